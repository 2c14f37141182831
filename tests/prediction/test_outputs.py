"""Files of rows that are continued wherever they end, and drawings that harm no other file."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import contents, rows_of
from PIL import Image

from config import FORMATS
from prediction.outputs import COLUMNS, Drawings, RowsFile, name_below
from runtime.files import InputError

ROW = dict.fromkeys(COLUMNS, 0.25) | {"path": "a.png", "error": None}
every_kind = pytest.mark.parametrize("kind", FORMATS)


def rows_in(path, kind):
    """The rows of a file by columns; None, where it is empty, and numbers as text."""
    if kind == "csv":
        return [{name: value or None for name, value in row.items()} for row in rows_of(path)]
    rows = map(json.loads, path.read_bytes().splitlines())
    return [{name: value if value is None else str(value) for name, value in row.items()} for row in rows]


def paths_in(path, kind):
    return [row["path"] for row in rows_in(path, kind)]


# Rows -------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("columns", [COLUMNS, ("category", *COLUMNS)], ids=["one", "several"])
def test_a_file_is_continued_and_overwritten_wherever_it_ends(tmp_path, kind, columns):
    """Wherever a run was killed, the next one makes the same file and counts all rows; --overwrite starts anew, as the
    other kind too."""
    path, (other_kind,) = tmp_path / "rows", {*FORMATS} - {kind}
    empty = dict.fromkeys(columns)
    rows = [empty | {"path": 'q",\n"', "error": "bad"}, empty | {"path": "é\r\n", "anomalous": 1, "score": 1 / 3}]

    def write():
        with RowsFile(str(path), kind, columns) as file:
            file.add([row for row in rows if row["path"] not in file.done])
        assert file.done == {'q",\n"': None, "é\r\n": 1 / 3}
        assert file.counts == {"rows": 2, "anomalous": 1, "errors": 1}

    write()
    whole = path.read_bytes()
    assert rows_in(path, kind) == [{name: value and str(value) for name, value in row.items()} for row in rows]
    # What a file begins with decides whether it is of this program, so that is cut with other columns too
    for length in range(1 + (len(whole) if columns is COLUMNS else whole.index(b"\n") + 1)):
        path.write_bytes(whole[:length])
        write()
        assert path.read_bytes() == whole, length
        path.write_bytes(whole[:length])
        with RowsFile(str(path), other_kind, COLUMNS, overwrite=True) as file:
            file.add([ROW])
        assert paths_in(path, other_kind) == ["a.png"], length


@pytest.mark.parametrize("overwrite", [False, True])
@every_kind
@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "path,score\n", "letter", '{"a": 1}\n', '"' * 99, '{"pass', "x\ny\n", "[1]\n", "\n"]
)
def test_another_file_is_not_touched(tmp_path, kind, text, overwrite):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with (
        pytest.raises(InputError, match=r"notes\.txt: holds something else than rows of this program"),
        RowsFile(str(path), kind, COLUMNS, overwrite),
    ):
        pass
    assert path.read_text() == text


def test_two_runs_do_not_write_to_one_file(tmp_path):
    pytest.importorskip("fcntl")
    path = str(tmp_path / "rows.csv")
    with RowsFile(path, "csv", COLUMNS) as first:
        first.add([ROW])
        for overwrite in (False, True):
            second = RowsFile(path, "csv", COLUMNS, overwrite)
            with pytest.raises(InputError, match="another run is writing to it"), second:
                pass
        first.add([ROW | {"path": "b.png"}])
    with RowsFile(path, "csv", COLUMNS) as third:
        assert third.done == {"a.png": 0.25, "b.png": 0.25}


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.csv"
    with RowsFile(str(path), "csv", COLUMNS) as rows:
        rows.add([ROW])
        before, file, left = path.read_bytes(), rows.file, [4]

        def write(content):  # takes a few bytes, then none
            if not left:
                raise OSError(28, "No space left on device")
            return file.write(content[: left.pop()])

        rows.file = SimpleNamespace(write=write, fileno=file.fileno, truncate=file.truncate)
        with pytest.raises(OSError, match="cannot be written"):
            rows.add([ROW | {"path": "b.png"}])
        assert path.read_bytes() == before
        rows.file = file
        rows.add([ROW | {"path": "c.png"}])
    assert paths_in(path, "csv") == ["a.png", "c.png"]


# Drawings ---------------------------------------------------------------------------------------------------------


def draw(folders, *paths, below=()):
    """Draw images, below a folder or none, each kind in its folder; a panel as heat map."""
    drawings = Drawings(*folders)
    drawings.prepare((path, below) for path in paths)
    for path in paths:
        drawings.draw(path, np.full((4, 4), 9, np.float32), 1.0, below, 1.0)


def test_names_of_drawings(here):
    assert name_below("photos/more/a.png", ["photos"]) == "more/a.png"
    assert name_below("../photos/a.png", []) == "photos/a.png"
    assert name_below(str(here / "x.png"), []) == str(here / "x.png")[1:]
    draw(("heat", "masks"), "photos/a.jpg", "photos/c.TIF", "photos/more/e.bmp", below=["photos"])
    assert {str(path.relative_to(here)) for path in {**contents(here / "heat"), **contents(here / "masks")}} == {
        *("heat/a.jpg", "heat/c.png", "heat/more/e.png"),
        *("masks/a.png", "masks/c.png", "masks/more/e.png"),
    }
    for path in contents(here / "masks"):
        assert (np.array(Image.open(path)) == 255).all()


def test_no_drawing_is_in_the_way_of_another_file(here):
    """Test another image, the image itself, the other drawing, what a link leads to, and any other file."""
    draw(("heat", None), "photos/d.png")
    for source, target in (("photos/b.png", "photos/b.bmp"), ("photos/more/a.png", "photos/more/b.png")):
        (here / target).write_bytes((here / source).read_bytes())
    (here / "photos/drawn.png").write_bytes((here / "heat/photos/d.png").read_bytes())  # is a photograph now
    (here / "in").mkdir()
    (here / "gone").mkdir()
    links = {"in/b.png": here / "photos/b.png", "in/drawn.png": here / "photos/drawn.png", "gone/b.png": "/none/b.png"}
    for link, target in links.items():
        (here / link).symlink_to(target)
    before = contents(here)
    taken, there = "would be drawn of it, but that name is taken by", "is there already, without the mark"
    for kinds in ((0,), (1,), (2,)):  # heat maps, masks, panels
        for folder, paths, below, words in (
            ("photos", ["photos/b.png"], "photos", f"photos/b.png: photos/b.png {taken} photos/b.png"),
            ("photos", ["photos/b.png", f"{here}/photos/b.png"], "photos", f"b.png {taken}"),
            ("a", ["photos/b.png", "photos/b.bmp"], "photos", f"photos/b.bmp: a/b.png {taken} photos/b.png"),
            ("photos", ["photos/more/b.png"], "photos/more", f"photos/b.png: {there}"),
            ("photos", ["in/b.png"], "in", f"photos/b.png {taken}"),
            ("photos", ["in/drawn.png"], "in", f"photos/drawn.png {taken}"),
            ("gone", ["photos/b.png"], "photos", f"gone/b.png: {there}"),
        ):
            folders = [folder if kind in kinds else None for kind in range(3)]
            with pytest.raises(InputError) as caught:
                draw(folders, *paths, below=[below])
            assert words in str(caught.value)
    for folders in (("a", "a"), (None, "a", "a")):
        with pytest.raises(InputError, match="a, a: each kind of drawing needs a folder of its own"):
            draw(folders)
    with pytest.raises(InputError, match=r"b\.png would be drawn of it"):
        draw(("a", "./a"), "photos/b.png", below=["photos"])
    assert contents(here) == before
    assert (here / "gone/b.png").is_symlink()
    assert not (here / "a").exists()
    for _ in range(2):  # what this program has drawn is replaced
        draw(("heat", "masks"), "photos/d.png")
    drawings = Drawings("heat", None)
    drawings.prepare([("photos/d.png", ["photos"])])
    (here / "heat/d.png").write_text("came in the way since")
    with pytest.raises(InputError, match=r"heat/d\.png: is there already"):
        drawings.draw("photos/d.png", np.zeros((4, 4), np.float32), 1.0, ["photos"], 1.0)
    assert (here / "heat/d.png").read_text() == "came in the way since"
