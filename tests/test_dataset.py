import itertools

import numpy as np
import pytest
from PIL import Image

from dataset import (
    InputError,
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
    train_paths,
)

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
    """Data/nut: every image is flat, of its own grey."""
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
    assert np.array_equal(decode(save(tmp_path / f"a.{suffix}", array)), array)


def test_decode_takes_a_string(tmp_path):
    array = noise(12, 20, 3)
    assert np.array_equal(decode(str(save(tmp_path / "a.png", array))), array)


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


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_decode_16_bit(tmp_path, suffix):
    values = noise(12, 20, dtype=np.uint16)
    values[0, :6] = 0, 128, 129, 257, 65534, 65535
    path = save(tmp_path / f"a.{suffix}", values)
    assert mode_of(path) == "I;16"
    expected = [[round(value * 255 / 65535) for value in row] for row in values.tolist()]
    assert np.array_equal(decode(path), as_rgb(expected))


def test_decode_big_endian_16_bit(tmp_path):
    values = noise(12, 20, dtype=np.uint16)
    image = Image.frombytes("I;16B", (20, 12), values.astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    assert mode_of(tmp_path / "a.tif") == "I;16B"
    expected = [[round(value * 255 / 65535) for value in row] for row in values.tolist()]
    assert np.array_equal(decode(tmp_path / "a.tif"), as_rgb(expected))


def test_decode_16_bit_values_in_32_bits(tmp_path):
    values = noise(12, 20, dtype=np.uint16).astype(np.int32)
    path = save(tmp_path / "a.tif", values)
    assert mode_of(path) == "I"
    expected = [[round(value * 255 / 65535) for value in row] for row in values.tolist()]
    assert np.array_equal(decode(path), as_rgb(expected))


def test_decode_float(tmp_path):
    values = np.random.default_rng(0).random((12, 20), dtype=np.float32)
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


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_decode_turns_upright(tmp_path, orientation, suffix):
    array = noise(12, 20, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", array, exif=exif, **options)
    assert np.array_equal(decode(path), UPRIGHT[orientation](array))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_decode_turns_16_bit_upright_before_resizing(tmp_path, orientation):
    values = np.zeros((12, 20), np.uint16)
    values[:6] = 65535  # the upper half
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = decode(save(tmp_path / "a.png", values, exif=exif), (16, 16))
    expected = UPRIGHT[orientation](as_rgb(np.repeat([255, 0], 8)[:, None].repeat(16, 1)))
    assert np.abs(upright.astype(int) - expected).mean() < 5  # but for the blurred border between the halves


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_read_size_agrees_with_decode(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path / f"a.{suffix}", noise(12, 20, 3), exif=exif)
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


@pytest.mark.parametrize("spoil", [truncate, make_text, make_empty])
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
def test_bad_test_image_is_named(category, spoil):
    path = category / "test" / "crack" / "001.png"  # the one without a mask
    spoil(path)
    assert error_of(load, category).startswith(f"{path}: not a readable image")


@pytest.mark.parametrize("spoil", [truncate, make_text, make_empty])
def test_bad_test_image_with_a_mask_is_named(category, spoil):
    path = category / "test" / "bent" / "000.png"
    spoil(path)
    assert error_of(load, category).startswith(f"{path}: not a readable image")


@pytest.mark.parametrize("spoil", [truncate, make_text, make_empty])
def test_bad_mask_is_named(category, spoil):
    path = category / "ground_truth" / "bent" / "000_mask.png"
    spoil(path)

    def load_all():
        load_masks(load(category), (10, 16), 0)

    assert error_of(load_all).startswith(f"{path}: not a readable image")


def test_mask_of_another_size_is_named(category):
    mask = save(category / "ground_truth" / "crack" / "000.png", np.zeros((32, 20), np.uint8))
    image = category / "test" / "crack" / "000.png"
    expected = f"{mask}: mask of 20x32 pixels for {image}, which has 32x20; make them equal"
    assert error_of(load, category) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70_000]], np.int32), "grey values from 0 to 70000"),
        (np.array([[-1, 200]], np.int32), "grey values from -1 to 200"),
        (np.array([[0, 255]], np.float32), "float values from 0.0 to 255.0"),
        (np.array([[-0.5, 1]], np.float32), "float values from -0.5 to 1.0"),
        (np.array([[np.nan, 1]], np.float32), "float values from nan"),
    ],
)
def test_values_without_a_meaning(tmp_path, values, message):
    path = save(tmp_path / "a.tif", values)
    assert error_of(decode, path).startswith(f"{path}: {message}")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_of_a_rotated_tiff_is_the_decoded_one(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((12, 20, 3), np.uint8)).save(tmp_path / "a.tif", exif=exif)
    assert read_size(tmp_path / "a.tif") == decode(tmp_path / "a.tif").shape[:2]
    assert read_size(tmp_path / "a.tif") == ((12, 20) if orientation < 5 else (20, 12))


def test_folders_are_no_images_and_hidden_folders_no_defect_types(tmp_path):
    for name in ("good", "crack", ".ipynb_checkpoints"):
        (tmp_path / "part/test" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "part/test" / name / "000.png")
    (tmp_path / "part/test/crack/001.png").mkdir()
    test = load_test(tmp_path, "part", (4, 4), 0)
    assert test.defect_types == ["good", "crack"]
    assert len(test.paths) == 2


def test_masks_of_any_colour_are_read_as_they_are_seen(tmp_path):
    """A palette mask in near-black blue, and one turned by its EXIF tag."""
    for name in ("test", "ground_truth"):
        (tmp_path / "part" / name / "crack").mkdir(parents=True)
    marked = np.zeros((4, 6), np.uint8)
    marked[0, :2] = 1
    palette = Image.fromarray(marked, "P")
    palette.putpalette([0, 0, 0, 0, 0, 1])
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = Image.fromarray(np.ascontiguousarray(marked[::-1, ::-1] * 255))
    for index, mask in enumerate((palette, turned)):
        Image.new("RGB", (6, 4)).save(tmp_path / f"part/test/crack/{index}.png")
        mask.save(tmp_path / f"part/ground_truth/crack/{index}_mask.png", **({"exif": exif} if index else {}))
    masks = load_masks(load_test(tmp_path, "part", (4, 6), 0), (4, 6), 0)
    assert (masks.numpy() == marked).all()
