"""Test which images are meant: folders that are walked once, and lists."""

import io
import os
import shutil
import sys

from prediction.inputs import list_paths, pair_folders, walk


def test_folders_are_walked_once(here):
    (here / "photos/more/back").symlink_to(here / "photos")
    for hidden in (".hidden/b.png", "._b.png", "@eaDir/b.png", "more/__MACOSX/b.png", "$RECYCLE.BIN/b.png"):
        (here / "photos" / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(here / "photos/b.png", here / "photos" / hidden)
    names = ["a.jpg", "b.png", "c.TIF", "d.png", "more/a.png", "more/e.bmp"]
    assert list(walk("photos")) == [f"photos/{name}" for name in names]
    (here / "photos/more/back").unlink()
    twice = list_paths(["photos/b.png", "photos", "photos/more"])
    assert twice[0] == "photos/b.png"
    assert sorted(twice) == [f"photos/{name}" for name in names]
    assert len(list_paths(["photos"], skipped=["photos/more"])) == 4


def test_what_is_left_out_of_a_folder_and_its_sub_folders_is_told(here, capsys):
    for name in ("f.gif", "more/g.gif", "more/h.gif"):
        (here / "photos" / name).write_text("")
    for _ in range(2):
        assert len(list(walk("photos"))) == 6
    told = [line.partition("; ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["photos: left out: 1 .gif", "photos/more: left out: 2 .gif"]


def test_folders_of_systems_are_no_categories(here, detectors, capsys):
    for name in ("brick", "@eaDir", "__MACOSX"):
        (here / "all" / name).mkdir(parents=True)
    shutil.copy(here / "photos/b.png", here / "all")
    assert [task.category for task in pair_folders(str(detectors / "patch"), "all")] == ["brick"]
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("all: left out: 1 image(s) beside the sub-folders; ")
    assert told[1:] == ["grass: has a detector but no images; left out"]


def test_a_list_may_have_any_line_breaks_and_bytes(monkeypatch):
    lines = b"a.png\r\n\n=b.png\n\xff.png\nfolder"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert list_paths(["c.png", "-", "a.png"]) == ["c.png", "a.png", "./=b.png", os.fsdecode(b"\xff.png"), "folder"]


def test_a_folder_that_may_not_be_listed_is_given_like_a_file(here, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(walk("photos"))[4:] == ["photos/more"]
