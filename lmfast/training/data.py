"""From text to batches of next-token examples, in an order that can be resumed."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# The ids of a new tokenizer begin with these; padding has id 0.
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")


class Tokenizer(Protocol):
    """What is needed of a tokenizer; `lmfast.BPETokenizer` has it."""

    def encode_numpy(self, text: str) -> np.ndarray:
        """Return the ids of a text."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8; names the file and the place.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.txt")
        >>> _ = path.write_text("one line", encoding="utf-8")
        >>> read_text(path)
        'one line'
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start}"
        ) from None


def split_text(text: str, held_out: float) -> tuple[str, str]:
    """Split a text in two at a line break: all but its last part, and the last part.

    Args:
        text: anything.
        held_out: share of the characters in the last part, in [0, 1).

    Raises:
        ValueError: `held_out` is out of range.

    Example:
        >>> split_text("a\\nb\\nc\\nd\\n", 0.25)
        ('a\\nb\\nc\\n', 'd\\n')
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out}")
    cut = len(text) - int(len(text) * held_out)
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return text[:cut], text[cut:]


def encode_text(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the ids of a text as one int64 tensor (N,)."""
    return torch.from_numpy(np.asarray(tokenizer.encode_numpy(text), dtype=np.int64))


def encode_lines(tokenizer: Tokenizer, text: str) -> list[Tensor]:
    """Return the ids of every line that is not blank."""
    return [encode_text(tokenizer, line) for line in text.splitlines() if line.strip()]


class Batches(ABC):
    """An endless, resumable stream of batches, and fixed passes for evaluation.

    `next_batch` goes through the examples epoch after epoch, each in its own random order that
    depends on the seed and the epoch only; `state_dict` says where it is. Iterating gives every
    example once, in order, and leaves that position alone.

    A batch is a pair of int64 tensors (B, T): inputs, and targets with `ignore_index` where there
    is nothing to predict. The last batch of an epoch may be smaller.

    Raises:
        ValueError: no examples, a batch size below 1, or a state that belongs to other data.
    """

    def __init__(
        self, num_examples: int, batch_size: int, *, shuffle: bool, seed: int, checksum: int
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_examples == 0:
            raise ValueError("the text is too short: it has no token to predict")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self._checksum = checksum
        self._epoch = 0
        self._position = 0  # batches already given in this epoch
        self._order = self._epoch_order()

    @abstractmethod
    def collate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets (B, T) of some examples."""

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.arange(self.num_examples).split(self.batch_size):
            yield self.collate(indices)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return the next training batch and move on."""
        if self._position == len(self):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._epoch_order()
        start = self._position * self.batch_size
        self._position += 1
        return self.collate(self._order[start : start + self.batch_size])

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what it belongs to."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` says; raises ValueError if the data has changed since."""
        for name, here in self._identity().items():
            if state.get(name) != here:
                raise ValueError(
                    f"the training data is not what the checkpoint was trained on: "
                    f"{name} is {here}, it was {state.get(name)}"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order()

    def _identity(self) -> dict[str, int]:
        return {
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "shuffle": int(self.shuffle),
            "seed": self.seed,
            "checksum": self._checksum,
        }

    def _epoch_order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_examples)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._epoch)
        return torch.randperm(self.num_examples, generator=generator)


class PackedBatches(Batches):
    """Batches cut from one long text: windows of `context` tokens, side by side, none left out.

    Args:
        ids: (N,) int64, the whole text.
        batch_size: windows per batch.
        context: T, tokens per window.
        pad_id: fills the end of the last window.
        ignore_index: target where there is nothing to predict.
        shuffle, seed: order of the windows.

    Raises:
        ValueError: fewer than 2 tokens, or a size below 1.

    Example:
        >>> batches = PackedBatches(torch.arange(1, 7), 2, context=3, pad_id=0, shuffle=False)
        >>> batches.next_batch()
        (tensor([[1, 2, 3],
                [4, 5, 0]]), tensor([[   2,    3,    4],
                [   5,    6, -100]]))
    """

    def __init__(
        self,
        ids: Tensor,
        batch_size: int,
        *,
        context: int,
        pad_id: int = 0,
        ignore_index: int = -100,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        predicted = max(len(ids) - 1, 0)
        windows = -(-predicted // context)
        self._inputs = torch.full((windows * context,), pad_id, dtype=torch.int64)
        self._targets = torch.full((windows * context,), ignore_index, dtype=torch.int64)
        self._inputs[:predicted], self._targets[:predicted] = ids[:-1], ids[1:]
        self._inputs = self._inputs.view(windows, context)
        self._targets = self._targets.view(windows, context)
        super().__init__(windows, batch_size, shuffle=shuffle, seed=seed, checksum=_checksum([ids]))

    def collate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._inputs[indices], self._targets[indices]


class PaddedBatches(Batches):
    """Batches of separate texts, such as sentences, padded on the right to the longest.

    Args:
        sequences: ids of each text; those with fewer than 2 are left out.
        batch_size: texts per batch.
        max_length: longer texts are cut to this many ids, that is max_length - 1 predictions.
        pad_id: fills the inputs.
        ignore_index: fills the targets. It is not the padding id on purpose: where padding and
            end of text share an id, the end would never be learnt.
        shuffle, seed: order of the texts.

    Raises:
        ValueError: no text has 2 tokens, or a size is out of range.

    Example:
        >>> batches = PaddedBatches([[1, 2, 3], [4, 5]], 2, max_length=30, shuffle=False)
        >>> batches.next_batch()
        (tensor([[1, 2],
                [4, 0]]), tensor([[   2,    3],
                [   5, -100]]))
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int] | Tensor],
        batch_size: int,
        *,
        max_length: int,
        pad_id: int = 0,
        ignore_index: int = -100,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        cut = [torch.as_tensor(s, dtype=torch.int64)[:max_length] for s in sequences]
        self._sequences = [ids for ids in cut if len(ids) > 1]
        self._pad_id = pad_id
        self._ignore_index = ignore_index
        super().__init__(
            len(self._sequences),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            checksum=_checksum(self._sequences),
        )

    def collate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [self._sequences[i] for i in indices.tolist()]
        shape = (len(chosen), max(len(ids) for ids in chosen) - 1)
        inputs = torch.full(shape, self._pad_id, dtype=torch.int64)
        targets = torch.full(shape, self._ignore_index, dtype=torch.int64)
        for row, ids in enumerate(chosen):
            inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        return inputs, targets


def _checksum(sequences: Sequence[Tensor]) -> int:
    value = 0
    for ids in sequences:
        value = zlib.crc32(ids.numpy().tobytes(), value)
    return value
