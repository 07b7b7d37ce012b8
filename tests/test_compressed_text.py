"""Text files compressed by gzip, bzip2 and xz: read as they were before, block by block, and damage
told."""

import bz2
import gzip
import lzma
import pickle
import tarfile
import threading

import pytest

from lmfast.tokenizer import BPETokenizer
from lmfast.training import DataError, TextFiles, open_texts, read_text, sources

KINDS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
TEXT = "".join(f"line {i}: " + "wörd " * (i % 7) + "\n" for i in range(300))


@pytest.fixture(params=KINDS)
def packed(request, tmp_path, monkeypatch):
    """A compressed file beside the plain one, read in blocks of 512 bytes."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 512)
    data = TEXT.encode()
    (tmp_path / "text.txt").write_bytes(data)
    path = tmp_path / f"text.txt.{request.param}"
    path.write_bytes(KINDS[request.param](data))
    return path


def test_compressed_text_is_read(packed):
    plain = packed.with_suffix("")
    assert read_text(packed) == TEXT
    here, there = TextFiles([packed], lines=True), TextFiles([plain], lines=True)
    positions = []
    position = here.start()
    while position is not None:
        positions.append(position)
        assert here.read(position) == there.read(position)
        position = here.read(position)[1]  # a second time: from the beginning of the file
    assert len(positions) == 17
    copy = pickle.loads(pickle.dumps(packed_reader := here._readers[0]))
    for position in (positions[-1], positions[3], positions[4]):  # back, and on
        assert here.read(position) == there.read(position)
        assert copy.block(position["offset"], 512) == packed_reader.block(position["offset"], 512)


def test_one_path_is_a_list_of_one(packed):
    assert list(TextFiles(str(packed))) == list(open_texts(packed)) == list(TextFiles([packed]))


def test_threads_share_a_source(packed):
    source = TextFiles([packed], lines=True)
    found = [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda rows=rows: rows.extend(source)) for rows in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[line for line in TEXT.split("\n") if line]] * 4


def test_a_tokenizer_learns_from_it(packed):
    assert BPETokenizer.train(packed, 300) == BPETokenizer.train(TEXT, 300)


def test_lines_of_json_by_the_name_before_it(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}'))
    assert list(open_texts([path])) == ["one", "two"]
    path.write_bytes(gzip.compress(b""))
    assert list(open_texts([path])) == []


def test_damage_is_told(packed):
    data = packed.read_bytes()
    middle = len(data) // 2
    for bad in (data[:middle], data[:middle] + b"\xff" * 8 + data[middle + 8 :]):
        packed.write_bytes(bad)
        for read in (read_text, lambda path: list(TextFiles([path], bad_lines="skip"))):
            with pytest.raises(ValueError, match=rf"{packed.name} is compressed and damaged: "):
                read(packed)
        with pytest.raises(DataError):
            list(TextFiles([packed]))


def test_what_is_not_read_is_told(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for mode in ("w", "w:gz"):
        with tarfile.open(tmp_path / "a.tar", mode) as archive:
            archive.add(tmp_path / "text.txt")
        with pytest.raises(ValueError, match=r"is an archive or compressed.*with tar -xf"):
            read_text(tmp_path / "a.tar")
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00")
    with pytest.raises(DataError, match="unpack it first, with unzstd"):
        list(TextFiles([tmp_path / "a.zst"]))
    for begins in ("BZh", "BZh91 is a text", "\x1f"):  # as a text may
        (tmp_path / "text.txt").write_text(begins)
        assert read_text(tmp_path / "text.txt") == begins
