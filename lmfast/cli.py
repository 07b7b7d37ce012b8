"""The command line: `lmfast COMMAND`, the same as `python -m lmfast COMMAND`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lmfast.commands.formatting import HelpFormatter
from lmfast.commands.typed import typed_options

# The module of a command is imported when it is the one that runs.
_COMMANDS = {
    "demo": "train and compare both models on real text: the main job",
    "train": "train a model on text files",
    "finetune": "teach a trained model to answer prompts, whole or by low-rank updates",
    "generate": "continue a prompt with a trained model",
    "chat": "talk with a model, line by line",
    "tokenizer": "train, apply and invert a tokenizer",
    "info": "print versions, processor features and the table of operators and backends",
    "bench": "time the operators against plain PyTorch",
    "profile": "show where a training step spends its time",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 is success, 1 an error of the input or the run, told in one line on stderr, 2 a wrong command
    line, 130 Ctrl-C, 143 SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows a "?"
            stream.reconfigure(errors="replace")
    parser = _parser(arguments[0] if arguments else None)
    options, unknown = parser.parse_known_args(arguments)
    command = vars(options).pop("parser")  # no option: a run keeps those in a file
    if unknown:
        _refuse(unknown, command)
    options.typed = typed_options(command, arguments[1:])
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("lmfast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, RuntimeError, ImportError, MemoryError) as error:
        if options.traceback:
            raise
        print(f"lmfast {options.command}: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmfast",
        description="Language models that train and generate fast on a CPU or one NVIDIA GPU.",
        epilog="lmfast COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=HelpFormatter,
        )
        if name == chosen:
            module = importlib.import_module(f"lmfast.commands.{name}")
            module.add_arguments(command)
            command.add_argument(
                "--traceback", action="store_true", help="show where an error comes from"
            )
            command.set_defaults(run=module.run, parser=command)
    return parser


def _refuse(unknown: list[str], command: argparse.ArgumentParser) -> NoReturn:
    """End as argparse does, with the usage of the command and the options that look alike."""
    known = [name for action in command._actions for name in action.option_strings]
    names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    alike = [near for name in names for near in difflib.get_close_matches(name, known, 1)]
    hint = f"; did you mean {' and '.join(alike)}?" if alike else ""
    command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        import lmfast

        print(f"lmfast {lmfast.__version__}")
        parser.exit()


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error) or type(error).__name__
    return " ".join(text.split())
