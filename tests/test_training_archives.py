"""Archives of corpora: unpacked whole, and nothing outside the place given."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from lmfast.training import DataError, TextFiles, extract_archive

TEXTS = {"corpus/a.txt": b"one\n", "corpus/deep/b.txt": b"two\nthree\n" * 1000, "c.txt": b""}


def zipped(path, texts, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.mkdir("corpus") if hasattr(archive, "mkdir") else None
        for name, data in texts.items():
            archive.writestr(name, data)
    return path


def tarred(path, texts, mode="w:gz", links=()):
    with tarfile.open(path, mode) as archive:
        for name, data in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives_are_unpacked(tmp_path, kind):
    path = tmp_path / f"corpus.{kind}"
    if kind == "zip":
        zipped(path, TEXTS, compression=zipfile.ZIP_DEFLATED)
    else:
        tarred(path, TEXTS, f"w:{kind.partition('.')[2]}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    place = tmp_path / "out"
    for _ in range(2):  # again, over what is there
        files = extract_archive(path, place, sha256=digest.upper())
        assert {str(f.relative_to(place)): f.read_bytes() for f in files} == TEXTS
    assert sum(p.is_file() for p in place.rglob("*")) == len(TEXTS)
    assert list(TextFiles(files[:1], lines=True)) == ["one"]


def test_a_file_is_not_the_directory_itself(tmp_path):
    path = tarred(tmp_path / "evil", {"good.txt": b"1", ".": b"2"})
    (tmp_path / ".out.partial").write_text("mine")
    with pytest.raises(DataError, match=r"'\.' would be written outside"):
        extract_archive(path, tmp_path / "out")
    assert (tmp_path / ".out.partial").read_text() == "mine"


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt"])
@pytest.mark.parametrize("make", [zipped, tarred])
def test_nothing_is_written_outside(tmp_path, make, name):
    path = make(tmp_path / "evil", {"good.txt": b"1", name: b"2"})
    with pytest.raises(DataError, match=r"evil\.txt' would be written outside"):
        extract_archive(path, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["evil"]


def test_links_and_devices_are_refused(tmp_path):
    for name, kind, target in (
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("link", tarfile.LNKTYPE, "good.txt"),
        ("pipe", tarfile.FIFOTYPE, ""),
    ):
        path = tarred(tmp_path / "a.tar", {"good.txt": b"1"}, "w", [(name, kind, target)])
        with pytest.raises(DataError, match=f"'{name}' is neither a file nor a directory"):
            extract_archive(path, tmp_path / "out")
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="'link' is neither a file nor a directory"):
        extract_archive(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_directory_does_not_lead_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "corpus").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="would be written outside"):
        extract_archive(zipped(tmp_path / "a.zip", TEXTS), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_damaged_and_foreign_archives_are_told(tmp_path):
    path = tmp_path / "a.zip"
    zipped(path, TEXTS)
    with pytest.raises(DataError, match=r"has the SHA-256 .*, expected 00"):
        extract_archive(path, tmp_path / "out", sha256="00")
    data = bytearray(path.read_bytes())
    at = data.index(b"two\nthree")
    data[at : at + 3] = b"TWO"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.zip is not a zip or tar archive, or damaged"):
        extract_archive(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.partial"))
    for kind in ("gz", "xz"):
        path = tarred(tmp_path / f"a.tar.{kind}", TEXTS, f"w:{kind}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"a\.tar\.{kind} is not a zip or tar archive, or dam"):
            extract_archive(path, tmp_path / "cut")
    path.write_text("no archive")
    with pytest.raises(DataError, match=r"a\.tar\.xz is not a zip or tar archive"):
        extract_archive(path, tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        extract_archive(tmp_path / "absent.zip", tmp_path / "cut")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_damage_inside_compressed_archives_is_told(tmp_path, kind):
    path = tarred(tmp_path / f"a.tar.{kind}", TEXTS, f"w:{kind}")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(b ^ 0xFF for b in data[middle : middle + 8])
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.tar\.{kind} is not a zip or tar archive, or damaged"):
        extract_archive(path, tmp_path / "out")
