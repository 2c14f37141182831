"""dataset.py: image files, folders in MVTec's layout, maps, and what bad or crafted files get."""

import io
import itertools
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import (
    choose_categories,
    decode,
    find_categories,
    find_images,
    find_mask,
    load_images,
    load_masks,
    load_test,
    load_train,
    read_size,
    save_maps,
    train_paths,
)
from runtime.files import InputError

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


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_decode_gray(tmp_path, suffix):
    gray = noise(12, 20)
    assert np.array_equal(decode(save(tmp_path / f"a.{suffix}", gray)), as_rgb(gray))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_decode_1_bit(tmp_path, suffix):
    bits = noise(12, 20) > 127
    assert np.array_equal(decode(save(tmp_path / f"a.{suffix}", bits)), as_rgb(bits * np.uint8(255)))


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


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_decode_lays_transparent_pixels_on_white(tmp_path, suffix):
    array = noise(12, 20, 4)
    array[:4, :, 3], array[4:8, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    result = decode(save(tmp_path / f"a.{suffix}", array, **options))
    alpha = array[..., 3:] / 255
    expected = alpha * array[..., :3] + (1 - alpha) * 255
    assert (result[:4] == 255).all()
    assert np.array_equal(result[4:8], array[4:8, :, :3])
    assert np.abs(result - expected).max() <= 1


def test_decode_gray_with_alpha(tmp_path):
    array = noise(12, 20, 2)
    array[:4, :, 1], array[4:8, :, 1] = 0, 255
    path = tmp_path / "a.png"
    bands = [Image.fromarray(np.ascontiguousarray(array[..., k])) for k in (0, 1)]
    Image.merge("LA", bands).save(path)
    assert mode_of(path) == "LA"
    result = decode(path)
    alpha = array[..., 1] / 255
    assert (result[:4] == 255).all()
    assert np.array_equal(result[4:8], as_rgb(array[4:8, :, 0]))
    assert np.abs(result - as_rgb(alpha * array[..., 0] + (1 - alpha) * 255)).max() <= 1


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
    values = np.random.default_rng(0).random((600, 500), dtype=np.float32)
    values[0, :2] = 0, 1
    path = save(tmp_path / "a.tif", values)
    assert mode_of(path) == "F"
    expected = [[round(value * 255) for value in row] for row in values.tolist()]
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
    result = decode(save(tmp_path / f"a.{suffix}", array, quality=95))
    assert result.shape == (24, 40, 3)
    assert np.abs(result.astype(int) - array).mean() < 3


@pytest.mark.parametrize(("suffix", "mode"), [("png", "RGB"), ("webp", "RGB"), ("tif", "RGB"), ("tif", "L")])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_decode_turns_upright(tmp_path, orientation, suffix, mode):
    """Gray TIFF files too, which Pillow scrambles if it maps them into memory."""
    array = noise(12, 20, 3) if mode == "RGB" else as_rgb(noise(12, 20))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", array, mode, exif=exif, **options)
    assert np.array_equal(decode(path), UPRIGHT[orientation](array))
    assert read_size(path) == UPRIGHT[orientation](array).shape[:2]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_decode_turns_16_bit_upright_before_resizing(tmp_path, orientation):
    values = np.zeros((12, 20), np.uint16)
    values[:6] = 65535  # the upper half
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = decode(save(tmp_path / "a.png", values, exif=exif), (16, 16))
    expected = UPRIGHT[orientation](as_rgb(np.repeat([255, 0], 8)[:, None].repeat(16, 1)))
    assert np.abs(upright.astype(int) - expected).mean() < 5  # but for the blurred border between the halves


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_read_size_of_a_turned_jpg(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path / "a.jpg", noise(12, 20, 3), exif=exif)
    assert read_size(path) == decode(path).shape[:2] == ((20, 12) if orientation > 4 else (12, 20))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
def test_read_size_without_exif(tmp_path, suffix):
    assert read_size(save(tmp_path / f"a.{suffix}", noise(12, 20, 3))) == (12, 20)


# Resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 20), (6, 10), (5, 20), (12, 7), (20, 6), (30, 50), (1, 1)])
def test_decode_resizes_like_an_anti_aliased_triangle(tmp_path, size):
    array = noise(12, 20, 3)
    result = decode(save(tmp_path / "a.png", array), size)
    expected = triangle_resized(triangle_resized(array, size[0]).transpose(1, 0, 2), size[1]).transpose(1, 0, 2)
    assert result.dtype == np.uint8
    assert result.shape == (*size, 3)
    assert np.abs(result - expected).max() <= 1.01


def test_resizing_keeps_up_and_left(tmp_path):
    array = np.zeros((40, 20, 3), np.uint8)
    array[:20, :, 0], array[:, :10, 1] = 255, 255  # red above, green on the left
    images = load_images([save(tmp_path / "a.png", array)], (16, 24), 0)
    assert images.shape == (1, 3, 16, 24)
    red, green, blue = images[0].float() / 255
    assert (red[:6] == 1).all()
    assert (red[10:] == 0).all()
    assert (green[:, :9] == 1).all()
    assert (green[:, 15:] == 0).all()
    assert (blue == 0).all()


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
    images = load_train(category.parent, "nut", (6, 8), 0)
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


def test_mask_named_mask_comes_first(category):
    truth = category / "ground_truth" / "crack"
    save(truth / "000_mask.png", np.zeros((20, 32), np.uint8))
    assert find_mask(category / "test" / "crack" / "000.png") == truth / "000_mask.png"


@pytest.mark.parametrize("name", ["001_mask.png", "001_mask.PNG", "001_mask.bmp", "001.TIF", "001.jpg"])
def test_mask_may_have_another_suffix(category, name):
    save(category / "ground_truth" / "crack" / name, np.zeros((20, 32), np.uint8))
    assert find_mask(category / "test" / "crack" / "001.png") == category / "ground_truth" / "crack" / name


def test_normal_image_has_no_mask(category):
    save(category / "ground_truth" / "good" / "000_mask.png", np.zeros((20, 32), np.uint8))
    assert find_mask(category / "test" / "good" / "000.png") is None


def test_mask_of_another_defect_type_is_not_taken(category):
    save(category / "ground_truth" / "bent" / "001_mask.png", np.zeros((20, 32), np.uint8))
    assert find_mask(category / "test" / "crack" / "001.png") is None


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


@pytest.mark.parametrize("choice", [["all"], ["nut"]])
def test_missing_data_folder(tmp_path, choice):
    missing = tmp_path / "nowhere"
    assert error_of(choose_categories, missing, choice).startswith(f"{missing}: no such folder")


def test_data_folder_without_category(tmp_path):
    (tmp_path / "nut" / "test").mkdir(parents=True)
    message = error_of(find_categories, tmp_path)
    assert message.startswith(f"{tmp_path}: no category")
    assert "train/good" in message


def test_unknown_category(category):
    message = error_of(choose_categories, category.parent, ["nut", "bolt"])
    assert message == f"bolt: no such category in {category.parent}, which holds: nut"


def test_category_without_training_folder(tmp_path):
    (tmp_path / "nut").mkdir()
    folder = tmp_path / "nut" / "train" / "good"
    assert error_of(load_train, tmp_path, "nut", (8, 8), 0).startswith(f"{folder}: no such folder")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_training_images(tmp_path, count):
    folder = tmp_path / "nut" / "train" / "good"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("")
    for i in range(count):
        save_flat(folder / f"{i}.png", i)
    message = error_of(load_train, tmp_path, "nut", (8, 8), 0)
    assert message.startswith(f"{folder}: {count} image(s) found, at least 2")


def test_missing_test_folder(tmp_path):
    (tmp_path / "nut").mkdir()
    message = error_of(load_test, tmp_path, "nut", (8, 8), 0)
    assert message.startswith(f"{tmp_path / 'nut' / 'test'}: no such folder")


def test_empty_test_folder(tmp_path):
    (tmp_path / "nut" / "test" / "good").mkdir(parents=True)
    assert error_of(load_test, tmp_path, "nut", (8, 8), 0).startswith(f"{tmp_path / 'nut' / 'test'}: no image")


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


@pytest.mark.parametrize("spoil", [truncate, make_text, make_empty])
@pytest.mark.parametrize("workers", [0, 4])
def test_bad_training_image_is_named(category, spoil, workers):
    path = category / "train" / "good" / "001.png"
    spoil(path)
    assert error_of(load_train, category.parent, "nut", (8, 8), workers).startswith(f"{path}: not a readable image")


@pytest.mark.parametrize("workers", [0, 4])
def test_first_of_two_bad_files_is_named(tmp_path, workers):
    paths = [save(tmp_path / f"{i:02}.png", noise(9, 9, 3)) for i in range(20)]
    make_text(paths[4])
    make_empty(paths[5])
    assert error_of(load_images, paths, (8, 8), workers).startswith(f"{paths[4]}: ")


@pytest.mark.parametrize("spoil", [truncate, make_text, make_empty])
@pytest.mark.parametrize("name", ["test/crack/001.png", "test/bent/000.png", "ground_truth/bent/000_mask.png"])
def test_bad_test_image_or_mask_is_named(category, name, spoil):
    """An image without a mask, one that has a mask, and its mask."""
    spoil(category / name)

    def load_all():
        load_masks(load(category), (10, 16), 0)

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
    stale = save(folder / "test" / "bent" / "000.tiff", np.zeros((2, 2), np.float32))
    save_maps(folder, category, paths, maps)
    assert not stale.exists()
    assert len(list(folder.rglob("*.*"))) == 3
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


# Crafted files ----------------------------------------------------------------------------------------------------


def tiff(size, offsets=(0,), tiles=False, bits=8, kind=1, packing=1, claims=None):
    """A gray TIFF file, in strips of a row or tiles of 16 x 16, around 200 KB of noise.

    offsets: of the strips in the noise. kind: 1 integers, 3 floats. packing: 1 none, 8 deflate. claims: {tag: (type,
    number of values)} for tags that have no such values.
    """
    body = np.random.default_rng(0).bytes(200_000)
    tags = {256: size[0], 257: size[1], 258: bits, 259: packing, 262: 1, 339: kind}
    tags |= {322: 16, 323: 16, 324: None} if tiles else {273: None, 278: 1}
    entries = {tag: (4, 1, value) for tag, value in tags.items()}
    entries |= {tag: (*claim, 8) for tag, claim in (claims or {}).items()}
    start = 14 + 12 * len(entries)
    where = (1, start + offsets[0]) if len(offsets) == 1 else (len(offsets), start + len(body))
    entries |= {tag: (4, *where) for tag, (_, _, value) in entries.items() if value is None}
    table = b"".join(struct.pack("<HHII", tag, *entries[tag]) for tag in sorted(entries))
    pointers = (np.asarray(offsets) + start).astype("<u4").tobytes()
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + bytes(4) + body + pointers


def big_tiff(count):
    """A BigTIFF file that claims ``count`` tags and has a thousand."""
    return struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, count) + 1000 * struct.pack("<HHQQ", 65000, 4, 1, 0)


def png(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def run_length_bmp(width, height):
    """Rows of one run each; the rest of a row is background."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return struct.pack("<2sIII", b"BM", 0, 0, 1078) + header + bytes(1024) + b"\1\0\0\0" * height


def progressive_jpg(width, height, scans):
    """The last scan again and again."""
    buffer = io.BytesIO()
    Image.new("L", (width, height), 128).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()[:-2]
    return content + content[content.rindex(b"\xff\xda") :] * scans + b"\xff\xd9"


FEW, MANY = (0,), np.zeros(10**6, np.int64)
ALLOWED = "allowed: 178956970, 1048576 a side"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff((2**31 - 1, 2**31 - 1)), f"claims 2147483647x2147483647 pixels; {ALLOWED}"),
        (tiff((20_000, 9_000), packing=8), f"claims 20000x9000 pixels; {ALLOWED}"),
        (tiff((1, 170_000_000), packing=8), f"claims 1x170000000 pixels; {ALLOWED}"),
        (tiff((1, 10**6), MANY), "claims 1000000 strips or tiles, at most 65536 are read"),
        (tiff((16_000, 16_000), MANY, tiles=True), "claims 1000000 strips or tiles"),
        (tiff((100, 100), claims={324: (4, 2**32 - 1)}), "claims 4294967295 strips or tiles"),
        (tiff((100, 100), claims={282: (5, 10**6)}), "claims 1000000 strips or tiles"),
        (big_tiff(2**63), "claims 9223372036854775808 strips or tiles"),
        (tiff((170, 10**6), FEW, bits=16), "claims 170x1000000 pixels in 200"),
        (tiff((170, 10**6), FEW, bits=32, kind=3), "claims 170x1000000 pixels in 200"),
        (tiff((13_000, 13_000), FEW, tiles=True), "claims 13000x13000 pixels in 200"),
        (png(1, 178_000_000), f"claims 1x178000000 pixels; {ALLOWED}"),
        (run_length_bmp(13_000, 13_000), "claims 13000x13000 pixels; allowed: 8388608"),
        (progressive_jpg(4_000, 3_000, 400), "claims 4000x3000 pixels; allowed: "),
    ],
    ids=range(14),
)
def test_what_a_file_may_claim(tmp_path, content, message):
    """Most of these kept Pillow busy for 5 to 70 seconds."""
    path = tmp_path / "a.png"
    path.write_bytes(content)
    started = time.monotonic()
    for call in (decode, read_size):
        assert error_of(call, path).startswith(f"{path}: {message}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PNG", "JPEG"])
def test_large_files_are_read_in_silence(tmp_path, kind):
    """More pixels than Pillow takes without a warning, and as many strips as there are rows."""
    if kind == "TIFF":
        size, path = (3, 60_000), tmp_path / "a.tif"
        path.write_bytes(tiff(size, range(0, 180_000, 3)))
    else:
        size, path = (9_500 if kind == "PNG" else 2_500, 9_500), tmp_path / f"a.{kind}"
        image = Image.new("1" if kind == "PNG" else "L", size, 1)
        image.save(path, kind, **({"progressive": True} if kind == "JPEG" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = decode(path, (8, 8))
        assert read_size(path) == size[::-1]
    if kind == "TIFF":
        noise = np.frombuffer(np.random.default_rng(0).bytes(200_000), np.uint8)
        assert np.array_equal(decode(path), as_rgb(noise[:180_000].reshape(60_000, 3)))
    else:
        assert (small == small[0, 0]).all()


def test_a_crafted_training_image_is_named(category):
    path = category / "train" / "good" / "001.png"
    path.write_bytes(tiff((2**31 - 1, 2**31 - 1)))
    assert error_of(load_train, category.parent, "nut", (8, 8), 4).startswith(f"{path}: claims ")
