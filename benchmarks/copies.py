"""Which copies check_data.py finds: planted ones, and pairs of pictures that are there as they are
-> results/duplicates.csv.

    python benchmarks/copies.py --type bottle
    python benchmarks/copies.py --type bottle,grid,screw --size 128

Of each category every tenth training image, at most twenty, is copied: as it is, encoded as a JPEG file of quality 75,
five percent lighter, and moved down and to the right by a pixel of the file. Counts how many copies of each kind are
found next to their originals, and the other pairs; and, without any copy, the near pairs. Adds a row for each category.
"""

import argparse
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from record import add_record_flags, append, command, commit

import config as options
from check_data import Pair, find_duplicates
from dataset import choose_categories, load_images, load_test, train_paths
from runtime.cache import IN_MEMORY
from runtime.cli import device_name, new_parser, run_script, size
from runtime.files import say
from runtime.image_files import decode, resized

EVERY, MOST = 10, 20  # training images of which one is copied, and copies of each kind


def encoded(pixels: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    return np.array(Image.open(buffer).convert("RGB"))


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exact": lambda pixels: pixels,
    "jpeg_75": encoded,
    "lighter_5_percent": lambda pixels: (1.05 * pixels).clip(0, 255).astype(np.uint8),
    "moved_1_pixel": lambda pixels: np.pad(pixels[:-1, :-1], ((1, 0), (1, 0), (0, 0)), "edge"),
}


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what is measured").add_argument
    add("--data_dir", default="Data", metavar="DIR", help="folder of the categories (default: Data)")
    add("--type", type=options.categories, default=["all"], metavar="NAMES", help="categories (default: all)")
    add("--size", type=size, default=(256, 256), metavar="S|WxH", help="of images in pixels (default: 256)")
    add_record_flags(parser, "duplicates.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    for category in choose_categories(args.data_dir, args.type):
        say(f"measuring: {category}")
        paths = train_paths(args.data_dir, category)
        images = load_images(paths, args.size, 2)
        test = Path(args.data_dir, category, "test").is_dir()
        others = load_test(args.data_dir, category, args.size, 2, IN_MEMORY).images if test else None
        inside, between = find_duplicates(images, others)
        chosen = range(0, len(paths), EVERY)[:MOST]
        copied = [decode(paths[i]) for i in chosen]
        copies = {name: [resized(make(pixels), args.size) for pixels in copied] for name, make in COPIES.items()}
        row = {"category": category, "height": args.size[0], "width": args.size[1], "images": len(paths)}
        row |= {"pairs_within_train": len(inside), "pairs_between_train_and_test": len(between)}
        row |= {"copies": len(copied)} | planted(images, copies, list(chosen), inside)
        made = {"command": command(), "processor": device_name(torch.device("cpu")), "torch": str(torch.__version__)}
        append(row | made | {"commit": commit(), "note": args.note}, args.results)


def planted(images: torch.Tensor, copies: dict[str, list[np.ndarray]], originals: list[int], known: list[Pair]) -> dict:
    """How many copies of each kind are found next to their originals, and other pairs than those that are known."""
    found, others = Counter(dict.fromkeys(copies, 0)), set()
    for name, own in copies.items():
        more = torch.cat([images, torch.from_numpy(np.stack(own)).permute(0, 3, 1, 2)])
        places = {(original, len(images) + i) for i, original in enumerate(originals)}
        pairs = {(pair.first, pair.second) for pair in find_duplicates(more)[0]}
        found[name] = len(pairs & places)
        others |= {pair for pair in pairs - places if max(pair) < len(images)}
    return found | {"other_pairs": len(others - {(pair.first, pair.second) for pair in known})}


if __name__ == "__main__":
    run_script(main, get_parser())
