"""Files of tensors: what is written comes back, a damaged file is refused, and an old one is never lost."""

import random
import zipfile
from collections import OrderedDict

import pytest
import torch

from runtime.files import InputError, load_tensors, part_path, remove_file, save_tensors, write_files

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
    content = load_tensors(path, "test", checked=lambda content: True)
    assert equal(content, CONTENT)
    assert "checksum" not in CONTENT
    assert not list(path.parent.glob(".*"))


def test_saving_twice_gives_the_same_bytes(path):
    save_tensors(CONTENT, path.with_name("b.pt"))
    assert path.with_name("b.pt").read_bytes() == path.read_bytes()
    save_tensors(load_tensors(path, "test"), path.with_name("c.pt"))
    assert equal(load_tensors(path.with_name("c.pt"), "test"), CONTENT)


def refused(path, content):
    """Whether the file is refused, in one line that names it; otherwise it must hold what was saved."""
    path.write_bytes(content)
    try:
        found = load_tensors(path, "test", checked=lambda content: True)
    except InputError as error:
        return str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert equal(found, CONTENT)
    return False


def places(path, suffix):
    """Where in the file the bytes of an archive's member lie."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (content,) = (archive.read(name) for name in archive.namelist() if name.endswith(suffix))
    return range(start := whole.index(content), start + len(content))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_flipped_bit_is_found(path):
    """Among the weights always; elsewhere it may lie where nothing is read."""
    whole, chance = bytearray(path.read_bytes()), random.Random(0)
    weights = chance.sample(places(path, "data/0"), 300)
    structure = chance.sample(places(path, "data.pkl"), 300)
    for place in [*weights, *structure, *chance.sample(range(len(whole)), 300)]:
        bit = 1 << chance.randrange(8)
        whole[place] ^= bit
        found = refused(path, whole)
        assert found or place not in weights
        whole[place] ^= bit
    assert not refused(path, whole)


def test_a_zeroed_kilobyte_is_found(path):
    whole = path.read_bytes()
    for start in range(places(path, "data/0").start, places(path, "data/0").stop - 1024, 1000):
        assert refused(path, whole[:start] + bytes(1024) + whole[start + 1024 :])
        with pytest.raises(InputError, match="damaged: its content does not match its checksum; restore it"):
            load_tensors(path, "test")


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3.0},
        {"version": True},
        {"new": None},
        {"values": tuple(CONTENT["values"])},
        {"network": CONTENT["network"] | {"count": torch.tensor([7])}},
        {"network": CONTENT["network"] | {"count": torch.tensor(7, dtype=torch.int32)}},
        {"network": CONTENT["network"] | {"half": CONTENT["network"]["half"].view(torch.float16)}},
        {"network": CONTENT["network"] | {"turned": CONTENT["network"]["turned"].reshape(20, 30)}},
        {"network": CONTENT["network"] | {"none": torch.empty(4, 0)}},
    ],
)
def test_types_and_shapes_are_part_of_the_checksum(path, changes):
    content = torch.load(path, weights_only=True)
    torch.save(content | changes, path)
    with pytest.raises(InputError, match="does not match its checksum"):
        load_tensors(path, "test")


def test_files_of_an_earlier_version_have_no_checksum(path):
    torch.save(CONTENT, path)
    assert equal(load_tensors(path, "test"), CONTENT)
    assert equal(load_tensors(path, "test", lambda content: content["version"] > 3), CONTENT)
    with pytest.raises(InputError, match="does not match its checksum"):
        load_tensors(path, "test", lambda content: content["version"] >= 3)


def test_what_torch_could_not_read_is_not_written(path):
    before = path.read_bytes()
    for value in (object(), torch.tensor([1.5]).numpy()[0], path):
        with pytest.raises(TypeError, match="neither a tensor nor a plain value"):
            save_tensors({"value": [value]}, path)
    assert path.read_bytes() == before


def test_bad_files_are_named(path):
    def fails(match):
        with pytest.raises(InputError, match=match) as caught:
            load_tensors(path, "test")
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)

    whole = path.read_bytes()
    for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        fails("truncated, damaged or not a test file")
    for text in ("hello", "test of a file", "X", "\x89PNG\r\n"):
        path.write_text(text)
        fails("truncated, damaged or not a test file")
    for content in ([1, 2], "text", torch.zeros(3)):
        torch.save(content, path)
        fails("truncated, damaged or not a test file")
    path.unlink()
    fails("no such file")


# Atomic writing ---------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_the_old_one(path):
    before = path.read_bytes()
    part_path(path).symlink_to("/dev/full")  # every write ends in "no space left on device"
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); nothing was replaced") as caught:
        save_tensors({}, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    one, other = tmp_path / "new folder/one", tmp_path / "other"
    write_files({one: b"1", other: memoryview(b"2")})
    assert (one.read_bytes(), other.read_bytes()) == (b"1", b"2")
    part_path(other).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_files({one: b"3", other: b"4"})
    assert caught.value.filename == str(other)
    assert (one.read_bytes(), other.read_bytes()) == (b"1", b"2")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["new folder", "one", "other"]


def test_removing_takes_what_a_killed_process_left_too(path):
    part_path(path).write_text("half")
    for _ in range(2):
        remove_file(path)
        assert list(path.parent.iterdir()) == []
