"""Files of tensors: what is written comes back, a damaged file is refused, and an old one is never lost."""

import csv
import io
import os
import random
import struct
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import room

from runtime.files import (
    KILLED_AFTER,
    PART,
    InputError,
    archive_of,
    csv_table,
    load_parts,
    load_tensors,
    locked_folder,
    remove_abandoned,
    save_tensors,
    spreadsheet_safe,
    write_file,
    write_files,
)

CONTENT = {
    "format": "a test",
    "version": 3,
    "values": [None, True, 0, -1.5, float("inf"), "line\nbreak", b"bytes", (1, "2"), {}, {7: 8}],
    "network": OrderedDict(
        weight=torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0)),
        half=torch.arange(500).to(torch.bfloat16),
        count=torch.tensor(7),
        turned=torch.arange(600.0).view(20, 30).T,
        none=torch.empty(0, 4),
        mask=torch.tensor([True, False]),
    ),
}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture
def path(tmp_path):
    save_tensors(CONTENT, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_round_trip(path):
    assert equal(load_tensors(path, "test"), CONTENT)
    assert not list(path.parent.glob(".*"))
    save_tensors(CONTENT, path.with_name("b.pt"))
    assert path.with_name("b.pt").read_bytes() == path.read_bytes()


def test_files_of_earlier_versions(path):
    """Some were written with a checksum among the content, which has another type than what it stands beside."""
    for earlier in (CONTENT, CONTENT | {"checksum": "0" * 64}):
        torch.save(earlier, path)
        assert equal(load_tensors(path, "test"), CONTENT)


def is_refused(path, content):
    """Return whether a file of that content is refused in one line that names it; else it must hold what was saved."""
    path.write_bytes(content)
    try:
        loaded = load_tensors(path, "test")
    except InputError as error:
        return str(error) == f"{path}: truncated, damaged or not a test file; restore it or train again"
    assert equal(loaded, CONTENT)
    return False


def test_a_flipped_bit_is_found(path):
    """In what is read always; elsewhere it may lie where it harms nothing."""
    content, generator = bytearray(path.read_bytes()), random.Random(0)
    with zipfile.ZipFile(path) as archive:
        parts, directory = archive.infolist(), archive.start_dir
    read = set()
    for part in parts:
        name_and_extra = struct.unpack_from("<HH", content, part.header_offset + 26)
        start = part.header_offset + 30 + sum(name_and_extra)
        read.update(range(start, start + part.file_size))
    outside = [*set(range(len(content))) - read]
    places = [place for group in (sorted(read), outside) for place in generator.sample(group, 300)]
    flips = [(place, generator.randrange(8)) for place in places]
    flips += [(place, 4) for place in range(directory, len(content))]  # among them: that a part is a folder
    for place, bit in flips:
        content[place] ^= 1 << bit
        assert is_refused(path, content) or place not in read
        content[place] ^= 1 << bit
    assert not is_refused(path, content)


def test_bad_files_are_refused(path):
    content = path.read_bytes()
    zeroed = [content[:start] + bytes(1024) + content[start + 1024 :] for start in range(2000, 20_000, 1000)]
    cut = [content[:length] for length in (0, 10, 1000, len(content) // 2, len(content) - 1)]
    for damaged in (*zeroed, *cut, b"hello", b"test of a file", b"X", b"\x89PNG\r\n"):
        assert is_refused(path, damaged)
    assert not is_refused(path, content + b"more")
    for other in ([1, 2], "text", torch.zeros(3)):
        torch.save(other, path)
        assert is_refused(path, path.read_bytes())
    path.unlink()
    with pytest.raises(InputError, match=f"^{path}: no such file$"):
        load_tensors(path, "test")


def test_what_torch_could_not_read_is_not_written(path):
    before = path.read_bytes()
    for value in (object(), torch.tensor([1.5]).numpy()[0], path):
        for content in ({"value": [value]}, {"value": {"a": (value,)}}, {value: 1}):
            with pytest.raises(TypeError, match="neither a tensor nor a plain value"):
                save_tensors(content, path)
    assert path.read_bytes() == before


# Atomic writing ---------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_the_old_one(path):
    before = path.read_bytes()
    with (
        room(2000),
        pytest.raises(OSError, match=r"cannot be written \(File too large\); nothing was replaced") as caught,
    ):
        save_tensors(CONTENT, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    one, other = tmp_path / "new folder/one", tmp_path / "other"
    write_files({one: b"1", other: memoryview(b"2")})
    assert (one.read_bytes(), other.read_bytes()) == (b"1", b"2")
    with room(2000), pytest.raises(OSError, match="File too large") as caught:
        write_files({one: b"3", other: bytes(2001)})
    assert caught.value.filename == str(other)
    assert (one.read_bytes(), other.read_bytes()) == (b"1", b"2")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["new folder", "one", "other"]


def test_a_name_may_be_as_long_as_any(tmp_path):
    write_file(b"1", tmp_path / ("x" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]
    with pytest.raises(InputError, match=r"xxx: cannot be written \(File name too long\); shorten"):
        write_files({tmp_path / "a": b"2", tmp_path / ("x" * 256): b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_what_is_written_follows_no_link_and_meets_no_other_run(tmp_path):
    """Many writers of one file at once: it is always one of theirs, whole, and none fails."""
    (tmp_path / "victim").write_text("precious")
    for name in (".a.part", f".a{PART}"):
        (tmp_path / name).symlink_to("victim")
    contents = [bytes([number]) * 100_000 for number in range(8)]

    def write(content):
        for _ in range(10):
            write_file(content, tmp_path / "a")
            assert (tmp_path / "a").read_bytes() in contents

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert (tmp_path / "victim").read_text() == "precious"


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    left, other = tmp_path / f".0{PART}", tmp_path / "a.part"
    for path in (left, other):
        path.write_text("half")
    remove_abandoned(tmp_path)
    assert left.exists()  # it may be another run's, at work
    for path in (left, other):
        os.utime(path, (0, time.time() - KILLED_AFTER - 60))
    write_file(b"1", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.part", "b"]


def test_a_folder_is_locked_until_the_end(tmp_path):
    pytest.importorskip("fcntl")
    for _ in range(2):
        with locked_folder(tmp_path, "wait"):
            with pytest.raises(InputError, match=f"{tmp_path}: another run is writing to it; wait"):
                locked_folder(tmp_path, "wait").__enter__()
            assert list(tmp_path.iterdir()) == []


# CSV --------------------------------------------------------------------------------------------------------------


def test_a_table_is_read_back(tmp_path):
    rows = [
        {"path": 'a, "b"\r\n\udcff', "score": 0.1 + 0.2, "count": 3},
        {"path": "é", "score": None, "above": True},
    ]
    (tmp_path / "a.csv").write_bytes(csv_table(rows, ("path", "score")))
    with open(tmp_path / "a.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        names, *values = csv.reader(file)
    assert names == ["path", "score", "count", "above"]
    assert values == [[rows[0]["path"], "0.30000000000000004", "3", ""], ["é", "", "", "True"]]
    assert csv_table([], ("path", "score")) == b"path,score\n"


def test_no_cell_is_a_formula():
    """Text that would be one has an apostrophe before it, in the head of the table too; numbers stay numbers."""
    texts = [start + "cmd|' /C calc'!A0" for start in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"]
    rows = [{"=name": text, "score": -1.5, "text": " =1", "date": "2024-01-01"} for text in texts]
    header, *lines = csv.reader(io.StringIO(csv_table(rows).decode(), newline=""))
    assert header == ["'=name", "score", "text", "date"]
    assert lines == [["'" + text, "-1.5", " =1", "2024-01-01"] for text in texts]
    assert [spreadsheet_safe(path) for path in ("=1.png", "a/=1.png", "\tb")] == ["./=1.png", "a/=1.png", "./\tb"]


# Parts ------------------------------------------------------------------------------------------------------------


def test_parts_come_back_and_damage_is_told(tmp_path):
    parts, path = {"a.json": b"{}", "b": bytes(range(256)) * 50, "empty": b""}, tmp_path / "a.zip"
    content = archive_of(parts)
    assert content == archive_of(parts)
    path.write_bytes(content)
    assert load_parts(path, "test") == parts
    at = content.index(parts["b"]) + 1000
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b", bytes(10**6))
    for bad in (b"", b"text", content[:-9], content[:at] + b"?" + content[at + 1 :], packed.getvalue()):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"a\.zip: truncated, damaged or not a test file; do this$"):
            load_parts(path, "test", "do this")


def overlapping(name, part):
    """Return an archive of a part, and of another one that it lies in."""
    inner = archive_of({name: part})
    outer = io.BytesIO(archive_of({"outer": inner}))
    with zipfile.ZipFile(io.BytesIO(inner)) as archive:
        listed = archive.getinfo(name)
    listed.header_offset = outer.getvalue().index(inner)
    with zipfile.ZipFile(outer, "a") as archive:
        archive.filelist.append(listed)
        archive.writestr("end", b"")  # or the new list would not be written
    return outer.getvalue()


def test_no_archive_holds_more_than_its_file(path):
    """Parts that lie in each other, or are compressed, could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, part in parts.items():
            archive.writestr(zipfile.ZipInfo(name), part, zipfile.ZIP_DEFLATED)
    for read, content in ((load_parts, overlapping("b", bytes(10**5))), (load_tensors, packed.getvalue())):
        path.write_bytes(content)
        with pytest.raises(InputError, match="truncated, damaged or not a test file"):
            read(path, "test")
