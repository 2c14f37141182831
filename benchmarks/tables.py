"""Results -> README: keeps results/*.csv and the tables that the README shows of them.

    python benchmarks/tables.py add Eval/models/results.csv results/image.csv   append what eval.py wrote
    python benchmarks/tables.py write                                           bring the README up to date
    python benchmarks/tables.py check                                           fail if it is not

Reads and writes results/ and README.md, nothing else.
"""

import argparse
import sys
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAPER_PIXEL = {"bottle": 97.6, "screw": 96.7, "grid": 97.5}  # its Table 2, 3-way patch models
START, END = "<!-- table: {} -->", "<!-- end of table -->"


def image_table() -> str:
    """Image AUROC, one row a detector."""
    rows = pandas.read_csv(ROOT / "results/image.csv")
    lines = [
        "| category | variant | size | updates | batch | seed | head | normalize | precision | image AUROC | control "
        "| AUPRC |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.itertuples():
        size = row.width if row.width == row.height else f"{row.width}x{row.height}"
        precision = "float32" if pandas.isna(row.amp) or row.amp == "off" else row.amp
        control = "" if pandas.isna(row.control_auroc) else f"{100 * row.control_auroc:.1f}"
        lines.append(
            f"| {row.category} | {row.variant} | {size} | {row.epochs} | {row.batch_size} | {row.seed} | "
            f"{row.head_layer} | {row.normalize} | {precision} | {100 * row.image_auroc:.1f} | {control} | "
            f"{100 * row.image_auprc:.1f} |"
        )
    return "\n".join(lines)


def density_table() -> str:
    """Image AUROC of one network under each density, embeddings brought to length 1 or not."""
    rows = pandas.read_csv(ROOT / "results/density.csv")
    rows["kind"] = rows.density + rows.l2.map({True: ", length 1", False: ", as they are"})
    table = rows.pivot_table(index="category", columns="kind", values="image_auroc", sort=False)
    lines = [f"| category | {' | '.join(table.columns)} |", "|---" * (1 + len(table.columns)) + "|"]
    for name, values in table.iterrows():
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.2f}' for value in values)} |")
    return "\n".join(lines)


def speed_table() -> str:
    """What benchmarks/speed.py measured, one column a row of the file."""
    rows = pandas.read_csv(ROOT / "results/speed.csv")
    shown = {
        "device": lambda r: r.processor if pandas.isna(r.gpu) else r.gpu,
        "cores": lambda r: r.cores,
        "torch": lambda r: r.torch,
        "commit": lambda r: r.commit,
        "variant, size, images per step": lambda r: f"{r.variant}, {r.width} x {r.height}, {r.batch_size}",
        "precision": lambda r: r.amp + (", compiled" if r.compile else ""),
        "training step, seconds": lambda r: f"{r.step_seconds:.2f}",
        "training step over bare step": lambda r: f"{r.step_over_bare:.3f}",
        "conventional step over ours": lambda r: f"{r.conventional_over_ours:.2f}",
        "augmentation, images per second": lambda r: f"{r.augmentation_images_per_second:.0f}",
        "the same conventionally": lambda r: f"{r.conventional_augmentation_images_per_second:.0f}",
        "scoring of resident images over bare forward": lambda r: f"{r.scoring_over_bare:.3f}",
        "scoring of files over decoding and bare forward": lambda r: f"{r.files_over_decoding_and_bare:.3f}",
        "images scored per second, resident": lambda r: f"{r.scoring_images_per_second:.0f}",
        "images scored per second, from files": lambda r: f"{r.files_images_per_second:.0f}",
        "decoding with all cores over with one": lambda r: f"{r.decoding_gain_of_threads:.2f}",
        "peak memory of training, MB": lambda r: f"{r.training_peak_mb:.0f}",
        "peak memory of scoring, MB": lambda r: f"{r.scoring_peak_mb:.0f}",
    }
    lines = ["| |" + " |" * len(rows), "|---" * (1 + len(rows)) + "|"]
    for name, cell in shown.items():
        cells = ["" if (text := str(cell(row))) == "nan" else text for row in rows.itertuples()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Peak memory and speed of training, one row a run."""
    rows = pandas.read_csv(ROOT / "results/memory.csv")
    lines = [
        "| images | decoded, MB | held | peak memory, MB | updates per second |",
        "|---|---|---|---|---|",
    ]
    for row in rows.itertuples():
        held = "on disk" if row.decoded_mb > 1e3 * row.memory_gb else "in memory"
        lines.append(
            f"| {row.images:,} | {row.decoded_mb:,.0f} | {held} | {row.peak_mb:,.0f} | {row.steps_per_second:.2f} |"
        )
    return "\n".join(lines)


def pixel_table() -> str:
    """Maps of patch models and by Grad-CAM, one row a detector."""
    rows = pandas.read_csv(ROOT / "results/pixel.csv")
    lines = [
        "| category | maps | size | updates | seed | Gaussian | pixel AUROC | control | paper | AUPRO | image AUROC |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.itertuples():
        patches = not pandas.isna(row.patch_size)
        maps = f"patch model, {row.patch_size:.0f} px" if patches else "Grad-CAM"
        gaussian = row.location_chosen if patches else "of images"
        control = "" if pandas.isna(row.control_pixel_auroc) else f"{100 * row.control_pixel_auroc:.1f}"
        lines.append(
            f"| {row.category} | {maps} | {row.width} | {row.epochs} | {row.seed} | {gaussian} | "
            f"{100 * row.pixel_auroc:.1f} | {control} | {PAPER_PIXEL.get(row.category, '') if patches else ''} | "
            f"{100 * row.aupro:.1f} | {100 * row.image_auroc:.1f} |"
        )
    return "\n".join(lines)


def maps_table() -> str:
    """What benchmarks/maps.py measured: pixel AUROC of each category under each combination of settings."""
    rows = pandas.read_csv(ROOT / "results/maps.csv")
    rows = rows[rows.trained].copy()
    rows["network"] = rows.dense.map({True: "once", False: "per window"})
    rows["length"] = rows.l2.map({True: "1", False: "kept"})
    settings = ["level", "network", "window", "stride", "location_chosen", "dims", "sigma", "length"]
    if (again := rows.duplicated([*settings, "category"])).any():
        sys.exit(f"results/maps.csv: more than one row for {rows[again].iloc[0][[*settings, 'category']].to_dict()}")
    pixels = rows.pivot_table("pixel_auroc", settings, "category", sort=False)
    costs = rows.groupby(settings, sort=False)[["seconds_per_image", "peak_mb", "file_mb"]].median()
    categories = [name for name in PAPER_PIXEL if name in pixels.columns]
    lines = [
        f"| stage | network | window | stride | Gaussian | dims | sigma | length | {' | '.join(categories)} "
        "| s per image | peak MB | file MB |",
        "|---" * (11 + len(categories)) + "|",
    ]
    for key, values in pixels.iterrows():
        level, network, window, stride, location, dims, sigma, length = key
        found = " | ".join("" if pandas.isna(values[name]) else f"{100 * values[name]:.1f}" for name in categories)
        cost = costs.loc[key]
        lines.append(
            f"| {level:.0f} | {network} | {window:.0f} | {stride:.0f} | {location} | {dims:.0f} | {sigma:g} | {length} "
            f"| {found} | {cost.seconds_per_image:.3g} | {cost.peak_mb:,.0f} | {cost.file_mb:,.0f} |"
        )
    return "\n".join(lines)


TABLES = {
    "image": image_table,
    "density": density_table,
    "pixel": pixel_table,
    "maps": maps_table,
    "speed": speed_table,
    "memory": memory_table,
}


def filled(text: str) -> str:
    """The README with every table as results/ has it."""
    for name, make in TABLES.items():
        head, rest = text.split(START.format(name) + "\n", 1)
        _, tail = rest.split(END, 1)
        text = f"{head}{START.format(name)}\n{make()}\n{END}{tail}"
    return text


def add(source: Path, target: Path) -> None:
    """Append the rows of one table to another, whose columns it may extend; identical rows once."""
    rows = pandas.read_csv(source)
    if target.exists():
        rows = pandas.concat([pandas.read_csv(target), rows])
    target.parent.mkdir(exist_ok=True)
    rows.drop_duplicates().to_csv(target, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("add", "write", "check"))
    parser.add_argument("files", nargs="*", type=Path, help="add: source and target")
    args = parser.parse_args()
    if args.command == "add":
        if len(args.files) != 2:
            parser.error("add needs a source and a target")
        add(*args.files)
        return
    text = README.read_text()
    if args.command == "write":
        README.write_text(filled(text))
    elif filled(text) != text:
        sys.exit("README.md is not what results/ says: python benchmarks/tables.py write")


if __name__ == "__main__":
    main()
