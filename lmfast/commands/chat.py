"""`lmfast chat`: talk with a model, line by line."""

from __future__ import annotations

import argparse
import sys
from typing import Any

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
from lmfast.commands.options import add_machine_options, apply_machine_options, read_text
from lmfast.generation import Prefix
from lmfast.generation.text import encode, until
from lmfast.training.chat_format import CHATML, ChatFormat, load_chat_format

START, END = CHATML.special_tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    add_generation_options(parser)
    add_machine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Read lines and answer them until the input ends."""
    device = apply_machine_options(options)
    generator, tokenizer, ends = load_generator(options, device)
    taught = load_chat_format(options.model)
    talk = Conversation(tokenizer, options.system, taught)
    print(
        f"{talk.format}; Ctrl-C ends an answer, /reset begins anew, /quit or the end of the input "
        "ends",
        file=sys.stderr,
    )
    arguments = generation_arguments(options, tokenizer, device)
    ends = sorted({*talk.end_ids, *ends})
    stops = [*options.stop, *talk.end_texts]
    arguments |= {"eos_token_id": ends, "stop_strings": stops}
    prefix: Prefix | None = None
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = read_text(sys.stdin.readline, "the line")
        if not line or line.strip() == "/quit":
            print(file=sys.stderr)
            return 0
        if line.strip() == "/reset":
            talk, prefix = Conversation(tokenizer, options.system, taught), None
            continue
        line = line.rstrip("\n")
        if not line.strip():
            continue
        tell_unknown(tokenizer, encode(tokenizer, line), "tokens of the line")
        ids = talk.ask(line)
        if not ids:
            print("note: the line has no tokens", file=sys.stderr)
            continue
        clock = Clock(1, len(ids))
        prompt = torch.tensor([ids], device=device)
        # What was said before is not computed again; a context that is cut begins elsewhere.
        known = None
        printer = Printer(tokenizer, stops)
        new: list[int] = []
        try:
            if options.context == "error":
                known = prefix = generator.prefill(prompt, prefix=prefix)
            for step in generator.stream(prompt, prefix=known, **arguments):
                clock.tick()
                new.append(int(step[0]))
                if new[-1] not in ends:
                    printer.add(new[-1])
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print("(interrupted)", file=sys.stderr)
        printer.close()
        # An end of the model's own, behind the end of a turn or without one, is no part of it.
        talk.answer(new if new and new[-1] in talk.end_ids else before_end(new, ends))
        if options.stats:
            clock.report()


class Conversation:
    """What was said, as ids.

    The tokenizer's own template is used where it has one, ChatML where it has its tags, then the
    format the model was taught, and else the text simply goes on.

    Args:
        tokenizer: a `BPETokenizer` or one of transformers.
        system: the first turn, or None.
        taught: the format of `lmfast finetune`, or None.
    """

    def __init__(
        self, tokenizer: Any, system: str | None, taught: ChatFormat | None = None
    ) -> None:
        self._taught: ChatFormat | None = None
        self._tokenizer = tokenizer
        self._turns: list[dict[str, str]] = []
        self._ids: list[int] = []
        self.end_ids: list[int] = []
        self.end_texts: list[str] = []
        specials = getattr(getattr(tokenizer, "model", None), "special_tokens", {})
        if getattr(tokenizer, "chat_template", None):
            self.format = "the tokenizer's template"
            if tokenizer.eos_token_id is not None:
                self.end_ids = [tokenizer.eos_token_id]
            if system is not None:
                self._turns.append({"role": "system", "content": system})
        elif START in specials and END in specials and taught in (None, CHATML):
            self.format = "ChatML"
            self.end_ids = [specials[END]]
            if system is not None:
                self._ids = self._turn("system", system)
        elif taught is not None:
            self.format, self._taught = f"the format {taught.name}", taught
            self.end_texts = [taught.end] if taught.end else []
            if system is not None:
                self._turns.append({"role": "system", "content": system})
        else:
            self.format = "no template: the model continues the text"
            if system is not None:
                self._ids = encode(tokenizer, f"{system}\n")

    def ask(self, text: str) -> list[int]:
        """Add what was typed and return all ids up to where the answer begins."""
        if self.format == "the tokenizer's template":
            self._turns.append({"role": "user", "content": text})
            return list(
                self._tokenizer.apply_chat_template(
                    self._turns, add_generation_prompt=True, return_dict=False
                )
            )
        if self._taught is not None:
            self._turns.append({"role": "user", "content": text})
            return encode(self._tokenizer, self._taught.prompt(self._turns))
        if self.format == "ChatML":
            self._ids += [
                *self._turn("user", text),
                *encode(self._tokenizer, f"{START}assistant\n"),
            ]
        else:
            self._ids += encode(self._tokenizer, f"{text}\n")
        return list(self._ids)

    def answer(self, ids: list[int]) -> None:
        """Add what the model said."""
        if self.format == "the tokenizer's template":
            said = [i for i in ids if i not in self.end_ids]
            self._turns.append({"role": "assistant", "content": self._tokenizer.decode(said)})
            return
        if self._taught is not None:
            answer = until(self._tokenizer.decode(ids), self.end_texts)
            self._turns.append({"role": "assistant", "content": answer})
            return
        self._ids += ids
        if self.format == "ChatML":
            if not ids or ids[-1] not in self.end_ids:
                self._ids += self.end_ids
            self._ids += encode(self._tokenizer, "\n")
        else:
            self._ids += encode(self._tokenizer, "\n")

    def _turn(self, role: str, text: str) -> list[int]:
        # Tags in the text are text: they are no way to end a turn.
        inner = self._tokenizer.encode(text, allowed_special=set(), disallowed_special=set())
        head, tail = (
            encode(self._tokenizer, f"{START}{role}\n"),
            encode(self._tokenizer, f"{END}\n"),
        )
        return [*head, *inner, *tail]
