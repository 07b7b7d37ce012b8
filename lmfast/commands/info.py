"""`lmfast info`: what this installation consists of."""

from __future__ import annotations

import argparse

import lmfast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(options: argparse.Namespace) -> int:
    """Print the report of `lmfast.info`."""
    print(lmfast.info())
    return 0
