"""How --help is laid out."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.HelpFormatter):
    """Shows a default where there is one: not for switches, nor for what is off or left open."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        default = action.default
        silent = default in (None, False, argparse.SUPPRESS) or default in ([], "")
        if silent or "%(default)" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"
