"""Seq2Seq: equal ways to compute the same, decoding against exhaustive search, a learnt task."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmfast.models import Seq2Seq, Tagger
from lmfast.models.beam import beam_search
from lmfast.training import plot_attention

PAD, BOS, EOS = 0, 1, 2
STEPS = 500
SOURCE = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [4, 0, 0, 0]])
TARGET = torch.tensor([[5, 4, 3, 6, 2], [6, 6, 2, 0, 0], [2, 0, 0, 0, 0]])


def model(**options) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(9, 8, **{"emb_dim": 5, "hidden_dim": 6, "cell": "gru", **options})


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "gru_textbook"])
@pytest.mark.parametrize("attention", ["bahdanau", "general", None])
def test_steps_are_the_whole_sequence_and_rows_do_not_meet(
    cell: str, attention: str | None
) -> None:
    m = model(cell=cell, attention=attention, num_layers=2).double()
    logits = m(SOURCE, TARGET)
    # A teacher that forces almost surely takes the path step by step.
    stepped = m(SOURCE, TARGET, teacher_forcing=1 - 1e-12)
    torch.testing.assert_close(stepped, logits, rtol=1e-10, atol=1e-12)
    for row, length in enumerate((4, 2, 1)):
        alone = m(SOURCE[row : row + 1, :length], TARGET[row : row + 1])
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-10, atol=1e-12)


def test_loss_is_the_cross_entropy_of_the_logits_and_trains_everything() -> None:
    for options in ({}, {"cell": "lstm", "input_feeding": True}, {"attention": "general"}):
        m = model(**options)
        loss = m.loss(SOURCE, TARGET)
        logits = m(SOURCE, TARGET).flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, TARGET.flatten(), ignore_index=PAD)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


def test_scheduled_sampling_is_seeded_and_uses_the_models_own_words() -> None:
    m = model()
    runs = [
        m(SOURCE, TARGET, teacher_forcing=p, generator=torch.Generator().manual_seed(seed))
        for p, seed in ((0.5, 0), (0.5, 0), (0.5, 1), (0.0, 0))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # Without a teacher the inputs are the model's own greedy words, as in generate.
    own = runs[3].argmax(-1)
    ids = m.generate(SOURCE, max_length=5).ids
    for row, words in zip(own, ids):
        length = int((words != PAD).sum())
        assert row[:length].tolist() == words[:length].tolist()


def log_probability(m: Seq2Seq, source: Tensor, words: list[int]) -> float:
    target = torch.tensor([words])
    return m(source, target).log_softmax(-1)[0, torch.arange(len(words)), target[0]].sum().item()


@pytest.mark.parametrize(
    ("length_penalty", "input_feeding"), [(0.0, False), (0.7, True), (2.0, False)]
)
def test_beam_search_is_exhaustive_search(length_penalty: float, input_feeding: bool) -> None:
    torch.manual_seed(3)
    m = Seq2Seq(9, 4, emb_dim=5, hidden_dim=6, cell="lstm", input_feeding=input_feeding).double()
    torch.nn.init.normal_(m.fc.weight, std=2)
    longest = 4
    found = m.generate(SOURCE, max_length=longest, num_beams=64, length_penalty=length_penalty)
    for row, length in enumerate((4, 2, 1)):
        source = SOURCE[row : row + 1, :length]
        best, score = [], -math.inf
        for n in range(1, longest + 1):
            for words in itertools.product(range(4), repeat=n):
                if EOS in words[:-1] or (n < longest and words[-1] != EOS):
                    continue
                value = log_probability(m, source, list(words)) / n**length_penalty
                if value > score:
                    best, score = list(words), value
        assert found.ids[row].tolist()[: len(best)] == best
        assert all(i == PAD for i in found.ids[row].tolist()[len(best) :])
        assert found.scores[row].item() == pytest.approx(score, rel=1e-5)


def test_more_beams_never_find_less_and_rows_are_independent() -> None:
    m = model(attention="scaled", bidirectional=False)
    torch.nn.init.normal_(m.fc.weight, std=2)
    scores = [m.generate(SOURCE, max_length=8, num_beams=k).scores for k in (2, 300)]
    assert (scores[0] <= scores[1] + 1e-6).all()
    found = m.generate(SOURCE, max_length=8, num_beams=3)
    for row, length in enumerate((4, 2, 1)):
        alone = m.generate(SOURCE[row : row + 1, :length], max_length=8, num_beams=3)
        n = alone.ids.shape[1]
        assert found.ids[row, :n].tolist() == alone.ids[0].tolist()
        assert (found.ids[row, n:] == PAD).all()


def test_beam_search_stops_only_when_nothing_can_improve() -> None:
    """A long text of likely words beats the short one that is finished first."""
    log_p = torch.tensor([0.0, 0.0, 0.3, 0.7]).log()
    ids, scores, _ = beam_search(
        lambda tokens, state: (log_p.expand(len(tokens), 4), state),
        lambda state, index: state,
        None,
        batch=1, num_beams=2, max_length=6, bos_idx=1, eos_idx=EOS, pad_idx=PAD,
        length_penalty=1.0,
    )  # fmt: skip
    assert ids[0, 0].tolist() == [3] * 6
    assert scores[0, 0].item() == pytest.approx(math.log(0.7), rel=1e-6)


def test_learns_to_reverse() -> None:
    """More than 99 of 100 new strings are reversed without a mistake."""
    torch.manual_seed(0)
    m = Seq2Seq(13, 13, emb_dim=16, hidden_dim=48, cell="gru")
    optimizer = torch.optim.Adam(m.parameters(), 8e-3)

    def batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(3, 9, (rows, 1), generator=generator)
        digits = torch.randint(3, 13, (rows, 8), generator=generator)
        at = torch.arange(9)
        source = digits.masked_fill(at[:8] >= lengths, PAD)
        back = torch.cat((digits, digits[:, :1]), 1).gather(1, (lengths - 1 - at).clamp_min(0))
        target = back.masked_fill(at >= lengths, PAD).masked_fill(at == lengths, EOS)
        return source, target

    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * (1 - step / STEPS)
        loss = m.loss(*batch(64, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
    source, target = batch(1000, generator)
    m.eval()
    for beams in (1, 3):
        found = m.generate(source, max_length=9, num_beams=beams)
        right = (found.ids == target[:, : found.ids.shape[1]]).all(1).float().mean().item()
        assert right > 0.99
    # Attention found where each digit stands: output i looks at position n - 1 - i.
    lengths = (source != PAD).sum(1)
    first = found.attention[torch.arange(1000), 0].argmax(1)
    assert ((first - (lengths - 1)).abs() <= 1).float().mean() > 0.9


def test_plot_attention_writes_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    m = model()
    found = m.generate(SOURCE[:1], max_length=5)
    path = tmp_path / "attention.png"
    columns = [str(i) for i in SOURCE[0].tolist()]
    rows = [str(i) for i in found.ids[0].tolist()]
    plot_attention(path, found.attention[0], columns, rows, title="weights")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="weights must be"):
        plot_attention(path, found.attention[0], columns[1:], rows)


@pytest.mark.parametrize("cell", ["lstm", "gru_textbook"])
def test_no_rows_and_autocast(cell: str) -> None:
    m = model(cell=cell, num_layers=2)
    assert m(SOURCE[:0], TARGET[:0]).shape == (0, 5, 8)
    for beams in (1, 3):
        assert len(m.generate(SOURCE[:0], max_length=4, num_beams=beams).ids) == 0
    expected = m.loss(SOURCE, TARGET).item()
    with torch.autocast("cpu", torch.bfloat16):
        for forcing in (1.0, 1 - 1e-12):
            loss = m.loss(SOURCE, TARGET, teacher_forcing=forcing)
            # Operands and states in bf16, of which some twenty meet: 2^-9 each.
            assert loss.item() == pytest.approx(expected, rel=2e-2)
            loss.backward()
        assert m.generate(SOURCE, max_length=4, num_beams=2).ids.shape[0] == 3


def test_errors() -> None:
    with pytest.raises(ValueError, match="attention must be one of"):
        model(attention="cosine")
    with pytest.raises(ValueError, match="cell must be one of"):
        model(cell="qrnn")
    with pytest.raises(ValueError, match="eos_idx must be in"):
        model(eos_idx=8)
    m = model()
    padded = SOURCE.index_fill(0, torch.tensor(1), m.pad_idx)
    with pytest.raises(ValueError, match="source must have a token in every row, row 1 is all"):
        m.loss(padded, TARGET)
    with pytest.raises(ValueError, match=r"source must be \(B, S\) with at least one token"):
        m.generate(SOURCE[:, :0])
    for wrong in ([4, 2, 3], torch.tensor([4.0, 2.0, 3.0])):
        with pytest.raises(TypeError, match="lengths must be an integer tensor"):
            m.loss(SOURCE, TARGET, source_lengths=wrong)  # type: ignore[arg-type]
    tagger = Tagger(9, 3, emb_dim=4, hidden_dim=4)
    with pytest.raises(ValueError, match=r"ids must be \(B, T\), got \(4,\)"):
        tagger(SOURCE[0])
    with pytest.raises(TypeError, match="lengths must be an integer tensor"):
        tagger.loss(SOURCE, SOURCE % 3, [4, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_beams must be at least 1"):
        m.generate(SOURCE, num_beams=0)
    with pytest.raises(ValueError, match=r"target must be \(B, T\)"):
        m.loss(SOURCE, TARGET[:, :0])
    with pytest.raises(ValueError, match="teacher_forcing must be in"):
        m.loss(SOURCE, TARGET, teacher_forcing=1.5)


def test_sources_and_targets_have_as_many_rows() -> None:
    model, ids = Seq2Seq(9, 9, emb_dim=4, hidden_dim=4), torch.ones(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"source must be \(B, S\) with the B of target \(2, 2\)"):
        model(ids, ids[:2])
