"""What may import what: each part only those above it in the list, also inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lmfast

ROOT = Path(lmfast.__file__).parent
# From the bottom up; parts of one line do not know each other.
LAYERS = (
    ("_compressed", "_variables"),
    ("_allocator", "_extension", "_measured", "_sharding", "_table", "_transforms", "_version"),
    ("testing", "tokenizer"),
    ("_dispatch",),
    ("ops",),
    ("cache", "triton"),
    ("nn",),
    ("models", "patching"),
    ("generation", "training"),
    ("integrations",),
    ("_info",),
    ("lmfast",),  # the package itself: its names are for those who use it
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(ROOT.rglob("*.py"))


def part_of(file: Path) -> str:
    first = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return "lmfast" if first == "__init__" else first


def imported(file: Path) -> set[str]:
    """The parts of this package that a file names in an import."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names if name.split(".")[0] == "lmfast"]
    return {p[1] if len(p) > 1 and p[1] in RANK else "lmfast" for p in parts}


def test_every_part_has_its_layer() -> None:
    assert {part_of(file) for file in FILES} == RANK.keys()


@pytest.mark.parametrize("part", RANK)
def test_imports_go_down(part: str) -> None:
    wrong = {
        f"{file.relative_to(ROOT)} imports {other}"
        for file in FILES
        if part_of(file) == part
        for other in imported(file) - {part}
        if RANK[other] >= RANK[part]
    }
    assert not wrong
