"""Weights as integers: exact products, rounding, calibration, files; and prompts in bf16."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import OPTIONS, V, ids_of, model_of

import lmfast
from lmfast import Generator, QuantisedWeights, quantise
from lmfast.generation.engine import CannotPack, make_engine
from lmfast.generation.engine.make import plan_of
from lmfast.generation.engine.plan_forward import PlanForward
from lmfast.generation.prefill import prefill
from lmfast.generation.prompts import check_prompts
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel
from lmfast.ops._rounding import quantise_groups, quantise_rows

pytestmark = pytest.mark.usefixtures("needs_cpu_kernels")

KINDS = [("int8", None), ("int8", 32), ("int8", 128), ("int4", None), ("int4", 64)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The operators of models this small are faster alone, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def as_rounded(model: DecoderLanguageModel, weights: str, group: int | None) -> torch.nn.Module:
    """The float64 model whose weights are what the integers stand for."""
    exact = DecoderLanguageModel(**model.options).double()
    exact.load_state_dict(model.state_dict())

    def rounded(matrix: torch.Tensor, transposed: bool, last: bool) -> None:
        w = (matrix.t() if transposed else matrix).float()
        if weights == "int4" and not last:
            q = quantise_groups(w, group or 32)
        elif group is not None and weights == "int8" and transposed:
            q = quantise_groups(w, group, 8)
        else:
            q = quantise_rows(w)
        whole = q.dequantised()[:, : w.shape[1]].double()
        matrix.copy_(whole.t() if transposed else whole)

    with torch.no_grad():
        for layer in exact.layers:
            for matrix in (layer.attn.W_QKV, layer.attn.W_O, layer.mlp.W_GU, layer.mlp.W_D):
                rounded(matrix, True, False)
        rounded(exact.output, True, True)
        rounded(exact.embedding.weight, False, True)
    return exact


@pytest.mark.parametrize(("weights", "group"), KINDS)
def test_integer_products_are_exact(weights: str, group: int | None, cpu_isa: str) -> None:
    """The engine equals the float64 model whose weights are what the integers stand for."""
    model = model_of(OPTIONS["llama"], 64)
    with torch.no_grad():
        expected = as_rounded(model, weights, group)(ids_of(2, 9))
    runner = make_engine(model, weights, group=group, cache_dtype=torch.float32)
    found, _ = runner.step(ids_of(2, 9), runner.new_state(2), all_positions=True)
    # A row of x is rounded to steps of 1/32639 of its largest number: in a product of 64 terms that
    # is 3e-5 of their rms, through nine products one after the other 1e-4. The rounding of the
    # weights themselves is 0.05.
    assert (found - expected).square().mean().sqrt() < 2e-4
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("weights", "group"), [("bf16", None), *KINDS])
@pytest.mark.parametrize("width", [48, 64])
def test_prompts_are_rounded_to_bf16_at_most(
    weights: str, group: int | None, width: int, cpu_isa: str
) -> None:
    """Of a hundred rows at a time products may be of bf16: as exact as those are."""
    model = model_of(OPTIONS["llama"], width)
    ids = ids_of(2, 53)
    if weights == "bf16":
        exact = DecoderLanguageModel(**model.options).double()
        exact.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
        for name, p in exact.named_parameters():  # norms stay in float32
            if p.ndim == 1:
                p.data.copy_(model.get_parameter(name))
    else:
        exact = as_rounded(model, weights, group)
    with torch.no_grad():
        expected = exact(ids)
    runner = make_engine(model, weights, group=group, cache_dtype=torch.float32)
    found, state = runner.step(ids, runner.new_state(2), all_positions=True)
    error = (found - expected).square().mean().sqrt() / expected.std()
    # Rounding to 8 bits is off by 2^-9 / sqrt(3) = 1.1e-3 of a number, rms. Nine products of rows
    # rounded so, one after the other and partly added up, and of weights with groups rounded too.
    assert error < 0.012
    # The tokens after it are multiplied as ever.
    one = ids_of(2, 1, 5)
    with torch.no_grad():
        expected = exact(torch.cat((ids, one), 1))[:, -1]
    after, _ = runner.step(one, state)
    assert (after - expected).square().mean().sqrt() / expected.std() < 0.012


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_rows_are_rounded_alone_as_in_a_batch(weights: str, cpu_isa: str) -> None:
    """A prompt's own length decides, and steps behind it are never rounded."""
    runner = make_engine(model_of(OPTIONS["llama"], 64), weights, cache_dtype=torch.float32)
    lengths = torch.tensor([5, 40, 31, 32, 12, 63])
    ids = ids_of(6, 63)
    # Attention may take rows one by one or in blocks, and what differs in the last bit may become
    # another one of the 65,279 steps of an operand: 3e-4; rounding to bf16 is off by 0.04.
    close = {"rtol": 0, "atol": 1e-3}
    together, state = runner.step(ids, runner.new_state(6), lengths)
    everywhere, _ = runner.step(ids, runner.new_state(6), lengths, all_positions=True)
    after, _ = runner.step(ids_of(6, 10, 3), state, all_positions=True)  # 60 tokens
    for row, n in enumerate(lengths.tolist()):
        alone, own = runner.step(ids[row : row + 1, :n], runner.new_state(1))
        torch.testing.assert_close(together[row], alone[0], **close)
        positions, _ = runner.step(ids[row : row + 1, :n], runner.new_state(1), all_positions=True)
        torch.testing.assert_close(everywhere[row, :n], positions[0], **close)
        assert not everywhere[row, n:].any()
        for step, token in enumerate(ids_of(6, 10, 3)[row]):
            one, own = runner.step(token.view(1, 1), own)
            torch.testing.assert_close(after[row, step], one[0], **close)


@pytest.mark.parametrize("chunk", [None, 64])
def test_prompts_that_begin_alike_are_rounded_as_each_alone(chunk: int | None) -> None:
    runner = make_engine(model_of(OPTIONS["llama"], 64), "bf16", cache_dtype=torch.float32)
    ids = ids_of(1, 130).repeat(3, 1)
    ids[1, 90:], ids[2, 129] = ids_of(1, 40, 1)[0], 7
    found, _ = prefill(runner, check_prompts(ids, None, V), 140, chunk)
    for row in range(3):
        alone, _ = prefill(runner, check_prompts(ids[row : row + 1], None, V), 140, chunk)
        torch.testing.assert_close(found[row], alone[0], rtol=0, atol=1e-3)  # as above


@pytest.mark.parametrize("name", OPTIONS)
def test_a_plan_in_plain_pytorch_is_the_model(name: str) -> None:
    model = model_of(OPTIONS[name])
    texts = [ids_of(1, 17)[0], ids_of(1, 30, 1)[0], ids_of(1, 1, 2)[0]]
    with torch.no_grad():
        found = PlanForward(plan_of(model), texts).logits()
        expected = torch.cat([model(t[None])[0] for t in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("weights", "group"), [("int8", None), ("int4", None), ("int4", 64)])
def test_calibration_changes_products_less(weights: str, group: int | None) -> None:
    """On other texts of the same kind, and layer by layer as well as at the end."""
    model = model_of({**OPTIONS["llama"], "mlp_dim": 160}, 64)
    # Rows that have much in common, as those of language models: few kinds of token occur.
    kinds = torch.tensor([3, 8, 20, 33, 47, 60, 71, 90])
    texts = [kinds[torch.randint(0, 8, (200,))] for _ in range(6)]
    plan = plan_of(model)
    with torch.no_grad():
        expected = PlanForward(plan, texts[4:]).logits()
    errors = {}
    for how, given in (("nearest", None), ("calibrated", texts[:4])):
        weighed = quantise(model, weights, group=group, texts=given)
        # The output layer is rounded the same way in both.
        weighed = replace(weighed, matrices={**weighed.matrices})
        with torch.no_grad():
            found = PlanForward(weighed.into(plan), texts[4:]).logits()
        errors[how] = float((found - expected).square().mean())
    # In squares; 0.2 to 0.5 for other seeds, with int8 the output layer's rounding is in both.
    assert errors["calibrated"] < 0.8 * errors["nearest"]


def test_files_and_generators_of_quantised_weights(tmp_path: Path) -> None:
    model = model_of(OPTIONS["llama"])
    ids = ids_of(2, 8)
    for weights, group in KINDS:
        made = quantise(model, weights, group=group)
        path = tmp_path / f"{weights}-{group}.safetensors"
        made.save(path)
        loaded = QuantisedWeights.load(path)
        assert (loaded.kind, loaded.group) == (made.kind, made.group)
        assert loaded.matrices.keys() == made.matrices.keys()
        for name, q in made.matrices.items():
            other = loaded.matrices[name]
            assert torch.equal(other.codes, q.codes)
            assert torch.equal(other.scales, q.scales)
        assert path.stat().st_size < made.memory() + 8192  # names and shapes
        plain = Generator(model, weights=weights, group=group)
        given = Generator(model, weights=loaded)
        expected = plain.generate(ids, max_new_tokens=20)
        assert torch.equal(given.generate(ids, max_new_tokens=20), expected)
        assert given.weights == weights


def test_of_tied_and_other_families(tmp_path: Path) -> None:
    model = model_of(OPTIONS["gemma"])
    weights = quantise(model, "int4", texts=[ids_of(1, 40)[0]])
    assert "embedding" not in weights.matrices
    weights.save(tmp_path / "a.safetensors")
    loaded = QuantisedWeights.load(tmp_path / "a.safetensors")
    a = Generator(model, weights=weights).generate(ids_of(1, 5), max_new_tokens=9)
    assert torch.equal(Generator(model, weights=loaded).generate(ids_of(1, 5), max_new_tokens=9), a)
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=V, n_positions=64)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    weights = quantise(gpt2, "int8", texts=[ids_of(1, 40)])
    expected = gpt2(ids_of(2, 7)).logits[:, -1]
    found, _ = Generator(gpt2, weights=weights).step(
        ids_of(2, 7), make_engine(gpt2, weights).new_state(2)
    )
    assert (found - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_memory_is_halved_and_quartered_and_the_model_may_go() -> None:
    model = model_of({**OPTIONS["llama"], "mlp_dim": 512}, 256)
    sizes = {}
    for weights in ("fp32", "bf16", "int8", "int4"):
        generator = Generator(model, weights=weights)
        sizes[weights] = generator.memory()
    # Norms stay in float32; int8 has a scale per row, int4 one of 16 bits for 32 numbers, and its
    # output layer and embeddings are int8.
    assert sizes["bf16"] < 0.51 * sizes["fp32"]
    assert sizes["int8"] < 0.27 * sizes["fp32"]
    assert sizes["int4"] < 0.17 * sizes["fp32"]
    gone = weakref.ref(model)
    expected = generator.generate(ids_of(1, 5), max_new_tokens=4)
    del model
    gc.collect()
    assert gone() is None
    assert torch.equal(generator.generate(ids_of(1, 5), max_new_tokens=4), expected)


def test_texts_are_strings_with_a_tokenizer() -> None:
    tokenizer = lmfast.BPETokenizer.train(["some words to learn from"], 280)
    model = DecoderLanguageModel(tokenizer.vocab_size, 32, 2, 1, 0)
    text = "words to learn"
    a = quantise(model, "int4", texts=[text], tokenizer=tokenizer)
    b = quantise(model, "int4", texts=[torch.tensor(tokenizer.encode(text))])
    for name, q in a.matrices.items():
        assert torch.equal(q.codes, b.matrices[name].codes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "bf16"}, ValueError, r'weights must be "int8" or "int4", got \'bf16\''),
        ({"group": 48}, ValueError, r"group must be one of 32, 64, 128, got 48"),
        ({"texts": "abc"}, ValueError, r"texts must be a list of at least one text, got 'abc'"),
        ({"texts": []}, ValueError, r"texts must be a list of at least one text, got \[\]"),
        ({"texts": ["abc"]}, ValueError, r"tokenizer must be given"),
        ({"texts": [torch.ones(3)]}, TypeError, r"texts must be strings or int64 tensors"),
        ({"texts": [torch.ones(0).long()]}, ValueError, r"they are all empty"),
        ({"texts": [torch.tensor([V])]}, ValueError, r"ids in 0..100, got 101"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantise(model_of({}), **options)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = quantise(model_of(OPTIONS["llama"]))
    with pytest.raises(CannotPack, match=r"layers.0.q of the quantised weights is \(48, 48\)"):
        make_engine(model_of(OPTIONS["llama"], 64), weights)
    with pytest.raises(
        CannotPack, match=r"quantised weights have layers.0.gate, the model has not"
    ):
        make_engine(model_of({"mlp": "silu", "mlp_dim": 72, "num_kv_heads": 2}), weights)
    with pytest.raises(ValueError, match=r"weights must be 'fp32' for this model, got quantised"):
        Generator(lmfast.models.RecurrentLanguageModel(50, 16, 1, 0), weights=weights)
    with pytest.raises(
        ValueError, match=r'group goes with weights "int8" and "int4", got \'fp32\''
    ):
        Generator(model_of({}), group=32)
    with pytest.raises(ValueError, match=r"leave it out"):
        Generator(model_of(OPTIONS["llama"]), weights=weights, group=32)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"must be a safetensors file"):
        QuantisedWeights.load(other)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, other)
    with pytest.raises(ValueError, match=r"must be a file of QuantisedWeights.save"):
        QuantisedWeights.load(other)
    with pytest.raises(CannotPack, match=r"a Linear is not a model the engine knows"):
        quantise(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_matrix_without_rows(bits: int) -> None:
    codes, scales = lmfast.ops.quantise_weight(torch.empty(0, 64), bits)
    assert codes.shape == (0, 64 * bits // 8)
    x, bias = torch.ones(3, 64, requires_grad=True), torch.empty(0, requires_grad=True)
    y = lmfast.ops.quantised_linear(x, codes, scales, bias)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert y.shape == (3, 0)
    assert dbias.shape == (0,)
    assert torch.equal(dx, torch.zeros(3, 64))


@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("int8", 32), ("int4", None)])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_rounded(kind, group, number):
    model = RecurrentLanguageModel(40, 32, 1, 0)
    model.rnn.rnn_units[0].Uh.data[3, 4] = number
    with pytest.raises(ValueError, match="weights must be finite to be rounded to integers"):
        quantise(model, kind, group=group)
    with pytest.raises(ValueError, match="weights must be finite to be rounded to integers"):
        Generator(model, weights=kind, group=group)


def test_files_that_cannot_be_are_named(tmp_path):
    weights = quantise(RecurrentLanguageModel(40, 32, 1, 0))
    with pytest.raises(OSError, match=r"cannot write .*nowhere"):
        weights.save(tmp_path / "nowhere" / "weights.safetensors")
    with pytest.raises(IsADirectoryError, match="is a directory, and must be a file"):
        QuantisedWeights.load(tmp_path)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        quantise(3)
