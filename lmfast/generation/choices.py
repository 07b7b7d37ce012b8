"""Continuing with one of several given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmfast.generation.options import as_ids, check_ids
from lmfast.generation.text import encode


class ChoiceTree:
    """The runs of ids that are allowed, as a tree.

    Args:
        choices: texts or runs of ids.
        tokenizer: for texts.
        vocab_size: V.
        eos_ids: that end a choice which is the beginning of another.
        most: tokens that may be said; None = any number.

    Raises:
        ValueError: an empty choice, one longer than `most`, an id outside the vocabulary, or a
            choice that is the beginning of another while there is no end-of-text id to tell them
            apart.

    Example:
        >>> tree = ChoiceTree([[1, 2], [1, 3]], None, 5, [])
        >>> tree.following(tree.root), tree.following(tree.root[1])
        ([1], [2, 3])
    """

    def __init__(
        self,
        choices: Sequence[str | Sequence[int]],
        tokenizer: Any,
        vocab_size: int,
        eos_ids: list[int],
        most: int | None = None,
    ) -> None:
        self.root: dict[int, Any] = {}
        self._eos_ids = eos_ids
        ends: list[dict[int, Any]] = []
        for choice in choices:
            ids = (
                encode(tokenizer, choice) if isinstance(choice, str) else as_ids("choices", choice)
            )
            if not ids:
                raise ValueError(f"every choice must have at least one token, got {choice!r}")
            check_ids("choices", ids, vocab_size)
            if most is not None and len(ids) > most:
                raise ValueError(
                    f"max_new_tokens must be at least {len(ids)}, the tokens of the choice "
                    f"{choice!r}, got {most}"
                )
            node = self.root
            for i in ids:
                node = node.setdefault(i, {})
            ends.append(node)
        # Where a choice ends and another goes on, the end of the text is one more way.
        self._open_ends = {id(node) for node in ends if node}
        if self._open_ends and not eos_ids:
            raise ValueError(
                "choices must not begin with one another, or eos_token_id must be given, which "
                "ends the shorter one"
            )

    def following(self, node: dict[int, Any]) -> list[int]:
        """The ids that may come next."""
        return [*node, *(self._eos_ids if id(node) in self._open_ends else ())]


class ChoiceRows:
    """Where in a tree each row is.

    Args:
        tree: what may be said.
        batch: number of rows.
        vocab_size, device: of the logits.
    """

    def __init__(self, tree: ChoiceTree, batch: int, vocab_size: int, device: torch.device) -> None:
        self._tree = tree
        self._nodes: list[dict[int, Any]] = [tree.root] * batch
        self._allowed = torch.empty(batch, vocab_size, device=device)
        self._changed = True

    def allowed(self) -> Tensor:
        """(B, V), 0 at ids that may come next and -inf at the others."""
        if self._changed:
            self._allowed.fill_(float("-inf"))
            for row, node in enumerate(self._nodes):
                # A row that has said its choice is padded anyway.
                self._allowed[row, self._tree.following(node) or [0]] = 0.0
            self._changed = False
        return self._allowed

    def advance(self, row: int, new_id: int) -> bool:
        """Take a row's next id and return whether it has said its choice."""
        node = self._nodes[row].get(new_id, {})
        self._nodes[row] = node
        self._changed = True
        return not node

    def would_end(self, row: int, new_id: int) -> bool:
        """Whether a row would have said its choice with this id."""
        return not self._nodes[row].get(new_id, {})

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows in the given order."""
        self._nodes = [self._nodes[row] for row in rows]
        self._changed = True
