"""The tokenizer against gigatoken, tiktoken and Hugging Face tokenizers, in one process.

Texts: WikiText-2 and Shakespeare (3.5 MB), eight times that, and 16 MB of Python source, with
GPT-2's vocabulary. One thread for all. Cold: a tokenizer that has encoded nothing yet, made outside
the measured time. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
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
    folders = [Path(sysconfig.get_paths()["stdlib"]), *sorted(Path("/usr/lib").glob("python3*"))]
    parts, size = [], 0
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(parts[-1])
        if size > 16_000_000:
            break
    return "".join(parts)


def distinct_words(alphabet: str, least: int, most: int) -> str:
    draw, words = random.Random(0), dict[str, None]()
    while len(words) < 200_000:
        words["".join(draw.choices(alphabet, k=draw.randint(least, most)))] = None
    return " ".join(words)


def letters(alphabet: str, count: int = 1_000_000) -> str:
    return "".join(random.Random(1).choices(alphabet, k=count))


LATIN = "abcdefghijklmnopqrstuvwxyz"
CYRILLIC = "абвгдежзиклмнопрстуфхцчшыьэюя"
# What a cache of words or a merge by pieces finds hard.
HARD: dict[str, Callable[[], str]] = {
    "one letter, 1 MB": lambda: "a" * 1_000_000,
    "spaces, 1 MB": lambda: " " * 1_000_000,
    "random letters, 1 MB": lambda: letters(LATIN),
    "random digits, 1 MB": lambda: letters("0123456789"),
    "ideographs without spaces, 1 MB": lambda: "".join(map(chr, range(0x4E00, 0x9E00))) * 16,
    "one word of 10 MB": lambda: letters("etaoinshrdlu", 10_000_000),
    "200,000 Cyrillic words": lambda: distinct_words(CYRILLIC, 8, 20),
    "200,000 short Cyrillic words": lambda: distinct_words(CYRILLIC, 4, 7),
    "200,000 Latin words": lambda: distinct_words(LATIN, 5, 14),
    "200,000 long Latin words": lambda: distinct_words(LATIN, 16, 40),
}


@functools.lru_cache(maxsize=1)
def ours() -> BPETokenizer:
    return BPETokenizer.from_gpt2(DATA / "gpt2.encoder.json", DATA / "gpt2.vocab.bpe")


def _tokenizers(folder: str | Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def _gigatoken(folder: str | Path) -> Any:
    import gigatoken

    return gigatoken.Tokenizer(str(Path(folder) / "tokenizer.json"))


def _tiktoken() -> Any:
    import tiktoken

    ranks = {t: i for i, t in enumerate(ours().model.tokens) if t is not None}
    return tiktoken.Encoding(
        "gpt2", pat_str=PUBLISHED["gpt2"], mergeable_ranks=ranks, special_tokens={}
    )


def peers(folder: Path) -> dict[str, Any]:
    """Those that are installed, with the same vocabulary."""
    found: dict[str, Any] = {}
    with contextlib.suppress(ImportError):
        ours().to_huggingface().save(str(folder / "tokenizer.json"))
        found["tokenizers"] = _tokenizers(folder)
        found["gigatoken"] = _gigatoken(folder)
    with contextlib.suppress(ImportError):
        found["tiktoken"] = _tiktoken()
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
    compare(
        "encode to list",
        lambda: ours().encode(text),
        others,
        moved=len(text.encode()),
        rounds=5,
    )


def compare_first_passes(
    compare: Any, found: dict[str, Any], folder: Path, name: str, text: str, rounds: int
) -> None:
    """A new tokenizer for every round, made before."""
    fresh = [BPETokenizer(ours().model) for _ in range(rounds + 2)]
    for tokenizer in fresh:
        tokenizer.encode("")
    others = {}
    if "gigatoken" in found:
        cold = [_gigatoken(folder) for _ in range(rounds + 2)]
        others["gigatoken"] = lambda: cold.pop().encode(text)
    compare(
        name,
        lambda: fresh.pop().encode_numpy(text),
        others,
        moved=len(text.encode()),
        rounds=rounds,
    )


@pytest.mark.parametrize("name", ["english", "code"])
def bench_encode_cold(compare: Any, installed: dict[str, Any], folder: Path, name: str) -> None:
    text = text_of(name)
    compare_first_passes(compare, installed, folder, f"encode cold, {name}", text, 9)


@pytest.mark.parametrize("name", HARD)
def bench_hard_texts_cold(compare: Any, installed: dict[str, Any], folder: Path, name: str) -> None:
    rounds = 1 if "10 MB" in name else 5
    compare_first_passes(compare, installed, folder, f"{name}, cold", HARD[name](), rounds)


@pytest.mark.parametrize("name", HARD)
def bench_hard_texts_warm(compare: Any, installed: dict[str, Any], name: str) -> None:
    text = HARD[name]()
    others = calls(installed, gigatoken=lambda g: g.encode(text))
    compare(f"{name}, warm", lambda: ours().encode_numpy(text), others, rounds=11)


def bench_encode_a_short_document(compare: Any, installed: dict[str, Any]) -> None:
    """A thousand times, so that what ran before is out of the caches."""
    text = text_of("english")[1000:1696]

    def thousand(encode: Callable[[str], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(1000):
                encode(text)

        return run

    others = {}
    if "gigatoken" in installed:
        others["gigatoken"] = thousand(lambda t: installed["gigatoken"].encode(t).tolist())
    if "tiktoken" in installed:
        others["tiktoken"] = thousand(installed["tiktoken"].encode_ordinary)
    if "tokenizers" in installed:
        others["tokenizers"] = thousand(lambda t: installed["tokenizers"].encode(t).ids)
    compare("encode 696 characters to list, 1,000 times", thousand(ours().encode), others)


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
        tokenizers=lambda t: len(t.encode(text)),
    )
    compare("count", lambda: ours().count(text), others, moved=len(text.encode()), rounds=5)


def train_tokenizers(lines: list[str], size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)


@pytest.mark.parametrize("corpus", ["english", "code"])
@pytest.mark.parametrize("size", [5000, 32_000])
def bench_train(compare: Any, size: int, corpus: str) -> None:
    lines = text_of(corpus).splitlines(keepends=True)
    others = {}
    with contextlib.suppress(ImportError):
        import tokenizers  # noqa: F401

        others["tokenizers"] = lambda: train_tokenizers(lines, size)
    compare(
        f"train V={size}, {corpus}",
        lambda: BPETokenizer.train(lines, size, tie_break="ids", threads=1),
        others,
        rounds=3,
    )


@pytest.mark.parametrize("size", [5000, 32_000])
def bench_train_on_all_threads(size: int, keep: Any, benchmark: Any) -> None:
    """In a process of its own: tokenizers reads the number of threads once."""
    pytest.importorskip("tokenizers")
    seconds = json.loads(in_new_process(f"json.dumps(bench_bpe.on_all_threads({size}))"))
    row = {f"{k}_ms": statistics.median(s) * 1e3 for k, s in seconds.items()}
    keep({"name": f"train V={size}, english, all threads", **row})
    benchmark.pedantic(lambda: None)


def on_all_threads(size: int) -> dict[str, list[float]]:
    """Seconds of five trainings each, in turn."""
    os.environ.pop("RAYON_NUM_THREADS", None)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    lines = text_of("english").splitlines(keepends=True)
    work = {
        "tokenizers": lambda: train_tokenizers(lines, size),
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


def in_new_process(expression: str, *args: str) -> str:
    """What the expression over this module, and over args, prints as."""
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]);"
        f"import bench_bpe; args = sys.argv[2:]; print({expression})"
    )
    path = json.dumps([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", code, path, *args], capture_output=True, text=True, check=True
    )
    return result.stdout


@pytest.mark.parametrize("what", ["encode", "train"])
def bench_peak_memory(
    what: str, folder: Path, installed: dict[str, Any], keep: Any, benchmark: Any
) -> None:
    """Megabytes that making a tokenizer and encoding, or training, adds to a process that has the
    text."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak of a part of a process's life")
    row: dict[str, Any] = {"name": f"peak memory, {what}"}
    for who in ("lmfast", "gigatoken", "tiktoken", "tokenizers"):
        if who == "lmfast" or (who in installed and (what, who) in MEASURED_FOR_MEMORY):
            call = "bench_bpe.memory_of(*args)"
            row[f"{who}_MB"] = float(in_new_process(call, what, who, str(folder)))
    keep(row)
    benchmark.pedantic(lambda: None)


MEASURED_FOR_MEMORY = [
    *(("encode", who) for who in ("gigatoken", "tiktoken", "tokenizers")),
    ("train", "tokenizers"),
]


def memory_of(what: str, who: str, folder: str) -> float:
    """Megabytes added to this process by one encoding or one training."""
    text = text_of("english")
    make: dict[tuple[str, str], Callable[[], Any]] = {
        ("encode", "lmfast"): lambda: ours().encode_numpy(text),
        ("encode", "gigatoken"): lambda: _gigatoken(folder).encode(text),
        ("encode", "tiktoken"): lambda: _tiktoken().encode_ordinary(text),
        ("encode", "tokenizers"): lambda: _tokenizers(folder).encode(text).ids,
        ("train", "lmfast"): lambda: BPETokenizer.train([text], 32_000),
        ("train", "tokenizers"): lambda: train_tokenizers([text], 32_000),
    }
    # The libraries themselves are loaded before.
    if who != "lmfast":
        __import__(who)
    # Not ru_maxrss, which a process inherits from its parent.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kilobytes("VmHWM")
    make[what, who]()
    return (_status_kilobytes("VmHWM") - before) / 1024


def _status_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
