"""Decode image files, whatever they hold, into RGB bytes; refuse in one line what is no image. Encode images.

Owns which files of a folder are images, how one is decoded and resized, and the limits on what a file may claim. A bad
file gets an ``InputError`` that names it and says what to do. Writes nothing but lines on stderr.
"""

import functools
import io
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from PIL import Image, ImageChops, ImageOps, features

from runtime.files import InputError, check_regular, say, say_once

# By suffix, in any case, what Pillow calls a format. Some others tell their size only as they are decoded
FORMATS = {".png": "PNG"} | dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
FORMATS |= {".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
OPTIONAL = dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif") | {".avif": "'pillow>=11.3'"}  # the packages needed
# What systems, network drives and archives leave: thumbnails, deleted files, earlier versions. In any case
SYSTEM_NAMES = {"__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found"}
SYSTEM_NAMES |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}
SYSTEM_NAMES |= {"@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"}
# What Pillow and its plugins raise for a bad file
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, TypeError, ArithmeticError, RuntimeError)
# What a header may claim. One of a hundred bytes can keep Pillow busy for a minute
MAX_PIXELS = 178_956_970  # Pillow's own limit: seconds and gigabytes an image; industrial cameras reach 151 million
MAX_SIDE = 2**20  # in Pillow a row costs more than its pixels
MAX_RLE_PIXELS = 2**23  # of a run-length encoded BMP: decoded in Python, 0.3 us a pixel
SCANS = 16  # of a progressive JPEG that has MAX_PIXELS: each is a pass over all of them, writers make about ten
MAX_PARTS = 2**16  # strips or tiles of a TIFF: handled in Python, 10 us apiece, before the size is known
# Of masks: the largest number of a kind of defects, as VisA has them; how many grays between black and the brightest
# one may stand for kinds, before they are taken for smoothed edges
MAX_KIND, MAX_GRAYS = 32, 8
FULL_RANGE = 65535  # the value that is white in a 16-bit image, unless a training set says otherwise
NAMED_KINDS = 6  # of what is left out of a folder
FEW_GRAYS = 16  # that are left of an image that is brought to 8 bits, up to which that is told
BAND = 2**18  # values that are brought to 8 bits together, so that they stay in the processor's cache
PLANES = "16-bit colors in planes are not read; save it with the colors of a pixel together"
DECODER = f"3, Pillow {PIL.__version__}"  # raise the number when ``decode`` gives other pixels for the same file


# Folders ----------------------------------------------------------------------------------------------------------


def find_images(folder: Path) -> list[Path]:
    """Return the image files of a folder by name; what else it holds is told, as ``list_folder`` does."""
    return list_folder(folder, folders=False)[0]


def find_folders(folder: Path) -> list[Path]:
    """Return the sub-folders of a folder by name; what else it holds is told, as ``list_folder`` does."""
    return list_folder(folder, images=False)[1]


def list_folder(folder: Path, images: bool = True, folders: bool = True) -> tuple[list[Path], list[Path]]:
    """Return the image files and the sub-folders of a folder, each by name, without those that ``is_hidden``.

    What else is there, and what is not wanted (``images``, ``folders``), is told on stderr, once, in a line that says
    why it is left out. Raises OSError if the folder cannot be listed.
    """
    names, left_out = {"image": [], "folder": []}, []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                kind = _kind(entry)
                names.get(kind, left_out).append(entry.name if kind in names else kind)
    if not images:
        left_out += ["image(s) beside the sub-folders"] * len(names["image"])
    if not folders:
        left_out += ["sub-folder(s)"] * len(names["folder"])
    _tell_left_out(folder, Counter(left_out))
    found_images, found_folders = ([folder / name for name in sorted(group)] for group in names.values())
    return found_images * images, found_folders * folders


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, as macOS's ``._x.png`` is, or kept by a system for itself."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _kind(entry: os.DirEntry) -> str:
    """Return "image", "folder", or what to tell of another entry of a folder."""
    with suppress(OSError):  # a link that leads to itself
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in formats():
                return "image"
            if suffix in OPTIONAL:
                return f"{suffix} (read after pip install {OPTIONAL[suffix]})"
            return suffix if suffix.isascii() and suffix[1:].isalnum() else "of no known kind"
    return "link(s) that lead nowhere" if entry.is_symlink() else "of no known kind"


@functools.cache
def formats() -> dict[str, str]:
    """Return FORMATS with those that an optional package reads, if it is installed."""
    result = dict(FORMATS)
    if "avif" in features.modules and features.check("avif"):
        result[".avif"] = "AVIF"
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        result |= {suffix: "HEIF" for suffix, package in OPTIONAL.items() if package == "pillow-heif"}
    return result


def suffixes_in_words() -> str:
    """Return the suffixes of image files, for a message."""
    return ", ".join(suffix[1:] for suffix in formats())


def _tell_left_out(folder: Path, counts: Counter) -> None:
    """Tell what is left out of a folder; again only if it is of other kinds. Of several ranks the first tells."""
    kinds = (folder, *sorted(counts))
    if counts and kinds not in _TOLD and os.environ.get("RANK", "0") == "0":
        _TOLD.add(kinds)
        words = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(NAMED_KINDS))
        more = f", {counts.total()} in all" if len(counts) > NAMED_KINDS else ""
        say(f"{folder}: left out: {words}{more}; taken are {suffixes_in_words()}")


_TOLD: set[tuple] = set()


# Image files ------------------------------------------------------------------------------------------------------


def decode(path: str | Path, size: tuple[int, int] | None = None, white: int | None = None) -> np.ndarray:
    """Return an image file as RGB: (H, W, 3) uint8, resized to ``size`` = (H, W) with an anti-aliased bilinear filter.

    Turned upright by its EXIF tag; 16-bit and float images brought to 8 bits; transparent pixels laid on white.
    white: the value that is white in 16-bit images, larger ones are cut off; stderr tells, once for a folder, where it
    does not suit. Default: FULL_RANGE, and nothing is told.
    Raises InputError, with the path, if the file is missing, truncated, no image, or claims to be too large.
    """
    return decode_with_size(path, size, white)[0]


def decode_with_size(
    path: str | Path, size: tuple[int, int] | None, white: int | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the pixels of an image file, as ``decode`` does, and its own (H, W), as ``read_size`` does, in one
    opening."""
    with _opened(path) as image:
        raw_mode, kind, file = _raw_mode(image), image.format, image.fp
        ImageOps.exif_transpose(image, in_place=True)
        file_size = image.size[::-1]
        image = _to_8_bits(image, path, raw_mode, white)
        if kind == "JPEG":
            _tell_without_end(file, path)
        image = image if size is None else _resized(image, size)
        return np.array(image if image.mode == "RGB" else image.convert("RGB")), file_size


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an image (H, W, 3) uint8 at ``size``, as ``decode`` does. Raises InputError for another kind of array."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"an array (H, W, 3) uint8 is needed for an image, not {image.shape} {image.dtype}")
    return np.array(_resized(Image.fromarray(image), size))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the content of an image file. kind: PNG or JPEG. options: Pillow's, such as quality."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode_mask(path: str | Path, faint: bool = False) -> np.ndarray:
    """Return a mask upright: (H, W) bool, True where it is marked. Raises InputError as ``decode`` does.

    Black and what is transparent is unmarked, all else is marked; but of a mask that is lossy or has many values, only
    what is brighter than half of the brightest: not the artefacts and smoothed edges. faint: those too.
    """
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        values = _brightness(image)
        top, lossless = values.max(), image.format in ("PNG", "BMP", "TIFF")
    between = values[(values > 0) & (values < top)]
    if faint or not between.size:
        return values > 0
    if top <= MAX_KIND and values.dtype.kind != "f":  # kinds of defects; a lossy file that has no more is all black
        return (values > 0) & lossless
    noisy = 2 * np.count_nonzero(values) > values.size and between.max() < top / 8  # a background that is nearly black
    few = lossless and not noisy and len(np.unique(between)) <= MAX_GRAYS
    return values > (0 if few else float(top) / 2)


def _brightness(image: Image.Image) -> np.ndarray:
    """Return the values (H, W) of a mask: of colors the brightest channel, laid on black as far as it is transparent.
    Where all that can be seen is black, the opacity: it was painted in black."""
    if image.mode[0] in "IF":
        values = np.asarray(image)
        return (1 if image.mode == "F" else FULL_RANGE) - values if _min_is_white(image) else values
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.asarray(image)
    image = image.convert("RGBA")
    values = functools.reduce(ImageChops.lighter, image.split()[:3])
    if (alpha := _alpha(image)) is not None:
        visible = ImageChops.multiply(values, alpha)
        values = visible if visible.getbbox() else alpha
    return np.asarray(values)


def read_size(path: str | Path) -> tuple[int, int]:
    """Return (H, W) of an image file as it will be decoded, from its header."""
    with _opened(path) as image:
        # A TIFF's as it is stored: newer versions of Pillow turn the size when they open the file, older ones do not
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        # A whole PNG would be decoded to look for a tag behind its pixels
        turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file; every way in which it is no image becomes an InputError."""
    try:
        Image.MAX_IMAGE_PIXELS = None  # Pillow would print a warning for what is allowed here
        check_regular(path)
        with open(path, "rb") as file:  # from a path, Pillow 13 maps gray TIFF files and scrambles those that it turns
            _check_parts(file, path)
            with Image.open(file, formats=tuple(dict.fromkeys(formats().values()))) as image:
                _check_pixels(image, path)
                yield image
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except MemoryError as error:
        raise InputError(f"{path}: the memory is too small to decode it; free some, or scale it down") from error
    except (*UNREADABLE, struct.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" <")[0]
        suffix = os.path.splitext(path)[1].lower()
        reason += f"; pip install {OPTIONAL[suffix]}" if suffix in OPTIONAL and suffix not in formats() else ""
        raise InputError(f"{path}: not a readable image ({reason}); replace or remove it") from error


def _check_parts(file: BinaryIO, path: str | Path) -> None:
    """Refuse a TIFF file with too many parts, by its own header. Fractions in a tag cost Pillow as much as strips."""
    head = file.read(16)
    if head[:2] not in (b"II", b"MM"):
        return
    order, big = "<" if head[:2] == b"II" else ">", head[2:3] == b"+"  # as Pillow tells a BigTIFF
    file.seek(*struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4))
    number, entry = (struct.Struct(order + part) for part in (("Q", "HHQ8x") if big else ("H", "HHI4x")))
    (count,) = number.unpack(file.read(number.size))
    content = file.read(min(count, MAX_PARTS) * entry.size)
    entries = entry.iter_unpack(content[: len(content) // entry.size * entry.size])
    count = max([count, *(values for tag, kind, values in entries if tag in (273, 324) or kind in (5, 10))])
    if count > MAX_PARTS:
        raise InputError(f"{path}: claims {count} strips or tiles, at most {MAX_PARTS} are read; save larger ones")


def _check_pixels(image: Image.Image, path: str | Path) -> None:
    """Refuse an image that claims more pixels than are read, or than its file can hold; and what Pillow scrambles."""
    (width, height), packing = image.size, (image.format, image.info.get("compression"))
    scans = Path(path).read_bytes().count(b"\xff\xda") if "progressive" in image.info else 1
    limit = MAX_RLE_PIXELS if packing in (("BMP", 1), ("BMP", 2)) else MAX_PIXELS * SCANS // max(scans, SCANS)
    if width * height > limit or max(width, height) > MAX_SIDE:
        raise InputError(f"{path}: claims {width}x{height} pixels; allowed: {limit}, {MAX_SIDE} a side; scale it down")
    if packing == ("TIFF", "raw") and width * height > 8 * (length := os.path.getsize(path)):
        raise InputError(f"{path}: claims {width}x{height} pixels in {length} bytes, at most 8 a byte; replace it")
    if packing == ("TIFF", "raw") and _in_planes(image):
        raise InputError(f"{path}: {PLANES}")


def _to_8_bits(image: Image.Image, path: str | Path, raw_mode: str, white: int | None) -> Image.Image:
    """Return the image as gray or RGB, without transparency: gray is resized in a third of the time."""
    if image.mode == "F" or image.mode.startswith("I"):  # float; 16 bits, some of which Pillow reads as 32
        largest, kind, how = (1, "float", "in [0, 1] or 8") if image.mode == "F" else (65535, "gray", "with 8 or 16")
        values = np.asarray(image).reshape(-1)
        if not (values.min() >= 0 and values.max() <= largest):
            raise InputError(f"{path}: {kind} values from {values.min()} to {values.max()}; save it {how} bits")
        if white is not None and image.mode != "F":
            largest = _suited(white, int(values.max()), path)
        scaled = _scaled(values, largest).reshape(image.size[::-1])
        image = Image.fromarray(255 - scaled if _min_is_white(image) else scaled)
    elif white is not None and ";16" in raw_mode:  # colors, of which Pillow gives the upper bytes
        _suited(white, 256 * max(high for _, high in image.getextrema()[:3]), path)
        if white < FULL_RANGE:
            values = _deep_colors(image, path, raw_mode)
            image = Image.fromarray(_scaled(values.reshape(-1), white).reshape(values.shape))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if _alpha(image) is not None:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _tell_without_end(file: BinaryIO, path: str | Path) -> None:
    """Tell of a JPEG whose end is missing: Pillow fills in what it does not find, as in a copy that was interrupted."""
    file.seek(-2, os.SEEK_END)
    if file.read() == b"\xff\xd9":
        return
    file.seek(0)
    content = file.read()  # cameras may add something behind the end
    if content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):
        say_once(f"{path}: has no end and is damaged, a part of it may be gray; replace it")


def _alpha(image: Image.Image) -> Image.Image | None:
    """Return the opacity of an image in mode RGBA; None where it hides nothing, and where it hides everything, as the
    fourth channel of a camera that does not set it."""
    alpha = image.getchannel("A")
    return None if alpha.getextrema() in ((0, 0), (255, 255)) else alpha


def _min_is_white(image: Image.Image) -> bool:
    """Return whether 0 is white in a TIFF file, which Pillow sees to if it has 8 bits or fewer."""
    return image.format == "TIFF" and image.tag_v2.get(262) == 0


def _scaled(values: np.ndarray, white: int) -> np.ndarray:
    """Return values (n,) as uint8: 0 stays 0, ``white`` and what is above become 255."""
    bands = np.array_split(values, len(values) // BAND + 1)
    if white < FULL_RANGE and values.dtype.kind != "f":
        bands = (np.minimum(band, white) for band in bands)
    return np.concatenate([(band * np.float32(255 / white)).round().astype(np.uint8) for band in bands])


# 16 bits ----------------------------------------------------------------------------------------------------------


def white_of(path: str | Path) -> int:
    """Return the value that should be white in a 16-bit image file: the least of 255, 511, 1023, ... 65535 that is not
    below its largest value; 0 for another file. Raises InputError as ``decode`` does."""
    with suppress(OSError), open(path, "rb") as file:  # in a tenth of the time that Pillow takes for a header
        head = file.read(25)
        if head[:2] not in (b"II", b"MM") and (head[:4], head[24:]) != (b"\x89PNG", b"\x10"):
            return 0
    with _opened(path) as image:
        if image.mode[0] == "I":
            largest = int(np.asarray(image).max())
        elif ";16" in _raw_mode(image):
            largest = 256 * max(high for _, high in image.getextrema()[:3])  # the upper byte decides, down to 255
        else:
            return 0
    return min(2 ** max(8, largest.bit_length()) - 1, FULL_RANGE)


def _suited(white: int, largest: int, path: str | Path) -> int:
    """Return ``white``; tell, once for a folder, of 16-bit images whose largest value it does not suit."""
    folder, limit = os.path.dirname(path) or os.curdir, 2 ** largest.bit_length() - 1
    if largest > white:
        say_once(f"{folder}: 16-bit images with values above {white}, where those for training end; they are cut off")
    elif white == FULL_RANGE and 0 < largest < FEW_GRAYS * 256:
        grays = f"at most {round(limit * 255 / white) + 1} grays are left of 16-bit images with values up to {limit}"
        say_once(f"{folder}: {grays}; {white} is white, as in the training images")
    return white


def _raw_mode(image: Image.Image) -> str:
    """Return what Pillow calls the values in a PNG or TIFF file, such as RGB;16B, as long as it is not loaded."""
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return ""
    args = image.tile[0][3]
    return args if isinstance(args, str) else str(args[0])


def _in_planes(image: Image.Image) -> bool:
    """Return whether a TIFF file has 16 bits and its colors one behind the other, not pixel by pixel."""
    return image.format == "TIFF" and image.tag_v2.get(284) == 2 and image.tag_v2.get(258, ())[:2] == (16, 16)


def _deep_colors(image: Image.Image, path: str | Path, raw_mode: str) -> np.ndarray:
    """Return the values (H, W, 3 or 4) uint16 of a 16-bit image in colors, of which ``image`` has the upper bytes."""
    kind, _, order = raw_mode.partition(";16")
    if _in_planes(image):
        raise InputError(f"{path}: {PLANES}")
    if kind not in ("RGB", "RGBA", "RGBX"):
        raise InputError(f"{path}: 16 bits of a kind that is not read ({kind}); save it as gray or RGB")
    # Read in the other order of bytes, lower ones are taken for upper ones. N is the machine's own
    upper_first = order == "B" or (order == "N" and sys.byteorder == "big")
    swapped = f"{kind};16{'L' if upper_first else 'B'}"
    with _opened(path) as other:
        tiles = []
        for tile in other.tile:
            args = swapped if isinstance(tile[3], str) else (swapped, *tile[3][1:])
            tiles.append(tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args))
        other.tile = tiles
        ImageOps.exif_transpose(other, in_place=True)
        return np.asarray(image) * np.uint16(256) + np.asarray(other)
