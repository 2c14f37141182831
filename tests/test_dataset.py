"""dataset.py: image files, folders in MVTec's layout, maps, and what bad or crafted files get."""

import io
import itertools
import shutil
import struct
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import (
    choose_categories,
    find_categories,
    find_mask,
    load_images,
    load_masks,
    load_test,
    load_train,
    save_maps,
    train_paths,
)
from runtime.files import InputError
from runtime.image_files import decode, find_images, read_size

ORIENTATION = 0x0112
UPRIGHT = {  # what each EXIF orientation asks for, on an array (H, W, 3)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def noise(height, width, *channels, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, *channels), dtype, True)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def save_flat(path, value, size=(20, 32)):
    return save(path, np.full((*size, 3), value, np.uint8))


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


def as_rgb(gray):
    return np.repeat(np.asarray(gray)[..., None], 3, axis=2)


def triangle_resized(array, count):
    """Bilinear resizing of the first axis with anti-aliasing, output row by output row."""
    step = len(array) / count
    reach = max(step, 1)
    rows = []
    for i in range(count):
        weights = [max(0, 1 - abs((j + 0.5) - (i + 0.5) * step) / reach) for j in range(len(array))]
        rows.append(sum(w * row for w, row in zip(weights, array.astype(float))) / sum(weights))
    return np.stack(rows)


@pytest.fixture
def category(tmp_path):
    """Data/nut: every image is flat, of its own gray."""
    root = tmp_path / "Data" / "nut"
    for i in range(3):
        save_flat(root / "train" / "good" / f"{i:03}.png", 10 + i)
    save_flat(root / "test" / "good" / "001.png", 51)
    save_flat(root / "test" / "good" / "000.png", 50)
    save_flat(root / "test" / "crack" / "000.png", 70)
    save_flat(root / "test" / "crack" / "001.png", 71)
    save_flat(root / "test" / "crack" / "002.png", 72)
    save_flat(root / "test" / "bent" / "000.png", 60)
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


# Decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "PNG", "Tif"])
def test_decode_rgb(tmp_path, suffix):
    array = noise(12, 20, 3)
    path = save(tmp_path / f"a.{suffix}", array)
    assert np.array_equal(decode(path), array)
    assert np.array_equal(decode(str(path)), array)
    assert read_size(path) == (12, 20)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_decode_gray_and_1_bit(tmp_path, suffix):
    gray = noise(12, 20)
    assert np.array_equal(decode(save(tmp_path / f"a.{suffix}", gray)), as_rgb(gray))
    assert np.array_equal(decode(save(tmp_path / f"b.{suffix}", gray > 127)), as_rgb((gray > 127) * np.uint8(255)))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_decode_palette(tmp_path, suffix):
    colors, index = noise(256, 3), noise(12, 20, seed=1)
    image = Image.fromarray(index, "L")
    image.putpalette(colors.tobytes())
    image.save(tmp_path / f"a.{suffix}")
    assert mode_of(tmp_path / f"a.{suffix}") == "P"
    assert np.array_equal(decode(tmp_path / f"a.{suffix}"), colors[index])


def test_decode_palette_with_a_transparent_color(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png", transparency=1)
    assert decode(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


@pytest.mark.parametrize(("suffix", "channels"), [("png", 4), ("tif", 4), ("webp", 4), ("png", 2)])
def test_decode_lays_transparent_pixels_on_white(tmp_path, suffix, channels):
    array = noise(12, 20, channels)
    array[:4, :, -1], array[4:8, :, -1] = 0, 255
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", array, **options)
    assert mode_of(path) == ("RGBA" if channels == 4 else "LA")
    result = decode(path)
    alpha = array[..., -1:] / 255
    assert (result[:4] == 255).all()
    assert (result[4:8] == array[4:8, :, :-1]).all()
    assert np.abs(result - (alpha * array[..., :-1] + (1 - alpha) * 255)).max() <= 1


@pytest.mark.parametrize(
    ("suffix", "mode", "dtype"),
    [("png", "I;16", "<u2"), ("tif", "I;16", "<u2"), ("tif", "I;16B", ">u2"), ("tif", "I", "<i4")],
)
def test_decode_16_bit(tmp_path, suffix, mode, dtype):
    values = np.arange(2**16).reshape(128, 512)
    path = tmp_path / f"a.{suffix}"
    Image.frombytes(mode, (512, 128), values.astype(dtype).tobytes()).save(path)
    assert mode_of(path) == mode
    expected = [[round(value * 255 / 65535) for value in row] for row in values.tolist()]
    assert np.array_equal(decode(path), as_rgb(expected))


def test_decode_float(tmp_path):
    expected = noise(600, 500)
    off = np.random.default_rng(1).uniform(-0.49, 0.49, expected.shape)
    path = save(tmp_path / "a.tif", ((expected + off).clip(0, 255) / 255).astype(np.float32))
    assert mode_of(path) == "F"
    assert np.array_equal(decode(path), as_rgb(expected))


@pytest.mark.parametrize("cmyk", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 128, 0, 51), (30, 60, 90, 0), (0, 0, 0, 255)])
def test_decode_cmyk_jpg(tmp_path, cmyk):
    Image.new("CMYK", (20, 12), cmyk).save(tmp_path / "a.jpg", quality=95)
    assert mode_of(tmp_path / "a.jpg") == "CMYK"
    expected = [255 * (1 - ink / 255) * (1 - cmyk[3] / 255) for ink in cmyk[:3]]
    assert np.abs(decode(tmp_path / "a.jpg") - np.array(expected)).max() <= 3


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "JPG"])
def test_decode_lossy(tmp_path, suffix):
    ramp = np.add.outer(np.arange(24), 2 * np.arange(40)).astype(np.uint8)
    array = np.stack([ramp, 255 - ramp, ramp // 2 + 60], axis=2)
    path = save(tmp_path / f"a.{suffix}", array, quality=95)
    result = decode(path)
    assert read_size(path) == (24, 40)
    assert result.shape == (24, 40, 3)
    assert np.abs(result.astype(int) - array).mean() < 3


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("png", "RGB"), ("png", "I;16"), ("webp", "RGB"), ("tif", "RGB"), ("tif", "L"), ("tif", "I;16")],
)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_decode_turns_upright_before_resizing(tmp_path, orientation, suffix, kind):
    """Gray TIFF files too, which Pillow scrambles if it maps them into memory."""
    array = noise(12, 20, 3) if kind == "RGB" else noise(12, 20)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", array * np.uint16(257) if kind == "I;16" else array, exif=exif, **options)
    upright = UPRIGHT[orientation](array if kind == "RGB" else as_rgb(array))
    assert np.array_equal(decode(path), upright)
    assert np.array_equal(decode(path, (9, 7)), decode(save(tmp_path / "b.png", upright), (9, 7)))
    assert read_size(path) == upright.shape[:2]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_read_size_of_a_turned_jpg(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path / "a.jpg", noise(12, 20, 3), exif=exif)
    assert read_size(path) == decode(path).shape[:2] == ((20, 12) if orientation > 4 else (12, 20))


# Resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 20), (6, 10), (5, 20), (12, 7), (20, 6), (30, 50), (1, 1)])
def test_images_are_resized_like_by_an_anti_aliased_triangle(tmp_path, size):
    array = noise(12, 20, 3)
    images = load_images([save(tmp_path / "a.png", array)], size, 0)
    expected = triangle_resized(triangle_resized(array, size[0]).transpose(1, 0, 2), size[1]).transpose(2, 1, 0)
    assert images.dtype == torch.uint8
    assert images.shape == (1, 3, *size)
    assert np.abs(images[0].numpy() - expected).max() <= 1.01


# Folders ----------------------------------------------------------------------------------------------------------


def test_find_images_ignores_what_is_none(tmp_path):
    for name in ("b.png", "A.PNG", "c.JpG", "d.jpeg", "e.bmp", "f.TIF", "g.tiff", "h.webp"):
        save(tmp_path / name, noise(4, 4, 3))
    for name in ("._b.png", ".hidden.png", ".DS_Store", "Thumbs.db", "notes.txt", "png", "b.png.bak", "data.csv"):
        (tmp_path / name).write_text("no image")
    save(tmp_path / "folder" / "x.png", noise(4, 4, 3))
    names = [path.name for path in find_images(tmp_path)]
    assert names == ["A.PNG", "b.png", "c.JpG", "d.jpeg", "e.bmp", "f.TIF", "g.tiff", "h.webp"]


def test_find_categories(category):
    data = category.parent
    save_flat(data / "bolt" / "train" / "good" / "0.png", 0)
    save_flat(data / "no_training" / "test" / "good" / "0.png", 0)
    (data / "readme.txt").write_text("")
    assert find_categories(data) == ["bolt", "nut"]
    assert choose_categories(data, ["all"]) == ["bolt", "nut"]
    assert choose_categories(str(data), ["nut", "bolt", "nut"]) == ["nut", "bolt"]


def test_load_train_is_in_the_order_of_names(category):
    save_flat(category / "train" / "good" / "0005.PNG", 99)
    (category / "train" / "good" / "._000.png").write_bytes(b"macOS")
    images = load_train(category.parent, "nut", (6, 8), 0).images
    assert images.shape == (4, 3, 6, 8)
    assert images[:, 0, 0, 0].tolist() == [10, 99, 11, 12]
    assert (images == images[:, :1, :1, :1]).all()
    assert [p.name for p in train_paths(category.parent, "nut")] == ["000.png", "0005.PNG", "001.png", "002.png"]


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_workers_change_nothing(tmp_path, workers):
    paths = [save(tmp_path / f"{i}.png", noise(15 + i, 30 - i, 3, seed=i)) for i in range(12)]
    expected = load_images(paths, (11, 13), 0)
    assert len(np.unique(expected.flatten(1).numpy(), axis=0)) == 12
    assert (load_images(paths, (11, 13), workers) == expected).all()
    assert (load_images(paths[::-1], (11, 13), workers) == expected.flip(0)).all()


@pytest.mark.parametrize("workers", [0, 4])
def test_load_test_order_labels_types_and_masks(category, workers):
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


@pytest.mark.parametrize(
    ("image", "mask", "found"),
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
def test_find_mask(category, image, mask, found):
    mask = save(category / "ground_truth" / mask, np.zeros((20, 32), np.uint8))
    assert find_mask(category / "test" / image) == (mask if found else None)


@pytest.mark.parametrize("workers", [0, 4])
def test_load_masks(category, workers):
    """Masks of {0, 255}, {0, 1} and one bit, at half their size."""
    masks = load_masks(load(category), (10, 16), workers)
    assert masks.shape == (6, 10, 16)
    assert str(masks.dtype) == "torch.uint8"
    corner = np.zeros((20, 32), np.uint8)
    corner[:10, :8] = 1
    truth = {2: corner, 3: corner.T.reshape(20, 32), 5: corner}
    for i in range(6):
        full = truth.get(i, np.zeros((20, 32), np.uint8))
        for y, x in itertools.product(range(10), range(16)):
            assert masks[i, y, x] in full[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
    assert masks.sum((1, 2)).tolist()[:3] == [0, 0, 5 * 4]
    assert masks[4].sum() == 0
    assert masks[5].sum() == 5 * 4


def test_load_masks_at_their_own_size(category):
    mask = (noise(20, 32) > 127) * noise(20, 32, seed=1)
    save(category / "ground_truth" / "bent" / "000_mask.png", mask)
    masks = load_masks(load(category), (20, 32), 0)
    assert np.array_equal(masks[2], mask > 0)


def test_data_folder_is_only_read(category):
    def listing():
        return [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(category.rglob("*"))]

    before = listing()
    load_masks(load(category), (10, 16), 2)
    load_train(category.parent, "nut", (10, 16), 2)
    assert listing() == before


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
    ("call", "made", "message"),
    [
        (load_train, "nut", "nut/train/good: no such folder"),
        (load_test, "nut", "nut/test: no such folder"),
        (load_test, "nut/test/good", "nut/test: no image"),
    ],
)
def test_missing_or_empty_folders(tmp_path, call, made, message):
    (tmp_path / made).mkdir(parents=True)
    assert error_of(call, tmp_path, "nut", (8, 8), 0).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_training_images(tmp_path, count):
    folder = tmp_path / "nut" / "train" / "good"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("")
    for i in range(count):
        save_flat(folder / f"{i}.png", i)
    message = error_of(load_train, tmp_path, "nut", (8, 8), 0)
    assert message.startswith(f"{folder}: {count} image(s) found, at least 2")


def truncate(path):
    """Half of a picture with the size of the others: the header is whole."""
    save(path, noise(20, 32, 3))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def make_text(path):
    path.write_text("two roads diverged\nin a yellow wood\n")


def make_empty(path):
    path.write_bytes(b"")


def make_gif(path):
    Image.new("L", (4, 4)).save(path, "GIF")


@pytest.mark.parametrize("spoil", [truncate, make_text, make_empty, make_gif])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_bad_file(tmp_path, suffix, spoil):
    path = tmp_path / f"a.{suffix}"
    spoil(path)
    message = error_of(decode, path)
    assert message.startswith(f"{path}: not a readable image (")
    assert message.endswith("); replace or remove it")
    assert message.count(str(path)) == 1


def test_missing_file(tmp_path):
    path = tmp_path / "a.png"
    assert error_of(decode, path) == f"{path}: No such file or directory"
    assert error_of(read_size, path) == f"{path}: No such file or directory"


@pytest.mark.parametrize("workers", [0, 4])
def test_first_of_two_bad_files_is_named(tmp_path, workers):
    paths = [save(tmp_path / f"{i:02}.png", noise(9, 9, 3)) for i in range(20)]
    make_text(paths[4])
    make_empty(paths[5])
    assert error_of(load_images, paths, (8, 8), workers).startswith(f"{paths[4]}: ")


@pytest.mark.parametrize("spoil", [truncate, make_text, make_empty])
@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize(
    "name", ["train/good/001.png", "test/crack/001.png", "test/bent/000.png", "ground_truth/bent/000_mask.png"]
)
def test_bad_image_or_mask_is_named(category, name, workers, spoil):
    """A training image, a test image without a mask, one that has a mask, and its mask."""
    spoil(category / name)

    def load_all():
        load_train(category.parent, "nut", (8, 8), workers)
        load_masks(load(category, workers=workers), (10, 16), workers)

    assert error_of(load_all).startswith(f"{category / name}: not a readable image")


def test_mask_of_another_size_is_named(category):
    mask = save(category / "ground_truth" / "crack" / "000.png", np.zeros((32, 20), np.uint8))
    image = category / "test" / "crack" / "000.png"
    expected = f"{mask}: mask of 20x32 pixels for {image}, which has 32x20; make them equal"
    assert error_of(load, category) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70_000]], np.int32), "gray values from 0 to 70000"),
        (np.array([[-1, 200]], np.int32), "gray values from -1 to 200"),
        (np.array([[0, 255]], np.float32), "float values from 0.0 to 255.0"),
        (np.array([[-0.5, 1]], np.float32), "float values from -0.5 to 1.0"),
        (np.array([[np.nan, 1]], np.float32), "float values from nan"),
    ],
)
def test_values_without_a_meaning(tmp_path, values, message):
    path = save(tmp_path / "a.tif", values)
    assert error_of(decode, path).startswith(f"{path}: {message}")


def test_folders_are_no_images_and_hidden_folders_no_defect_types(tmp_path):
    for name in ("good", "crack", ".ipynb_checkpoints"):
        (tmp_path / "part/test" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "part/test" / name / "000.png")
    (tmp_path / "part/test/crack/001.png").mkdir()
    test = load_test(tmp_path, "part", (4, 4), 0)
    assert test.defect_types == ["good", "crack"]
    assert len(test.paths) == 2


def test_masks_of_any_color_are_read_as_they_are_seen(tmp_path):
    """A palette mask in near-black blue, and one turned by its EXIF tag."""
    for name in ("test", "ground_truth"):
        (tmp_path / "part" / name / "crack").mkdir(parents=True)
    marked = np.zeros((4, 6), np.uint8)
    marked[0, :2] = 1
    palette = Image.fromarray(marked, "P")
    palette.putpalette([0, 0, 0, 0, 0, 1])
    exif = Image.Exif()
    exif[ORIENTATION] = 3  # upside down
    turned = Image.fromarray(np.ascontiguousarray(marked[::-1, ::-1] * 255))
    for index, mask in enumerate((palette, turned)):
        Image.new("RGB", (6, 4)).save(tmp_path / f"part/test/crack/{index}.png")
        mask.save(tmp_path / f"part/ground_truth/crack/{index}_mask.png", **({"exif": exif} if index else {}))
    masks = load_masks(load_test(tmp_path, "part", (4, 6), 0), (4, 6), 0)
    assert (masks.numpy() == marked).all()


# Maps -------------------------------------------------------------------------------------------------------------


def test_maps_are_saved_in_the_size_of_their_images(category, tmp_path):
    paths = [category / "test" / name for name in ("good/000.png", "crack/000.png", "crack/001.png")]
    save_flat(paths[1], 70, (16, 8))
    maps = np.random.default_rng(0).random((3, 8, 16), dtype=np.float32)
    maps[2] = 1e6  # more than 16 bits hold
    folder = tmp_path / "maps"
    other = save(folder / "test" / "bent" / "000.tiff", np.zeros((2, 2), np.float32))  # of another program
    (folder / "notes.txt").write_text("mine")
    bent = save_flat(category / "test" / "bent" / "001.png", 70)
    save_maps(folder, category, [*paths, bent], np.zeros((4, 8, 16), np.float32))
    (folder / "test" / "linked").symlink_to(shutil.copytree(folder / "test" / "bent", tmp_path / "elsewhere"))
    stale = folder / "test" / "bent" / "001.tiff"
    assert stale.exists()
    save_maps(folder, category, paths, maps)
    assert not stale.exists()
    assert (tmp_path / "elsewhere" / "001.tiff").exists()
    assert {path for path in folder.rglob("*.*") if "linked" not in path.parts} == {
        *(folder / "test" / path.parent.name / f"{path.stem}.tiff" for path in paths),
        *(other, folder / "notes.txt"),
    }
    import tifffile

    read = [tifffile.imread(folder / "test" / f"{path.parent.name}/{path.stem}.tiff") for path in paths]
    assert [values.dtype for values in read] == [np.float16] * 3
    assert [values.shape for values in read] == [(20, 32), (16, 8), (20, 32)]
    for values, small in zip(read[:2], maps):
        expected = torch.nn.functional.interpolate(torch.tensor(small)[None, None], values.shape, mode="bilinear")
        assert np.abs(values - expected[0, 0].numpy()).max() < 1e-3
    assert (read[2] == np.finfo(np.float16).max).all()


def test_maps_of_two_images_of_one_stem_are_refused(category, tmp_path):
    twin = save_flat(category / "test" / "good" / "001.bmp", 9)
    old = save(tmp_path / "maps" / "test" / "good" / "000.tiff", np.zeros((2, 2), np.float32))
    paths = [category / "test" / "crack" / "001.png", category / "test" / "good" / "001.png", twin]
    message = error_of(save_maps, tmp_path / "maps", category, paths, np.zeros((3, 4, 4), np.float32))
    assert message == f"{twin}: its map would be named like that of 001.png; rename one of them"
    assert [path for path in (tmp_path / "maps").rglob("*.*")] == [old]
    content = old.read_bytes()
    paths[0] = category / "test" / "good" / "000.png"
    message = error_of(save_maps, tmp_path / "maps", category, paths[:2], np.zeros((2, 4, 4), np.float32))
    assert message.startswith(f"{old}: is there already")
    assert [path for path in (tmp_path / "maps").rglob("*.*")] == [old]
    assert old.read_bytes() == content


# Crafted files ----------------------------------------------------------------------------------------------------


def tiff(tags):
    """A small uncompressed gray TIFF file whose header claims something else: {tag: value}, or {tag: (type, number of
    values)} for values at the end of the file, 8 MB of zeros."""
    buffer = io.BytesIO()
    Image.fromarray(noise(256, 256)).save(buffer, "TIFF", dpi=(1, 1))
    content = bytearray(buffer.getvalue())
    entries = range(content[4] + 2, content[4] + 2 + 12 * content[8], 12)
    places = {struct.unpack_from("<H", content, place)[0]: place for place in entries}
    places |= {322: places[282], 323: places[283], 324: places[273], 339: places[296]}  # in place of resolution, strips
    for tag, value in tags.items():
        claim = (*value, len(content)) if isinstance(value, tuple) else (4, 1, value)
        struct.pack_into("<HHII", content, places[tag], tag, *claim)
    return bytes(content) + bytes(8_000_000 * any(isinstance(value, tuple) for value in tags.values()))


def run_length_bmp(width, height):
    """Rows of one run of one pixel; the rest of a row is background."""
    header = struct.pack("<2sIIIIIIHHI", b"BM", 0, 0, 1078, 40, width, height, 1, 8, 1)
    return header + bytes(1044) + b"\1\0\0\0" * height


def progressive_jpg(width, height, scans):
    """The last scan again and again."""
    buffer = io.BytesIO()
    Image.new("L", (width, height), 128).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()[:-2]
    return content + content[content.rindex(b"\xff\xda") :] * scans + b"\xff\xd9"


ALLOWED = "allowed: 178956970, 1048576 a side"
BIG_TIFF = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 2**63) + 1000 * struct.pack("<HHQQ", 65000, 4, 1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff({256: 2**31 - 1, 257: 2**31 - 1}), f"claims 2147483647x2147483647 pixels; {ALLOWED}"),
        (tiff({256: 20_000, 257: 9_000, 259: 8}), f"claims 20000x9000 pixels; {ALLOWED}"),
        (tiff({256: 1, 257: 170_000_000, 259: 8}), f"claims 1x170000000 pixels; {ALLOWED}"),
        (tiff({256: 1, 257: 10**6, 278: 1, 273: (4, 10**6)}), "claims 1000000 strips or tiles, at most 65536 are read"),
        (tiff({256: 16_000, 257: 16_000, 322: 16, 323: 16, 324: (4, 10**6)}), "claims 1000000 strips or tiles"),
        (tiff({324: (4, 2**32 - 1)}), "claims 4294967295 strips or tiles"),
        (tiff({282: (5, 10**6)}), "claims 1000000 strips or tiles"),  # fractions
        (BIG_TIFF, "claims 9223372036854775808 strips or tiles"),
        (tiff({256: 170, 257: 10**6, 278: 1, 258: 16}), "claims 170x1000000 pixels in 65710 bytes"),
        (tiff({256: 170, 257: 10**6, 278: 1, 258: 32, 339: 3}), "claims 170x1000000 pixels in 65710 bytes"),
        (tiff({256: 13_000, 257: 13_000, 322: 16, 323: 16, 324: 200}), "claims 13000x13000 pixels in 65710 bytes"),
        (run_length_bmp(13_000, 13_000), "claims 13000x13000 pixels; allowed: 8388608"),
        (progressive_jpg(4_000, 3_000, 400), "claims 4000x3000 pixels; allowed: "),
    ],
    ids=range(13),
)
def test_what_a_file_may_claim(tmp_path, content, message):
    """Files like these kept Pillow busy for up to 70 seconds."""
    path = tmp_path / "a.png"
    path.write_bytes(content)
    started = time.monotonic()
    for call in (decode, read_size):
        assert error_of(call, path).startswith(f"{path}: {message}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        ("PNG", (9_500, 9_500), {}),  # more pixels than Pillow takes without a warning
        ("TIFF", (3, 60_000), {"compression": "packbits", "strip_size": 3}),  # a strip a row
        ("JPEG", (4_000, 3_000), {"progressive": True}),
    ],
)
def test_large_files_are_read_in_silence(tmp_path, kind, size, options):
    path = tmp_path / "a.png"
    Image.new("1" if kind == "PNG" else "L", size, 255).save(path, kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_size(path) == size[::-1]
        assert (decode(path, (8, 8)) == 255).all()
