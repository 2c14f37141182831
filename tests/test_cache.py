"""Decoded images on disk: the right ones or none, one file per folder and size, and memory that stays bounded."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, one_line, run, same_weights
from PIL import Image

import cache
import dataset
import options
from cache import Storage, all_equal, blocks, digest, is_mapped, release
from dataset import InputError, find_images, load_images, load_test, load_train

SIZE = (6, 8)
STORED = 3 * 6 * 8

# Loads folders at 64 x 64 in a process of its own; says of each what it got and how much memory, in MB, that had taken.
PROGRAM = """
import sys
from pathlib import Path
import cache
from dataset import find_images, load_images

storage, cache.BLOCK = cache.Storage(Path(sys.argv[1]), float(sys.argv[2])), int(sys.argv[3])
for folder in sys.argv[4:]:
    images = load_images(find_images(Path(folder)), (64, 64), 0, storage)
    print(len(images), cache.is_mapped(images), cache.digest(images))
    print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def save_noise(path, seed, side=12):
    """A BMP: the same size in bytes for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Five images of the same size in bytes and the same time of change."""
    for i in range(5):
        os.utime(save_noise(tmp_path / f"images/{i}.bmp", i), (10**9, 10**9))
    return tmp_path / "images"


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path / "cache")


def fresh(folder, size=SIZE):
    return load_images(find_images(folder), size, 0)


def load(folder, storage, size=SIZE):
    return load_images(find_images(folder), size, 0, storage)


def entries(storage):
    """All files of the cache, hidden ones too."""
    return sorted(storage.folder.iterdir()) if storage.folder.exists() else []


def replace_unseen(path, seed):
    """Other pixels, with size and time of change as they were."""
    status = path.stat()
    save_noise(path, seed)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


# What is taken from the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1e9, 0])
def test_a_hit_decodes_nothing(folder, storage, memory, monkeypatch):
    storage = Storage(storage.folder, memory)
    before = fresh(folder)
    assert torch.equal(load(folder, storage), before)
    (entry,) = entries(storage)
    written = entry.stat().st_mtime_ns
    monkeypatch.setattr(dataset, "decode", None)
    assert torch.equal(load(folder, storage), before)
    assert entries(storage) == [entry]
    assert entry.stat().st_mtime_ns == written
    with pytest.raises(TypeError):
        fresh(folder)


def touch(folder):
    path = folder / "2.bmp"
    replace_unseen(path, 77)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def swap(folder):
    """Two names change places: every size and time of change stays."""
    time = (folder / "1.bmp").stat().st_mtime_ns
    os.utime(folder / "2.bmp", ns=(time, time))
    load(folder, Storage(folder.parent / "cache"))
    for old, new in (("1.bmp", "kept"), ("2.bmp", "1.bmp"), ("kept", "2.bmp")):
        (folder / old).rename(folder / new)


def restore(folder):
    """Another file with the size and time of the old one, as cp -p leaves it."""
    replace_unseen(folder / "2.bmp", 77)


def resize(folder):
    path = folder / "2.bmp"
    time = path.stat().st_mtime_ns
    save_noise(path, 77, side=13)
    os.utime(path, ns=(time, time))


def add(folder):
    save_noise(folder / "22.bmp", 77)


def remove(folder):
    (folder / "2.bmp").unlink()


def rename(folder):
    (folder / "2.bmp").rename(folder / "7.bmp")


def exchange(folder):
    (folder / "2.bmp").rename(folder / "x")
    (folder / "4.bmp").rename(folder / "2.bmp")
    (folder / "x").rename(folder / "44.bmp")


@pytest.mark.parametrize("change", [touch, swap, restore, resize, add, remove, rename, exchange])
def test_a_changed_folder_replaces_its_entry(folder, storage, change):
    before = load(folder, storage)
    (entry,) = entries(storage)
    change(folder)
    after = load(folder, storage)
    assert torch.equal(after, fresh(folder))
    assert not torch.equal(after, before)
    assert entries(storage) == [entry]
    assert torch.equal(load(folder, storage), after)


def test_order_counts(folder, storage):
    paths = find_images(folder)
    forward = load_images(paths, SIZE, 0, storage)
    assert torch.equal(load_images(paths[::-1], SIZE, 0, storage), forward.flip(0))


def test_each_size_has_its_entry(folder, storage):
    for size in ((6, 8), (8, 6), (12, 12), (6, 8)):
        assert torch.equal(load(folder, storage, size), fresh(folder, size))
    assert len(entries(storage)) == 3


def test_a_relative_path_means_the_same(folder, storage, monkeypatch):
    load(folder, storage)
    monkeypatch.chdir(folder.parent)
    before = load(folder, storage)
    monkeypatch.setattr(dataset, "decode", None)
    assert torch.equal(load(Path("images"), storage), before)
    assert len(entries(storage)) == 1


def test_a_link_that_leads_elsewhere_is_another_folder(folder, storage, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    replace_unseen(tmp_path / "other/1.bmp", 77)
    link = folder / "link"
    for target in (folder, tmp_path / "other"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert torch.equal(load(link, storage), fresh(target))
        paths = [folder / "0.bmp", *find_images(link)]
        assert torch.equal(load_images(paths, SIZE, 0, storage), load_images(paths, SIZE, 0))


def test_training_and_test_images_each_have_one_entry(tmp_path, storage):
    root = tmp_path / "Data/nut"
    for i in range(2):
        save_noise(root / f"train/good/{i}.bmp", i)
        save_noise(root / f"test/good/{i}.bmp", 2 + i)
    for i in range(3):
        train = load_train(tmp_path / "Data", "nut", SIZE, 0, storage)
        test = load_test(tmp_path / "Data", "nut", SIZE, 0, storage)
        assert torch.equal(train, fresh(root / "train/good"))
        assert test.images.shape[0] == 2 + i
        assert torch.equal(test.images[:2], fresh(root / "test/good"))
        assert len(entries(storage)) == 2
        save_noise(root / f"test/crack{i}/0.bmp", 10 + i)


def test_no_images_are_no_entry(storage):
    assert load_images([], SIZE, 0, storage).shape == (0, 3, *SIZE)
    assert entries(storage) == []


def test_a_bad_image_is_named_and_nothing_is_kept(folder, storage):
    (folder / "3.bmp").write_text("no image")
    for place in (storage, Storage(storage.folder, 0), Storage(None, 0)):
        with pytest.raises(InputError, match=r"3\.bmp: not a readable image"):
            load(folder, place)
    with pytest.raises(InputError, match=r"9\.bmp: No such file"):
        load_images([*find_images(folder)[:2], folder / "9.bmp"], SIZE, 0, storage)
    assert entries(storage) == []


@pytest.mark.parametrize("memory", [1e9, 0])
def test_a_file_that_changes_while_it_is_decoded_is_not_kept(folder, storage, memory):
    paths = find_images(folder)

    def decode_and_change(first, images):
        images[:] = fresh(folder)
        touch(folder)

    images = cache.load(paths, SIZE, decode_and_change, "1", Storage(storage.folder, memory))
    assert images.shape == (5, 3, *SIZE)
    assert entries(storage) == []


# Files that are not whole -----------------------------------------------------------------------------------------


def cut(content):
    return content[: STORED * 3]


def cut_the_end(content):
    return content[:-1]


def longer(content):
    return content + b"\n"


def empty(content):
    return b""


def foreign(content):
    return b"\x89PNG\r\n" + bytes(300)


def other_format(content):
    return content.replace(cache.FORMAT.encode(), b"cutpaste-images 9")


def other_decoder(content):
    return content.replace(b"Pillow ", b"Pillov ")


def flipped_pixel(content):
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("memory", [1e9, 0])
@pytest.mark.parametrize(
    "spoil", [cut, cut_the_end, longer, empty, foreign, other_format, other_decoder, flipped_pixel]
)
def test_a_bad_entry_is_made_anew(folder, storage, spoil, memory, capsys):
    storage = Storage(storage.folder, memory)
    expected = fresh(folder)
    load(folder, storage)
    (entry,) = entries(storage)
    whole = entry.read_bytes()
    assert spoil(whole) != whole
    entry.write_bytes(spoil(whole))
    assert torch.equal(load(folder, storage), expected)
    assert entries(storage) == [entry]
    assert entry.read_bytes() == whole
    assert capsys.readouterr().err == ""


def test_two_processes_at_once(folder, storage, tmp_path):
    command = [sys.executable, program(tmp_path), storage.folder]
    ways = {"env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE}
    both = [subprocess.Popen([*command, memory, "40000", folder], **ways, text=True) for memory in ("1e9", "0")]
    outputs = [process.communicate(timeout=60)[0].split()[:3] for process in both]
    expected = digest(fresh(folder, (64, 64)))
    assert outputs == [["5", "False", expected], ["5", "True", expected]]
    (entry,) = entries(storage)
    assert torch.equal(load(folder, storage, (64, 64)), fresh(folder, (64, 64)))
    assert entries(storage) == [entry]


def many(folder, count):
    """``count`` names of ten images of 64 x 64."""
    for i in range(10):
        save_noise(folder / f"{i:06}.bmp", i, side=64)
    for i in range(10, count):
        os.link(folder / f"{i % 10:06}.bmp", folder / f"{i:06}.bmp")
    return folder


def test_what_a_killed_run_leaves_is_never_taken_and_goes_after_a_day(storage, tmp_path):
    folder = many(tmp_path / "many", 10_000)
    command = [sys.executable, program(tmp_path), storage.folder, "0", str(10**6), folder]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not any(path.stat().st_size for path in entries(storage)) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (left,) = entries(storage)
    assert left.suffix == cache.PART
    assert 0 < left.stat().st_size < 10_000 * 3 * 64 * 64
    for path in find_images(folder)[20:]:
        path.unlink()
    assert torch.equal(load(folder, storage, (64, 64)), fresh(folder, (64, 64)))
    assert left in entries(storage)  # it may be another run's, at work
    os.utime(left, (0, time.time() - cache.KILLED_AFTER - 60))
    load(folder, storage)
    assert [path.suffix for path in entries(storage)] == [cache.SUFFIX] * 2


# No room ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1e9, 0])
def test_a_cache_that_cannot_be_written_costs_one_line(folder, tmp_path, memory, capsys):
    where = tmp_path / f"file{memory}"
    where.write_text("no folder")
    for _ in range(2):
        assert torch.equal(load(folder, Storage(where, memory)), fresh(folder))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{where}: decoded images cannot be kept there (File exists); see --cache_dir"


@contextmanager
def room(size):
    """No file can become larger than that: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("block", [2**26, 20_000])
def test_a_full_disk_costs_one_line(tmp_path, storage, monkeypatch, capsys, block):
    monkeypatch.setattr(cache, "BLOCK", block)
    folder = many(tmp_path / "many", 30)
    with room(100_000):
        images = load(folder, storage, (64, 64))
    assert torch.equal(images, fresh(folder, (64, 64)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{storage.folder}: decoded images cannot be kept there (File too large); see --cache_dir"
    assert entries(storage) == []


def test_images_larger_than_memory_and_disk_are_an_error(data, tmp_path, script, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    where = ("--model_dir", tmp_path / "models", "--logdir", tmp_path / "logs", "--cache_dir", tmp_path / "cache")
    with room(4000):
        done = script("run_training", "--data_dir", data, "--type", "brick", "--memory_gb", 1e-6, *where, *TINY)
    one_line(done, f"{tmp_path}: ", "--memory_gb", "File too large", "TMPDIR")
    assert sum("cannot be kept" in line for line in done.err.splitlines()) == 1
    assert list((tmp_path / "models").iterdir()) == list((tmp_path / "cache").iterdir()) == []


def test_none_leaves_no_file(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    for memory in (1e9, 0):
        assert torch.equal(load(folder, Storage(None, memory)), fresh(folder))
        assert is_mapped(load(folder, Storage(None, memory))) == (memory == 0)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "cache").exists()


# Larger than memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cache", "none"])
def test_mapped_images_are_the_same(folder, tmp_path, where):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = fresh(folder)
        for memory in (5 * STORED - 1, 5 * STORED):
            storage = Storage(tmp_path / "cache" if where == "cache" else None, memory)
            for _ in range(2):
                images = load(folder, storage)
                assert is_mapped(images) == (memory < 5 * STORED)
                assert images.dtype == torch.uint8
                assert images.is_contiguous()
                assert torch.equal(images, expected)


def test_one_block_or_many_give_the_same_file(tmp_path, storage, monkeypatch):
    folder = many(tmp_path / "many", 50)
    contents = set()
    for memory, block in ((1e9, 2**26), (1e9, 1), (0, 2**26), (0, 1), (0, 11 * STORED)):
        shutil.rmtree(storage.folder, ignore_errors=True)
        monkeypatch.setattr(cache, "BLOCK", block)
        for _ in range(2):
            assert torch.equal(load(folder, Storage(storage.folder, memory)), fresh(folder))
        (entry,) = entries(storage)
        contents.add(entry.read_bytes())
    assert len(contents) == 1


def test_a_replaced_entry_leaves_maps_as_they_were(folder, storage):
    images = load(folder, Storage(storage.folder, 0))
    before = images.clone()
    touch(folder)
    after = load(folder, Storage(storage.folder, 0))
    release(images)
    assert torch.equal(images, before)
    assert not torch.equal(after, before)
    shutil.rmtree(storage.folder)
    release(images)
    assert torch.equal(images, before)


def resident(images):
    """Bytes of the map under ``images`` that are in this process."""
    address = images.untyped_storage().data_ptr()
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{address:x}-"))
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_release_gives_memory_back_and_keeps_the_content(tmp_path, storage):
    folder = many(tmp_path / "many", 1000)
    images = load(folder, Storage(storage.folder, 0), (64, 64))
    expected = images.clone()
    assert torch.equal(images[:20], fresh(folder, (64, 64))[:20])
    assert resident(images) >= 12_000_000
    release(images[500:])
    assert 2_000_000 < resident(images) < 8_000_000
    assert torch.equal(images, expected)
    release(images[:300])
    assert 4_000_000 < resident(images) < 10_000_000
    release(images)
    assert resident(images) == 0
    assert torch.equal(images[30:40], expected[30:40])
    assert torch.equal(torch.cat([block.clone() for block in blocks(images, 7)]), expected)
    assert resident(images) == 0
    release(images[3])
    release(images[:0])
    release(images[::2])
    release(expected)
    release(torch.rand(3))
    assert torch.equal(images, expected)


def test_a_map_goes_with_its_last_tensor(folder):
    images = load(folder, Storage(None, 0))
    address, part = images.data_ptr(), images[2:3]
    assert is_mapped(part)
    del images
    assert is_mapped(part)
    assert address in cache._maps
    del part
    assert address not in cache._maps


@pytest.mark.parametrize("memory", [1e9, 0])
def test_passes_over_blocks(folder, monkeypatch, memory):
    for i in range(5, 19):
        save_noise(folder / f"{i:02}.bmp", i)
    images = load(folder, Storage(None, memory))
    for block in (1, 2**26):
        monkeypatch.setattr(cache, "BLOCK", block)
        assert torch.equal(torch.cat([block.clone() for block in blocks(images)]), images)
        assert [len(block) for block in blocks(images)] == ([19] if block > 1 else [8, 8, 3])
        assert digest(images) == hashlib.blake2b(images.numpy(), digest_size=16).hexdigest()
        assert not all_equal(images)
        assert all_equal(images[:1].repeat(20, 1, 1, 1))
        one_other = images[:1].repeat(20, 1, 1, 1)
        one_other[19, 2, 5, 7] ^= 1
        assert not all_equal(one_other)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    folder, few = many(tmp_path / "many", 20_000), tmp_path / "few"
    few.mkdir()
    for path in find_images(folder)[:2000]:
        os.link(path, few / path.name)
    where = (tmp_path / "cache", "1000", str(4 * 10**6))
    done = run(program(tmp_path), *where, few, folder, folder, PYTHONPATH=str(ROOT))
    assert done.code == 0, done.err
    found, peaks = done.out.splitlines()[::2], [int(line) for line in done.out.splitlines()[1::2]]
    assert [line.split()[:2] for line in found] == [["2000", "True"], ["20000", "True"], ["20000", "True"]]
    assert found[1] == found[2]
    assert peaks[2] - peaks[0] < 25, peaks  # 221 MB of images, and 18,000 names


# The scripts ------------------------------------------------------------------------------------------------------


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "cutpaste"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_folder() == tmp_path / "home/.cache/cutpaste"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == tmp_path / "home/.cache/cutpaste"


def test_flags(cache_home):
    parser = options.new_parser("")
    options.add_data_flags(parser)
    assert options.storage(parser.parse_args([])) == Storage(cache_home / "cutpaste", 4e9)
    args = parser.parse_args(["--cache_dir", "here", "--memory_gb", "0.5"])
    assert options.storage(args) == Storage(Path("here"), 5e8)
    assert options.storage(parser.parse_args(["--cache_dir", "none"])).folder is None
    for wrong in ("-1", "much", "nan"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--memory_gb", wrong])


def test_detectors_and_scores_do_not_depend_on_where_the_images_live(data, tmp_path, script):
    ways = {
        "none": ["--cache_dir", "none"],
        "cold": ["--cache_dir", tmp_path / "cache"],
        "warm": ["--cache_dir", tmp_path / "cache"],
        "mapped": ["--cache_dir", tmp_path / "cache", "--memory_gb", "0.000001"],
    }
    scores = {}
    for name, flags in ways.items():
        where = ["--data_dir", data, "--type", "brick", "--model_dir", tmp_path / name, *flags]
        done = script("run_training", *where, "--logdir", tmp_path / "logs", *TINY, "--epochs", 2)
        assert done.code == 0, done.err
        assert "cannot" not in done.err
        assert same_weights(tmp_path / "none/brick.pt", tmp_path / name / "brick.pt")
        done = script("eval", *where, "--eval_dir", tmp_path / "Eval", "--density", "torch", "--save_plots", 0)
        assert done.code == 0, done.err
        scores[name] = (tmp_path / "Eval" / name / "scores.csv").read_bytes()
        assert len(list((tmp_path / "cache").glob("*"))) == (0 if name == "none" else 2)  # train/good, test
    assert set(scores.values()) == {scores["none"]}
