"""dataset.py: folders in MVTec's layout, labels, masks, and the maps that are written in that layout."""

import itertools
import shutil

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dataset import (
    TestSet,
    choose_categories,
    find_categories,
    find_mask,
    load_images,
    load_masks,
    load_test,
    load_train,
    save_maps,
    train_paths,
    unpaired_masks,
)
from runtime.files import InputError
from runtime.image_files import decode


def noise(height, width, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def save_flat(path, value, size=(20, 32)):
    return save(path, np.full((*size, 3), value, np.uint8))


@pytest.fixture
def category(tmp_path):
    """Data/nut: every image is flat, of its own gray."""
    root = tmp_path / "Data" / "nut"
    grays = {"train/good/000": 10, "train/good/001": 11, "train/good/002": 12, "test/good/001": 51}
    grays |= {
        "test/good/000": 50,
        "test/crack/000": 70,
        "test/crack/001": 71,
        "test/crack/002": 72,
        "test/bent/000": 60,
    }
    for name, gray in grays.items():
        save_flat(root / f"{name}.png", gray)
    mask = np.zeros((20, 32), np.uint8)
    mask[:10, :8] = 255
    save(root / "ground_truth" / "bent" / "000_mask.png", mask)
    save(root / "ground_truth" / "crack" / "000.png", mask.T.copy().reshape(20, 32) // 255)
    save(root / "ground_truth" / "crack" / "002_mask.png", mask > 0)
    return root


def load(category, size=(10, 16), workers=0):
    return load_test(category.parent, category.name, size, workers)


def error_of(call, *args):
    """The message of the InputError, which is one line."""
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# Folders ----------------------------------------------------------------------------------------------------------


def test_find_categories(category):
    data = category.parent
    save_flat(data / "bolt" / "train" / "good" / "0.png", 0)
    save_flat(data / "no_training" / "test" / "good" / "0.png", 0)
    (data / "readme.txt").write_text("")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(data / "bolt", data / name)
    assert find_categories(data) == ["bolt", "nut"]
    assert choose_categories(data, ["all"]) == ["bolt", "nut"]
    assert choose_categories(str(data), ["nut", "bolt", "nut"]) == ["nut", "bolt"]


def test_load_train_is_in_the_order_of_names(category):
    save_flat(category / "train" / "good" / "0005.PNG", 99)
    (category / "train" / "good" / "._000.png").write_bytes(b"macOS")
    train = load_train(category.parent, "nut", (6, 8), 0)
    images = train.images
    assert (images.shape, images.dtype, len(train)) == ((4, 3, 6, 8), torch.uint8, 4)
    assert images[:, 0, 0, 0].tolist() == [10, 99, 11, 12]
    assert (images == images[:, :1, :1, :1]).all()
    assert [path.name for path in train.paths] == ["000.png", "0005.PNG", "001.png", "002.png"]
    assert train_paths(category.parent, "nut") == train.paths


def test_what_lies_beside_the_images_of_a_category_is_told(category, capsys):
    (category / "train/good/more").mkdir()
    (category / "train/good/002.png").rename(category / "train/good/002.jp2")
    save_flat(category / "train/bad/000.png", 1)
    save_flat(category / "test/000.png", 1)
    (category / "test/bent/001.png").symlink_to("nowhere")
    load_train(category.parent, "nut", (6, 8), 0)
    load(category)
    load(category)
    lines = [line.partition("; taken are png, jpg")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        f"{category}/train/good: left out: 1 .jp2, 1 sub-folder(s)",
        f"{category}/train: left out: bad; only good is learned from",
        f"{category}/test: left out: 1 image(s) beside the sub-folders",
        f"{category}/test/bent: left out: 1 link(s) that lead nowhere",
    ]


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_images_are_decoded_in_order_by_any_number_of_workers(tmp_path, workers):
    paths = [save(tmp_path / f"{i}.png", noise(15 + i, 30 - i, 3, seed=i)) for i in range(12)]
    expected = load_images(paths, (11, 13), 0)
    assert all(np.array_equal(image.permute(1, 2, 0), decode(path, (11, 13))) for image, path in zip(expected, paths))
    assert len(np.unique(expected.flatten(1).numpy(), axis=0)) == 12
    assert (load_images(paths, (11, 13), workers) == expected).all()
    assert (load_images(paths[::-1], (11, 13), workers) == expected.flip(0)).all()


@pytest.mark.parametrize("workers", [0, 4])
def test_load_test_order_labels_types_and_masks(category, workers):
    """Hidden folders and those of systems are no defect types, folders no images; the data folder is only read."""
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"):
        shutil.copytree(category / "test" / "good", category / "test" / name)
    (category / "test" / "crack" / "003.png").mkdir()
    before = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(category.rglob("*"))]
    test = load(category, workers=workers)
    assert test.images.shape == (6, 3, 10, 16)
    assert test.images[:, 0, 0, 0].tolist() == [50, 51, 60, 70, 71, 72]
    assert test.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert test.labels.dtype == np.int64
    assert test.defect_types == ["good", "good", "bent", "crack", "crack", "crack"]
    names = [str(path.relative_to(category / "test")) for path in test.paths]
    assert names == ["good/000.png", "good/001.png", "bent/000.png", "crack/000.png", "crack/001.png", "crack/002.png"]
    truth = category / "ground_truth"
    expected = [None, None, truth / "bent/000_mask.png", truth / "crack/000.png", None, truth / "crack/002_mask.png"]
    assert test.mask_paths == expected
    assert test.with_truth.tolist() == [True, True, True, True, False, True]
    load_masks(test, (10, 16), workers)
    load_train(category.parent, "nut", (10, 16), workers)
    assert [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(category.rglob("*"))] == before


@pytest.mark.parametrize(
    ("image", "mask", "paired"),
    [
        ("crack/000.png", "crack/000_mask.png", True),  # before crack/000.png, which is there too
        ("crack/001.png", "crack/001_mask.png", True),
        ("crack/001.png", "crack/001_mask.PNG", True),
        ("crack/001.png", "crack/001_mask.bmp", True),
        ("crack/001.png", "crack/001.TIF", True),
        ("crack/001.png", "crack/001.jpg", True),
        ("crack/001.png", "bent/001_mask.png", False),  # of another defect type
        ("good/000.png", "good/000_mask.png", False),
    ],
)
def test_find_mask(category, image, mask, paired):
    mask = save(category / "ground_truth" / mask, np.zeros((20, 32), np.uint8))
    assert find_mask(category / "test" / image) == (mask if paired else None)


@pytest.mark.parametrize("workers", [0, 4])
def test_several_masks_of_an_image_are_one(category, workers):
    """A folder for each image, as in MVTec LOCO AD; of a mask file and a folder, the file."""
    first, second = np.zeros((2, 20, 32), np.uint8)
    first[2:4, 3:9] = second[10:14, 20:22] = 254
    folder = category / "ground_truth/crack/001"
    for number, mask in enumerate((first, second)):
        save(folder / f"{number:03}.png", mask)
    save(category / "ground_truth/crack/002/000.png", first)
    test = load(category)
    assert test.mask_paths[4:] == [folder, category / "ground_truth/crack/002_mask.png"]
    assert unpaired_masks(test) == [category / "ground_truth/crack/002"]
    assert np.array_equal(load_masks(test, (20, 32), workers)[4], (first + second) > 0)
    for size in ((10, 16), (7, 11)):
        masks = []
        for mask in (first, second):
            save(folder / "000.png", mask)
            save(folder / "001.png", mask)
            masks.append(load_masks(test, size, workers)[4])
        save(folder / "000.png", first)
        assert torch.equal(load_masks(test, size, workers)[4], masks[0] | masks[1])
    wrong = save(folder / "002.png", first.T.copy())
    assert error_of(load, category).startswith(f"{wrong}: mask of 20x32 pixels for {category}/test/crack/001.png")


def test_masks_that_fit_no_image_are_found(category, tmp_path):
    truth, mask = category / "ground_truth", np.zeros((20, 32), np.uint8)
    names = ["000_mask.png", "bent/000_gt.png", "bent/001_mask.png", "bent/000_MASK.png", "Crack/001_mask.png"]
    paths = [save(truth / name, mask) for name in names]
    save(truth / "good/000_mask.png", mask)  # of a normal image
    save(truth / "@eaDir/000_mask.png", mask)
    test = load(category)
    assert sorted(unpaired_masks(test)) == sorted(paths)
    truth.rename(category / "masks")
    assert unpaired_masks(test) == [category / "masks"]
    (category / "masks").rename(tmp_path / "elsewhere")
    assert unpaired_masks(test) == []


@pytest.mark.parametrize("workers", [0, 4])
def test_load_masks(category, workers):
    """Masks of {0, 255}, {0, 1} and one bit, at half their size and at their own."""
    test = load(category)
    masks, large = load_masks(test, (10, 16), workers), load_masks(test, (20, 32), workers)
    assert (masks.shape, large.shape, masks.dtype) == ((6, 10, 16), (6, 20, 32), torch.uint8)
    corner = np.zeros((20, 32), np.uint8)
    corner[:10, :8] = 1
    truth = {2: corner, 3: corner.T.reshape(20, 32), 5: corner}
    for i in range(6):
        expected = truth.get(i, np.zeros((20, 32), np.uint8))
        assert np.array_equal(large[i], expected)
        for y, x in itertools.product(range(10), range(16)):
            assert masks[i, y, x] in expected[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
    sums = masks.sum((1, 2)).tolist()
    assert (sums[:3], sums[4:]) == ([0, 0, 5 * 4], [0, 5 * 4])


@pytest.mark.parametrize("size", [(10, 16), (7, 11), (19, 31), (1, 1), (20, 9), (33, 16), (40, 64)])
def test_a_pixel_counts_if_any_part_of_it_is_marked(tmp_path, size):
    """Against a count in halves, thirds ...: where it shrinks, any overlap; where it grows, the nearest pixel."""
    marked = np.random.default_rng(1).random((20, 32)) < 0.03
    path = save(tmp_path / "mask.png", marked * np.uint8(255))
    test = TestSet(torch.empty(0), np.array([1]), ["crack"], [path], [path])

    def parts(number, length, smaller):
        """The pixels of an axis that a pixel of the resized one covers."""
        if smaller > length:
            return [int((number + 0.5) * length / smaller)]
        return [i for i in range(length) if i * smaller < (number + 1) * length and (i + 1) * smaller > number * length]

    rows, columns = ([parts(i, *sides) for i in range(sides[1])] for sides in zip(marked.shape, size))
    expected = [[marked[np.ix_(y, x)].any() for x in columns] for y in rows]
    assert np.array_equal(load_masks(test, size, 0)[0], expected)
    assert test.known(load_masks(test, size, 0).numpy()).all()


def test_an_anomalous_image_whose_mask_marks_nothing_is_not_known(category):
    save(category / "ground_truth/bent/000_mask.png", np.zeros((20, 32), np.uint8))
    test = load(category)
    assert test.known(load_masks(test, (10, 16), 0).numpy()).tolist() == [True, True, False, True, False, True]


# Errors -----------------------------------------------------------------------------------------------------------


def test_what_is_no_data_folder_or_category(category, tmp_path):
    for choice in (["all"], ["nut"]):
        assert error_of(choose_categories, tmp_path / "none", choice).startswith(f"{tmp_path}/none: no such folder")
    message = error_of(find_categories, category)
    assert message.startswith(f"{category}: no category")
    assert "train/good" in message
    message = error_of(choose_categories, category.parent, ["nut", "bolt"])
    assert message == f"bolt: no such category in {category.parent}, which holds: nut"


@pytest.mark.parametrize(
    ("call", "folder", "count", "message"),
    [
        (load_train, "nut", 0, "nut/train/good: no such folder"),
        (load_train, "nut/train/good", 0, "nut/train/good: 0 image(s) found, at least 2"),
        (load_train, "nut/train/good", 1, "nut/train/good: 1 image(s) found, at least 2"),
        (load_test, "nut", 0, "nut/test: no such folder"),
        (load_test, "nut/test/good", 0, "nut/test: no image"),
    ],
)
def test_missing_or_empty_folders(tmp_path, call, folder, count, message):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "notes.txt").write_text("")
    for number in range(count):
        save_flat(tmp_path / folder / f"{number}.png", number)
    assert error_of(call, tmp_path, "nut", (8, 8), 0).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize(
    "name", ["train/good/001.png", "test/crack/001.png", "test/bent/000.png", "ground_truth/bent/000_mask.png"]
)
def test_bad_image_or_mask_is_named(category, name, workers):
    """A training image, a test image without a mask, one that has a mask, and its mask; whole header or none."""

    def load_all():
        load_train(category.parent, "nut", (8, 8), workers)
        load_masks(load(category, workers=workers), (10, 16), workers)

    content = save(category / name, noise(20, 32, 3)).read_bytes()
    for spoiled in (content[: len(content) // 2], b"two roads diverged\nin a yellow wood\n", b""):
        (category / name).write_bytes(spoiled)
        assert error_of(load_all).startswith(f"{category / name}: not a readable image")


@pytest.mark.parametrize("workers", [0, 4])
def test_first_of_two_bad_files_is_named(tmp_path, workers):
    paths = [save(tmp_path / f"{i:02}.png", noise(9, 9, 3)) for i in range(20)]
    paths[4].write_text("no image")
    paths[5].write_text("")
    assert error_of(load_images, paths, (8, 8), workers).startswith(f"{paths[4]}: ")


def test_mask_of_another_size_is_named(category):
    mask = save(category / "ground_truth" / "crack" / "000.png", np.zeros((32, 20), np.uint8))
    image = category / "test" / "crack" / "000.png"
    expected = f"{mask}: mask of 20x32 pixels for {image}, which has 32x20; make them equal"
    assert error_of(load, category) == expected


# Maps -------------------------------------------------------------------------------------------------------------


def test_maps_are_saved_in_the_size_of_their_images(category, tmp_path):
    """Instead of earlier maps of images that are gone. What another program wrote, or a link leads to, stays."""
    paths = [category / "test" / name for name in ("good/000.png", "crack/000.png", "crack/001.png")]
    save_flat(paths[1], 70, (16, 8))
    gone = save_flat(category / "test" / "bent" / "001.png", 70)
    folder = tmp_path / "maps"
    other = save(folder / "test" / "bent" / "000.tiff", np.zeros((2, 2), np.float32))
    (folder / "notes.txt").write_text("mine")
    save_maps(folder, category, [*paths, gone], np.zeros((4, 8, 16), np.float32))
    stale = folder / "test" / "bent" / "001.tiff"
    assert stale.exists()
    (folder / "test" / "linked").symlink_to(shutil.copytree(folder / "test" / "bent", tmp_path / "elsewhere"))
    maps = np.random.default_rng(0).random((3, 8, 16), dtype=np.float32)
    maps[2] = 1e6  # more than 16 bits hold
    save_maps(folder, category, paths, maps)
    assert not stale.exists()
    assert (tmp_path / "elsewhere" / "001.tiff").exists()
    targets = [folder / "test" / path.parent.name / f"{path.stem}.tiff" for path in paths]
    left = {path for path in folder.rglob("*.*") if "linked" not in path.parts}
    assert left == {*targets, other, folder / "notes.txt"}
    saved = [tifffile.imread(target) for target in targets]
    assert [values.dtype for values in saved] == [np.float16] * 3
    assert [values.shape for values in saved] == [(20, 32), (16, 8), (20, 32)]
    for values, small in zip(saved[:2], maps):
        expected = torch.nn.functional.interpolate(torch.tensor(small)[None, None], values.shape, mode="bilinear")
        assert np.abs(values - expected[0, 0].numpy()).max() < 1e-3
    assert (saved[2] == np.finfo(np.float16).max).all()


def test_maps_that_would_replace_another_file_are_refused(category, tmp_path):
    """Those of two images of one stem, and one in whose place lies a file of another program."""
    twin = save_flat(category / "test" / "good" / "001.bmp", 9)
    old = save(tmp_path / "maps" / "test" / "good" / "000.tiff", np.zeros((2, 2), np.float32))
    content = old.read_bytes()
    first, second, third = (category / "test" / name for name in ("crack/001.png", "good/001.png", "good/000.png"))
    for paths, message in [
        ([first, second, twin], f"{twin}: its map would be named like that of 001.png; rename one of them"),
        ([third, second], f"{old}: is there already"),
    ]:
        maps = np.zeros((len(paths), 4, 4), np.float32)
        assert error_of(save_maps, tmp_path / "maps", category, paths, maps).startswith(message)
        assert list((tmp_path / "maps").rglob("*.*")) == [old]
        assert old.read_bytes() == content
