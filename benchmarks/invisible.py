"""How many pasted views show nothing: the share of each kind of view, category by category -> results/invisible.csv.

    python benchmarks/invisible.py

Draws views as training does, of the variants 3way and soft, in crops and in whole images; trains nothing.
"""

import argparse
from pathlib import Path

from record import add_record_flags, append, command, commit

import config as options
from config import Config, PatchConfig
from dataset import choose_categories, load_train
from runtime.cli import new_parser, run_script, side
from training.trainer import invisible_shares

VARIANTS = ("3way", "soft")


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    options.add_data_flags(parser)
    parser.add_argument("--size", type=side, default=256, metavar="S", help="side of the images (default: 256)")
    parser.add_argument("--patch_size", type=side, default=64, metavar="S", help="side of the crops (default: 64)")
    add_record_flags(parser, "invisible.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    size = args.size, args.size
    for category in choose_categories(args.data_dir, args.type):
        images = load_train(Path(args.data_dir), category, size, args.workers, options.storage(args))
        for patches in (PatchConfig(args.patch_size), None):
            for variant in VARIANTS:
                config = Config(category, height=args.size, width=args.size, variant=variant, patches=patches)
                for view, share in invisible_shares(config, images).items():
                    row = {"category": category, "size": args.size, "patch_size": patches and args.patch_size}
                    row |= {"variant": variant, "view": view, "share": round(share, 4)}
                    append(row | {"command": command(), "commit": commit(), "note": args.note}, args.results)


if __name__ == "__main__":
    run_script(main, get_parser())
