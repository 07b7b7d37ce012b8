"""llama.cpp and CTranslate2 on the models of bench_generate.py, from the same random weights.

Each is left out where its package is missing (`llama-cpp-python` with `gguf`; `ctranslate2`). Their
files, 1.2 GB of the 160M model, are kept in the folder for temporary files, so that only the first
run writes them, which takes longer than measuring. What is in fp32 must give the engine's first
tokens: `bench_generate.py` checks it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

Peers = dict[str, Any]
EXACT = ("llama_cpp", "ctranslate2")  # in fp32, as the model is


def peers(model: Any, capacity: int) -> Peers:
    """What there is, by the name of its column; each has ``generate(ids, new)``.

    Args:
        model: GPT-2 or Llama of transformers, float32.
        capacity: tokens of all rows together at most.
    """
    return {**_llama_cpp(model, capacity), **_ctranslate2(model)}


def _kept(model: Any, package: str, name: str, write: Callable[[Path], None]) -> Path:
    """What ``write`` makes of the model at a path, or made there before."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{model.config.to_json_string()} {version(package)}".encode())
    digest.update(model.get_input_embeddings().weight[:64].detach().numpy().tobytes())
    folder = Path(tempfile.gettempdir()) / f"lmfast-generation-peers-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{digest.hexdigest()[:16]}-{name}"
    if not path.exists():
        part = folder / f"{path.name}.{os.getpid()}"
        write(part)
        part.rename(path)
    return path


# CTranslate2


def _ctranslate2(model: Any) -> Peers:
    try:
        import ctranslate2
    except ImportError:
        return {}
    import tokenizers

    def convert(path: Path) -> None:
        source = path.with_suffix(".transformers")
        model.save_pretrained(source)
        names = {f"t{i}": i for i in range(model.config.vocab_size)}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, "t0"))
        ends = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "t0")
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(source)
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(path))
        shutil.rmtree(source)

    made = _kept(model, "ctranslate2", "ct2", convert)

    def load(kind: str) -> Any:
        threads = torch.get_num_threads()
        return ctranslate2.Generator(str(made), "cpu", compute_type=kind, intra_threads=threads)

    return {
        "ctranslate2": CTranslate2(load("float32")),
        "ctranslate2_int8": CTranslate2(load("int8")),
    }


class CTranslate2:
    """A converted model."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def generate(self, ids: torch.Tensor, new: int) -> list[list[int]]:
        """The likeliest `new` ids after ids (B, T)."""
        results = self._generator.generate_batch(
            [[f"t{i}" for i in row] for row in ids.tolist()],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            max_batch_size=len(ids),
        )
        return [result.sequences_ids[0] for result in results]


# llama.cpp

# Column, type of matrices, of the output layer and embeddings, of keys and values.
_KINDS = (
    ("llama_cpp", "F32", "F32", "F32"),
    ("llama_cpp_bf16", "BF16", "BF16", "F16"),
    ("llama_cpp_q8_0", "Q8_0", "Q8_0", "F16"),
    ("llama_cpp_q4_0", "Q4_0", "Q8_0", "F16"),
)


def _llama_cpp(model: Any, capacity: int) -> Peers:
    try:
        import gguf
        import llama_cpp
    except ImportError:
        return {}
    found: Peers = {}
    for name, inner, outer, cache in _KINDS:
        types = [gguf.GGMLQuantizationType[kind] for kind in (inner, outer, cache)]
        write = functools.partial(_write_gguf, model, inner=types[0], outer=types[1])
        path = _kept(model, "gguf", f"{inner}.gguf", write)
        found[name] = LlamaCpp(llama_cpp, path, capacity, types[2])
    return found


class LlamaCpp:
    """A loaded file and a context of it."""

    def __init__(self, library: Any, path: Path, capacity: int, cache: int) -> None:
        self._lib = library
        self._quiet = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self._quiet, ctypes.c_void_p())
        options = library.llama_model_default_params()
        options.use_mmap = False
        self._model = library.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        context = library.llama_context_default_params()
        context.n_ctx, context.n_seq_max, context.kv_unified = capacity, 8, True
        context.n_batch = context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        context.type_k = context.type_v = cache
        self._context = library.llama_init_from_model(self._model, context)
        self._memory = library.llama_get_memory(self._context)
        self._vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._batch = library.llama_batch_init(512, 0, 1)

    def __del__(self) -> None:
        if getattr(self, "_batch", None) is not None:
            self._lib.llama_batch_free(self._batch)
        if getattr(self, "_context", None):
            self._lib.llama_free(self._context)
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)

    def generate(self, ids: torch.Tensor, new: int) -> list[list[int]]:
        """The likeliest `new` ids after ids (B, T)."""
        return self.extend(self.prefill(ids), ids.shape[1], new)

    def prefill(self, ids: torch.Tensor) -> list[int]:
        """Forget everything, read ids (B, T); the likeliest next ones."""
        self._lib.llama_memory_clear(self._memory, True)
        length = ids.shape[1]
        found = []
        size = 512 // len(ids)
        for first in range(0, length, size):
            past = min(first + size, length)
            rows = ids[:, first:past].tolist()
            found = self._decode(
                [
                    (token, first + t, row, first + t + 1 == length)
                    for row, tokens in enumerate(rows)
                    for t, token in enumerate(tokens)
                ]
            )
        return found

    def extend(self, now: list[int], position: int, new: int) -> list[list[int]]:
        """`now` and what follows: `new` ids of every row, the first at `position`."""
        out = [now]
        for step in range(new - 1):
            at = position + step
            now = self._decode([(token, at, row, True) for row, token in enumerate(now)])
            out.append(now)
        return [list(row) for row in zip(*out, strict=True)]

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every row."""
        self._lib.llama_memory_seq_rm(self._memory, -1, length, -1)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Of (id, position, row, whether the next is wanted): the likeliest next ones."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if self._lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        found = []
        for i, token in enumerate(tokens):
            if token[3]:
                logits = self._lib.llama_get_logits_ith(self._context, i)
                found.append(int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax()))
        return found


def _write_gguf(model: Any, path: Path, inner: Any, outer: Any) -> None:
    """A GGUF file of the model, matrices as `inner`, output layer and embeddings as `outer`."""
    import gguf

    config = model.config
    kind = config.model_type
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if kind == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        tensors = _gpt2_tensors(model)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        tensors = _llama_tensors(model)
    for name, tensor in tensors.items():
        data = tensor.detach().float().contiguous().numpy()
        if data.ndim == 1 or name.startswith("position"):
            stored = gguf.GGMLQuantizationType.F32
        else:
            stored = outer if name.startswith(("token", "output.")) else inner
        writer.add_tensor(name, gguf.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gpt2_tensors(model: Any) -> dict[str, torch.Tensor]:
    base = model.transformer
    found = {
        "token_embd.weight": base.wte.weight,
        "position_embd.weight": base.wpe.weight,
        "output_norm.weight": base.ln_f.weight,
        "output_norm.bias": base.ln_f.bias,
    }
    for i, block in enumerate(base.h):
        parts = {
            "attn_norm": block.ln_1,
            "attn_qkv": block.attn.c_attn,
            "attn_output": block.attn.c_proj,
            "ffn_norm": block.ln_2,
            "ffn_up": block.mlp.c_fc,
            "ffn_down": block.mlp.c_proj,
        }
        for name, module in parts.items():
            weight = module.weight
            found[f"blk.{i}.{name}.weight"] = weight if weight.ndim == 1 else weight.t()
            found[f"blk.{i}.{name}.bias"] = module.bias
    return found


def _llama_tensors(model: Any) -> dict[str, torch.Tensor]:
    base, config = model.model, model.config
    found = {
        "token_embd.weight": base.embed_tokens.weight,
        "output_norm.weight": base.norm.weight,
        "output.weight": model.lm_head.weight,
    }

    def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """Rows such that what is rotated together, half a head apart, lies together."""
        halves = weight.view(heads, 2, -1, weight.shape[1])
        return halves.transpose(1, 2).reshape(weight.shape)

    for i, block in enumerate(base.layers):
        a, mlp = block.self_attn, block.mlp
        parts = {
            "attn_norm": block.input_layernorm.weight,
            "attn_q": neighbours(a.q_proj.weight, config.num_attention_heads),
            "attn_k": neighbours(a.k_proj.weight, config.num_key_value_heads),
            "attn_v": a.v_proj.weight,
            "attn_output": a.o_proj.weight,
            "ffn_norm": block.post_attention_layernorm.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
        }
        found.update({f"blk.{i}.{name}.weight": weight for name, weight in parts.items()})
    return found
