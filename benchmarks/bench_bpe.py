"""The tokenizer against gigatoken, tiktoken and Hugging Face tokenizers, in one process.

Texts: WikiText-2 and Shakespeare (3.5 MB), eight times that, and the standard library's source,
with GPT-2's vocabulary. One thread for all. Cold: a tokenizer that has encoded nothing yet, made
outside the measured time. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from lmfast import BPETokenizer
from lmfast.tokenizer.patterns import PUBLISHED

DATA = Path(os.environ.get("LMFAST_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
FILES = ("wikitext2.valid.txt", "wikitext2.test.txt", "tinyshakespeare.txt")

pytestmark = pytest.mark.skipif(
    not (DATA / "gpt2.vocab.bpe").exists(), reason=f"{DATA} is absent; set LMFAST_TEST_DATA"
)


@functools.lru_cache(maxsize=4)
def text_of(name: str) -> str:
    if name == "english":
        return "".join((DATA / f).read_text(encoding="utf-8") for f in FILES)
    if name == "english x8":
        return text_of("english") * 8
    library = Path(sysconfig.get_paths()["stdlib"])
    if name == "code":
        return "".join(map(read, sorted(library.glob("*.py"))))
    # The standard library, and from what is installed beside it as much as is wanted.
    text, wanted = [], 16_000_000
    for path in sorted(library.rglob("*.py")):
        text.append(read(path)[: max(wanted, 0)])
        wanted -= len(text[-1])
        if wanted <= 0:
            break
    return "".join(text)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@functools.lru_cache(maxsize=1)
def ours() -> BPETokenizer:
    return BPETokenizer.from_gpt2(DATA / "gpt2.encoder.json", DATA / "gpt2.vocab.bpe")


def peers(folder: Path) -> dict[str, Any]:
    """Those that are installed, with the same vocabulary."""
    found: dict[str, Any] = {}
    try:
        found["tokenizers"] = ours().to_huggingface()
        found["tokenizers"].save(str(folder / "tokenizer.json"))
        import gigatoken

        found["gigatoken"] = gigatoken.Tokenizer(str(folder / "tokenizer.json"))
    except ImportError:
        pass
    try:
        import tiktoken

        ranks = {t: i for i, t in enumerate(ours().model.tokens) if t is not None}
        found["tiktoken"] = tiktoken.Encoding(
            "gpt2", pat_str=PUBLISHED["gpt2"], mergeable_ranks=ranks, special_tokens={}
        )
    except ImportError:
        pass
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="session")
def installed(folder: Path) -> dict[str, Any]:
    return peers(folder)


def calls(found: dict[str, Any], **method: Callable[[Any], Any]) -> dict[str, Callable[[], Any]]:
    return {
        name: functools.partial(call, found[name]) for name, call in method.items() if name in found
    }


@pytest.mark.parametrize("name", ["english", "english x8", "code"])
def bench_encode_to_numpy(compare: Any, installed: dict[str, Any], name: str) -> None:
    text = text_of(name)
    others = calls(installed, gigatoken=lambda g: g.encode(text))
    compare(
        f"encode to numpy, {name}",
        lambda: ours().encode_numpy(text),
        others,
        moved=len(text.encode()),
    )


def bench_encode_to_list(compare: Any, installed: dict[str, Any]) -> None:
    text = text_of("english")
    others = calls(
        installed,
        gigatoken=lambda g: g.encode(text).tolist(),
        tiktoken=lambda t: t.encode_ordinary(text),
        tokenizers=lambda t: t.encode(text).ids,
    )
    compare("encode to list", lambda: ours().encode(text), others, moved=len(text.encode()))


def bench_encode_cold(compare: Any, installed: dict[str, Any], folder: Path) -> None:
    """A new tokenizer for every round, made before."""
    text, rounds = text_of("english"), 8
    fresh = [BPETokenizer(ours().model) for _ in range(2 * rounds)]
    for tokenizer in fresh:
        tokenizer.encode("")
    others = {}
    if "gigatoken" in installed:
        import gigatoken

        cold = [gigatoken.Tokenizer(str(folder / "tokenizer.json")) for _ in range(2 * rounds)]
        others["gigatoken"] = lambda: cold.pop().encode(text)
    compare(
        "encode cold",
        lambda: fresh.pop().encode_numpy(text),
        others,
        moved=len(text.encode()),
        rounds=rounds,
    )


def bench_encode_a_short_document(compare: Any, installed: dict[str, Any]) -> None:
    text = text_of("english")[1000:1696]
    others = calls(
        installed,
        gigatoken=lambda g: g.encode(text).tolist(),
        tiktoken=lambda t: t.encode_ordinary(text),
        tokenizers=lambda t: t.encode(text).ids,
    )
    compare("encode 696 characters to list", lambda: ours().encode(text), others)


def bench_encode_a_batch_of_lines(compare: Any, installed: dict[str, Any]) -> None:
    lines = text_of("english").splitlines(keepends=True)[:10_000]
    others = calls(
        installed,
        gigatoken=lambda g: g.encode_batch(lines, parallel=False),
        tiktoken=lambda t: t.encode_ordinary_batch(lines, num_threads=1),
        tokenizers=lambda t: t.encode_batch_fast(lines),
    )
    compare(
        "encode a batch of 10,000 lines",
        lambda: ours().encode_batch(lines, threads=1, flat=True),
        others,
        moved=sum(len(line.encode()) for line in lines),
    )


def bench_decode(compare: Any, installed: dict[str, Any]) -> None:
    text = text_of("english")
    array = ours().encode_numpy(text)
    ids = array.tolist()
    others = calls(
        installed,
        gigatoken=lambda g: g.decode(array),
        tiktoken=lambda t: t.decode(ids),
        tokenizers=lambda t: t.decode(ids),
    )
    compare("decode to str", lambda: ours().decode(array), others, moved=len(text.encode()))


def bench_count(compare: Any, installed: dict[str, Any]) -> None:
    text = text_of("english")
    others = calls(
        installed,
        gigatoken=lambda g: len(g.encode(text)),
        tiktoken=lambda t: len(t.encode_ordinary(text)),
    )
    compare("count", lambda: ours().count(text), others, moved=len(text.encode()))


@pytest.mark.parametrize(
    "piece", ["a" * 1_000_000, "".join(map(chr, range(0x4E00, 0x9E00))) * 10], ids=["one", "cjk"]
)
def bench_one_long_piece(compare: Any, installed: dict[str, Any], piece: str) -> None:
    others = calls(installed, gigatoken=lambda g: g.encode(piece))
    compare(f"one piece of {len(piece)}", lambda: ours().encode_numpy(piece), others)


def train_with_tokenizers(lines: list[str], size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)


@pytest.mark.parametrize("corpus", ["english", "code 16 MB"])
@pytest.mark.parametrize("size", [5000, 32_000])
def bench_train(compare: Any, size: int, corpus: str) -> None:
    """One thread each; the peer's own threads are in bench_train_on_all_threads."""
    pytest.importorskip("tokenizers")
    lines = text_of(corpus).splitlines(keepends=True)
    compare(
        f"train V={size}, {corpus}",
        lambda: BPETokenizer.train(lines, size, tie_break="ids", threads=1),
        {"tokenizers": lambda: train_with_tokenizers(lines, size)},
        rounds=3,
    )


@pytest.mark.parametrize("size", [5000, 32_000])
def bench_train_on_all_threads(
    size: int, capsys: pytest.CaptureFixture[str], benchmark: Any
) -> None:
    """In a process of its own: tokenizers reads the number of threads once."""
    pytest.importorskip("tokenizers")
    seconds = json.loads(in_new_process(f"json.dumps(bench_bpe.on_all_threads({size}))"))
    with capsys.disabled():
        ours, theirs = (statistics.median(seconds[k]) * 1e3 for k in ("lmfast", "tokenizers"))
        print(f"\ntrain V={size}, english, all threads: {ours:.1f} ms, x{theirs / ours:.1f}")
    benchmark.pedantic(lambda: None)


def on_all_threads(size: int) -> dict[str, list[float]]:
    """Seconds of five trainings each, in turn."""
    os.environ.pop("RAYON_NUM_THREADS", None)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    lines = text_of("english").splitlines(keepends=True)
    work = {
        "tokenizers": lambda: train_with_tokenizers(lines, size),
        "lmfast": lambda: BPETokenizer.train(lines, size, tie_break="ids"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(5):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def bench_train_characters(compare: Any) -> None:
    """Against the textbook loop, which recounts all pairs in every round."""
    text = text_of("english")[:200_000]

    def train(backend: str) -> BPETokenizer:
        return BPETokenizer.train([text], 200, mode="char", backend=backend)

    compare(
        "train characters, V=200 on 200 kB",
        lambda: train("cpu"),
        {"textbook loop": lambda: train("reference")},
        rounds=3,
    )


def in_new_process(expression: str) -> str:
    """What the expression over this module prints as."""
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]);"
        f"import bench_bpe; print({expression})"
    )
    path = json.dumps([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    return result.stdout


@pytest.mark.parametrize("what", ["encode", "train", "train with tokenizers"])
def bench_peak_memory(what: str, capsys: pytest.CaptureFixture[str], benchmark: Any) -> None:
    """Megabytes that encoding or training adds to a process that has the text."""
    megabytes = float(in_new_process(f"bench_bpe.memory_of({what!r})"))
    with capsys.disabled():
        print(f"\npeak memory, {what}: {megabytes:.0f} MB")
    benchmark.pedantic(lambda: None)


def memory(entry: str) -> float:
    """Megabytes: VmRSS now, VmHWM at most since the last reset. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def memory_of(what: str) -> float:
    """Megabytes added to this process by one encoding or one training."""
    lines = text_of("english").splitlines(keepends=True)
    tokenizer = ours() if what == "encode" else None
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    if tokenizer is not None:
        tokenizer.encode_numpy(text_of("english"))
    elif what == "train":
        BPETokenizer.train(lines, 32_000)
    else:
        train_with_tokenizers(lines, 32_000)
    return memory("VmHWM") - before
