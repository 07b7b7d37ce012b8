"""Counting words: parts, threads, files, several sizes, interruption."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor

import pytest
from tokenizer_support import ENGINES, corpus, needs_engine

from lmfast.tokenizer import BPETokenizer, count_words


@pytest.fixture(params=ENGINES)
def backend(request):
    return request.param


def test_counts_add_up_across_processes():
    text = corpus()
    middle = text.index("\n", len(text) // 2) + 1
    parts = [[text[:middle]], [text[middle:]]]
    with ProcessPoolExecutor(2) as pool:
        first, second = pool.map(count_words, parts)
    assert dict(first + second) == dict(count_words([text[:middle], text[middle:]]))
    trained = BPETokenizer.train(first + second, 1000)
    assert trained.merges == BPETokenizer.train([text[:middle], text[middle:]], 1000).merges


def test_counting_does_not_depend_on_threads():
    lines = corpus().splitlines(keepends=True) * 3
    one = count_words(lines, threads=1)
    assert list(count_words(lines, threads=3).items()) == list(one.items())


@needs_engine
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "whitespace", "words"])
def test_short_texts_are_counted_as_if_alone(pattern):
    """The engine joins them where that changes nothing."""
    draw = random.Random(4)
    mode = "char" if pattern == "words" else "byte"
    for _ in range(200):
        parts = [" ", "\n", "\n\n", "a", "b1", "'s", "!", "é", "\u00a0", "\t", " x", ""]
        lines = ["".join(draw.choices(parts, k=draw.randint(0, 5))) for _ in range(20)]
        fast, slow = (
            count_words(lines, mode=mode, pattern=pattern, backend=b) for b in ("cpu", "reference")
        )
        assert list(fast.items()) == list(slow.items())


@needs_engine
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "whitespace", "words"])
def test_texts_of_every_kind_in_one_list(pattern):
    """Short and long, ASCII and not, str and bytes, over more than one block of any size."""
    draw = random.Random(1)
    kinds = [
        lambda: " ".join(draw.choices(["the", "cat", "sat", "mat,"], k=draw.randint(1, 9))) + "\n",
        lambda: " " * draw.randint(1, 20) + f"x = {draw.randint(0, 99)}\n",
        lambda: "\n",
        lambda: "",
        lambda: "naïve café\n",
        lambda: "long " * draw.randint(400, 900),
        lambda: b"of bytes \xff\n",
    ]
    weights = [40, 20, 10, 1, 0.1, 0.05, 0.1]
    corpus = [kind() for kind in draw.choices(kinds, weights, k=9_000)]
    mode = "char" if pattern == "words" else "byte"
    one, three, slow = (
        list(count_words(corpus, mode=mode, pattern=pattern, threads=n, backend=b).items())
        for n, b in ((1, "cpu"), (3, "cpu"), (1, "reference"))
    )
    assert one == three == slow


@needs_engine
@pytest.mark.parametrize("threads", [1, 3])
def test_indented_lines_are_counted_as_if_alone(threads):
    """More lines than are looked at together, and indentations beyond those that have a place."""
    draw = random.Random(5)
    ends = ["x\n", "y = 1\n", "\n", " \n", "\tz\n", "é\n", "", "it's\n"]
    lines = [" " * draw.randint(0, 140) + draw.choice(ends) for _ in range(3000)] + ["\n", "a\n"]
    lines *= 3
    assert len(lines) > 2 * 4096
    fast = count_words(lines, threads=threads)
    assert list(fast.items()) == list(count_words(lines, backend="reference").items())


def test_lists_of_texts_and_paths(tmp_path, backend):
    path = tmp_path / "part.txt"
    path.write_text("b c\n")
    assert dict(count_words([path, "a b\n", path, b"c", path], backend=backend)) == {
        **{b"b": 3, b" c": 3, b"\n": 4, b"a": 1, b" b": 1, b"c": 1}
    }
    with pytest.raises(TypeError, match="corpus must yield str, bytes or paths, got int"):
        count_words(["a", 3], backend=backend)


@pytest.mark.parametrize("mode", ["byte", "char"])
def test_files_are_counted_as_texts(tmp_path, mode, backend):
    text = corpus()[:60_000] + "\n\n  é漢\n"
    path = tmp_path / "corpus.txt"
    path.write_bytes(text.encode())
    assert count_words(path, mode=mode, backend=backend) == count_words(
        text, mode=mode, backend=backend
    )


def test_files_in_blocks(tmp_path, monkeypatch):
    from lmfast.tokenizer import training

    monkeypatch.setattr(training, "_BLOCK", 1000)
    text = corpus()[:50_000] + "x" * 5000
    path = tmp_path / "corpus.txt"
    path.write_bytes(text.encode())
    assert count_words(path) == count_words(text)


def test_several_sizes_from_one_run(backend):
    text = corpus()[:20_000]
    small, large = BPETokenizer.train([text], [280, 320], backend=backend)
    assert small.vocab_size == 280
    assert large.vocab_size == 320
    assert small == BPETokenizer.train([text], 280, backend=backend)


def test_progress_and_interruption(backend):
    seen = []
    BPETokenizer.train(
        [corpus()[:20_000]], 600, backend=backend, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (344, 344)

    def interrupt(done, wanted):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BPETokenizer.train([corpus()[:20_000]], 600, backend=backend, progress=interrupt)
