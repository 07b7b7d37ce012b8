"""Which options were typed: an option without effect is refused, also one typed as it is anyway."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence


def typed_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> frozenset[str]:
    """Return the attributes of the options that are in some arguments which the parser has taken.

    The parser's own options, not those of parsers inside it; it has no defaults afterwards.
    """
    options = [action for action in parser._actions if action.option_strings]
    for action in options:
        action.default = argparse.SUPPRESS
    found, _ = parser.parse_known_args(arguments)
    return frozenset(action.dest for action in options if hasattr(found, action.dest))


def as_typed(options: argparse.Namespace, name: str) -> str:
    """Return an option as it stands on a command line, with its value unless it is a switch."""
    value, option = getattr(options, name), f"--{name.replace('_', '-')}"
    if isinstance(value, bool) or value is None:
        return option
    return " ".join([option, *map(str, value if isinstance(value, list) else [value])])


def refuse_typed(options: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise ValueError, which names the first of some options that was typed, if one was."""
    for name in names:
        if name in options.typed:
            raise ValueError(f"{as_typed(options, name)} {reason}")
