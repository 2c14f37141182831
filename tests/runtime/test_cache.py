"""Decoded images on disk: the right ones or none, one file per folder and size, and memory that stays bounded."""

import argparse
import hashlib
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, TINY, room, same_weights
from forked import Forked
from PIL import Image

import config as options
import dataset
from dataset import load_images, load_test, load_train
from runtime import cache, files
from runtime.cache import Storage, all_equal, digest, iterate
from runtime.files import InputError
from runtime.image_files import find_images

SIZE = (6, 8)
STORED = 3 * 6 * 8

# Loads folders at 64 x 64 in a process of its own, passes over them, and prints for each the number of its images,
# their digest and the peak of the memory that no file stands behind, in MB.
PROGRAM = """
import sys, threading, time
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from dataset import find_images, load_images
from runtime import cache, files

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) // 1024)
        time.sleep(0.002)

peak, cache.BLOCK = 0, 10**6
if sys.platform == "linux":
    threading.Thread(target=watch, daemon=True).start()
for folder in sys.argv[3:]:
    images = load_images(find_images(Path(folder)), (64, 64), 0, cache.Storage(Path(sys.argv[1]), float(sys.argv[2])))
    for chosen in torch.randperm(len(images)).split(64):
        images[chosen]
    print(len(images), cache.digest(images), peak)
"""


def save_noise(path, seed, side=12):
    """A BMP: the same size in bytes for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Five images of the same size in bytes and the same time of change."""
    for i in range(5):
        save_noise(tmp_path / f"images/{i}.bmp", i)
        os.utime(tmp_path / f"images/{i}.bmp", (10**9, 10**9))
    return tmp_path / "images"


@pytest.fixture(params=[1e9, 0], ids=["in memory", "mapped"])
def storage(tmp_path, request):
    return Storage(tmp_path / "cache", request.param)


def load(folder, storage=cache.IN_MEMORY, size=SIZE):
    """The pixels of a folder's images, wherever they live."""
    return load_images(find_images(folder), size, 0, storage)


def entries(storage):
    """All files of the cache, hidden ones too."""
    return sorted(storage.folder.iterdir()) if storage.folder.exists() else []


def replace(path, side=12, later=0):
    """Other pixels; the time of change stays, or moves on by nanoseconds."""
    changed = path.stat().st_mtime_ns + later
    save_noise(path, 77, side)
    os.utime(path, ns=(changed, changed))


def many(folder, count):
    """``count`` names of ten images of 64 x 64."""
    for i in range(10):
        save_noise(folder / f"{i:06}.bmp", i, side=64)
    for i in range(10, count):
        os.link(folder / f"{i % 10:06}.bmp", folder / f"{i:06}.bmp")
    return folder


def start(tmp_path, *arguments):
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    return Forked(tmp_path / "program.py", *arguments)


# What is taken from the cache -------------------------------------------------------------------------------------


def test_a_hit_decodes_nothing(folder, storage, monkeypatch):
    before = load(folder)
    assert torch.equal(load(folder, storage), before)
    (entry,) = entries(storage)
    written = entry.stat().st_mtime_ns
    monkeypatch.setattr(dataset, "decode", None)
    monkeypatch.chdir(folder.parent)
    for path in (folder, Path("images")):
        assert torch.equal(load(path, storage), before)
    assert entries(storage) == [entry]
    assert entry.stat().st_mtime_ns == written


def swap(folder):
    """Two names change places: every size and time of change stays."""
    for old, new in (("1.bmp", "kept"), ("2.bmp", "1.bmp"), ("kept", "2.bmp")):
        (folder / old).rename(folder / new)


CHANGES = {
    "touched": lambda folder: replace(folder / "2.bmp", later=1),
    "restored as cp -p does": lambda folder: replace(folder / "2.bmp"),
    "resized": lambda folder: replace(folder / "2.bmp", side=13),
    "added": lambda folder: save_noise(folder / "22.bmp", 77),
    "removed": lambda folder: (folder / "2.bmp").unlink(),
    "renamed": lambda folder: (folder / "2.bmp").rename(folder / "7.bmp"),
    "swapped": swap,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_replaces_its_entry(folder, storage, change):
    old = load(folder, storage)
    before = old.clone()
    (entry,) = entries(storage)
    time.sleep(0.02)  # a file system's clock ticks slowly
    change(folder)
    after = load(folder, storage)
    assert torch.equal(after, load(folder))
    assert not torch.equal(after, before)
    assert entries(storage) == [entry]
    assert torch.equal(load(folder, storage), after)
    entry.unlink()
    assert torch.equal(old, before)  # the file has lost its name


def test_each_size_has_its_entry_and_order_counts(folder, storage):
    for size in ((6, 8), (8, 6), (12, 12), (6, 8)):
        assert torch.equal(load(folder, storage, size), load(folder, size=size))
    assert len(entries(storage)) == 3
    assert torch.equal(load_images(find_images(folder)[::-1], SIZE, 0, storage), load(folder).flip(0))


def test_a_link_that_leads_elsewhere_is_another_folder(folder, storage, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    replace(tmp_path / "other/1.bmp")
    link = folder / "link"
    for target in (folder, tmp_path / "other"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert torch.equal(load(link, storage), load(target))
        paths = [folder / "0.bmp", *find_images(link)]
        assert torch.equal(load_images(paths, SIZE, 0, storage), load_images(paths, SIZE, 0))


def test_training_and_test_images_each_have_one_entry(tmp_path, storage):
    root = tmp_path / "Data/nut"
    for i in range(2):
        save_noise(root / f"train/good/{i}.bmp", i)
        save_noise(root / f"test/good/{i}.bmp", 2 + i)
    for i in range(3):
        train, test = (load(root.parent, "nut", SIZE, 0, storage) for load in (load_train, load_test))
        assert torch.equal(train.images, load(root / "train/good"))
        assert torch.equal(test.images[:2], load(root / "test/good"))
        assert len(test.images) == 2 + i
        assert len(entries(storage)) == 2
        save_noise(root / f"test/crack{i}/0.bmp", 10 + i)


def test_what_is_never_kept(folder, storage):
    """No images, and images of which one is bad or missing: it is named."""
    assert load_images([], SIZE, 0, storage).shape == (0, 3, *SIZE)
    (folder / "3.bmp").write_text("no image")
    for place in (storage, Storage(None, storage.memory)):
        with pytest.raises(InputError, match=r"3\.bmp: not a readable image"):
            load(folder, place)
    with pytest.raises(InputError, match=r"9\.bmp: No such file"):
        load_images([*find_images(folder)[:2], folder / "9.bmp"], SIZE, 0, storage)
    assert entries(storage) == []


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(folder, storage):
    def decode_and_change(first, images):
        images[:] = load(folder)
        replace(folder / "2.bmp", later=1)

    images = cache.load(find_images(folder), SIZE, decode_and_change, "1", storage)
    assert images.shape == (5, 3, *SIZE)
    assert entries(storage) == []


# Files that are not whole -----------------------------------------------------------------------------------------


SPOILED = {
    "cut": lambda content: content[: STORED * 3],
    "cut at the end": lambda content: content[:-1],
    "longer": lambda content: content + b"\n",
    "other format": lambda content: content.replace(cache.FORMAT.encode(), b"cutpaste-images 9"),
    "other decoder": lambda content: content.replace(b"Pillow ", b"Pillov "),
    "flipped bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_bad_entry_is_made_anew(folder, storage, spoil, capsys):
    expected = load(folder)
    load(folder, storage)
    (entry,) = entries(storage)
    whole = entry.read_bytes()
    assert spoil(whole) != whole
    entry.write_bytes(spoil(whole))
    assert torch.equal(load(folder, storage), expected)
    assert entries(storage) == [entry]
    assert entry.read_bytes() == whole
    assert capsys.readouterr().err == ""


def test_two_processes_at_once(folder, tmp_path):
    both = [start(tmp_path, tmp_path / "cache", memory, folder) for memory in ("1e9", "0")]
    outputs = [process.communicate()[0].split()[:2] for process in both]
    expected = load(folder, size=(64, 64))
    assert outputs == [["5", digest(expected)]] * 2
    storage = Storage(tmp_path / "cache")
    assert len(entries(storage)) == 1
    assert torch.equal(load(folder, storage, (64, 64)), expected)


def test_what_a_killed_run_leaves_is_never_taken_and_goes_after_a_day(tmp_path):
    folder, storage = many(tmp_path / "many", 10_000), Storage(tmp_path / "cache", 0)
    process = start(tmp_path, storage.folder, 0, folder)
    while process.poll() is None and not any(path.stat().st_size for path in entries(storage)):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    (left,) = entries(storage)
    assert left.suffix == files.PART
    assert 0 < left.stat().st_size < 10_000 * 3 * 64 * 64
    for path in find_images(folder)[20:]:
        path.unlink()
    assert torch.equal(load(folder, storage, (64, 64)), load(folder, size=(64, 64)))
    assert left in entries(storage)  # it may be another run's, at work
    os.utime(left, (0, time.time() - files.KILLED_AFTER - 60))
    load(folder, storage)
    assert [path.suffix for path in entries(storage)] == [cache.SUFFIX] * 2


# No room ----------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_costs_one_line(folder, storage, capsys):
    storage.folder.write_text("no folder")
    for _ in range(2):
        assert torch.equal(load(folder, storage), load(folder))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{storage.folder}: decoded images cannot be kept there (File exists); choose another folder"


def test_a_full_disk(tmp_path, storage, monkeypatch, capsys):
    """It costs one line; for images larger than the memory it is an error, which names the temporary folder."""
    monkeypatch.setattr(cache, "BLOCK", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = many(tmp_path / "many", 30)
    with room(100_000):  # the second block has none
        if storage.memory:
            assert torch.equal(load(folder, storage, (64, 64)), load(folder, size=(64, 64)))
        else:
            with pytest.raises(OSError, match=r"0\.0 GB .* \(File too large\); set TMPDIR to another folder") as caught:
                load(folder, storage, (64, 64))
            assert caught.value.filename == str(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{storage.folder}: decoded images cannot be kept there (File too large); choose another folder"
    assert entries(storage) == []


# Larger than memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cache", None])
def test_images_beyond_the_memory_are_mapped(folder, tmp_path, where, monkeypatch):
    """From the cache, or from a file in $TMPDIR that has no name and goes when they go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for memory in (5 * STORED - 1, 5 * STORED):
        for _ in range(2):
            storage = Storage(where and tmp_path / where, memory)
            images = load(folder, storage)
            assert storage.maps(images.shape) == (memory < 5 * STORED)
            assert torch.equal(images, load(folder))
            assert list((tmp_path / "temporary").iterdir()) == []
            if sys.platform == "linux":
                maps = Path("/proc/self/maps").read_text()
                assert (str(tmp_path / (where or "temporary")) in maps) == (memory < 5 * STORED)
                del images
                assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_images_beyond_the_memory_of_the_machine_are_mapped(tmp_path):
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    shape = (2 * total // (3 * 256 * 256), 3, 256, 256)
    with open(tmp_path / "images", "w+b") as file:
        os.ftruncate(file.fileno(), math.prod(shape))  # takes no room: nothing is written
        images = cache._map(file, shape)
    assert images[-1].sum() == 0


def test_passes_over_images(folder, storage, monkeypatch):
    for i in range(5, 19):
        save_noise(folder / f"{i:02}.bmp", i)
    images = load_images(find_images(folder), SIZE, 0, storage)
    for block, lengths in ((1, [8, 8, 3]), (2**26, [19])):
        monkeypatch.setattr(cache, "BLOCK", block)
        assert [len(block) for block in iterate(images)] == lengths
        assert [len(block) for block in iterate(images, 10)] == [10, 9]
        assert torch.equal(torch.cat(list(iterate(images))), images)
        assert digest(images) == hashlib.blake2b(images.numpy(), digest_size=16).hexdigest()
        assert not all_equal(images)
        others = images[:1].repeat(20, 1, 1, 1)
        assert all_equal(others)
        others[19, 2, 5, 7] ^= 1
        assert not all_equal(others)


def test_one_block_or_many_give_the_same_file(tmp_path, storage, monkeypatch):
    folder = many(tmp_path / "many", 50)
    contents = set()
    for memory, block in ((1e9, 2**26), (1e9, 1), (0, 2**26), (0, 1), (0, 11 * STORED)):
        shutil.rmtree(storage.folder, ignore_errors=True)
        monkeypatch.setattr(cache, "BLOCK", block)
        for _ in range(2):
            assert torch.equal(load(folder, Storage(storage.folder, memory)), load(folder))
        (entry,) = entries(storage)
        contents.add(entry.read_bytes())
    assert len(contents) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """While they are decoded, and while they are mapped from the entry of the cache."""
    few, folder = many(tmp_path / "few", 1000), many(tmp_path / "many", 10_000)
    lines = start(tmp_path, tmp_path / "cache", 1000, few, folder, folder).communicate()[0].splitlines()
    counts, digests, peaks = zip(*map(str.split, lines))
    assert counts == ("1000", "10000", "10000")
    assert digests[1] == digests[2]
    assert int(peaks[2]) - int(peaks[0]) < 25, peaks  # 111 MB of images, and 9,000 names


# The scripts ------------------------------------------------------------------------------------------------------


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, expected in ((tmp_path, "cutpaste"), ("relative", "home/.cache/cutpaste"), ("", "home/.cache/cutpaste")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(value))
        assert cache.default_folder() == tmp_path / expected


def test_flags(cache_home):
    parser = argparse.ArgumentParser()
    options.add_data_flags(parser)
    for words, expected in (
        ([], Storage(cache_home / "cutpaste", 4e9)),
        (["--cache_dir", "here", "--memory_gb", "0.5"], Storage(Path("here"), 5e8)),
        (["--cache_dir", "none"], Storage(None, 4e9)),
    ):
        assert options.storage(parser.parse_args(words)) == expected
    for wrong in ("-1", "much", "nan"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--memory_gb", wrong])


def test_detectors_and_scores_do_not_depend_on_where_the_images_live(data, tmp_path, script):
    ways = {
        "none": ["--cache_dir", "none"],
        "mapped": ["--cache_dir", tmp_path / "cache", "--memory_gb", "0.000001"],  # which writes the cache
        "warm": ["--cache_dir", tmp_path / "cache"],
    }
    scores = {}
    for name, flags in ways.items():
        where = ["--data_dir", data, "--type", "brick", "--model_dir", tmp_path / name, *flags]
        done = script("run_training", *where, "--logdir", tmp_path / "logs", *TINY, *SMALL, "--epochs", 1)
        assert done.code == 0, done.err
        assert "cannot" not in done.err
        assert same_weights(tmp_path / "none/brick.pt", tmp_path / name / "brick.pt")
        done = script("eval", *where, "--eval_dir", tmp_path / "Eval", "--density", "torch", "--save_plots", 0)
        assert done.code == 0, done.err
        scores[name] = (tmp_path / "Eval" / name / "scores.csv").read_bytes()
        assert len(list((tmp_path / "cache").glob("*"))) == (0 if name == "none" else 2)  # train/good, test
    assert set(scores.values()) == {scores["none"]}
