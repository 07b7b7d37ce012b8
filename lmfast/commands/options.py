"""Options that several commands have, and checks of what was typed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from lmfast.tokenizer import BPETokenizer

_LARGEST = 1e18  # what numbers without a limit of their own may be


def number(
    kind: Callable[[str], int | float],
    lowest: float,
    *,
    above: bool = False,
    highest: float = _LARGEST,
) -> Callable[[str], int | float]:
    """Return an argparse type that takes numbers in a range, and says so when one is not."""
    word = "whole number" if kind is int else "number"
    wanted = f"a {word} {'above' if above else 'of at least'} {lowest:g}"
    if highest < _LARGEST:
        wanted += f" and at most {highest:g}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not (lowest < value if above else lowest <= value) or not value <= highest:
            limit = f" and at most {highest:g}" if value > highest == _LARGEST else ""
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}{limit}")
        return value

    return parse


COUNT = number(int, 1)
NATURAL = number(int, 0)
POSITIVE = number(float, 0, above=True)
SHARE = number(float, 0, highest=1)
# Every thread has a stack: OpenMP ends the process where it cannot have as many as were asked for.
_THREADS = number(int, 1, highest=4096)


def output_file(text: str) -> str:
    """An argparse type: a file that can be written, found out before the work and not after it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory, not a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: no directory {path.parent}")
    return text


def add_machine_options(parser: argparse.ArgumentParser, *, auto: bool = False) -> None:
    """Add --device, --threads and --precision; `auto`: the device is a GPU where there is one."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto" if auto else "cpu",
        metavar="NAME",
        help="cpu, cuda or cuda:INDEX" + (", auto = a GPU if there is one" if auto else ""),
    )
    group.add_argument(
        "--threads", type=_THREADS, metavar="N", help="CPU threads (default: PyTorch's choice)"
    )
    group.add_argument(
        "--precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="of fp32 matrix products, as torch.set_float32_matmul_precision; medium uses bf16",
    )


def apply_machine_options(options: argparse.Namespace) -> torch.device:
    """Set threads and precision, and return the device.

    Raises:
        ValueError: there is no such device here.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.precision)
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {options.device} cannot be used: {reason}") from None
    if device.type == "meta":
        raise ValueError("--device meta cannot be used: its tensors hold no numbers")
    return device


def load_tokenizer(directory: str | Path) -> BPETokenizer:
    """Load the tokenizer of a model directory, or of the run its checkpoint belongs to.

    Raises:
        ValueError: there is none.
    """
    start = Path(directory).resolve()
    for place in (start, *start.parents[:2]):
        if (place / "tokenizer.json").is_file():
            return BPETokenizer.load(place / "tokenizer.json")
    raise ValueError(f"{directory} holds no tokenizer.json, nor does the run it belongs to")


def read_text(read: Callable[[], str], name: str) -> str:
    """Return what a method of standard input reads.

    Raises:
        ValueError: it holds bytes that are no UTF-8.
    """
    try:
        return typed_text(read(), name)
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None


def typed_text(text: str, name: str) -> str:
    """Return a text from the command line.

    Raises:
        ValueError: it holds bytes that are no UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None
    return text
