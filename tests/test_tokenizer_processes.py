"""Training seen from outside the process: Ctrl-C, peak memory, counting on several workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizer_support import needs_engine

ROOT = Path(__file__).parents[1]


def run(code: str, *arguments: str) -> str:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


# Tens of GB of text and a TB of words without the memory, and a word whose first merges alone take
# minutes: none is done before the signal comes.
CORPORA = {
    "counting": 'corpus, pattern = ["some words of a text\\n" * 25_000] * 65_000, "gpt2"',
    "counting one word": 'corpus, pattern = [("ab" * 250_000)] * 2_000_000, None',
    "merging": "corpus, pattern = [random.Random(1).randbytes(40_000_000)], None",
}


@needs_engine
@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
@pytest.mark.parametrize("what", CORPORA)
def test_ctrl_c(what):
    code = f"""
import os, random, signal, threading
from lmfast.tokenizer import BPETokenizer
signal.signal(signal.SIGINT, signal.default_int_handler)
{CORPORA[what]}
threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    BPETokenizer.train(corpus, 200_000, pattern=pattern)
except KeyboardInterrupt:
    print("interrupted")
again = BPETokenizer.train(["ab ab abc"], 300)
print(again.decode(again.encode("ab abc")))
"""
    assert run(code).split("\n")[:2] == ["interrupted", "ab abc"]


@needs_engine
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory")
def test_files_are_streamed(tmp_path):
    """Six times the file takes no more memory, to within a quarter of what it has more."""
    block = "".join(f"word{i} " for i in range(1000)) * 1000 + "\n"
    for name, blocks in ("small", 6), ("large", 36):
        with open(tmp_path / name, "w") as file:
            for _ in range(blocks):
                file.write(block)
    code = """
import pathlib, sys
from lmfast.tokenizer import BPETokenizer
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
for name in sys.argv[1:]:
    BPETokenizer.train(pathlib.Path(name), 500)
    print(peak())
"""
    small, large = map(int, run(code, str(tmp_path / "small"), str(tmp_path / "large")).split())
    more = ((tmp_path / "large").stat().st_size - (tmp_path / "small").stat().st_size) / 1024
    assert more > 200_000
    assert large - small < more / 4


def test_counting_with_dask(tmp_path):
    """The example of count_words."""
    pytest.importorskip("dask.bag")
    books = tmp_path / "books"
    books.mkdir()
    for i, text in enumerate(["a cat sat\n", "the cat ran\n", "a dog sat\n"]):
        (books / f"{i}.txt").write_text(text * 10)
    script = tmp_path / "example.py"
    documented = __import__("lmfast").tokenizer.count_words.__doc__.split("reads::")[1]
    lines = documented.split("Raises:")[0].splitlines()
    code = "\n".join(line.removeprefix(" " * 12) for line in lines)
    script.write_text(
        code.replace("32_000", "270") + "\n    print(dict(counts), tokenizer.merges)\n"
    )
    output = run(
        "import os, runpy, sys; os.chdir(sys.argv[1]); sys.path.insert(0, sys.argv[1]);"
        "runpy.run_path('example.py', run_name='__main__')",
        str(tmp_path),
    )
    assert "b' cat': 20" in output
    assert "[(b'a', b't')" in output
