"""Results -> README: keeps results/*.csv and the tables that the README shows of them.

    python benchmarks/tables.py add Eval/models/results.csv results/image.csv   append what eval.py wrote
    python benchmarks/tables.py write                                           bring the README up to date
    python benchmarks/tables.py check                                           fail if it is not

Reads and writes results/ and README.md, nothing else.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAPER_PIXEL = {"bottle": 97.6, "screw": 96.7, "grid": 97.5}  # its Table 2, 3-way patch models
START, END = "<!-- table: {} -->", "<!-- end of table -->"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def percent(value: float, digits: int = 1) -> str:
    """A fraction in percent; nothing where there is none."""
    return "" if pandas.isna(value) else f"{100 * value:.{digits}f}"


def spread(values: pandas.Series) -> str:
    """Mean and, of more than one, sample standard deviation of fractions, in percent."""
    return percent(values.mean()) + (f" ± {percent(values.std())}" if values.count() > 1 else "")


def image_table() -> str:
    """Image AUROC, one row a detector."""
    rows = pandas.read_csv(ROOT / "results/image.csv")
    head = "category, variant, size, updates, batch, seed, head, normalize, precision, image AUROC, control, AUPRC"
    cells = []
    for row in rows.itertuples():
        size = row.width if row.width == row.height else f"{row.width}x{row.height}"
        precision = "float32" if pandas.isna(row.amp) or row.amp == "off" else row.amp
        setting = [row.category, row.variant, size, row.epochs, row.batch_size, row.seed, row.head_layer, row.normalize]
        found = map(percent, (row.image_auroc, row.control_auroc, row.image_auprc))
        cells.append([*setting, precision, *found])
    return markdown(head.split(", "), cells)


def density_table() -> str:
    """Image AUROC of one network under each density, embeddings brought to length 1 or not."""
    rows = pandas.read_csv(ROOT / "results/density.csv")
    rows["kind"] = rows.density + rows.l2.map({True: ", length 1", False: ", as they are"})
    table = rows.pivot_table(index="category", columns="kind", values="image_auroc", sort=False)
    cells = ([name, *(percent(value, 2) for value in values)] for name, values in table.iterrows())
    return markdown(["category", *table.columns], cells)


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
    cells = []
    for name, cell in shown.items():
        cells.append([name, *("" if (text := str(cell(row))) == "nan" else text for row in rows.itertuples())])
    return markdown([""] * (1 + len(rows)), cells)


def memory_table() -> str:
    """Peak memory and speed of training, one row a run."""
    rows = pandas.read_csv(ROOT / "results/memory.csv")
    cells = []
    for row in rows.itertuples():
        held = "on disk" if row.decoded_mb > 1e3 * row.memory_gb else "in memory"
        speed = f"{row.steps_per_second:.2f}"
        cells.append([f"{row.images:,}", f"{row.decoded_mb:,.0f}", held, f"{row.peak_mb:,.0f}", speed])
    return markdown(["images", "decoded, MB", "held", "peak memory, MB", "updates per second"], cells)


def pixel_table() -> str:
    """Maps of patch models and by Grad-CAM: of detectors that only differ in their seed, mean and deviation."""
    rows = pandas.read_csv(ROOT / "results/pixel.csv")
    rows["maps"] = rows.patch_size.map(lambda side: "Grad-CAM" if pandas.isna(side) else f"patch model, {side:.0f} px")
    rows["gaussian"] = rows.location_chosen.fillna("of images")
    shown = ["category", "maps", "width", "epochs", "gaussian"]
    settings = [*shown, "variant", "head_layer", "normalize", "batch_size", "l2"]
    if (again := rows.duplicated([*settings, "seed"])).any():
        sys.exit(f"results/pixel.csv: more than one row for {rows[again].iloc[0][[*settings, 'seed']].to_dict()}")
    cells = []
    for key, own in rows.groupby(settings, sort=False):
        key = key[: len(shown)]
        paper = PAPER_PIXEL.get(key[0], "") if key[1] != "Grad-CAM" else ""
        pixels = [spread(own.pixel_auroc), spread(own.control_pixel_auroc), paper]
        cells.append([*key, len(own), *pixels, spread(own.aupro), spread(own.image_auroc)])
    head = "category, maps, size, updates, Gaussian, seeds, pixel AUROC, control, paper, AUPRO, image AUROC"
    return markdown(head.split(", "), cells)


def maps_table() -> str:
    """What benchmarks/maps.py measured: pixel AUROC of each category under each combination of settings, and what it
    costs, the median over the categories."""
    rows = pandas.read_csv(ROOT / "results/maps.csv")
    rows["network"] = rows.dense.map({True: "once", False: "per window"})
    rows["length"] = rows.l2.map({True: "1", False: "kept"})
    settings = ["level", "network", "window", "stride", "location_chosen", "dims", "sigma", "length"]
    if (again := rows.duplicated([*settings, "category"])).any():
        sys.exit(f"results/maps.csv: more than one row for {rows[again].iloc[0][[*settings, 'category']].to_dict()}")
    pixels = rows.pivot_table("pixel_auroc", settings, "category", sort=False)
    costs = rows.groupby(settings, sort=False)[["seconds_per_image", "peak_mb", "file_mb"]].median()
    categories = [name for name in PAPER_PIXEL if name in pixels.columns]
    head = ["stage", "network", "window", "stride", "Gaussian", "dims", "sigma", "length"]
    cells = []
    for key, values in pixels.iterrows():
        level, network, window, stride, location, dims, sigma, length = key
        cost = costs.loc[key]
        cells.append([level, network, window, stride, location, dims, f"{sigma:g}", length])
        cells[-1] += [percent(values[name]) for name in categories]
        cells[-1] += [f"{cost.seconds_per_image:.3g}", f"{cost.peak_mb:,.0f}", f"{cost.file_mb:,.0f}"]
    return markdown([*head, *categories, "s per image", "peak MB", "file MB"], cells)


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
    """Append the rows of one table to another, whose columns it may extend; identical rows once. As text: numbers keep
    their digits."""
    rows = pandas.read_csv(source, dtype=str)
    if target.exists():
        rows = pandas.concat([pandas.read_csv(target, dtype=str), rows])
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
