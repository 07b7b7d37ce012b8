"""What `lmfast generate` and `lmfast chat` have in common: options, models, printing, figures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lmfast.commands.options import COUNT, NATURAL, POSITIVE, SHARE, load_tokenizer, number
from lmfast.commands.typed import refuse_typed
from lmfast.generation import Generator, QuantisedWeights
from lmfast.generation.options import end_ids
from lmfast.generation.runner import WEIGHTS
from lmfast.generation.text import TextStream, until
from lmfast.training import load_model
from lmfast.training.memory import peak_bytes

_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_FINITE = number(float, -1e18)
_PROBABILITY = number(float, 0, above=True, highest=1)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model and of the choice of tokens."""
    parser.epilog = (
        "The likeliest token is taken at every step unless --sample, --temperature, --top-k, "
        "--top-p, --min-p or --typical-p is given. Advice on temperature: 0.1-0.3 focused, "
        "0.7-0.8 balanced, 1.5-2 diverse. A text ends before the tokenizer's <eos>, or where the "
        "configuration of transformers' models says."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="of train or demo, or of transformers"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="fp32", help="how the engine stores them"
    )
    parser.add_argument(
        "--group", type=COUNT, metavar="N", help="of int8 and int4: inputs that share a scale"
    )
    parser.add_argument(
        "--quantised",
        metavar="FILE",
        help="weights that QuantisedWeights.save wrote, in the place of --weights",
    )
    parser.add_argument(
        "--max-new-tokens", type=NATURAL, default=100, metavar="N", help="tokens to add"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it")
    parser.add_argument("--stats", action="store_true", help="print speed and memory to stderr")
    parser.add_argument(
        "--lookup",
        type=COUNT,
        metavar="N",
        help="try N tokens at once that followed the same words before: faster, same result",
    )
    parser.add_argument(
        "--context",
        choices=["error", "slide", "truncate"],
        default="error",
        help="what to do when the model's context is full",
    )
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument("--sample", action="store_true", help="draw instead of the likeliest")
    drawing.add_argument("--temperature", type=POSITIVE, metavar="T", help="above 0 (default: 1)")
    drawing.add_argument(
        "--top-k", type=NATURAL, metavar="K", help="of the K likeliest; 0 = all (default: 50)"
    )
    drawing.add_argument(
        "--top-p",
        type=_PROBABILITY,
        metavar="P",
        help="of the likeliest that together have probability P",
    )
    drawing.add_argument(
        "--min-p", type=SHARE, metavar="P", help="of those at least P times as likely as the best"
    )
    drawing.add_argument(
        "--typical-p",
        type=_PROBABILITY,
        metavar="P",
        help="of those nearest to the expected surprise that together have probability P",
    )
    drawing.add_argument(
        "--repetition-penalty",
        type=POSITIVE,
        default=1.0,
        metavar="X",
        help="divides (positive) and multiplies (negative) logits of tokens that occurred",
    )
    drawing.add_argument(
        "--frequency-penalty",
        type=_FINITE,
        default=0.0,
        metavar="X",
        help="subtracted for every time a token was generated",
    )
    drawing.add_argument(
        "--presence-penalty",
        type=_FINITE,
        default=0.0,
        metavar="X",
        help="subtracted once a token was generated",
    )
    drawing.add_argument("--seed", type=NATURAL, metavar="N", help="makes drawing reproducible")


def generation_arguments(
    options: argparse.Namespace, tokenizer: Any, device: torch.device
) -> dict[str, Any]:
    """The arguments of `Generator.generate` that were typed."""
    chosen = {name: getattr(options, name) for name in _DRAWING}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    generator = None
    if options.seed is not None:
        generator = torch.Generator(device).manual_seed(options.seed)
    return {
        "max_new_tokens": options.max_new_tokens,
        "do_sample": options.sample or bool(chosen),
        "repetition_penalty": options.repetition_penalty,
        "frequency_penalty": options.frequency_penalty,
        "presence_penalty": options.presence_penalty,
        "stop_strings": options.stop,
        "tokenizer": tokenizer,
        "generator": generator,
        "prompt_lookup_num_tokens": options.lookup,
        "context_policy": options.context,
        **chosen,
    }


def load_generator(
    options: argparse.Namespace, device: torch.device
) -> tuple[Generator, Any, list[int]]:
    """Return the generator of a model directory, its tokenizer, and the ids that end a text.

    Raises:
        ValueError: the directory holds no model or no tokenizer, or the two do not fit.
    """
    if _is_transformers(options.model):
        import transformers

        transformers.logging.set_verbosity_error()
        there = {"local_files_only": True}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, **there)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.model, **there)
        model = model.to(device).eval()
        ends = end_ids(model.generation_config, "auto")
    else:
        model = load_model(options.model, device=device)
        tokenizer = load_tokenizer(options.model)
        if tokenizer.vocab_size != model.vocab_size:
            raise ValueError(
                f"the tokenizer of {options.model} has {tokenizer.vocab_size} tokens, "
                f"its model {model.vocab_size}"
            )
        ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    weights: Any = options.weights
    if options.quantised is not None:
        refuse_typed(options, ["weights", "group"], "has no effect beside --quantised")
        weights = QuantisedWeights.load(options.quantised)
    return Generator(model, weights=weights, group=options.group), tokenizer, ends


def tell_unknown(tokenizer: Any, ids: Sequence[int], what: str) -> None:
    """Say how many of some ids stand for characters that the tokenizer does not know."""
    unk_id = getattr(tokenizer, "unk_id", None)
    if unknown := 0 if unk_id is None else list(ids).count(unk_id):
        print(f"note: {unknown} of {len(ids)} {what} are unknown", file=sys.stderr)


def before_end(ids: Sequence[int], ends: Sequence[int], start: int = 0) -> list[int]:
    """Cut ids before the first behind a place that ends a text."""
    stop = next((i for i in range(start, len(ids)) if ids[i] in ends), len(ids))
    return list(ids[:stop])


def _is_transformers(directory: str) -> bool:
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # load_model says what is wrong
        return False
    return isinstance(config, dict) and "model_type" in config


class Printer:
    """Prints a text as it grows, and holds its end back while it may be part of a stop text.

    Args:
        tokenizer: decodes.
        stops: texts before which printing ends.
        before: ids in front of the new ones, printed at once.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], before: Sequence[int] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self.text = "".join(self._stream.push(i) for i in before)
        self._start = len(self.text)
        self._stops = stops
        self._held = max((len(stop) for stop in stops), default=1) - 1
        self._printed = 0
        self._show(self._start)

    def add(self, new_id: int) -> None:
        """Take the next id."""
        self.text += self._stream.push(new_id)
        self._show(len(self.text) - self._held)

    def close(self) -> None:
        """Print what was held back, and end the line."""
        self.text += self._stream.finish()
        self._show(len(self.text))
        print(flush=True)

    def _show(self, end: int) -> None:
        end = min(end, len(until(self.text, self._stops, self._start)))
        if end > self._printed:
            print(self.text[self._printed : end], end="", flush=True)
            self._printed = end


class Clock:
    """When tokens came.

    Args:
        rows: tokens per step.
        prompt: tokens of the prompt.
    """

    def __init__(self, rows: int, prompt: int) -> None:
        self._rows, self._prompt = rows, prompt
        self._times = [time.perf_counter()]

    def tick(self) -> None:
        """A step is done."""
        self._times.append(time.perf_counter())

    def report(self, at_once: int | None = None) -> None:
        """Print time to the first token, speed and memory to stderr.

        Args:
            at_once: so many steps ended together, now, as those of beam search do.
        """
        times = self._times
        steps = len(times) - 1 if at_once is None else at_once
        line = f"{steps} steps of {self._rows} rows after {self._prompt} prompt tokens"
        if at_once is not None:
            took = time.perf_counter() - times[0]
            line += f", all after {took * 1e3:.1f} ms, {steps * self._rows / took:,.0f} tokens/s"
        elif steps:
            line += f", first token after {(times[1] - times[0]) * 1e3:.1f} ms"
        if at_once is None and steps > 1 and times[-1] > times[1]:
            rate = (steps - 1) * self._rows / (times[-1] - times[1])
            line += f", then {rate:,.0f} tokens/s"
        print(f"{line}, peak memory {peak_bytes() / 1e6:,.0f} MB", file=sys.stderr)
