"""`lmfast demo`: the main job."""

from __future__ import annotations

import argparse
from dataclasses import replace

from lmfast.commands.options import COUNT, NATURAL, typed_text
from lmfast.commands.typed import refuse_typed
from lmfast.demo.run import run_demo
from lmfast.demo.settings import DemoSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    default = DemoSettings()
    parser.description = (
        "Train a tokenizer, a recurrent model and a Transformer on real text, then take the same "
        "steps with a plain textbook implementation of both, and compare: loss, perplexity, "
        "speed, memory. The text is the documentation found in the running interpreter unless "
        "--data names other files. About three minutes on two cores."
    )
    parser.add_argument("--data", nargs="+", metavar="FILE", default=[], help="UTF-8 text files")
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="where results go")
    parser.add_argument(
        "--vocab-size",
        type=COUNT,
        default=default.vocab_size,
        metavar="N",
        help="tokens of the tokenizer",
    )
    parser.add_argument("--steps", type=COUNT, default=default.steps, metavar="N", help="per model")
    parser.add_argument(
        "--batch-size", type=COUNT, default=default.batch_size, metavar="N", help="windows per step"
    )
    parser.add_argument(
        "--context", type=COUNT, default=default.context, metavar="N", help="tokens per window"
    )
    parser.add_argument(
        "--new-tokens",
        type=COUNT,
        default=default.new_tokens,
        metavar="N",
        help="tokens to generate",
    )
    parser.add_argument(
        "--prompt", default=default.prompt, metavar="TEXT", help="what the samples continue"
    )
    parser.add_argument(
        "--seed",
        type=NATURAL,
        default=default.seed,
        metavar="N",
        help="of parameters and order of the text",
    )
    parser.add_argument(
        "--precision",
        choices=["highest", "high", "medium"],
        default=default.precision,
        help="of fp32 matrix products in both implementations; medium uses bf16",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, only to see that everything works"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo; 1 if the two implementations do not learn the same."""
    if options.quick:
        sizes = ["vocab_size", "steps", "batch_size", "context", "new_tokens", "precision"]
        refuse_typed(options, sizes, "has no effect beside --quick: leave one of them out")
        settings = replace(DemoSettings().quick(), seed=options.seed)
    else:
        settings = replace(
            DemoSettings(),
            vocab_size=options.vocab_size,
            steps=options.steps,
            batch_size=options.batch_size,
            context=options.context,
            new_tokens=options.new_tokens,
            seed=options.seed,
            precision=options.precision,
        )
    settings = replace(settings, prompt=typed_text(options.prompt, "--prompt"))
    figures = run_demo(options.out, settings, options.data)
    if not figures["losses_agree"]:
        raise RuntimeError(
            "the losses of lmfast and textbook differ by more than rounding: "
            f"{figures['largest_difference']}"
        )
    return 0
