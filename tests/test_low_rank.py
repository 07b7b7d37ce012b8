"""LoRA: the formula, every kind of layer, merging, files, training, and peft as the peer."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lmfast
from lmfast import ops
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel, Seq2Seq, Tagger
from lmfast.models.textbook import TextbookDecoder
from lmfast.nn import BahdanauAttention, MultiHeadAttention
from lmfast.training import CheckpointError, LoRA, PackedBatches, Trainer, load_model, lora
from lmfast.training.checkpoint import save_model


def decoder(**options: object) -> DecoderLanguageModel:
    torch.manual_seed(0)
    return DecoderLanguageModel(50, 32, 4, 2, 0, **options)  # type: ignore[arg-type]


def textbook() -> TextbookDecoder:
    torch.manual_seed(0)
    return TextbookDecoder(50, 32, 4, 2, 0)


def randomise(adapter: LoRA) -> LoRA:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return adapter


IDS = torch.arange(18).reshape(2, 9) % 49 + 1


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (decoder, None),
        (lambda: decoder(mlp="swiglu", num_kv_heads=2, qkv_bias=True, final_norm=True), None),
        (textbook, ["W_Q", "W_V", "W_1"]),
        (lambda: RecurrentLanguageModel(50, 16, 2, 0), ["Wh", "Uh"]),
        (lambda: nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50)), ["1"]),
    ],
    ids=["decoder", "llama style", "textbook", "recurrent", "linear"],
)
def test_every_kind_of_matrix(make, targets, tmp_path: Path) -> None:
    model = make()
    before, names = model(IDS), set(model.state_dict())
    adapter = lora(model, 4, 8, targets)
    # B is zero at first; the packed products may sum in another order.
    torch.testing.assert_close(model(IDS), before, rtol=1e-6, atol=1e-6)
    randomise(adapter)
    changed = model(IDS)
    assert (changed - before).abs().max() > 1e-3
    changed.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    own = {id(p) for p in adapter.parameters()}
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in own)
    torch.testing.assert_close(copy.deepcopy(model)(IDS), changed, rtol=0, atol=0)

    adapter.save(tmp_path)
    adapter.merge()
    # One product with W + s A B instead of two: fp32 roundings of sums of 32 terms.
    torch.testing.assert_close(model(IDS), changed, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    torch.testing.assert_close(model(IDS), changed, rtol=0, atol=0)
    assert adapter.remove() is model
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)
    assert set(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())

    loaded = LoRA.load(tmp_path, model)
    torch.testing.assert_close(model(IDS), changed, rtol=0, atol=0)
    loaded.remove(merge=True)
    torch.testing.assert_close(model(IDS), changed, rtol=1e-4, atol=1e-5)


OUTPUT_LAYERS = {
    "recurrent": (lambda: RecurrentLanguageModel(50, 16, 2, 0), (IDS,), IDS),
    "tagger": (lambda: Tagger(50, 50, emb_dim=8, hidden_dim=8), (IDS,), IDS),
    "seq2seq": (lambda: Seq2Seq(50, 50, emb_dim=8, hidden_dim=8), (IDS, IDS), None),
}


@pytest.mark.parametrize("name", list(OUTPUT_LAYERS))
def test_output_layers_whose_logits_are_not_stored(name: str) -> None:
    """Their losses read the matrix, where nothing is beside it."""
    make, inputs, targets = OUTPUT_LAYERS[name]
    model = make()
    plain = model(*inputs)
    adapter = randomise(lora(model, 4, 8, ["fc"]))
    logits = model(*inputs)
    assert (logits - plain).abs().max() > 1e-3
    loss = model.loss(*inputs) if targets is None else model.loss(*inputs, targets)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, list(adapter.parameters()))
    exact = torch.autograd.grad(expected, list(adapter.parameters()))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    adapter.merge()
    torch.testing.assert_close(model(*inputs), logits, rtol=1e-4, atol=1e-5)
    adapter.remove()
    torch.testing.assert_close(model(*inputs), plain, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_query_of_additive_attention(dropout: float) -> None:
    """Its matrix goes into the operator; with an update the layer is called."""
    layer = BahdanauAttention(5, 4, 6)
    query, source = torch.randn(2, 3, 5), torch.randn(2, 7, 4)
    plain, _ = layer(query, source)
    adapter = randomise(lora(layer, 2, 4, ["query"], dropout=dropout))
    found, _ = layer.eval()(query, source)
    updated = copy.deepcopy(layer)
    LoRA.of(updated).remove(merge=True)
    expected, _ = updated(query, source)
    assert (found - plain).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    layer.train()(query, source)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_output_layers_whose_matrix_cannot_be_read() -> None:
    model = RecurrentLanguageModel(50, 16, 2, 0)
    lora(model, 4, 8, ["fc"], dropout=0.5)
    with pytest.raises(ValueError, match=r"updates of the output layer must have no dropout"):
        model.head()
    weight, bias = model.eval().head()
    torch.testing.assert_close(model(IDS), model.hidden(IDS) @ weight.t() + bias)
    wrapped = RecurrentLanguageModel(50, 16, 2, 0)
    expected = wrapped.loss(IDS, IDS)
    wrapped.fc = nn.Sequential(wrapped.fc)
    torch.testing.assert_close(wrapped.loss(IDS, IDS), expected)  # it is called
    with pytest.raises(TypeError, match=r"the output layer must be a torch\.nn\.Linear"):
        wrapped.head()


def test_a_layer_whose_matrix_is_the_embedding_has_no_updates() -> None:
    model = RecurrentLanguageModel(50, 16, 2, 0, tie_weights=True)
    assert not any("fc" in name for name, _ in lora(model, 4, 8, ["Wh"]).named_parameters())


def test_packed_projection_equals_updated_matrices() -> None:
    attention = MultiHeadAttention(32, 4, num_kv_heads=2)
    x = torch.randn(2, 7, 32)
    adapter = randomise(lora(attention, 3, 6, ["W_Q", "W_V"]))
    factors = dict(adapter.named_parameters())
    updated = copy.deepcopy(attention)
    LoRA.of(updated).remove()
    with torch.no_grad():
        updated.W_QKV[:, :32] += 2 * factors["W_Q.A"] @ factors["W_Q.B"]
        updated.W_QKV[:, 48:] += 2 * factors["W_V.A"] @ factors["W_V.B"]
    torch.testing.assert_close(attention(x), updated(x), rtol=1e-4, atol=1e-5)


def test_model_files_keep_updates(tmp_path: Path) -> None:
    model = decoder()
    randomise(lora(model, 2, 4, ["W_O", "W_1"]))
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=0, atol=0)
    assert str(LoRA.of(loaded)) == str(LoRA.of(model))
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=0)


def test_trains_and_resumes(tmp_path: Path) -> None:
    def run(steps: int, resume: bool) -> tuple[DecoderLanguageModel, Trainer]:
        model = decoder()
        lora(model, 4, 8)
        batches = PackedBatches(torch.arange(1, 400) % 49 + 1, 4, context=8)
        where = tmp_path / "whole" if not resume and steps == 6 else tmp_path / "parts"
        trainer = Trainer(
            model,
            batches,
            max_steps=steps,
            save_every=3,
            output_dir=where,
            learning_rate=1e-2,
            progress=False,
        )
        if resume:
            trainer.resume()
        trainer.fit()
        return model, trainer

    frozen = decoder().state_dict()
    whole, trainer = run(6, False)
    run(3, False)
    parts, _ = run(6, True)
    torch.testing.assert_close(parts(IDS), whole(IDS), rtol=0, atol=0)
    assert trainer.report.losses[-1] < trainer.report.losses[0]
    assert all(torch.equal(v, frozen[k]) for k, v in whole.state_dict().items() if k in frozen)


def test_compiles_in_one_graph() -> None:
    layer = MultiHeadAttention(32, 4)
    randomise(lora(layer, 2, 4))
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_files_of_peft_both_ways(style: str, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from lmfast.integrations.peft_format import load_peft, save_peft

    torch.manual_seed(0)
    if style == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        targets = ["q_proj", "v_proj", "down_proj"]
    else:
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)
        targets = ["c_attn", "mlp.c_proj"]
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        fan_in_fan_out=style == "gpt2",
        alpha_pattern={"v_proj": 3} if style == "llama" else {},
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = theirs(IDS, labels=IDS)
    expected.loss.backward()
    theirs.save_pretrained(tmp_path / "theirs")

    ours = copy.deepcopy(base)
    adapter = load_peft(tmp_path / "theirs", ours)
    found = ours(IDS, labels=IDS)
    # The same products, the update added in place: a few fp32 roundings.
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in adapter.named_parameters():
        layer, _, factor = name.rpartition(".")
        wanted = gradients[f"base_model.model.{layer}.lora_{factor}.default.weight"].t()
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(ours)(IDS).logits, found.logits, rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(IDS).logits, found.logits)

    save_peft(adapter, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(back(IDS).logits, expected.logits, rtol=1e-5, atol=1e-5)
    adapter.remove()
    torch.testing.assert_close(ours(IDS).logits, base(IDS).logits, rtol=0, atol=0)
    assert type(ours.get_submodule(next(iter(adapter_layers(ours, targets))))) in (
        nn.Linear,
        transformers.pytorch_utils.Conv1D,
    )


def test_files_of_peft_that_hold_or_change_the_models_own_matrices(tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from lmfast.integrations.peft_format import load_peft

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()

    def saved(name: str, **options: object) -> Tensor:
        settings = peft.LoraConfig(r=2, **options)
        theirs = peft.get_peft_model(copy.deepcopy(base), settings).eval()
        for parameter_name, parameter in theirs.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
        theirs.save_pretrained(tmp_path / name)
        return theirs(IDS).logits

    # Of a head, peft keeps the matrix itself too.
    for name, options in {
        "head": {"target_modules": ["lm_head"]},
        "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    }.items():
        expected, ours = saved(name, **options), copy.deepcopy(base)
        load_peft(tmp_path / name, ours)
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    other = copy.deepcopy(base)
    nn.init.normal_(other.lm_head.weight)
    with pytest.raises(CheckpointError, match="holds the matrix lm_head of the model it was tr"):
        load_peft(tmp_path / "head", other)
    saved("pissa", target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(CheckpointError, match="init_lora_weights = 'pissa' changed the model's"):
        load_peft(tmp_path / "pissa", copy.deepcopy(base))


def adapter_layers(model: nn.Module, targets: list[str]) -> list[str]:
    return [n for n, _ in model.named_modules() if any(n.endswith(t) for t in targets)]


def test_default_targets_of_transformers_leave_the_head() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = set(lora(model, 2).updates())
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.0.{kind}" for kind in kinds}


def test_dropout_of_the_update_only() -> None:
    layer = nn.Linear(64, 16)
    adapter = randomise(lora(nn.Sequential(layer), 8, 8, dropout=0.25))
    x = torch.randn(4000, 64)
    layer.eval()
    plain, kept = nn.functional.linear(x, layer.weight, layer.bias), layer(x)
    layer.train()
    noise = layer(x) - kept
    # The mean over dropouts is the output without; its own spread gives the tolerance.
    assert noise.std() > 0.01
    assert (noise.mean(0).abs() < 5 * noise.std(0) / math.sqrt(len(x))).all()
    assert (kept - plain).abs().max() > 0.01
    assert adapter.dropout == 0.25


def test_messages(tmp_path: Path) -> None:
    model = decoder()
    with pytest.raises(ValueError, match=r"'q_proj' names nothing in the model; it has .*W_Q"):
        lora(model, 4, targets=["q_proj"])
    with pytest.raises(ValueError, match=r"names layers.0.norm1, a RMSNorm"):
        lora(model, 4, targets=["norm1"])
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got 0"):
        lora(model, 0)
    with pytest.raises(TypeError, match="targets must be a list of names"):
        lora(model, 4, targets="W_Q")
    with pytest.raises(ValueError, match="dropout must be 0 for a bare parameter"):
        lora(textbook(), 4, targets=["W_Q"], dropout=0.1)
    with pytest.raises(ValueError, match="no low-rank updates"):
        LoRA.of(model)
    adapter = lora(model, 4)
    with pytest.raises(ValueError, match="has low-rank updates already"):
        lora(model, 4)
    adapter.save(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        LoRA.load(tmp_path, RecurrentLanguageModel(50, 16, 1, 0))
    with pytest.raises(CheckpointError, match="is no adapter directory"):
        LoRA.load(tmp_path / "absent", model)
    with pytest.raises(ValueError, match=r"b must be \(R, N\) = \(2, 3\), got \(2, 4\)"):
        ops.lora_linear(torch.ones(1, 5), torch.ones(3, 5), torch.ones(5, 2), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("make", "targets"),
    [(decoder, None), (textbook, ["W_Q", "W_V", "W_1"]), (lambda: nn.Linear(9, 9), None)],
    ids=["decoder", "textbook", "linear"],
)
def test_updates_on_a_patched_model(make, targets) -> None:
    plain = make()
    classes = [type(m) for m in plain.modules()]
    x = IDS if classes[0] is not nn.Linear else torch.randn(2, 9)
    updated = copy.deepcopy(plain)
    randomise(lora(updated, 4, 8, targets))
    expected = updated(x)
    model = copy.deepcopy(plain)
    lmfast.patch(model)
    adapter = randomise(lora(model, 4, 8, targets))
    # Other orders of sums: fp32 roundings through two layers.
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)
    lmfast.patch(model)
    lmfast.unpatch(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    adapter.remove()
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
