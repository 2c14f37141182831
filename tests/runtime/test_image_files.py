"""image_files.py: what every kind of image file is decoded to, and what bad or crafted files get."""

import importlib
import io
import os
import struct
import time
import warnings
import zlib
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import tifffile
from PIL import Image

from runtime.files import InputError
from runtime.image_files import (
    FULL_RANGE,
    OPTIONAL,
    decode,
    decode_mask,
    decode_with_size,
    find_folders,
    find_images,
    formats,
    list_folder,
    read_size,
    white_of,
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


def noise(height, width, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def turned_by(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


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


def error_of(call, path):
    """The message of the InputError, which is one line that begins with the path and names it once."""
    with pytest.raises(InputError) as caught:
        call(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_find_images_ignores_what_is_none(tmp_path):
    images = ["A.PNG", "b.png", "c.JpG", "d.jpeg", "e.bmp", "f.TIF", "g.tiff", "h.webp"]
    others = ["._b.png", ".hidden.png", ".DS_Store", "Thumbs.db", "notes.txt", "png", "b.png.bak", "data.csv"]
    for name in (*reversed(images), *others):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in find_images(tmp_path)] == images


@pytest.fixture
def mixed(tmp_path):
    """A folder of all that may lie among images."""
    for name in (
        "a.png",
        "b.JFIF",
        "c.jpe",
        "d.jp2",
        "e.JP2",
        "f.raw",
        "g",
        "h.x\ny",
        "i.heic",
        "Thumbs.db",
        "desktop.ini",
        ".k.png",
    ):
        (tmp_path / name).write_text("")
    for name in ("sub", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


def test_what_is_left_out_of_a_folder_is_told_once(mixed, capsys):
    assert list_folder(mixed) == ([mixed / "a.png", mixed / "b.JFIF", mixed / "c.jpe"] + _heic(mixed), [mixed / "sub"])
    line = capsys.readouterr().err
    assert line.startswith(f"{mixed}: left out: ")
    assert line.count("\n") == 1
    heic = ["1 .heic (read after pip install pillow-heif)"] * (not _heic(mixed))
    for part in (
        "3 of no known kind",
        "2 link(s) that lead nowhere",
        "2 .jp2",
        "1 .raw",
        *heic,
        "taken are png, jpg, jpeg",
    ):
        assert part in line
    assert list_folder(mixed)[1] == find_folders(mixed)
    assert capsys.readouterr().err.count("3 image(s) beside the sub-folders") == 1 - bool(_heic(mixed))
    assert find_images(mixed) == list_folder(mixed)[0]
    assert "1 sub-folder(s)" in capsys.readouterr().err
    (mixed / "l.jp2").write_text("")
    assert len(find_images(mixed)) == len(list_folder(mixed)[0])
    assert capsys.readouterr().err == ""
    (mixed / "m.gif").write_text("")
    find_images(mixed)
    assert "1 .gif" in capsys.readouterr().err


def _heic(folder):
    return [folder / "i.heic"] * (importlib.util.find_spec("pillow_heif") is not None)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JFIF"])
def test_all_names_of_a_jpeg_are_taken(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(12, 20, 3)).save(path, "JPEG")
    assert find_images(tmp_path) == [path]
    assert decode(path).shape == (12, 20, 3)


@pytest.mark.parametrize(("suffix", "kind", "orientations"), [("heic", "HEIF", [1]), ("avif", "AVIF", [1, 6])])
def test_photographs_of_phones_are_read_where_a_package_can(tmp_path, suffix, kind, orientations):
    path, values = tmp_path / f"a.{suffix}", np.add.outer(np.arange(64), 2 * np.arange(48)).astype(np.uint8)
    if f".{suffix}" not in formats():
        path.write_bytes(b"\0\0\0\x18ftypheic")
        assert error_of(decode, path).endswith(f"; pip install {OPTIONAL[f'.{suffix}']}); replace or remove it")
        return
    for orientation in orientations:
        Image.fromarray(values).save(path, kind, quality=95, exif=turned_by(orientation))
        assert find_images(tmp_path) == [path]
        expected = UPRIGHT[orientation](as_rgb(values))
        assert decode_with_size(path, None)[1] == read_size(path) == expected.shape[:2]
        assert np.abs(decode(path).astype(int) - expected).mean() < 4
    whole = path.read_bytes()
    for number in range(40, len(whole), 23):  # also where a decoder finds it only as it decodes
        path.write_bytes(whole[:number] + bytes(99) + whole[number + 99 :])
        with suppress(InputError):
            assert decode(path).shape[2] == 3
        path.write_bytes(whole[:number])
        assert error_of(decode, path).startswith("not a readable image")


# Decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "PNG", "Tif"])
def test_lossless_files_are_decoded_to_their_pixels(tmp_path, suffix):
    color, gray, path = noise(12, 20, 3), noise(12, 20), tmp_path / f"a.{suffix}"
    palette = Image.fromarray(gray)
    palette.putpalette(noise(256, 3).tobytes())
    for image, mode, expected in [
        (Image.fromarray(color), "RGB", color),
        (Image.fromarray(gray), "L", as_rgb(gray)),
        (Image.fromarray(gray > 127), "1", as_rgb((gray > 127) * np.uint8(255))),
        (palette, "P", noise(256, 3)[gray]),
    ]:
        image.save(path)
        assert mode_of(path) == mode
        assert np.array_equal(decode(path), expected)
        assert np.array_equal(decode(str(path)), expected)
        assert read_size(path) == (12, 20)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "JPG"])
def test_decode_lossy(tmp_path, suffix):
    ramp = np.add.outer(np.arange(24), 2 * np.arange(40)).astype(np.uint8)
    array = np.stack([ramp, 255 - ramp, ramp // 2 + 60], axis=2)
    path = save(tmp_path / f"a.{suffix}", array, quality=95)
    assert read_size(path) == (24, 40)
    assert decode(path).shape == (24, 40, 3)
    assert np.abs(decode(path).astype(int) - array).mean() < 3


@pytest.mark.parametrize("cmyk", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 128, 0, 51), (30, 60, 90, 0), (0, 0, 0, 255)])
def test_decode_cmyk_jpg(tmp_path, cmyk):
    Image.new("CMYK", (20, 12), cmyk).save(tmp_path / "a.jpg", quality=95)
    assert mode_of(tmp_path / "a.jpg") == "CMYK"
    expected = [255 * (1 - ink / 255) * (1 - cmyk[3] / 255) for ink in cmyk[:3]]
    assert np.abs(decode(tmp_path / "a.jpg") - np.array(expected)).max() <= 3


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
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "b.png", transparency=1)
    assert decode(tmp_path / "b.png").tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


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


def png_of_16_bits(values):
    """A PNG file of colors (H, W, 3 or 4), or gray with opacity (H, W, 2), which Pillow does not write."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_of_16_bits(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="minisblack" if values.ndim == 2 else "rgb", **options)
    return buffer.getvalue()


def gray_png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


DEEP = {  # files of 16-bit values: how they are made, and their number of channels
    "gray png": (gray_png, 1),
    "gray tif": (tiff_of_16_bits, 1),
    "gray tif, big-endian": (partial(tiff_of_16_bits, byteorder=">"), 1),
    "gray tif, 32 bits": (lambda values: tiff_of_16_bits(values.astype(np.int32)), 1),
    "rgb png": (png_of_16_bits, 3),
    "rgba png": (png_of_16_bits, 4),
    "rgb tif": (tiff_of_16_bits, 3),
    "rgb tif, big-endian": (partial(tiff_of_16_bits, byteorder=">"), 3),
    "rgb tif, compressed": (partial(tiff_of_16_bits, compression="zlib", rowsperstrip=5), 3),
    "rgba tif": (partial(tiff_of_16_bits, extrasamples=["unassalpha"]), 4),
}


def deep_values(largest, channels, seed=0):
    """Values (12, 20) or (12, 20, C) uint16 up to ``largest``, which is among them, opaque."""
    values = np.random.default_rng(seed).integers(0, largest + 1, (12, 20, channels)).astype(np.uint16)
    values[3, 4] = largest
    values[..., 3:] = 65535
    return values[..., 0] if channels == 1 else values


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize(("largest", "white"), [(90, 255), (255, 255), (1000, 1023), (4095, 4095), (32767, 32767)])
def test_16_bit_images_of_fewer_bits_keep_all_of_them(tmp_path, capsys, kind, largest, white):
    """Gray and colors, turned upright too; values above what is white are cut off, which is told once."""
    make, channels = DEEP[kind]
    values, path = deep_values(largest, channels), tmp_path / "a.png"
    path.write_bytes(make(values))
    assert white_of(path) == white
    colors = as_rgb(values) if channels == 1 else values[..., :3]
    expected = (np.float64(255) * colors / white).round()
    assert np.array_equal(decode(path, white=white), expected)
    assert np.array_equal(
        decode(path, (5, 6), white), decode(save(tmp_path / "b.png", expected.astype(np.uint8)), (5, 6))
    )
    assert capsys.readouterr().err == ""
    if white > 255:
        cut = (np.float64(255) * colors.clip(0, 255) / 255).round()
        assert np.array_equal(decode(path, white=255), cut)
        decode(path, white=255)
        assert capsys.readouterr().err == (
            f"{tmp_path}: 16-bit images with values above 255, where those for training end; they are cut off\n"
        )


@pytest.mark.parametrize("kind", DEEP)
def test_16_bit_images_of_the_full_range_are_decoded_as_without_white(tmp_path, capsys, kind):
    make, channels = DEEP[kind]
    path = tmp_path / "a.png"
    path.write_bytes(make(deep_values(65535, channels)))
    assert white_of(path) == FULL_RANGE
    assert np.array_equal(decode(path, white=FULL_RANGE), decode(path))
    assert capsys.readouterr().err == ""
    path.write_bytes(make(deep_values(1000, channels)))
    assert len(np.unique(decode(path))) <= 5
    assert capsys.readouterr().err == ""
    decode(path, white=FULL_RANGE)
    grays = (
        "at most 5 grays are left of 16-bit images with values up to 1023; 65535 is white, as in the training images"
    )
    assert capsys.readouterr().err == f"{tmp_path}: {grays}\n"


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_deep_colors_are_turned_upright(tmp_path, orientation):
    values, path = deep_values(1023, 3), tmp_path / "a.tif"
    path.write_bytes(tiff_of_16_bits(values, extratags=[(ORIENTATION, 3, 1, orientation, True)]))
    assert np.array_equal(decode(path, white=1023), UPRIGHT[orientation]((values * (255 / 1023)).round()))


def test_opacity_of_deep_colors_has_their_range(tmp_path):
    values, path = deep_values(1023, 4), tmp_path / "a.png"
    values[:6, :, 3], values[6:, :, 3] = 0, 1023
    path.write_bytes(png_of_16_bits(values))
    expected = (values[..., :3] * (255 / 1023)).round()
    expected[:6] = 255
    assert np.array_equal(decode(path, white=1023), expected)


def test_other_images_have_no_white(tmp_path):
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        path = save(tmp_path / f"a.{suffix}", noise(12, 20, 3))
        assert white_of(path) == 0
        assert np.array_equal(decode(path, white=255), decode(path))
    path = save(tmp_path / "a.tif", np.random.default_rng(0).random((12, 20), np.float32))
    assert white_of(path) == 0
    assert np.array_equal(decode(path, white=255), decode(path))
    path.write_bytes(png_of_16_bits(deep_values(1023, 2)))
    assert error_of(lambda path: decode(path, white=1023), path).startswith("16 bits of a kind that is not read (LA)")
    path.write_bytes(gray_png(deep_values(1023, 1))[:150])
    assert error_of(white_of, path).startswith("not a readable image")


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}])
def test_deep_colors_in_planes_are_refused_where_they_would_be_scrambled(tmp_path, options):
    values, path = deep_values(1023, 3), tmp_path / "a.tif"
    path.write_bytes(
        tiff_of_16_bits(np.ascontiguousarray(values.transpose(2, 0, 1)), planarconfig="separate", **options)
    )
    for call in (decode, decode_mask, read_size, lambda path: decode(path, white=1023)):
        if options.get("compression") and call in (decode, decode_mask, read_size):
            assert np.array_equal(decode(path), values >> 8)
        else:
            assert error_of(call, path).startswith("16-bit colors in planes are not read; save it")
    path.write_bytes(tiff_of_16_bits(values.transpose(2, 0, 1).astype(np.uint8), planarconfig="separate", **options))
    assert np.array_equal(decode(path), values.astype(np.uint8))
    gray = tiff_of_16_bits(values[..., 0], extratags=[(284, 3, 1, 2, True)], **options)  # one plane
    path.write_bytes(gray)
    assert np.array_equal(decode(path, white=1023), as_rgb((values[..., 0] * (255 / 1023)).round()))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_where_0_is_white_an_image_is_inverted(tmp_path, dtype):
    seen = noise(12, 20)
    values = {np.uint8: 255 - seen, np.uint16: (255 - seen) * np.uint16(257), np.float32: (255 - seen) / 255}[dtype]
    tifffile.imwrite(tmp_path / "a.tif", values.astype(dtype), photometric="miniswhite")
    assert np.array_equal(decode(tmp_path / "a.tif"), as_rgb(seen))
    tifffile.imwrite(tmp_path / "b.tif", (values.max() * (1 - RECTANGLE)).astype(dtype), photometric="miniswhite")
    assert np.array_equal(decode_mask(tmp_path / "b.tif"), RECTANGLE)
    tifffile.imwrite(tmp_path / "c.tif", 1023 - seen.astype(np.uint16) * 4, photometric="miniswhite")
    assert white_of(tmp_path / "c.tif") == 1023
    assert np.array_equal(decode(tmp_path / "c.tif", white=1023), as_rgb((seen * (4 * 255 / 1023)).round()))


@pytest.mark.parametrize("alpha", [0, 255])
def test_opacity_that_is_the_same_everywhere_hides_nothing(tmp_path, alpha):
    array = noise(12, 20, 4)
    array[..., 3] = alpha
    for suffix, options in (("png", {}), ("tif", {}), ("webp", {"lossless": True, "exact": True})):
        assert np.array_equal(decode(save(tmp_path / f"a.{suffix}", array, **options)), array[..., :3])
    gray = Image.fromarray(array[..., 0]).convert("LA")
    gray.putalpha(alpha)
    gray.save(tmp_path / "b.png")
    assert np.array_equal(decode(tmp_path / "b.png"), as_rgb(array[..., 0]))
    array[3, 4, 3] = 128
    share = array[..., 3:] / 255
    expected = share * array[..., :3] + (1 - share) * 255
    assert np.abs(decode(save(tmp_path / "c.png", array)) - expected).max() <= 1


def test_a_jpeg_without_its_end_is_told_once(tmp_path, capsys):
    """A copy that was interrupted, padded with zeros; not one that a camera has added something to."""
    path = save(tmp_path / "a.jpg", noise(64, 64, 3))
    whole = path.read_bytes()
    expected = decode(path)
    path.write_bytes(whole + b"some more of a camera")
    assert np.array_equal(decode(path), expected)
    assert capsys.readouterr().err == ""
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    for _ in range(2):
        assert decode(path).shape == (64, 64, 3)
    assert capsys.readouterr().err == f"{path}: has no end and is damaged, a part of it may be gray; replace it\n"


def test_decode_float(tmp_path):
    expected = noise(600, 500)
    off = np.random.default_rng(1).uniform(-0.49, 0.49, expected.shape)
    path = save(tmp_path / "a.tif", ((expected + off).clip(0, 255) / 255).astype(np.float32))
    assert mode_of(path) == "F"
    assert np.array_equal(decode(path), as_rgb(expected))


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("png", "RGB"), ("png", "I;16"), ("webp", "RGB"), ("tif", "RGB"), ("tif", "L"), ("tif", "I;16"), ("jpg", "RGB")],
)
def test_files_are_turned_upright_before_resizing(tmp_path, suffix, kind):
    """Gray TIFF files too, which Pillow scrambles if it maps them into memory."""
    array = noise(12, 20, 3) if kind == "RGB" else noise(12, 20)
    options = {"lossless": True} if suffix == "webp" else {}
    for orientation, upright in UPRIGHT.items():
        content = array * np.uint16(257) if kind == "I;16" else array
        path = save(tmp_path / f"a.{suffix}", content, exif=turned_by(orientation), **options)
        expected = upright(array if kind == "RGB" else as_rgb(array))
        assert read_size(path) == decode(path).shape[:2] == expected.shape[:2]
        if suffix != "jpg":
            assert np.array_equal(decode(path), expected)
            pixels, file_size = decode_with_size(path, (9, 7))
            assert np.array_equal(pixels, decode(save(tmp_path / "b.png", expected), (9, 7)))
            assert file_size == expected.shape[:2]


@pytest.mark.parametrize("size", [(12, 20), (6, 10), (5, 20), (12, 7), (20, 6), (30, 50), (1, 1)])
def test_images_are_resized_like_by_an_anti_aliased_triangle(tmp_path, size):
    array = noise(12, 20, 3)
    result = decode(save(tmp_path / "a.png", array), size)
    expected = triangle_resized(triangle_resized(array, size[0]).transpose(1, 0, 2), size[1]).transpose(1, 0, 2)
    assert (result.shape, result.dtype) == ((*size, 3), np.uint8)
    assert np.abs(result - expected).max() <= 1.01


def test_masks_of_any_color_are_read_as_they_are_seen(tmp_path):
    """A palette mask in near-black blue, and one turned by its EXIF tag."""
    marked = np.zeros((4, 6), np.uint8)
    marked[0, :2] = 1
    palette = Image.fromarray(marked)
    palette.putpalette([0, 0, 0, 0, 0, 1])
    palette.save(tmp_path / "a.png")
    assert np.array_equal(decode_mask(tmp_path / "a.png"), marked > 0)
    upside_down = np.ascontiguousarray(marked[::-1, ::-1] * 255)
    assert np.array_equal(decode_mask(save(tmp_path / "b.png", upside_down, exif=turned_by(3))), marked > 0)


RECTANGLE = np.zeros((100, 120), bool)
RECTANGLE[21:51, 33:83] = True  # 1,500 pixels, beside the blocks of a lossy file


def with_alpha(color, alpha, background=(255, 255, 255)):
    """The rectangle in one color, the rest in another; alpha: of both."""
    colors = np.where(RECTANGLE[..., None], color, background)
    return Image.fromarray(np.dstack([colors, np.where(RECTANGLE, *alpha)]).astype(np.uint8))


def transparent_palette():
    image = Image.fromarray(RECTANGLE.astype(np.uint8))
    image.putpalette([255, 255, 255, 9, 0, 0])
    return image


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (with_alpha((255, 255, 255), (255, 0)), {}),
        (with_alpha((90, 0, 0), (255, 0)), {}),
        (with_alpha((255, 255, 255), (120, 0), (0, 0, 0)), {}),
        (with_alpha((0, 0, 0), (255, 0)), {}),  # painted in black
        (with_alpha((255, 255, 255), (255, 0)).convert("LA"), {}),
        (with_alpha((255, 255, 255), (255, 255), (0, 0, 0)), {}),  # the alpha channel says nothing
        (with_alpha((255, 255, 255), (0, 0), (0, 0, 0)), {}),
        (with_alpha((255, 255, 255), (255, 0), (0, 0, 0)), {}),
        (transparent_palette(), {"transparency": 0}),
        (transparent_palette(), {"transparency": b"\0\xff"}),
        (Image.fromarray(np.where(RECTANGLE, 255, 7).astype(np.uint8)), {"transparency": 7}),
    ],
    ids=range(11),
)
def test_what_is_transparent_in_a_mask_is_not_marked(tmp_path, mask, options):
    mask.save(tmp_path / "a.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode_mask(tmp_path / "a.png"), RECTANGLE)
        assert np.array_equal(decode_mask(tmp_path / "a.png", faint=True), RECTANGLE)


@pytest.mark.parametrize(("suffix", "quality"), [("jpg", 50), ("jpg", 75), ("jpg", 95), ("webp", 50), ("webp", 90)])
@pytest.mark.parametrize("noise_up_to", [0, 5])
def test_artefacts_of_a_lossy_mask_are_not_marked(tmp_path, suffix, quality, noise_up_to):
    values = np.where(RECTANGLE, 255, noise(100, 120) % (noise_up_to + 1)).astype(np.uint8)
    path = save(tmp_path / f"a.{suffix}", values, quality=quality)
    assert np.array_equal(decode_mask(path), RECTANGLE)
    assert decode_mask(path, faint=True).sum() > 1500
    empty = save(tmp_path / f"b.{suffix}", np.where(RECTANGLE, 0, values), quality=quality)
    assert not decode_mask(empty).any()


@pytest.mark.parametrize("kinds", [[1], [1, 2, 7, 15], [100, 255], [254, 255], [20, 60, 100, 140, 180, 220]])
@pytest.mark.parametrize("mode", ["L", "I;16", "P"])
@pytest.mark.parametrize("large", [False, True])
def test_all_kinds_of_defects_in_a_mask_are_marked(tmp_path, kinds, mode, large):
    """As numbers, as grays, as colors; also where they fill more than half of the image."""
    values = np.zeros((100, 120), np.uint8)
    values[30:] = kinds[0] * large
    for number, kind in enumerate(kinds):
        values[10 * number + 3 : 10 * number + 9, 30:70] = kind
    image = Image.fromarray(values if mode != "I;16" else values.astype(np.uint16))
    if mode == "P":
        image.putpalette([part for number in range(256) for part in (0, number, number // 2)])
    image.save(tmp_path / "a.png")
    assert mode_of(tmp_path / "a.png") == mode
    assert np.array_equal(decode_mask(tmp_path / "a.png"), values > 0)


def test_smoothed_edges_and_noise_of_a_mask_are_not_marked(tmp_path):
    """A mask that was resized and one with a noisy background, both without loss."""
    large = Image.fromarray(RECTANGLE * np.uint8(255)).resize((240, 200), Image.Resampling.BICUBIC)
    large.save(tmp_path / "a.png")
    assert np.array_equal(decode_mask(tmp_path / "a.png"), RECTANGLE.repeat(2, 0).repeat(2, 1))
    noisy = np.where(RECTANGLE, 255, noise(100, 120) % 6).astype(np.uint8)
    assert np.array_equal(decode_mask(save(tmp_path / "b.png", noisy)), RECTANGLE)
    assert np.array_equal(decode_mask(save(tmp_path / "b.tif", (noisy / 255).astype(np.float32))), RECTANGLE)


# Bad files --------------------------------------------------------------------------------------------------------


def truncate(path):
    """Half of a picture: the header is whole."""
    save(path, noise(20, 32, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_text(path):
    path.write_text("two roads diverged\nin a yellow wood\n")


def make_empty(path):
    path.write_bytes(b"")


def make_gif(path):
    Image.new("L", (4, 4)).save(path, "GIF")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_bad_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    for call in (decode, decode_mask, read_size):
        assert error_of(call, path) == "No such file or directory"
    for spoil in (truncate, make_text, make_empty, make_gif):
        spoil(path)
        message = error_of(decode, path)
        assert message.startswith("not a readable image (")
        assert message.endswith("); replace or remove it")


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
    assert error_of(decode, save(tmp_path / "a.tif", values)).startswith(message)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", "/dev/zero"):
        for call in (decode, decode_mask, read_size):
            assert error_of(call, path) == "a pipe or a device, not a file; write it to a file first"


def test_a_full_memory_is_not_the_fault_of_the_file(tmp_path, monkeypatch):
    def convert(*_):
        raise MemoryError

    path = save(tmp_path / "a.png", noise(4, 4, 4))
    monkeypatch.setattr(Image.Image, "convert", convert)
    assert error_of(decode, path) == "the memory is too small to decode it; free some, or scale it down"


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
        assert error_of(call, path).startswith(message)
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
