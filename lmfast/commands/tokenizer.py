"""`lmfast tokenizer train|encode|decode`."""

from __future__ import annotations

import argparse
import sys
import time

from lmfast.commands.formatting import HelpFormatter
from lmfast.commands.options import COUNT, output_file, typed_text
from lmfast.tokenizer import BPETokenizer
from lmfast.training import SPECIAL_TOKENS, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser(
        "train", help="learn merges from text files", formatter_class=HelpFormatter
    )
    train.add_argument("--data", nargs="+", metavar="FILE", required=True, help="UTF-8 text files")
    train.add_argument(
        "--out", type=output_file, required=True, metavar="FILE", help="tokenizer file to write"
    )
    train.add_argument(
        "--vocab-size", type=COUNT, default=16_000, metavar="N", help="tokens to end with"
    )
    train.add_argument(
        "--mode",
        choices=["byte", "char"],
        default="byte",
        help="byte: any text, lossless; char: words of known characters, as in textbooks",
    )
    encode = actions.add_parser("encode", help="text to ids", formatter_class=HelpFormatter)
    encode.add_argument("--tokenizer", required=True, metavar="FILE")
    encode.add_argument("text", nargs="?", help="standard input if not given, or -")
    decode = actions.add_parser("decode", help="ids to text", formatter_class=HelpFormatter)
    decode.add_argument("--tokenizer", required=True, metavar="FILE")
    decode.add_argument("ids", nargs="*", metavar="ID", help="standard input if not given")


def run(options: argparse.Namespace) -> int:
    """Run one action."""
    return {"train": _train, "encode": _encode, "decode": _decode}[options.action](options)


def _train(options: argparse.Namespace) -> int:
    texts = [read_text(path) for path in options.data]
    if not any(text.strip() for text in texts):
        raise ValueError(f"there is no text in {', '.join(options.data)}")
    started = time.perf_counter()
    tokenizer = BPETokenizer.train(
        texts, options.vocab_size, mode=options.mode, special_tokens=SPECIAL_TOKENS
    )
    seconds = time.perf_counter() - started
    tokenizer.save(options.out)
    size = sum(len(text) for text in texts)
    learnt = f"{tokenizer.vocab_size:,} tokens from {size:,} characters"
    print(f"{options.out}: {learnt} in {seconds:.2f} s")
    if tokenizer.vocab_size < options.vocab_size:
        print(f"the text has no more than {tokenizer.vocab_size:,} tokens to learn")
    elif tokenizer.vocab_size > options.vocab_size + len(SPECIAL_TOKENS):
        print(f"the text has more characters than --vocab-size {options.vocab_size:,}: no merges")
    return 0


def _encode(options: argparse.Namespace) -> int:
    tokenizer = BPETokenizer.load(options.tokenizer)
    if options.text in (None, "-"):
        data = sys.stdin.buffer.read()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"standard input is not UTF-8 text: byte 0x{data[error.start]:02x} "
                f"at position {error.start}"
            ) from None
    else:
        text = typed_text(options.text, "the text")
    print(" ".join(str(i) for i in tokenizer.encode(text)))
    return 0


def _decode(options: argparse.Namespace) -> int:
    tokenizer = BPETokenizer.load(options.tokenizer)
    ids = []
    for word in options.ids or sys.stdin.read().split():
        if not word.isdecimal() or int(word) >= tokenizer.vocab_size:
            raise ValueError(f"ids must be in 0..{tokenizer.vocab_size - 1}, got {word}")
        ids.append(int(word))
    print(tokenizer.decode(ids))
    return 0
