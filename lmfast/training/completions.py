"""Prompts with completions: examples whose loss counts the completion only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmfast.training.batches import MemoryBatches, checksum, padded_pairs


class CompletionExample(NamedTuple):
    """One text with its labels: ids, and the same ids with `ignore_index` on the prompt."""

    ids: list[int]
    labels: list[int]


class PaddedExamples(NamedTuple):
    """Examples as transformers' models take them, (B, T) int64 each, padded on the right."""

    ids: Tensor
    labels: Tensor
    attention_mask: Tensor


def completion_example(
    prompt: Sequence[int],
    completion: Sequence[int],
    eos_id: int | None,
    *,
    ignore_index: int = -100,
    max_length: int | None = None,
) -> CompletionExample:
    """Join a prompt and its completion, and label the completion and the end only.

        ids = prompt + completion + [eos];   labels = [ignore] * len(prompt) + completion + [eos]

    Tokenise both apart, with the separators between them that generation will use.

    Args:
        prompt, completion: ids.
        eos_id: ends the text, so that the model learns to stop; None leaves it out.
        ignore_index: the label of tokens that do not count.
        max_length: longer texts lose the start of their prompt.

    Returns:
        ids and labels of equal length, not shifted.

    Raises:
        ValueError: nothing to learn, or a completion that alone exceeds `max_length`.

    Example:
        >>> completion_example([1, 2, 8], [12], 0)
        CompletionExample(ids=[1, 2, 8, 12, 0], labels=[-100, -100, -100, 12, 0])
    """
    answer = [*completion, *([] if eos_id is None else [eos_id])]
    if not answer or not prompt:
        raise ValueError(
            "an example needs a prompt and a completion, got "
            f"{len(prompt)} and {len(completion)} tokens"
        )
    kept = list(prompt)
    if max_length is not None:
        room = max_length - len(answer)
        if room < 1:
            raise ValueError(
                f"a completion of {len(answer)} tokens leaves no room for its prompt in "
                f"max_length {max_length}"
            )
        kept = kept[-room:]
    return CompletionExample(kept + answer, [ignore_index] * len(kept) + answer)


def pad_examples(
    examples: Sequence[CompletionExample], pad_id: int, *, ignore_index: int = -100
) -> PaddedExamples:
    """Put examples into one batch for a model that shifts the labels itself.

    Args:
        examples: from `completion_example`.
        pad_id: fills the ids on the right.
        ignore_index: fills the labels.

    Returns:
        ids, labels and a mask that is 1 at real tokens.

    Raises:
        ValueError: there are no examples.

    Example:
        >>> rows = [completion_example([5, 6], [7], 0), completion_example([5], [7], 0)]
        >>> pad_examples(rows, 9).attention_mask.tolist()
        [[1, 1, 1, 1], [1, 1, 1, 0]]
    """
    if not examples:
        raise ValueError("examples must not be empty")
    shape = (len(examples), max(len(example.ids) for example in examples))
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, ignore_index, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        labels[row, :length] = torch.tensor(example.labels)
        mask[row, :length] = 1
    return PaddedExamples(ids, labels, mask)


class CompletionBatches(MemoryBatches):
    """Batches of examples for `Trainer`: inputs, and the labels of what follows each of them.

    Args:
        examples: from `completion_example`.
        batch_size: examples per batch.
        pad_id: fills the inputs on the right.
        ignore_index: fills the targets.
        shuffle, seed: order of the examples.

    Raises:
        ValueError: no examples, or a batch size below 1.

    Example:
        >>> rows = [completion_example([5, 6], [7], 0)]
        >>> CompletionBatches(rows, 1).next_batch()
        (tensor([[5, 6, 7]]), tensor([[-100,    7,    0]]))
    """

    def __init__(
        self,
        examples: Sequence[CompletionExample],
        batch_size: int,
        *,
        pad_id: int = 0,
        ignore_index: int = -100,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self._ids = [torch.tensor(e.ids, dtype=torch.int32) for e in examples]
        self._labels = [torch.tensor(e.labels, dtype=torch.int32) for e in examples]
        self._pad_id, self._ignore_index = pad_id, ignore_index
        super().__init__(
            len(self._ids),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            identity={"checksum": checksum([*self._ids, *self._labels])},
        )

    def collate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [(self._ids[i][:-1], self._labels[i][1:]) for i in indices.tolist()]
        return padded_pairs(pairs, self._pad_id, self._ignore_index)
