"""The demo's text: the documentation that every Python interpreter carries."""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests hold no documentation, and what is installed beside the library is not the same everywhere.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def interpreter_documentation(max_characters: int = 2_000_000) -> str:
    """Return the language reference's topics and the standard library's docstrings as one text.

    The sources are parsed, not imported, so nothing runs. Entries come in an order shuffled by a
    fixed seed, so that the end of the text, which is held out for evaluation, is of the same kind
    as the rest.

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
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: list[tuple[str, str] | Path] = [*_topics(), *_modules(root)]
    order = random.Random(0)
    order.shuffle(sources)
    entries: dict[str, str] = {}  # by text: the same one may stand in several places
    size = 0
    for source in sources:
        for name, text in _docstrings(root, source) if isinstance(source, Path) else [source]:
            if size < max_characters and text not in entries:
                entries[text] = f"{name}\n\n{text}\n\n\n"
                size += len(entries[text])
        if size >= max_characters:
            break
    if not entries:
        raise ValueError("this interpreter comes without documentation: give a text with --data")
    chosen = list(entries.values())
    order.shuffle(chosen)
    return "".join(chosen)


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return
    for name in sorted(topics):
        yield name, topics[name].strip()


def _modules(root: Path) -> list[Path]:
    """Return the library's source files, in an order that does not depend on the disk."""
    paths = sorted(root.rglob("*.py"))
    return [path for path in paths if not _SKIPPED.intersection(path.relative_to(root).parts)]


def _docstrings(root: Path, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of everything documented in one source file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a module's source deserves to be warned of
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    parts = path.relative_to(root).with_suffix("").parts
    yield from _documented(tree, ".".join(part for part in parts if part != "__init__"))


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
