"""Batches: shift, truncation, padding, windows, order, resuming; reading and splitting text."""

import numpy as np
import pytest
import torch

from lmfast.training import PackedBatches, PaddedBatches, encode_lines, read_text, split_text

IGNORE = -100


def test_windows_predict_every_token_but_the_first_exactly_once():
    ids = torch.arange(100, 123)
    batches = PackedBatches(ids, 2, context=5, pad_id=7, shuffle=False)
    assert len(batches) == 3  # 22 predictions, 5 windows
    inputs = torch.cat([x.flatten() for x, _ in batches])
    targets = torch.cat([y.flatten() for _, y in batches])
    assert inputs[:22].tolist() == list(range(100, 122))
    assert targets[:22].tolist() == list(range(101, 123))
    assert inputs[22:].tolist() == [7] * 3
    assert targets[22:].tolist() == [IGNORE] * 3


def test_shuffled_epochs_give_every_window_once_in_another_order():
    ids = torch.arange(0, 41)
    batches = PackedBatches(ids, 3, context=4, seed=5)
    epochs = []
    for _ in range(2):
        rows = torch.cat([batches.next_batch()[0] for _ in range(len(batches))])
        epochs.append(rows[:, 0].tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 40, 4))
    assert epochs[0] != epochs[1]
    again = PackedBatches(ids, 3, context=4, seed=5)
    assert torch.equal(
        again.next_batch()[0], PackedBatches(ids, 3, context=4, seed=5).next_batch()[0]
    )
    other = PackedBatches(ids, 3, context=4, seed=6)
    assert not torch.equal(again.next_batch()[0], other.next_batch()[0])


def test_padding_shift_and_truncation():
    batches = PaddedBatches(
        [list(range(1, 41)), [5, 6, 7], [9], [], [3, 4]], 4, max_length=30, shuffle=False
    )
    assert batches.num_examples == 3
    inputs, targets = batches.next_batch()
    assert inputs.shape == (3, 29)  # 30 ids give 29 positions
    assert inputs[0].tolist() == list(range(1, 30))
    assert targets[0].tolist() == list(range(2, 31))
    assert inputs[1].tolist() == [5, 6] + [0] * 27
    assert targets[1].tolist() == [6, 7] + [IGNORE] * 27
    assert targets[2].tolist() == [4] + [IGNORE] * 28


@pytest.mark.parametrize("consumed", [0, 1, 4, 7])
def test_state_continues_at_the_same_batch(consumed):
    def make():
        return PackedBatches(torch.arange(0, 60) % 11, 4, context=4, seed=3)

    first = make()
    for _ in range(consumed):
        first.next_batch()
    second = make()
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        a, b = first.next_batch(), second.next_batch()
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_evaluation_passes_leave_the_training_position_alone():
    batches = PackedBatches(torch.arange(0, 60), 4, context=4, seed=3)
    batches.next_batch()
    state = batches.state_dict()
    assert sum(len(x) for x, _ in batches) == 15
    assert batches.state_dict() == state


def test_state_of_other_data_is_refused():
    state = PackedBatches(torch.arange(0, 60), 4, context=4).state_dict()
    changed = PackedBatches(torch.arange(1, 61), 4, context=4)
    with pytest.raises(ValueError, match=r"training data is not what the checkpoint.*checksum"):
        changed.load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size is 5, it was 4"):
        PackedBatches(torch.arange(0, 60), 5, context=4).load_state_dict(state)


def test_too_little_text_is_refused():
    for ids in ([], [1]):
        with pytest.raises(ValueError, match="too short: it has no token to predict"):
            PackedBatches(torch.tensor(ids, dtype=torch.int64), 2, context=3)
        with pytest.raises(ValueError, match="too short"):
            PaddedBatches([ids], 2, max_length=3)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        PackedBatches(torch.arange(9), 0, context=3)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        PackedBatches(torch.arange(9), 1, context=0)
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        PaddedBatches([[1, 2]], 1, max_length=1)


@pytest.mark.parametrize("bad", [[1.5, 2.5], 7, "ab", [[1, 2], [3, 4]], ["a"], None], ids=str)
def test_a_sequence_of_something_else_is_told(bad):
    """1.5 became 1, and rows of rows went through."""
    with pytest.raises(TypeError, match=r"sequences\[1\] must be ids \(N,\), got"):
        PaddedBatches([[1, 2], bad], 1, max_length=9)
    for good in (np.array([1, 2], dtype=np.uint16), torch.tensor([1, 2]), (1, 2)):
        batches = PaddedBatches([[], good], 1, max_length=9)
        assert batches.next_batch()[1].tolist() == [[2]]


def test_text_that_is_not_utf8_names_file_and_place(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text: byte 0xe9 at position 3"):
        read_text(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "absent.txt")


def test_split_is_at_a_line_break_and_loses_nothing():
    text = "".join(f"line {i}\n" for i in range(100))
    for share in (0.0, 0.05, 0.5, 0.99):
        first, last = split_text(text, share)
        assert first + last == text
        assert first.endswith("\n")
        assert len(last) >= int(share * len(text))
    assert split_text("no break", 0.5) == ("no b", "reak")
    with pytest.raises(ValueError, match=r"held_out must be in \[0, 1\), got 1"):
        split_text(text, 1)


def test_lines_are_encoded_one_by_one():
    class Letters:
        def encode_batch(self, texts, *, threads=None):
            return [np.array([ord(c) for c in text], dtype=np.int32) for text in texts]

    lines = encode_lines(Letters(), "ab\n\n  \nc\n")
    assert [line.tolist() for line in lines] == [[97, 98], [99]]
    assert all(line.dtype == torch.int32 for line in lines)
