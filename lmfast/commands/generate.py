"""`lmfast generate`: continue a prompt."""

from __future__ import annotations

import argparse
import sys

import torch

from lmfast.commands.generation import (
    Clock,
    Printer,
    add_generation_options,
    before_end,
    generation_arguments,
    load_generator,
    tell_unknown,
)
from lmfast.commands.options import COUNT, add_machine_options, apply_machine_options, read_text
from lmfast.generation.text import encode, until


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="text to continue; - reads standard input"
    )
    parser.add_argument(
        "--samples", type=COUNT, default=1, metavar="N", help="continuations to print"
    )
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument(
        "--beams", type=COUNT, default=1, metavar="N", help="hypotheses of a beam search"
    )
    add_generation_options(parser)
    add_machine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Generate and print."""
    device = apply_machine_options(options)
    if options.stream and max(options.samples, options.beams) > 1:
        raise ValueError("--stream shows one continuation: leave out --samples and --beams")
    read = sys.stdin.read if options.prompt == "-" else lambda: options.prompt
    text = read_text(read, "the prompt")
    generator, tokenizer, ends = load_generator(options, device)
    ids = encode(tokenizer, text)
    if not ids:
        raise ValueError("the prompt is empty: a model continues at least one token")
    tell_unknown(tokenizer, ids, "prompt tokens")
    arguments = generation_arguments(options, tokenizer, device)
    # Without drawing and beams all samples are the same: the prompt then stands in several rows.
    returned = options.samples if arguments["do_sample"] or options.beams > 1 else 1
    rows = 1 if returned > 1 else options.samples
    prompt = torch.tensor([ids] * rows, device=device)
    printer = Printer(tokenizer, options.stop, ids) if options.stream else None
    clock = Clock(max(options.samples, options.beams), len(ids))

    def on_token(new_ids: torch.Tensor) -> None:
        clock.tick()
        if printer is not None and int(new_ids[0]) not in ends:
            printer.add(int(new_ids[0]))

    out = generator.generate(
        prompt,
        num_beams=options.beams,
        num_return_sequences=returned,
        on_token=on_token if options.beams == 1 else None,
        eos_token_id=ends,
        **arguments,
    )
    if printer is not None:
        printer.close()
    else:
        rows_said = [before_end(row, ends, len(ids)) for row in out.tolist()]
        texts = [until(tokenizer.decode(row), options.stop, len(text)) for row in rows_said]
        print("\n\n".join(texts))
    if options.stats:
        clock.report(out.shape[1] - len(ids) if options.beams > 1 else None)
    return 0
