"""Sources of text and streamed batches: the same windows as in memory, any place resumed exactly,
bad lines named, changed data refused."""

import json
import os
import re
import threading

import numpy as np
import pytest
import torch

from lmfast.tokenizer import BPETokenizer
from lmfast.training import (
    DataError,
    DatasetTexts,
    JsonLines,
    PackedBatches,
    PaddedBatches,
    StreamedBatches,
    TextFiles,
    encode_text,
    encode_texts,
    open_texts,
    sources,
)

LINES = [f"line {i}: " + "wörd " * (i % 7) for i in range(300)]
TOKENIZER = BPETokenizer.train(LINES, 400, special_tokens=["<pad>", "<eos>"])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 512 bytes or 16 rows, so that a small text has many."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 512)
    monkeypatch.setattr(sources, "_BLOCK_ROWS", 16)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def json_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in LINES), encoding="utf-8")
    return path


def stream(source, **options):
    options = {"context": 10, "buffer": 40, "seed": 3, **options}
    return StreamedBatches(source, TOKENIZER, 8, **options)


def all_equal(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_every_source_gives_the_same_texts(tmp_path, text_file, json_file):
    assert list(TextFiles([text_file], lines=True)) == LINES
    assert "".join(TextFiles([text_file])) == text_file.read_text(encoding="utf-8")
    marked = text_file.with_name("marked.txt")  # as editors on Windows save it
    marked.write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert list(TextFiles([marked], lines=True)) == LINES
    assert list(TextFiles([marked])) == list(TextFiles([text_file]))
    assert list(JsonLines([json_file], field="body")) == LINES
    assert list(DatasetTexts([{"text": line} for line in LINES])) == LINES
    second = tmp_path / "second.txt"
    second.write_bytes(b"windows\r\n\r\nno line end")
    assert list(open_texts([second, text_file], lines=True)) == ["windows", "no line end", *LINES]
    assert "".join(open_texts([second, text_file])).startswith("windows\r\n\r\nno line end\nline 0")
    with pytest.raises(ValueError, match="must be of one kind, got JSON lines and text"):
        open_texts([text_file, json_file])


def test_reading_goes_on_at_any_position(text_file, json_file):
    for source in (
        TextFiles([text_file, text_file], lines=True),
        JsonLines([json_file], field="body"),
    ):
        position, texts = source.start(), []
        while position is not None:
            more, position = source.read(json.loads(json.dumps(position)))
            texts += more
        assert texts == list(source)


def test_datasets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the datasets package")
    dataset = datasets.Dataset.from_dict({"text": LINES, "n": list(range(len(LINES)))})
    iterable = dataset.to_iterable_dataset(num_shards=3)
    expected = stream(DatasetTexts(dataset))
    for source in (DatasetTexts(dataset), DatasetTexts(iterable)):
        batches = stream(source)
        for _ in range(9):
            assert all_equal(batches.next_batch(), expected.next_batch())
        again = stream(source)
        again.load_state_dict(json.loads(json.dumps(batches.state_dict())))
        assert all_equal(again.next_batch(), expected.next_batch())
        expected = stream(DatasetTexts(dataset))
    dataset.save_to_disk(tmp_path / "disk")
    assert list(open_texts([tmp_path / "disk"])) == LINES
    with pytest.raises(DataError, match="row 0: there is no field 'body'"):
        list(DatasetTexts(dataset, field="body"))


def test_windows_of_a_stream_are_those_in_memory(json_file):
    source = JsonLines([json_file], field="body")
    ids = np.concatenate(encode_texts(TOKENIZER, LINES, end_id=1))
    memory = PackedBatches(torch.from_numpy(ids), 8, context=10, shuffle=False)
    batches = stream(source, shuffle=False, end_id=1)
    assert len(batches) == len(memory)
    for expected in (*memory, *memory):  # two epochs
        given = batches.next_batch()
        width = given[0].shape[1]  # the last window alone is not padded
        assert all_equal(given, (expected[0][:, :width], expected[1][:, :width]))
        assert (expected[1][:, width:] == -100).all()


def test_texts_of_a_stream_are_those_in_memory(text_file):
    source = TextFiles([text_file], lines=True)
    memory = PaddedBatches(encode_texts(TOKENIZER, LINES), 8, max_length=11, shuffle=False)
    batches = stream(source, shuffle=False, pack=False)
    assert len(batches) == len(memory)
    for expected, passed in zip(memory, batches, strict=True):
        assert all_equal(batches.next_batch(), expected)
        assert all_equal(passed, expected)


def test_shuffling_is_seeded_and_keeps_every_example(text_file):
    def epoch(batches):
        rows = [row for _ in range(len(batches)) for row in batches.next_batch()[0].tolist()]
        return ["".join(map(str, row)).rstrip("0") for row in rows]

    plain = epoch(stream(TextFiles([text_file]), shuffle=False))
    batches = stream(TextFiles([text_file]))
    first, second = epoch(batches), epoch(batches)
    assert sorted(first) == sorted(second) == sorted(plain)
    assert len({tuple(first), tuple(second), tuple(plain)}) == 3
    assert epoch(stream(TextFiles([text_file]))) == first
    assert epoch(stream(TextFiles([text_file]), seed=4)) != first


@pytest.mark.parametrize("pack", [True, False])
def test_a_stream_continues_at_the_same_batch(text_file, pack):
    def make():
        return stream(TextFiles([text_file], lines=True), pack=pack)

    whole = make()
    states, batches = [], []
    for _ in range(2 * len(whole) + 3):
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(whole.next_batch())
    for place in range(0, 2 * len(whole), 5):
        continued = make()
        continued.load_state_dict(states[place])
        assert continued.state_dict() == states[place]
        for expected in batches[place : place + 3]:
            assert all_equal(continued.next_batch(), expected)


def test_changed_data_is_told(text_file, json_file):
    batches = stream(TextFiles([text_file]))
    batches.next_batch()
    state = batches.state_dict()
    text = text_file.read_text(encoding="utf-8")
    text_file.write_text(text.replace("line 200", "line 201"), encoding="utf-8")
    with pytest.raises(ValueError, match="training data is not what the checkpoint was trained on"):
        stream(TextFiles([text_file])).load_state_dict(state)
    text_file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="context is 9, it was 10"):
        stream(TextFiles([text_file]), context=9).load_state_dict(state)
    rows = [{"text": line} for line in LINES]
    batches = stream(DatasetTexts(rows))
    rows[3] = {"text": "changed"}  # as many rows, other texts
    with pytest.raises(ValueError, match="checksum is"):
        stream(DatasetTexts(rows)).load_state_dict(batches.state_dict())


@pytest.mark.parametrize("how", ["shorter", "other text", "touched"])
def test_data_that_changes_while_it_is_read(text_file, how):
    source = TextFiles([text_file])
    _, position = source.read(source.start())
    text, before = text_file.read_text(encoding="utf-8"), text_file.stat()
    changed = {
        "shorter": text[:-1],
        "other text": text.replace("line 299", "line 992"),
        "touched": text,
    }[how]
    text_file.write_text(changed, encoding="utf-8")
    os.utime(text_file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    if how == "touched":
        assert "".join(source) == text
        return
    with pytest.raises(DataError, match=rf"text\.txt has changed .*it had {before.st_size} bytes"):
        source.read(position)


def test_digits_are_replaced(text_file, json_file):
    expected = [re.sub(r"[0-9]+", r"<n\\1>", line) for line in LINES]
    options = {"digits": r"<n\1>"}  # no pattern: as it is
    assert list(TextFiles([text_file], lines=True, **options)) == expected
    assert list(JsonLines([json_file], field="body", **options)) == expected
    rows = [{"text": line} for line in LINES]
    assert list(DatasetTexts(rows, **options)) == expected
    assert list(open_texts([text_file], lines=True, digits="0"))[12].startswith("line 0: ")
    state = stream(TextFiles([text_file])).state_dict()
    with pytest.raises(ValueError, match="training data is not what the checkpoint was trained on"):
        stream(TextFiles([text_file], digits="0")).load_state_dict(state)
    # Arabic-Indic digits and superscripts: only the first are digits of a number.
    assert list(DatasetTexts([{"text": "\u0664\u0662 m\u00b2"}], digits="#")) == ["# m\u00b2"]


def test_texts_are_encoded_in_batches_by_workers(text_file):
    calls = []

    class Watched:
        def encode_batch(self, texts, *, threads=None):
            calls.append((threading.current_thread().name, len(texts), threads))
            return TOKENIZER.encode_batch(texts, threads=threads)

    batches = StreamedBatches(
        TextFiles([text_file], lines=True), Watched(), 8, context=10, buffer=40, threads=2
    )
    for _ in range(40):
        batches.next_batch()
    # The first buffer is waited for, the others are filled while there is something to learn from.
    assert calls[0][0] == threading.main_thread().name
    workers = {name for name, _, _ in calls if name.startswith("lmfast-data")}
    assert len(workers) == 1
    assert sum(name in workers for name, _, _ in calls) > len(calls) / 2
    assert all(texts > 1 and threads == 2 for _, texts, threads in calls)


BAD = [
    b'{"body": "good"}',
    b"not json",
    b'{"other": 1}',
    b'{"body": 7}',
    b"[1]",
    b'{"body": "\xff"}',
    b"",
]


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (1, "the line is not JSON: Expecting value"),
        (2, "there is no field 'body'"),
        (3, "field 'body' holds a value of type int, not text"),
        (4, "there is no field 'body'"),
        (5, "the line is not UTF-8 text: byte 0xff"),
    ],
)
def test_a_bad_line_is_named(tmp_path, index, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([BAD[0]] * 40 + [BAD[index], BAD[0]]))
    with pytest.raises(DataError) as error:
        list(JsonLines([path], field="body"))
    assert str(error.value) == f"{path}:41: {reason}"


def test_bad_lines_are_left_out_on_request(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(BAD))
    source = JsonLines([path], field="body", bad_lines="skip")
    with pytest.warns(UserWarning, match=r"left out: .*bad\.jsonl:2: the line is not JSON"):
        assert list(source) == ["good"]
    assert [place.rpartition(":")[2] for place in source.skipped] == ["2", "3", "4", "5", "6"]
    text = tmp_path / "latin.txt"
    text.write_bytes(b"one\ncaf\xe9\nthree\n")
    for lines, expected in ((True, ["one", "three"]), (False, ["one\nthree\n"])):
        with pytest.raises(DataError, match=r"latin\.txt:2: the line is not UTF-8"):
            list(TextFiles([text], lines=lines))
        with pytest.warns(UserWarning, match=r"latin\.txt:2"):
            assert list(TextFiles([text], lines=lines, bad_lines="skip")) == expected
    with pytest.raises(ValueError, match='bad_lines must be "error" or "skip", got \'drop\''):
        TextFiles([text], bad_lines="drop")
    with pytest.raises(TypeError, match="digits must be a string or None, got 0"):
        TextFiles([text], digits=0)


def test_a_bad_line_far_into_a_stream_stops_it_there(tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES) + "{\n")
    batches = stream(JsonLines([path]))
    with pytest.raises(DataError, match=r"late\.jsonl:301"):
        list(iter(batches.next_batch, None))


def test_other_things_than_sources_and_tokenizers_are_told(text_file):
    with pytest.raises(TypeError, match=r"source must be TextFiles, .*, got list"):
        StreamedBatches(["a text"], TOKENIZER, 8, context=3)
    for use in (
        lambda: StreamedBatches(TextFiles([text_file]), None, 8, context=3),
        lambda: encode_text(None, "a"),
        lambda: encode_texts(None, ["a"]),
    ):
        with pytest.raises(TypeError, match=r"tokenizer must have encode_batch.*; NoneType"):
            use()


def test_a_stream_without_text_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="too short: it has no token to predict"):
        stream(TextFiles([path], lines=True))
    with pytest.raises(ValueError, match="buffer must be at least 1, got 0"):
        stream(TextFiles([path]), buffer=0)
    with pytest.raises(ValueError, match="paths must name at least one file"):
        TextFiles([])


def test_blank_tail_ends_the_epoch(tmp_path):
    path = tmp_path / "tail.txt"
    path.write_text("some words to learn\n" * 30 + "\n" * 2000)
    batches = stream(TextFiles([path], lines=True), buffer=1, pack=False)
    for _ in range(3 * len(batches)):
        assert len(batches.next_batch()[0]) > 0
    assert batches.where().startswith("batch 4 of epoch 3, of texts from ")
    assert encode_text(TOKENIZER, "some").dtype == torch.int64
