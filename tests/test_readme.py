"""What the README and the docstrings show must run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import lmfast

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
# Modules of optional dependencies, and those whose examples need a machine of their own.
NOT_IMPORTED = tuple(
    f"lmfast.{name}"
    for name in (
        *("integrations", "generation.transformers", "triton"),
        *("__main__", "_bpe", "_cpu", "_cuda"),
    )
)
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(lmfast.__path__, "lmfast.")
    if not name.startswith(NOT_IMPORTED)
]


@pytest.mark.parametrize("block", BLOCKS, ids=[b.split("\n")[2][:40] for b in BLOCKS])
def test_readme_block_runs(
    block: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(block, str(README), "exec"), {})
    for line in block.splitlines():
        if line.startswith("print(") and "# " in line:
            assert line.split("# ", 1)[1].strip() in capsys.readouterr().out


def test_the_readme_has_the_blocks_it_should() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0


def test_every_public_operator_has_a_complete_docstring() -> None:
    for name in lmfast.ops.__all__:
        text = getattr(lmfast.ops, name).__doc__ or ""
        for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
            assert part in text, f"{name} lacks {part}"
