"""prepare_data.py: layouts, splits and refusals."""

import io
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from conftest import contents, one_line
from PIL import Image

from dataset import load_masks, load_test
from prepare_data import MVTEC_COUNTS, split
from runtime.image_files import find_images


def counts(folder):
    return {
        f"{p.parent.name}/{p.name}": len(find_images(p))
        for p in sorted([*(folder / "train").iterdir(), *(folder / "test").iterdir()])
    }


def photographs(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(np.full((6, 8, 3), index, np.uint8)).save(folder / f"{index:03d}.png")


def test_elpv_splits_real_cells(tmp_path, script):
    done = script("prepare_data", "elpv", "--data_dir", tmp_path)
    assert done.code == 0, done.err
    assert counts(tmp_path / "solar_mono") == {"train/good": 441, "test/defective": 313, "test/good": 147}
    names = [p.name for p in tmp_path.rglob("*.png")]
    assert len(names) == len(set(names)) == 901  # no cell in two places
    with Image.open(next(tmp_path.rglob("*.png"))) as image:
        assert image.size == (300, 300)
    one_line(script("prepare_data", "elpv", "--data_dir", tmp_path), "solar_mono", "left alone")


def test_split_is_seeded_complete_and_disjoint():
    items = np.arange(100)
    train, held_out = split(items, 0.25, 0)
    assert len(held_out) == 25
    assert sorted([*train, *held_out]) == list(range(100))
    assert (split(items, 0.25, 0)[1] == held_out).all()
    assert (split(items, 0.25, 1)[1] != held_out).any()


def test_textures_have_masks_where_they_have_defects(data):
    for name in ("brick", "grass", "gravel"):
        assert counts(data / name) == {
            "train/good": 8,
            "test/good": 3,
            "test/hole": 3,
            "test/scratch": 3,
            "test/stain": 3,
        }
    test = load_test(data, "brick", (32, 32), 0)
    masks = load_masks(test, (32, 32), 0)
    assert (masks.flatten(1).any(1).numpy() == (test.labels == 1)).all()
    assert masks.float().mean() < 0.3


def test_folder_copies_photographs(tmp_path, script):
    photographs(tmp_path / "good", 10)
    photographs(tmp_path / "bad/crack", 2)
    photographs(tmp_path / "bad", 3)
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints"):
        photographs(tmp_path / "bad" / name, 1)
    own = ["folder", "--data_dir", tmp_path / "Data", "--good", tmp_path / "good", "--name", "part"]
    assert script("prepare_data", *own, "--bad", tmp_path / "bad").code == 0
    found = counts(tmp_path / "Data/part")
    assert found == {"train/good": 8, "test/good": 2, "test/bad": 3, "test/crack": 2}
    for path in (tmp_path / "Data").rglob("good/*.png"):
        assert path.read_bytes() == (tmp_path / "good" / path.name).read_bytes()
    one_line(script("prepare_data", *own), "part", "left alone", "--add puts", "another --name")


def test_folder_adds_to_a_category(tmp_path, script):
    """No file is replaced; copies are left out, and a name that is taken gets a number."""
    for folder, factor in (("good", 1), ("more", 2)):
        photographs(tmp_path / folder, 5)
        for number, path in enumerate(sorted((tmp_path / folder).glob("*.png"))):
            Image.new("L", (20, 20), 10 * factor + number).save(path)
    own = ["folder", "--data_dir", tmp_path / "Data", "--name", "part", "--held_out", 0]
    more = ["--good", tmp_path / "more", "--add"]
    one_line(script("prepare_data", *own, *more), "part: no such category", "--add")
    assert script("prepare_data", *own, "--good", tmp_path / "good").code == 0
    before = contents(tmp_path / "Data")
    shutil.copy(tmp_path / "good/001.png", tmp_path / "more/copy.png")
    broken = tmp_path / "more/broken.png"
    broken.write_text("no image")
    one_line(script("prepare_data", *own, *more), "broken.png: not a readable image")
    assert contents(tmp_path / "Data") == before
    broken.unlink()
    done = script("prepare_data", *own, *more, "--held_out", 0.4)
    assert done.code == 0, done.err
    assert "1 were there already" in done.err
    assert "--refit" in done.err
    after = contents(tmp_path / "Data")
    assert {path: after[path] for path in before} == before
    added = {path: content for path, content in after.items() if path not in before}
    assert sorted(added.values()) == sorted(path.read_bytes() for path in (tmp_path / "more").glob("00*.png"))
    kinds = counts(tmp_path / "Data/part")
    assert kinds["train/good"] + kinds["test/good"] == 10
    assert kinds["test/good"] in (1, 2)
    assert {path.name for path in added if path.parent.parent.name == "train"} <= {f"00{n}.2.png" for n in range(5)}
    done = script("prepare_data", *own, *more)  # again: all of them are there
    assert "added nothing; 6 were there already" in done.err
    assert contents(tmp_path / "Data") == after


def test_folder_without_bad_photographs(tmp_path, script):
    photographs(tmp_path / "lids", 5)
    assert script("prepare_data", "folder", "--data_dir", tmp_path / "Data", "--good", tmp_path / "lids").code == 0
    assert counts(tmp_path / "Data/lids") == {"train/good": 4, "test/good": 1}


def test_folder_refuses(tmp_path, script):
    def fails(*words, good="good", more=()):
        own = ["folder", "--data_dir", tmp_path / "Data", "--good", tmp_path / good, "--name", "part", *more]
        one_line(script("prepare_data", *own), *words)
        assert not (tmp_path / "Data/part").exists()
        assert not list((tmp_path / "Data").glob(".new-*"))

    fails("good", "no such folder")
    photographs(tmp_path / "good", 1)
    fails("1 photograph(s)")
    photographs(tmp_path / "good", 3)
    fails("--held_out 0.9", more=("--held_out", 0.9))
    fails("nowhere", "--bad", more=("--bad", tmp_path / "nowhere"))
    (tmp_path / "good/003.png").write_text("no image")
    fails("003.png", "not a readable image")
    (tmp_path / "good/003.png").unlink()
    photographs(tmp_path / "bad/good", 1)
    fails("bad/good", "rename", more=("--bad", tmp_path / "bad"))
    for bad in (tmp_path / "good", tmp_path):  # the same folder, and one that holds it
        fails("good: is among the photographs of --bad", more=("--bad", bad))
    shutil.rmtree(tmp_path / "bad")
    photographs(tmp_path / "bad", 1)
    photographs(tmp_path / "bad/bad", 1)
    fails("two photographs of one name", "test/bad", more=("--bad", tmp_path / "bad"))
    for name in ("../part", "a,b", "all"):
        done = script("prepare_data", "folder", "--good", tmp_path / "good", "--name", name)
        assert done.code == 2


# MVTec AD ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toothbrush(tmp_path_factory):
    """A folder with a category of MVTec AD's layout and numbers (not its photographs)."""
    folder = tmp_path_factory.mktemp("mvtec") / "mvtec_anomaly_detection"
    photographs(folder / "toothbrush/train/good", 60)
    photographs(folder / "toothbrush/test/good", 12)
    photographs(folder / "toothbrush/test/defective", 30)
    masks = folder / "toothbrush/ground_truth/defective"
    shutil.copytree(folder / "toothbrush/test/defective", masks)
    for path in masks.iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    return folder


@pytest.mark.parametrize("kind", ["tar", "xztar", "zip"])
def test_mvtec_unpacks_and_verifies(toothbrush, tmp_path, script, kind):
    archive = shutil.make_archive(tmp_path / "mvtec", kind, toothbrush.parent)
    done = script("prepare_data", "mvtec", archive, "--data_dir", tmp_path / "Data")
    assert done.code == 0, done.err
    assert "toothbrush: complete" in done.err
    assert "bottle: not there" in done.err
    assert "1 of 15 categories are complete" in done.err
    assert [p.name for p in (tmp_path / "Data").iterdir()] == ["toothbrush"]
    one_line(script("prepare_data", "mvtec", archive, "--data_dir", tmp_path / "Data"), "toothbrush", "left alone")


def test_mvtec_says_what_is_missing(toothbrush, tmp_path, script):
    folder = tmp_path / "mvtec"
    shutil.copytree(toothbrush, folder)
    assert script("prepare_data", "mvtec", folder).code == 0
    (folder / "toothbrush/train/good/007.png").unlink()
    (folder / "toothbrush/ground_truth/defective/003_mask.png").unlink()
    done = script("prepare_data", "mvtec", folder)
    one_line(done, "2 problem(s)", "train has 59 images instead of 60")
    assert "1 mask(s) missing in ground_truth, the first for test/defective/003.png" in done.err
    one_line(script("prepare_data", "mvtec", tmp_path / "nowhere"), "nowhere", "no such file")
    (tmp_path / "empty").mkdir()
    one_line(script("prepare_data", "mvtec", tmp_path / "empty"), "empty", "no category")


@pytest.mark.parametrize("name", ["../escaped.png", "/escaped.png", "a/../../escaped.png"])
def test_no_path_escapes(tmp_path, script, name):
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        member = tarfile.TarInfo(name)
        member.size = 1
        file.addfile(member, io.BytesIO(b"x"))
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr(name, "x")
    for archive in ("bad.tar", "bad.zip"):
        done = script("prepare_data", "mvtec", tmp_path / archive, "--data_dir", tmp_path / "a/Data")
        one_line(done, archive, "outside the folder", "nothing was unpacked")
    assert not list(tmp_path.rglob("escaped.png"))
    assert not list((tmp_path / "a/Data").iterdir())


def test_links_and_broken_archives_are_refused(toothbrush, tmp_path, script):
    with tarfile.open(tmp_path / "link.tar", "w") as file:
        member = tarfile.TarInfo("toothbrush/train/good/000.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(member)
    one_line(script("prepare_data", "mvtec", tmp_path / "link.tar", "--data_dir", tmp_path / "Data"), "is a link")
    whole = shutil.make_archive(tmp_path / "whole", "xztar", toothbrush.parent)
    with open(whole, "rb") as file:
        content = file.read()
    spoiled = bytearray(content)
    spoiled[1000:1100] = bytes(100)
    for name, bad in (("half", content[:2000]), ("spoiled", spoiled), ("page", b"<html>\n" * 200), ("empty", b"")):
        (tmp_path / f"{name}.tar.xz").write_bytes(bad)
        done = script("prepare_data", "mvtec", tmp_path / f"{name}.tar.xz", "--data_dir", tmp_path / "Data")
        one_line(done, f"{name}.tar.xz", "cannot be unpacked")
        assert len(done.err.splitlines()) == 2  # "unpacking ..." and the error
        assert not list((tmp_path / "Data").iterdir())


def test_what_a_mac_adds_to_a_zip_is_left_out(toothbrush, tmp_path, script):
    archive = shutil.make_archive(tmp_path / "mac", "zip", toothbrush.parent)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("__MACOSX/mvtec_anomaly_detection/toothbrush/train/good/._000.png", b"x")
    done = script("prepare_data", "mvtec", archive, "--data_dir", tmp_path / "Data")
    assert done.code == 0, done.err
    assert "toothbrush: complete" in done.err


def test_official_numbers():
    assert len(MVTEC_COUNTS) == 15
    assert sum(train for train, _ in MVTEC_COUNTS.values()) == 3629
    assert sum(test for _, test in MVTEC_COUNTS.values()) == 1725
