"""The demo's text: the documentation that every Python interpreter carries."""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests hold no documentation, and what is installed beside the library is not the same everywhere.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def interpreter_documentation(max_characters: int = 2_000_000) -> str:
    """Return the language reference's topics and the standard library's docstrings as one text.

    The sources are parsed, not imported, so nothing runs. The order of the entries is shuffled by
    a fixed seed, so that the end of the text, which is held out for evaluation, is like the rest.

    Args:
        max_characters: entries are added until there are this many.

    Returns:
        The same text for the same interpreter version.

    Raises:
        ValueError: this interpreter comes without documentation.

    Example:
        >>> text = interpreter_documentation(20_000)
        >>> 20_000 <= len(text) < 200_000
        True
    """
    first_names: dict[str, str] = {}
    for name, text in (*_topics(), *_docstrings()):  # a text may stand in several places
        first_names.setdefault(text, name)
    entries = [(name, text) for text, name in first_names.items()]
    if not entries:
        raise ValueError("this interpreter comes without documentation: give a text with --data")
    random.Random(0).shuffle(entries)
    chosen, size = [], 0
    for name, text in entries:
        entry = f"{name}\n\n{text}\n\n\n"
        chosen.append(entry)
        size += len(entry)
        if size >= max_characters:
            break
    return "".join(chosen)


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return
    for name in sorted(topics):
        yield name, topics[name].strip()


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from _documented(tree, module)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, kinds):
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield name, inspect.cleandoc(text)
        for child in node.body:
            if isinstance(child, kinds[1:]):
                yield from _documented(child, f"{name}.{child.name}")
