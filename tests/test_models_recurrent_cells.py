"""Recurrent models over every cell, the tagger, minimal cells, and the oracle of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmfast.models import RecurrentLanguageModel, Tagger, build_model
from lmfast.models.textbook_character import CharacterWeights, character_step, character_weights
from lmfast.nn import MinGRU, MinLSTM
from lmfast.nn.stack import CELLS
from lmfast.ops import linear_recurrence

EVERY_CELL = pytest.mark.parametrize("cell", CELLS)


def model(cell: str, **options) -> RecurrentLanguageModel:
    torch.manual_seed(0)
    return RecurrentLanguageModel(19, 6, 2, 0, cell=cell, **options)


@EVERY_CELL
@pytest.mark.parametrize("tie_weights", [False, True])
def test_steps_chunks_and_ragged_rows_are_the_whole(cell: str, tie_weights: bool) -> None:
    m = model(cell, tie_weights=tie_weights).double()
    ids = torch.randint(1, 19, (2, 7))
    full = m(ids)
    for chunks in ([7], [1] * 7, [3, 4]):
        state, end = m.new_state(2), 0
        for part in ids.split(chunks, 1):
            logits, state = m.step(part, state)
            end += part.shape[1]
            torch.testing.assert_close(logits, full[:, end - 1], rtol=1e-10, atol=1e-12)
    ragged = ids.clone()
    ragged[1, 3:] = 0
    _, state = m.step(ragged, m.new_state(2), torch.tensor([7, 3]))
    after, _ = m.step(torch.tensor([[4], [5]]), state)
    for row, length in enumerate((7, 3)):
        text = torch.cat((ids[row, :length], torch.tensor([4 + row])))[None]
        torch.testing.assert_close(after[row], m(text)[0, -1], rtol=1e-10, atol=1e-12)


@EVERY_CELL
def test_names_what_does_not_fit(cell: str) -> None:
    m = model(cell)
    ids, state = torch.ones(2, 3, dtype=torch.int64), m.new_state(2)
    with pytest.raises(ValueError, match=r"ids must be \(B, T\), got \(3,\)"):
        m(ids[0])
    for lengths in ([0, 3], [3, 4]):
        with pytest.raises(ValueError, match=r"lengths must be in 1\.\.3, got values from"):
            m.step(ids, state, torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"lengths must be \(2,\), got \(1,\)"):
        m.step(ids, state, torch.tensor([3]))


@EVERY_CELL
def test_truncated_bptt_of_the_whole_length_is_bptt(cell: str) -> None:
    """Chunks with the state carried on equal one pass; detached, they miss what lies before."""
    m = model(cell).double()
    ids, targets = torch.randint(1, 19, (2, 12)), torch.randint(1, 19, (2, 12))

    def gradients(chunk: int, detach: bool) -> list[Tensor]:
        m.zero_grad()
        state, weight_bias = m.new_state(2), m.head()
        for part, wanted in zip(ids.split(chunk, 1), targets.split(chunk, 1)):
            features, state = m.advance(part, state)
            logits = torch.nn.functional.linear(features, *weight_bias)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), reduction="sum"
            )
            loss.backward(retain_graph=not detach)
            state = state.detach() if detach else state
        return [p.grad.clone() for p in m.parameters()]

    (m.loss(ids, targets) * ids.numel()).backward()
    whole = [p.grad.clone() for p in m.parameters()]
    for chunk, detach in ((12, True), (5, False)):
        for found, expected in zip(gradients(chunk, detach), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert any(
        (found - expected).abs().max() > 1e-6 for found, expected in zip(gradients(4, True), whole)
    )


@EVERY_CELL
def test_learns_a_text_that_needs_memory(cell: str) -> None:
    """A letter, two fillers, the letter again: the last is certain only with a state."""
    torch.manual_seed(1)
    m = RecurrentLanguageModel(9, 24, 1, None, cell=cell)
    optimizer = torch.optim.Adam(m.parameters(), 2e-2)
    for _ in range(120):
        letters = torch.randint(2, 9, (32, 1))
        text = torch.cat((letters, torch.zeros_like(letters), torch.ones_like(letters), letters), 1)
        loss = m.loss(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_tied_padding_and_configuration() -> None:
    m = model("gru", tie_weights=True)
    assert "fc.weight" not in m.state_dict()
    m.loss(torch.tensor([[1, 2, 0]]), torch.tensor([[2, 3, 4]])).backward()
    assert (m.embedding.weight.grad[0] == 0).all()
    assert m.embedding.weight.grad[7].abs().sum() > 0  # by the output layer
    clone = build_model(m.config)
    clone.load_state_dict(m.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(clone(ids), m(ids))
    with pytest.raises(ValueError, match="cell must be one of"):
        model("qrnn")


def test_gradients_are_those_of_the_character_network_by_hand() -> None:
    torch.manual_seed(0)
    hidden, vocab = 7, 11
    weights = CharacterWeights(*(60 * w for w in character_weights(vocab, hidden)))
    weights = weights._replace(bh=torch.randn(hidden).double(), by=torch.randn(vocab).double())
    m = RecurrentLanguageModel(vocab, hidden, 1, None, cell="rnn").double()
    layer = m.rnn.layers
    with torch.no_grad():
        m.embedding.weight.copy_(weights.wxh)  # one-hot times Wxh, so the layer takes it as it is
        layer.weight_ih_l0.copy_(torch.eye(hidden))
        layer.weight_hh_l0.copy_(weights.whh.t())
        layer.bias_ih_l0.copy_(weights.bh)
        layer.bias_hh_l0.zero_()
        m.fc.weight.copy_(weights.why.t())
        m.fc.bias.copy_(weights.by)
    ids, targets = torch.randint(0, vocab, (3, 9)), torch.randint(0, vocab, (3, 9))
    loss, grads, h = character_step(weights, ids, targets, torch.zeros(3, hidden).double())
    for dtype, close in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        m = m.to(dtype)
        m.zero_grad()
        ours = m.loss(ids, targets) * ids.numel()
        ours.backward()
        layer = m.rnn.layers
        found = (
            m.embedding.weight.grad, layer.weight_hh_l0.grad.t(), layer.bias_hh_l0.grad,
            m.fc.weight.grad.t(), m.fc.bias.grad,
        )  # fmt: skip
        torch.testing.assert_close(ours.double(), loss, rtol=close, atol=close)
        for f, expected in zip(found, grads, strict=True):
            torch.testing.assert_close(f.double(), expected, rtol=close, atol=20 * close)
        _, state = m.advance(ids, m.new_state(3))
        torch.testing.assert_close(state[0].double(), h, rtol=close, atol=close)
    _, clipped, _ = character_step(weights, ids, targets, torch.zeros(3, hidden).double(), 0.5)
    for c, g in zip(clipped, grads, strict=True):
        assert torch.equal(c, g.clamp(-0.5, 0.5))


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_minimal_cells_are_their_formulas_step_by_step(kind: type) -> None:
    torch.manual_seed(0)
    cell = kind(5, 6).double()
    x, h = 3 * torch.randn(2, 9, 5).double(), torch.randn(2, 6).double()
    y, last = cell(x, h)
    parts = cell.linear(x).chunk(cell.parts, -1)
    v = parts[-1]
    candidate = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    if kind is MinGRU:
        take = torch.sigmoid(parts[0])
        keep = 1 - take
    else:
        f, i = torch.sigmoid(parts[0]), torch.sigmoid(parts[1])
        keep, take = f / (f + i), i / (f + i)
    for t in range(9):
        h = keep[:, t] * h + take[:, t] * candidate[:, t]
        torch.testing.assert_close(y[:, t], h, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(last, h, rtol=1e-10, atol=1e-12)
    extreme = kind(5, 6)
    found, _ = extreme(1e4 * torch.randn(2, 9, 5))
    assert found.isfinite().all()
    with pytest.raises(ValueError, match="x must be"):
        cell(torch.zeros(2, 9, 4))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_long_scans_keep_their_digits(backend: str, needs_cpu_kernels: None) -> None:
    """T = 4,096 with gates in (0, 1) and positive numbers: no digit is lost with length."""
    a, b = torch.sigmoid(3 * torch.randn(2, 4096, 8) + 3), torch.rand(2, 4096, 8)
    h, worst = torch.zeros(2, 8).double(), 0.0
    y, _ = linear_recurrence(a, b, backend=backend)
    for t in range(4096):
        h = a[:, t].double() * h + b[:, t].double()
        worst = max(worst, ((y[:, t] - h) / h).abs().max().item())
    # 20 roundings of 2^-24; a sum of 4,096 logarithms of such gates would leave 1e-4.
    assert worst < 20 * 2**-24


def test_tagger_reads_both_sides_and_ignores_padding() -> None:
    torch.manual_seed(0)
    tagger = Tagger(20, 9, emb_dim=5, hidden_dim=6).double()
    ids, tags = torch.randint(1, 20, (3, 6)), torch.randint(0, 9, (3, 6))
    lengths = torch.tensor([6, 2, 4])
    logits = tagger(ids, lengths)
    total = 0.0
    for row, n in enumerate(lengths.tolist()):
        alone = tagger(ids[row : row + 1, :n])
        torch.testing.assert_close(logits[row, :n], alone[0], rtol=1e-10, atol=1e-12)
        total += torch.nn.functional.cross_entropy(alone[0], tags[row, :n], reduction="sum")
    torch.testing.assert_close(tagger.loss(ids, tags, lengths), total / 12)
    changed = ids.clone()
    changed[0, 5] = ids[0, 5] % 19 + 1
    assert (tagger(changed, lengths)[0, 0] - logits[0, 0]).abs().max() > 1e-9


def test_tagger_learns_tags_that_depend_on_what_follows() -> None:
    """A token's tag says whether the last token of its row is even."""
    torch.manual_seed(0)
    tagger = Tagger(12, 2, emb_dim=8, hidden_dim=12, num_layers=1)
    optimizer = torch.optim.Adam(tagger.parameters(), 2e-2)
    for _ in range(80):
        ids, lengths = torch.randint(1, 12, (32, 6)), torch.randint(1, 7, (32,))
        last = ids.gather(1, (lengths - 1)[:, None])
        tags = (last % 2).expand(32, 6)
        loss = tagger.loss(ids, tags, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = tagger.predict(ids, lengths) == tags
    assert right[torch.arange(6) < lengths[:, None]].float().mean() > 0.99
