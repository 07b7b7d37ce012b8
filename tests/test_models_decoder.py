"""Decoder language model: golden logits, losses, gradients, counts, options, padding, steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden import golden_decoder_state
from torch.func import functional_call, grad, jvp, vmap

from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel, build_model
from lmfast.models.textbook import TextbookDecoder

# Printed with 9 or 10 digits. The rotation tables are fp32, which shows from the 11th digit on.
NINE, TEN = {"atol": 6e-10, "rtol": 0}, {"atol": 6e-11, "rtol": 0}
IDS, TARGETS = torch.arange(1, 7)[None], torch.arange(2, 8)[None]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def golden_model():
    model = DecoderLanguageModel(11, 8, 2, 2, 0).double()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict(golden_decoder_state(shapes))
    return model


def test_logits_golden(golden_model):
    logits = golden_model(IDS)[0]
    row1 = [
        0.202639161, 0.402831223, 0.413565467, 0.229793409, -0.062054079, -0.324716564,
        -0.434659776, -0.340175703, -0.085701681, 0.20907918, 0.405526836,
    ]  # fmt: skip
    row6 = [
        0.061137076, 0.084688491, 0.068409585, 0.019956582, -0.037882313, -0.077904564,
        -0.081287082, -0.046439015, 0.010250047, 0.062118351, 0.084771424,
    ]  # fmt: skip
    torch.testing.assert_close(logits[0], tensor(row1), **NINE)
    torch.testing.assert_close(logits[5], tensor(row6), **NINE)


def test_loss_and_gradient_norms_golden(golden_model):
    loss = golden_model.loss(IDS, TARGETS)
    torch.testing.assert_close(loss, tensor(2.3861269890), **TEN)
    torch.testing.assert_close(loss.exp(), tensor(10.8713076), atol=6e-8, rtol=0)
    loss.backward()
    attention = golden_model.layers[0].attn
    columns = dict(attention.part_views("W_QKV", attention.W_QKV.grad))
    named = dict(golden_model.named_parameters())
    expected = {
        "layers.0.norm1.scale": 0.1645509578,
        "layers.1.attn.W_O": 0.2752970994,
        "layers.1.mlp.B_1": 0.1040513437,
        "output": 1.017581497,
        "embedding.weight": 2.9698704783,
    }
    for name, value in expected.items():
        torch.testing.assert_close(named[name].grad.norm(), tensor(value), atol=6e-10, rtol=0)
    torch.testing.assert_close(columns["heads.0.W_Q"].norm(), tensor(0.0105811403), **TEN)
    assert golden_model.embedding.weight.grad[0].abs().sum() == 0


@pytest.mark.parametrize("ignore_index", [0, -100])
def test_loss_with_ignored_targets_golden(golden_model, ignore_index):
    targets = TARGETS.clone()
    targets[:, -2:] = ignore_index
    loss = golden_model.loss(IDS, targets, ignore_index=ignore_index)
    torch.testing.assert_close(loss, tensor(2.3431343178), **TEN)


def test_loss_with_every_target_ignored_is_zero_with_zero_gradients(golden_model):
    loss = golden_model.loss(IDS, torch.full_like(IDS, -100))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in golden_model.parameters())


@pytest.mark.parametrize(
    ("sizes", "options", "count"),
    [
        ((11, 8, 2, 2, 0), {}, 1_824),
        ((32_011, 128, 8, 2, 0), {}, 8_589_824),
        ((32_011, 128, 8, 2, 0), {"final_norm": True, "output_bias": True}, 8_621_963),
        ((32_011, 128, 8, 2, 0), {"tie_weights": True}, 8_589_824 - 32_011 * 128),
    ],
)
def test_parameter_counts(sizes, options, count):
    assert DecoderLanguageModel(*sizes, **options).num_parameters() == count


def test_state_dict_has_the_textbook_names_and_goes_both_ways():
    torch.manual_seed(0)
    ours, textbook = DecoderLanguageModel(23, 12, 3, 2, 0), TextbookDecoder(23, 12, 3, 2, 0)
    assert set(ours.state_dict()) == set(textbook.state_dict())
    ours.load_state_dict(textbook.state_dict())
    ids, targets = torch.randint(0, 23, (3, 9)), torch.randint(0, 23, (3, 9))
    # Two ways to sum in fp32: 2e-5 on values of order 1.
    torch.testing.assert_close(ours(ids), textbook(ids), atol=2e-5, rtol=0)
    expected = F.cross_entropy(textbook(ids).flatten(0, 1), targets.flatten(), ignore_index=0)
    torch.testing.assert_close(ours.loss(ids, targets, ignore_index=0), expected, atol=2e-5, rtol=0)
    again = TextbookDecoder(23, 12, 3, 2, 0)
    again.load_state_dict(ours.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), textbook.state_dict().values())
    )


def test_training_steps_equal_the_textbook():
    torch.manual_seed(0)
    ours, textbook = DecoderLanguageModel(23, 12, 3, 2, 0), TextbookDecoder(23, 12, 3, 2, 0)
    textbook.load_state_dict(ours.state_dict())
    first = torch.optim.AdamW(ours.parameters(), 1e-2, fused=True)
    second = torch.optim.AdamW(textbook.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        ids, targets = torch.randint(1, 23, (4, 9)), torch.randint(1, 23, (4, 9))
        a = ours.loss(ids, targets)
        b = F.cross_entropy(textbook(ids).flatten(0, 1), targets.flatten())
        for loss, optimizer in ((a, first), (b, second)):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        losses.append((a.item(), b.item()))
    # AdamW divides by the root of the second moment, which enlarges differences of single ulps.
    assert max(abs(a - b) for a, b in losses) < 2e-4
    assert losses[-1][0] != losses[0][0]


def test_padding_row_is_zero_and_stays_zero():
    for tie in (False, True):
        torch.manual_seed(0)
        model = DecoderLanguageModel(13, 8, 2, 1, 3, tie_weights=tie)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-1)
        for _ in range(3):
            optimizer.zero_grad()
            model.loss(torch.tensor([[1, 3, 2]]), torch.tensor([[3, 4, 5]])).backward()
            optimizer.step()
        assert model.embedding.weight[3].abs().sum() == 0
        assert model.embedding.weight[4].abs().sum() > 0


def test_tied_weights_gradient_is_the_sum_of_both_uses():
    torch.manual_seed(0)
    model = DecoderLanguageModel(13, 8, 2, 1, None, tie_weights=True).double()
    free = DecoderLanguageModel(13, 8, 2, 1, None).double()
    state = model.state_dict()
    free.load_state_dict({**state, "output": state["embedding.weight"].t()})
    ids, targets = torch.tensor([[1, 5, 2, 7]]), torch.tensor([[5, 2, 7, 8]])
    model.loss(ids, targets).backward()
    free.loss(ids, targets).backward()
    expected = free.embedding.weight.grad + free.output.grad.t()
    torch.testing.assert_close(model.embedding.weight.grad, expected, rtol=1e-12, atol=1e-14)


def test_tied_weights_inside_torch_func():
    torch.manual_seed(0)
    model = DecoderLanguageModel(11, 8, 2, 1, 0, tie_weights=True)
    ids, targets = torch.randint(1, 11, (2, 3, 5))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, ids, targets):
        logits = torch.func.functional_call(model, parameters, ids)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    found = torch.func.grad(loss)(parameters, ids, targets)
    expected = torch.autograd.grad(
        F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()), list(model.parameters())
    )
    for f, e in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(f, e)
    assert not found["embedding.weight"][0].any()
    rows = (None, 0, 0)
    each = torch.func.vmap(torch.func.grad(loss), rows)(parameters, ids[:, None], targets[:, None])
    for e, f in zip(each.values(), found.values(), strict=True):
        torch.testing.assert_close(e.mean(0), f)
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, ids, targets), (parameters,), (ones,))
    torch.testing.assert_close(slope, sum(f.sum() for f in found.values()), rtol=1e-4, atol=1e-5)


def test_options_are_what_they_say():
    torch.manual_seed(0)
    options = {"final_norm": True, "output_bias": True, "num_kv_heads": 1, "mlp_dim": 20}
    model = DecoderLanguageModel(17, 12, 3, 2, 0, **options)
    torch.nn.init.normal_(model.output_bias)
    ids = torch.randint(1, 17, (2, 5))
    x = model.embedding(ids)
    for layer in model.layers:
        x = layer(x)
    expected = model.norm(x) @ model.output + model.output_bias
    torch.testing.assert_close(model(ids), expected)
    clone = build_model(copy.deepcopy(model.config))
    clone.load_state_dict(model.state_dict())
    assert torch.equal(clone(ids), model(ids))


def test_left_padding_changes_nothing(golden_model):
    ids = torch.tensor([[0, 0, 0, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    logits = golden_model(ids, attention_mask=ids != 0)
    torch.testing.assert_close(logits[0, 3:], golden_model(ids[:1, 3:])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[1], golden_model(IDS)[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="attention_mask must have the shape of ids"):
        golden_model(ids, attention_mask=torch.ones(2, 5))


def test_left_padding_changes_nothing_in_a_window():
    torch.manual_seed(0)
    model = DecoderLanguageModel(13, 8, 2, 2, 0, windows=[2, None], qk_norm=True, rope_dim=2)
    model = model.double()
    ids = torch.tensor([[0, 0, 0, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    logits = model(ids, attention_mask=ids != 0)
    torch.testing.assert_close(logits[0, 3:], model(ids[:1, 3:])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[1], model(ids[1:])[0], rtol=0, atol=1e-12)
    wide = DecoderLanguageModel(13, 8, 2, 2, 0, qk_norm=True, rope_dim=2).double()
    wide.load_state_dict(model.state_dict())
    assert not torch.allclose(wide(ids[1:]), model(ids[1:]), atol=1e-6)
    with pytest.raises(ValueError, match="windows must have one entry for each of 2 blocks"):
        DecoderLanguageModel(13, 8, 2, 2, 0, windows=[2])


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 3, 1], [5, 1]])
def test_steps_give_the_logits_of_every_prefix(golden_model, chunks):
    full = golden_model(IDS)[0]
    state = golden_model.new_state(1)
    end = 0
    with torch.no_grad():
        for part in IDS.split(chunks, 1):
            logits, state = golden_model.step(part, state)
            end += part.shape[1]
            torch.testing.assert_close(logits[0], full[end - 1], rtol=0, atol=1e-12)


def test_ragged_steps_equal_single_rows(golden_model):
    rows = [[1, 2, 3, 4], [5], [6, 7, 8]]
    follow = [[9, 10], [3, 4], [2, 1]]
    padded = torch.tensor([row + [0] * (4 - len(row)) for row in rows])
    lengths = torch.tensor([4, 1, 3])
    with torch.no_grad():
        state = golden_model.new_state(3)
        logits, state = golden_model.step(padded, state, lengths)
        for row, ids in enumerate(rows):
            expected = golden_model(torch.tensor([ids]))[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-12)
        for i in range(2):
            logits, state = golden_model.step(torch.tensor([[f[i]] for f in follow]), state)
            for row, ids in enumerate(rows):
                expected = golden_model(torch.tensor([ids + follow[row][: i + 1]]))[0, -1]
                torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-12)
    assert state.lengths.tolist() == [6, 3, 5]


def test_sizes_and_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"pad_idx must be in 0\.\.10 or None, got 11"):
        DecoderLanguageModel(11, 8, 2, 2, 11)
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        DecoderLanguageModel(11, 8, 2, 0, 0)
    with pytest.raises(ValueError, match=r"head_dim must be even for rotary pairs.*, got 3"):
        DecoderLanguageModel(11, 6, 2, 1, 0)
    with pytest.raises(TypeError, match=r"ids must be a tensor \(B, T\) of ids, got list"):
        DecoderLanguageModel(11, 8, 2, 1, 0)([[1, 2]])
    with pytest.raises(TypeError, match=r"targets must be a tensor of ids, got list"):
        DecoderLanguageModel(11, 8, 2, 1, 0).loss(IDS, [[1, 2]])
    with pytest.raises(ValueError, match="targets must have the shape of ids"):
        DecoderLanguageModel(11, 8, 2, 1, 0).loss(IDS, TARGETS[:, :-1])
    with pytest.raises(ValueError, match=r"mlp must be one of relu, .*, geglu, got 'tanh'"):
        DecoderLanguageModel(11, 8, 2, 1, 0, mlp="tanh")
    model = DecoderLanguageModel(11, 8, 2, 1, 0)
    lengths = torch.zeros(len(IDS), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\..*, got values from 0 to 0"):
        model.step(IDS, model.new_state(len(IDS)), lengths)
    with pytest.raises(ValueError, match="unknown model 'mamba'; known: decoder, recurrent"):
        build_model({"model": "mamba"})
    with pytest.raises(ValueError, match="configuration of the decoder model is not valid"):
        build_model({"model": "decoder", "width": 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp64(golden_model, dtype):
    expected = golden_model(IDS)
    logits = golden_model.to(dtype)(IDS)
    assert logits.dtype == dtype
    # Two blocks of roundings to 8 bits, on logits up to 0.9: one operator alone stays below 2e-2.
    torch.testing.assert_close(logits.double(), expected, atol=3e-2, rtol=0)


def test_autocast_trains_and_generates_close_to_fp32():
    torch.manual_seed(0)
    model = DecoderLanguageModel(23, 16, 2, 2, 0)
    ids, targets = torch.randint(1, 23, (3, 9)), torch.randint(1, 23, (3, 9))
    expected = model.loss(ids, targets)
    expected_gradient = torch.autograd.grad(expected, model.output)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets)
        with torch.no_grad():
            logits, _ = model.step(ids, model.new_state(3))
    # bf16 has 8 bits: 4e-3 per product, on values of order 1.
    torch.testing.assert_close(loss.float(), expected, atol=2e-2, rtol=0)
    # Cached attention is computed in bf16 as well, from keys and values in the cache's fp32.
    torch.testing.assert_close(logits.float(), model(ids)[:, -1], atol=3e-2, rtol=0)
    gradient = torch.autograd.grad(loss, model.output)[0]
    assert gradient.dtype == torch.float32
    assert (gradient - expected_gradient).norm() < 2e-2 * expected_gradient.norm()


@pytest.mark.parametrize("tie", [False, True])
def test_loss_compiles_as_one_graph(tie):
    torch.manual_seed(0)
    model = DecoderLanguageModel(23, 16, 2, 2, 0, tie_weights=tie)
    ids, targets = torch.randint(1, 23, (3, 9)), torch.randint(1, 23, (3, 9))

    def loss():
        return model.loss(ids, targets)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(), list(model.parameters())) for f in (loss, compiled)]
    torch.testing.assert_close(compiled(), loss())
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [0, -1.0])
def test_a_logit_softcap_is_positive(softcap):
    with pytest.raises(ValueError, match="logit_softcap must be positive, got"):
        DecoderLanguageModel(20, 8, 2, 1, 0, logit_softcap=softcap)


def test_ids_have_two_dimensions():
    with pytest.raises(ValueError, match=r"ids must be \(B, T\), got \(3,\)"):
        DecoderLanguageModel(20, 8, 2, 1, 0)(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("kind", [DecoderLanguageModel, RecurrentLanguageModel])
def test_tied_weights_within_torch_func(kind):
    """Gradients, per row of a batch and along a direction, of a matrix whose row 3 is padding."""
    torch.manual_seed(0)
    sizes = (13, 8, 2, 1, 3) if kind is DecoderLanguageModel else (13, 8, 1, 3)
    model = kind(*sizes, tie_weights=True).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    ids = torch.randint(4, 13, (3, 6))

    def loss(weights, ids):
        return functional_call(model, weights, (ids,)).square().mean()

    model(ids).square().mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert not expected["embedding.weight"][3].any()
    close = {"rtol": 1e-10, "atol": 1e-13}  # fp64, sums in another order
    torch.testing.assert_close(grad(loss)(weights, ids), expected, **close)
    rows = vmap(grad(loss), (None, 0))(weights, ids[:, None])
    mean = {name: g.mean(0) for name, g in rows.items()}
    torch.testing.assert_close(mean, expected, **close)
    direction = {name: torch.randn_like(p) for name, p in weights.items()}
    slope = jvp(lambda w: loss(w, ids), (weights,), (direction,))[1]
    along = sum((g * direction[name]).sum() for name, g in expected.items())
    torch.testing.assert_close(slope, along, **close)
