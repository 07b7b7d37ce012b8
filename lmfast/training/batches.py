"""Batches of next-token examples from ids in memory, in an order that can be resumed."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmfast.tokenizer.training_arguments import whole


def _checked(ids: object) -> Tensor:
    """A text's ids (N,) as int32; TypeError or ValueError for anything else."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a tensor of integers, got {kind}")
    if ids.ndim != 1:
        raise ValueError(f"ids must be (N,), one text, got shape {tuple(ids.shape)}")
    return ids.to(torch.int32)


def _row(index: int, sequence: Any) -> Tensor:
    """A sequence's ids as int32; TypeError for anything else, which names its place."""
    try:
        ids = torch.as_tensor(sequence)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    empty = ids is not None and ids.numel() == 0  # of no dtype of its own
    if ids is None or ids.ndim != 1 or (ids.dtype.is_floating_point and not empty):
        raise TypeError(f"sequences[{index}] must be ids (N,), got {sequence!r}")
    return ids.to(torch.int32)


class Batches(ABC):
    """An endless, resumable stream of batches, and fixed passes for evaluation.

    A batch is a pair of int64 tensors (B, T): inputs, and targets with `ignore_index` where there
    is nothing to predict. The last batch of an epoch may be smaller.

    Attributes:
        carries_state: each row of a batch continues the same row of the one before, so that a
            recurrent model goes on from the state it had.
    """

    carries_state = False

    @abstractmethod
    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return the next training batch and move on, epoch after epoch."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give every example once, in order; the training position stays where it is."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches per epoch."""

    @abstractmethod
    def where(self) -> str:
        """Name the training batch given last, for a message."""

    @property
    @abstractmethod
    def epoch_begins(self) -> bool:
        """Whether the next training batch is the first of an epoch."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the training position and what it belongs to, JSON-ready."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` says; raises ValueError if the data has changed since."""


class MemoryBatches(Batches):
    """Batches of numbered examples; every epoch has its own random order.

    Args:
        num_examples: of an epoch.
        batch_size: examples per batch.
        shuffle, seed: the order depends on the seed and the epoch only.
        identity: what tells the examples from others, JSON-ready.

    Raises:
        ValueError: no examples, a batch size below 1, or a state that belongs to other data.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        identity: dict[str, Any],
    ) -> None:
        check_positive(batch_size=batch_size)
        if num_examples == 0:
            raise ValueError("the text is too short: it has no token to predict")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self._identity = {
            "num_examples": num_examples,
            "batch_size": batch_size,
            "shuffle": shuffle,
            "seed": seed,
            **identity,
        }
        self._epoch = 0
        self._position = 0  # batches already given in this epoch
        self._order = self._epoch_order()

    @abstractmethod
    def collate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets (B, T) of some examples."""

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.arange(self.num_examples).split(self.batch_size):
            yield self.collate(indices)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        if self._position == len(self):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._epoch_order()
        self._position += 1
        return self.collate(self._last_indices())

    def where(self) -> str:
        named = [str(i) for i in self._last_indices()[:3].tolist()]
        more = ", ..." if self.batch_size > 3 else ""
        return (
            f"batch {self._position} of epoch {self._epoch + 1}, examples {', '.join(named)}{more}"
        )

    @property
    def epoch_begins(self) -> bool:
        return self._position in (0, len(self))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(self._identity, state)
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order()

    def _last_indices(self) -> Tensor:
        start = (self._position - 1) * self.batch_size
        return self._order[start : start + self.batch_size]

    def _epoch_order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_examples)
        return shuffled(self.num_examples, self.seed, self._epoch)


class PackedBatches(MemoryBatches):
    """Batches cut from one long text: windows of `context` tokens, side by side, none left out.

    Args:
        ids: (N,) integers, the whole text; kept as int32.
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
        check_positive(context=context)
        self._ids = _checked(ids)
        self._context = min(context, max(len(ids) - 1, 1))  # no window wider than the text
        self._pad_id, self._ignore_index = pad_id, ignore_index
        super().__init__(
            -(-max(len(ids) - 1, 0) // context),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            identity={"context": context, "checksum": checksum([self._ids])},
        )

    def collate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        places = indices[:, None] * self._context + torch.arange(self._context)  # (B, T)
        return next_tokens(self._ids, places, self._pad_id, self._ignore_index)


class ContiguousBatches(MemoryBatches):
    """One long text in so many rows, read from left to right in pieces: for truncated BPTT.

    Row r of a batch continues row r of the one before, so a recurrent model keeps its state from
    batch to batch; at the start of an epoch it begins anew.

    Args:
        ids: (N,) integers, the whole text; kept as int32.
        batch_size: rows; each is about 1 / batch_size of the text.
        context: tokens per piece, through which gradients flow.
        pad_id, ignore_index: fill the end of the last row.

    Raises:
        ValueError: fewer than 2 tokens, or a size below 1.

    Source: Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of
    recurrent network trajectories".

    Example:
        >>> batches = ContiguousBatches(torch.arange(1, 10), 2, context=3)
        >>> [inputs.tolist() for inputs, _ in batches]
        [[[1, 2, 3], [5, 6, 7]], [[4], [8]]]
    """

    carries_state = True

    def __init__(
        self,
        ids: Tensor,
        batch_size: int,
        *,
        context: int,
        pad_id: int = 0,
        ignore_index: int = -100,
    ) -> None:
        check_positive(batch_size=batch_size, context=context)
        self._ids = _checked(ids)
        self._context, self._pad_id, self._ignore_index = context, pad_id, ignore_index
        self._row_length = -(-max(len(ids) - 1, 0) // batch_size)
        self._rows = batch_size
        super().__init__(
            -(-self._row_length // context),
            1,  # an example is one piece of all rows
            shuffle=False,
            seed=0,
            identity={"rows": batch_size, "context": context, "checksum": checksum([self._ids])},
        )

    def collate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        start = int(indices) * self._context
        width = min(self._context, self._row_length - start)
        rows = torch.arange(self._rows)[:, None] * self._row_length
        places = rows + start + torch.arange(width)  # (B, T)
        return next_tokens(self._ids, places, self._pad_id, self._ignore_index)


class PaddedBatches(MemoryBatches):
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
        TypeError: a sequence holds no ids; names its place.
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
        sequences: Sequence[Sequence[int] | np.ndarray | Tensor],
        batch_size: int,
        *,
        max_length: int,
        pad_id: int = 0,
        ignore_index: int = -100,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        whole("max_length", max_length, 2)
        cut = [_row(index, s)[:max_length] for index, s in enumerate(sequences)]
        self._sequences = [ids for ids in cut if len(ids) > 1]
        self._pad_id = pad_id
        self._ignore_index = ignore_index
        super().__init__(
            len(self._sequences),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            identity={"checksum": checksum(self._sequences)},
        )

    def collate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [self._sequences[i] for i in indices.tolist()]
        return padded(chosen, self._pad_id, self._ignore_index)


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a named size below 1, TypeError for what is no int."""
    for name, value in sizes.items():
        whole(name, value, 1)


def check_identity(here: dict[str, Any], state: dict[str, Any]) -> None:
    """Raise ValueError if a state is of other data, naming what differs."""
    for name, value in here.items():
        if state.get(name) != value:
            raise ValueError(
                f"the training data is not what the checkpoint was trained on: "
                f"{name} is {value}, it was {state.get(name)}"
            )


def checksum(sequences: Sequence[Tensor]) -> int:
    """Return the CRC-32 of some int32 sequences."""
    value = 0
    for ids in sequences:
        value = zlib.crc32(ids.contiguous().numpy().data, value)
    return value


def shuffled(count: int, *seeds: int) -> Tensor:
    """Return 0..count-1 in the random order that belongs to some whole numbers."""
    state = 0
    for seed in seeds:
        state = (state * 1_000_003 + seed) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(state))


def next_tokens(
    ids: Tensor, places: Tensor, pad_id: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return the tokens at some places (B, T) of a text and those that follow them."""
    last = len(ids) - 1
    there = places < last
    inputs = torch.where(there, ids[places.clamp_max(last)], pad_id).long()
    targets = torch.where(there, ids[(places + 1).clamp_max(last)], ignore_index).long()
    return inputs, targets


def padded(rows: Sequence[Tensor], pad_id: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of sequences of at least 2 tokens, padded on the right."""
    lengths = {len(ids) for ids in rows}
    if len(lengths) == 1:  # windows: a stream gives 5.6 M tokens/s so, 2.0 M row by row
        whole = torch.stack(list(rows)).long()
        return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
    return padded_pairs([(ids[:-1], ids[1:]) for ids in rows], pad_id, ignore_index)


def padded_pairs(
    pairs: Sequence[tuple[Tensor, Tensor]], pad_id: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of equal length each as two int64 matrices, padded on the right."""
    shape = (len(pairs), max(len(ids) for ids, _ in pairs))
    inputs = torch.full(shape, pad_id, dtype=torch.int64)
    targets = torch.full(shape, ignore_index, dtype=torch.int64)
    for row, (ids, following) in enumerate(pairs):
        inputs[row, : len(ids)], targets[row, : len(ids)] = ids, following
    return inputs, targets
