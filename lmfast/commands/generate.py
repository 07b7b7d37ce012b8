"""`lmfast generate`: continue a prompt."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from lmfast.commands.options import (
    COUNT,
    NATURAL,
    POSITIVE,
    SHARE,
    add_machine_options,
    apply_machine_options,
    load_tokenizer,
    number,
    typed_text,
)
from lmfast.generation import generate
from lmfast.tokenizer import BPETokenizer
from lmfast.training import load_model
from lmfast.training.memory import peak_bytes

_DRAWING = ("temperature", "top_k", "top_p", "min_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = (
        "The likeliest token is taken at every step unless --sample, --temperature, --top-k, "
        "--top-p or --min-p is given. Advice on temperature: 0.1-0.3 focused, 0.7-0.8 balanced, "
        "1.5-2 diverse."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="of train or demo")
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="text to continue; - reads standard input"
    )
    parser.add_argument(
        "--max-new-tokens", type=NATURAL, default=100, metavar="N", help="tokens to add"
    )
    parser.add_argument(
        "--samples", type=COUNT, default=1, metavar="N", help="continuations to print"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument("--stats", action="store_true", help="print speed and memory to stderr")
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument("--sample", action="store_true", help="draw instead of the likeliest")
    drawing.add_argument("--temperature", type=POSITIVE, metavar="T", help="above 0 (default: 1)")
    drawing.add_argument(
        "--top-k", type=NATURAL, metavar="K", help="of the K likeliest; 0 = all (default: 50)"
    )
    drawing.add_argument(
        "--top-p",
        type=number(float, 0, above=True, highest=1),
        metavar="P",
        help="of the likeliest that together have probability P",
    )
    drawing.add_argument(
        "--min-p", type=SHARE, metavar="P", help="of those at least P times as likely as the best"
    )
    drawing.add_argument(
        "--repetition-penalty",
        type=POSITIVE,
        default=1.0,
        metavar="X",
        help="divides (positive) and multiplies (negative) logits of tokens generated before",
    )
    drawing.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtracted for every time a token was generated",
    )
    drawing.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtracted once a token was generated",
    )
    drawing.add_argument("--seed", type=NATURAL, metavar="N", help="makes drawing reproducible")
    add_machine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Generate and print."""
    device = apply_machine_options(options)
    if options.stream and options.samples > 1:
        raise ValueError("--stream shows one continuation: leave out --samples")
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    text = typed_text(text, "the prompt")
    model = load_model(options.model, device=device)
    tokenizer = load_tokenizer(options.model)
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"the tokenizer of {options.model} has {tokenizer.vocab_size} tokens, "
            f"its model {model.vocab_size}"
        )
    ids = list(tokenizer.encode(text))
    if not ids:
        raise ValueError("the prompt is empty: a model continues at least one token")
    unknown = 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
    if unknown:
        print(f"note: {unknown} of {len(ids)} prompt tokens are unknown", file=sys.stderr)
    prompt = torch.tensor([ids] * options.samples, device=device)
    chosen = {name: getattr(options, name) for name in _DRAWING}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    generator = None
    if options.seed is not None:
        generator = torch.Generator(device).manual_seed(options.seed)
    printer = _Printer(tokenizer, ids, options.stop) if options.stream else None
    times = [time.perf_counter()]

    def on_token(new_ids: torch.Tensor) -> None:
        times.append(time.perf_counter())
        if printer is not None:
            printer.add(int(new_ids[0]))

    out = generate(
        model,
        prompt,
        options.max_new_tokens,
        do_sample=options.sample or bool(chosen),
        repetition_penalty=options.repetition_penalty,
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        stop_sequences=[list(tokenizer.encode(stop)) for stop in options.stop],
        generator=generator,
        on_token=on_token,
        **chosen,
    )
    if printer is not None:
        printer.close()
    else:
        texts = [_until(tokenizer.decode(row), options.stop, len(text)) for row in out.tolist()]
        print("\n\n".join(texts))
    if options.stats:
        _print_stats(times, options.samples, len(ids))
    return 0


def _until(text: str, stops: list[str], start: int) -> str:
    """Cut a text before the first stop text behind its prompt."""
    ends = [place for stop in stops if (place := text.find(stop, start)) >= 0]
    return text[: min(ends, default=len(text))]


def _print_stats(times: list[float], rows: int, prompt: int) -> None:
    steps = len(times) - 1
    line = f"{steps} steps of {rows} rows after {prompt} prompt tokens"
    if steps:
        line += f", first token after {(times[1] - times[0]) * 1e3:.1f} ms"
    if steps > 1:
        line += f", then {(steps - 1) * rows / (times[-1] - times[1]):,.0f} tokens/s"
    print(f"{line}, peak memory {peak_bytes() / 1e6:,.0f} MB", file=sys.stderr)


class _Printer:
    """Prints a text as it grows, and holds its end back while it may be part of a stop text."""

    def __init__(self, tokenizer: BPETokenizer, ids: list[int], stops: list[str]) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._text = self._decoder.push(ids)
        self._start = len(self._text)
        self._stops = stops
        self._held = max((len(stop) for stop in stops), default=1) - 1
        self._printed = 0
        self._show(self._start)

    def add(self, new_id: int) -> None:
        self._text += self._decoder.push(new_id)
        self._show(len(self._text) - self._held)

    def close(self) -> None:
        self._text += self._decoder.finish()
        self._show(len(self._text))
        print(flush=True)

    def _show(self, end: int) -> None:
        end = min(end, len(_until(self._text, self._stops, self._start)))
        if end > self._printed:
            print(self._text[self._printed : end], end="", flush=True)
            self._printed = end
