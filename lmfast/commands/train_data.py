"""From the files named on the command line to batches."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lmfast.commands.typed import refuse_typed
from lmfast.tokenizer import BPETokenizer
from lmfast.training import (
    SPECIAL_TOKENS,
    Batches,
    ContiguousBatches,
    PackedBatches,
    PaddedBatches,
    StreamedBatches,
    TextFiles,
    TextSource,
    encode_texts,
    open_texts,
    split_text,
)
from lmfast.training.text import end_id

_HELD_OUT = 0.05


@dataclass
class Data:
    """What a run learns from.

    Attributes:
        tokenizer: of the texts.
        batches: to train on.
        evaluation: to evaluate on, or None.
        sources: of both, which know what was left out.
        note: what the user may not have meant, or "".
    """

    tokenizer: BPETokenizer
    batches: Batches
    evaluation: Batches | None
    sources: list[TextSource]
    note: str = ""


def load_data(options: argparse.Namespace, stored_tokenizer: Path | None) -> Data:
    """Read, encode and divide the texts.

    Args:
        options: of the command.
        stored_tokenizer: of the run that is continued, if one is.

    Raises:
        OSError, ValueError: a file cannot be read or used, or there is no text in it.
    """
    source = _open(options, options.data)
    separate = not (isinstance(source, TextFiles) and not source.lines)
    if options.add_eos and not separate:
        raise ValueError("--add-eos needs separate texts: --lines, JSON lines or a data set")
    if options.examples == "texts" and not separate:
        raise ValueError("--examples texts needs separate texts: --lines, JSON lines or a data set")
    if options.carry_state and separate:
        raise ValueError("--carry-state reads one long text: give it plain text files")
    if isinstance(source, TextFiles):
        refuse_typed(options, ["text_field"], "is of JSON lines and data sets, not of plain text")
    packed = options.examples == "windows" or not (options.examples or options.lines)
    held_out: list[str] = []
    texts: Iterable[str] = source
    if not options.stream:
        share = _HELD_OUT if options.held_out is None else options.held_out
        texts, held_out = _divided(source, separate, 0 if options.eval_data else share)
    if not any(text.strip() for text in texts):
        raise ValueError(f"there is no text in {', '.join(options.data)}")
    tokenizer = _tokenizer(options, stored_tokenizer, texts)
    sources = [source]
    if options.eval_data:
        sources.append(_open(options, options.eval_data))
        held_out = list(sources[1])
        if not any(text.strip() for text in held_out):
            raise ValueError(f"there is no text in {', '.join(options.eval_data)}")
    elif options.held_out and not held_out:
        raise ValueError(f"--held-out {options.held_out:g} of this text is nothing: take more")
    make = _Maker(options, tokenizer, packed)
    if options.stream:
        batches: Batches = make.streamed(source)
    else:
        batches = make.in_memory(list(texts), shuffle=True)
    evaluation = make.in_memory(held_out, shuffle=False) if any(held_out) else None
    if evaluation is None:
        names = ["patience", "eval_batches", *(["eval_every"] if options.eval_every else [])]
        refuse_typed(options, names, "needs texts to evaluate on: --held-out or --eval-data")
    note = ""
    if packed and not options.stream:
        longest = next(iter(batches))[0].shape[1]
        if longest < options.context:
            note = f"--context {options.context} is longer than the text: examples of {longest}"
    if isinstance(batches, (PackedBatches, PaddedBatches)):
        examples = batches.num_examples
        if not note and examples < options.batch_size:
            note = f"--batch-size {options.batch_size} is more than the text's examples: {examples}"
    return Data(tokenizer, batches, evaluation, sources, note)


def _open(options: argparse.Namespace, paths: list[str]) -> TextSource:
    return open_texts(
        paths,
        lines=options.lines,
        field=options.text_field,
        bad_lines=options.bad_lines,
        digits=options.digits,
    )


def _divided(source: TextSource, separate: bool, share: float) -> tuple[list[str], list[str]]:
    """Return the texts to train on and the last ones, for evaluation."""
    if not separate:
        train, held_out = split_text("".join(source), share)
        return [train], [held_out] if held_out.strip() else []
    texts = list(source)
    cut = len(texts) - int(len(texts) * share)
    return texts[:cut], texts[cut:]


def _tokenizer(
    options: argparse.Namespace, stored: Path | None, texts: Iterable[str]
) -> BPETokenizer:
    if stored is not None:
        return BPETokenizer.load(stored)
    if options.tokenizer is not None:
        return BPETokenizer.load(options.tokenizer)
    return BPETokenizer.train(
        texts, options.vocab_size, mode=options.mode, special_tokens=SPECIAL_TOKENS
    )


class _Maker:
    """Makes batches of texts as the options say."""

    def __init__(self, options: argparse.Namespace, tokenizer: BPETokenizer, packed: bool) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._packed = packed
        # What fills a batch; its targets are ignored.
        self._pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id
        self._end_id = end_id(tokenizer) if options.add_eos else None

    def streamed(self, source: TextSource) -> StreamedBatches:
        options = self._options
        return StreamedBatches(
            source,
            self._tokenizer,
            options.batch_size,
            context=options.context,
            pack=self._packed,
            pad_id=self._pad_id,
            end_id=self._end_id,
            buffer=options.buffer,
            seed=options.seed,
            threads=options.workers,
        )

    def in_memory(self, texts: list[str], *, shuffle: bool) -> Batches:
        options = self._options
        size, context, seed = options.batch_size, options.context, options.seed
        rows = encode_texts(self._tokenizer, texts, end_id=self._end_id, threads=options.workers)
        if not self._packed:
            return PaddedBatches(
                rows,
                size,
                max_length=context + 1,
                pad_id=self._pad_id,
                shuffle=shuffle,
                seed=seed,
            )
        ids = torch.from_numpy(np.concatenate(rows))
        if options.carry_state:
            return ContiguousBatches(ids, size, context=context, pad_id=self._pad_id)
        return PackedBatches(
            ids, size, context=context, pad_id=self._pad_id, shuffle=shuffle, seed=seed
        )
