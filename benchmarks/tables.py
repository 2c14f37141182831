"""Results -> documents: keeps results/*.csv and the tables that README.md and docs/*.md show of them.

    python benchmarks/tables.py write
    python benchmarks/tables.py add Eval/models/results.csv results/image.csv

write brings what is between <!-- table: NAME --> and <!-- end of table --> up to date; check fails if a table is not,
or is shown nowhere; add appends the rows that eval.py wrote. Reads and writes results/, README.md and docs/, nothing
else.
"""

import argparse
import functools
import re
from pathlib import Path

import pandas
from cells import markdown, newest, percent, spread, yes_or_no
from deciding import DECIDING
from pandas import DataFrame
from paper import paper_made, paper_pixel_table, paper_runs_table, paper_table, published
from record import ROOT, append, read
from transfer import OTHERS, members_table, transfer_table, tuned_figures
from trials import around_table, trials_table, ways_table

from config import RECIPES
from runtime.cli import new_parser, run_script
from runtime.files import InputError

FITTING = ("streamed as moments", "held")  # notes of rows that say what fitting costs
RESULT_MINUTES, RESULT_DEVICE = 10, "AMD EPYC"  # of the rows of the fast recipe that the README shows
PAPER_SIZE = 256  # pixels
START, END = re.compile(r"<!-- table: (.*) -->\n"), "<!-- end of table -->"


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("command", choices=("add", "write", "check"))
    parser.add_argument("files", nargs="*", type=Path, help="add: source and target, CSV files")
    return parser


def main(args: argparse.Namespace) -> None:
    if len(args.files) != (2 if args.command == "add" else 0):
        raise argparse.ArgumentTypeError("add needs a source and a target, write and check need no file")
    if args.command == "add":
        source, target = args.files
        if not source.is_file():
            raise InputError(f"{source}: no such file; eval.py writes it")
        for row in read(source):
            append(row, target)
        return
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    documents = {path: path.read_text(encoding="utf-8") for path in paths}
    new = {path: filled(text, path) for path, text in documents.items()}
    if args.command == "write":
        for path in paths:
            if new[path] != documents[path]:
                path.write_text(new[path], encoding="utf-8")
        return
    shown = {name for text in documents.values() for name in START.findall(text)}
    if missing := [name for name in TABLES if name not in shown]:
        raise InputError(f"table {missing[0]!r} is neither in README.md nor in docs/*.md; give it a place")
    for path in paths:
        if new[path] != documents[path]:
            raise InputError(f"{path.relative_to(ROOT)} is not what results/ says: python benchmarks/tables.py write")


def filled(text: str, path: Path) -> str:
    """A document with every table in it as results/ has it. Raises InputError for a name that is no table's, and for a
    table without an end."""
    head, *parts = START.split(text)  # text, name, text, name, text ...
    for name, rest in zip(parts[::2], parts[1::2]):
        if name not in TABLES:
            raise InputError(f"{path}: unknown table {name!r}; it is one of {', '.join(TABLES)}")
        _, end, tail = rest.partition(END)
        if not end:
            raise InputError(f"{path}: the table {name!r} has no end; put {END} behind it")
        head += f"<!-- table: {name} -->\n{TABLES[name]()}\n{END}{tail}"
    return head


# Tables -----------------------------------------------------------------------------------------------------------


def paper_pixels() -> dict[str, float]:
    """The paper's pixel AUROC of its 3-way patch models, by category."""
    return published("3way patches", "pixel_auroc")


def results_table() -> str:
    """The fast recipe, as it is, in ten minutes on each category, next to the paper."""
    rows, fast = recipe_rows(), RECIPES["fast"]
    rows = rows[(rows.recipe == "fast") & rows.note.isna() & (rows.budget == f"{RESULT_MINUTES} min")]
    rows = rows[(rows.patch_size == fast["patch_size"]) & (rows.batch_size == fast["batch_size"])]
    rows = rows[rows.device == RESULT_DEVICE]
    paper_image, paper_pixel, cells = published("3way"), paper_pixels(), []
    other, tuned = published("3way", source="re-implementation"), tuned_figures()
    for (category, *_), own in rows.groupby(TOLD, sort=False, dropna=False):
        image, untrained, *pixel = figures(own)
        papers = [percent(values.get(category)) for values in (paper_image, other, paper_pixel)]
        cells.append([category, len(own), image, untrained, tuned.get(category, ""), *papers[:2]])
        cells[-1] += [*pixel[:2], papers[2], *pixel[2:]]
    head = ["category", "seeds", *FIGURES[:2], "fine-tuned", "paper", "re-impl.", *FIGURES[2:4], "paper", *FIGURES[4:]]
    return markdown(head, cells)


def image_table() -> str:
    """Image AUROC, one row a detector."""
    rows = pandas.read_csv(ROOT / "results/image.csv")
    head = (
        "category, variant, size, steps, batch, seed, head, normalize, precision, processor, "
        "image AUROC, untrained, AUPRC"
    )
    cells = []
    for row in rows.itertuples():
        size = row.width if row.width == row.height else f"{row.width}x{row.height}"
        precision = "float32" if pandas.isna(row.amp) or row.amp == "off" else row.amp
        setting = [row.category, row.variant, size, row.epochs, row.batch_size, row.seed, row.head_layer, row.normalize]
        found = map(percent, (row.image_auroc, row.control_auroc, row.image_auprc))
        cells.append([*setting, precision, row.device, *found])
    return markdown(head.split(", "), cells)


def density_table() -> str:
    """Image AUROC of one network under each density, embeddings L2-normalized or not."""
    rows = pandas.read_csv(ROOT / "results/density.csv")
    rows["normalized"] = yes_or_no(rows.l2)
    rows = newest("results/density.csv", rows, ["category", "normalized", "density"])
    table = rows.pivot_table("image_auroc", ["category", "normalized"], "density", sort=False)
    cells = ([*key, *(percent(value, 2) for value in values)] for key, values in table.iterrows())
    return markdown(["category", "L2-normalized", *table.columns], cells)


PIXEL_SHOWN = ["category", "maps", "width", "epochs", "gaussian"]
PIXEL_SETTINGS = [*PIXEL_SHOWN, "variant", "head_layer", "normalize", "batch_size", "l2"]


def pixel_rows() -> DataFrame:
    """results/pixel.csv, the newest row of each setting and seed."""
    rows = pandas.read_csv(ROOT / "results/pixel.csv")
    rows["maps"] = rows.patch_size.map(lambda side: "Grad-CAM" if pandas.isna(side) else f"patch model, {side:.0f} px")
    rows["gaussian"] = rows.location_chosen.fillna("of images")
    return newest("results/pixel.csv", rows, PIXEL_SETTINGS, ["seed"])


def pixel_table() -> str:
    """Maps of patch models and by Grad-CAM: of detectors that only differ in their seed, mean and deviation."""
    paper_pixel, cells = paper_pixels(), []
    for key, own in pixel_rows().groupby(PIXEL_SETTINGS, sort=False, dropna=False):
        key = key[: len(PIXEL_SHOWN)]
        paper = percent(paper_pixel.get(key[0])) if key[1] != "Grad-CAM" else ""
        pixels = [spread(own.pixel_auroc), spread(own.control_pixel_auroc), paper]
        cells.append([*key, len(own), *pixels, spread(own.aupro), spread(own.image_auroc)])
    head = "category, maps, size, steps, Gaussian, seeds, pixel AUROC, untrained, paper, AUPRO, image AUROC"
    return markdown(head.split(", "), cells)


def maps_table() -> str:
    """What benchmarks/maps.py measured: pixel AUROC of each category under each combination of settings, and what it
    costs, the median over the categories."""
    rows = pandas.read_csv(ROOT / "results/maps.csv")
    rows = rows[rows.note.isna()]
    rows["network"] = rows.dense.map({True: "once", False: "per window"})
    rows["normalized"] = yes_or_no(rows.l2)
    settings = ["level", "network", "window", "stride", "location_chosen", "dims", "sigma", "normalized"]
    rows = newest("results/maps.csv", rows, [*settings, "category"])
    pixels = rows.pivot_table("pixel_auroc", settings, "category", sort=False)
    costs = rows.groupby(settings, sort=False)[["seconds_per_image", "peak_mb", "file_mb"]].median()
    categories = [name for name in paper_pixels() if name in pixels.columns]
    head = ["stage", "network", "window", "stride", "Gaussian", "dims", "sigma", "L2-normalized"]
    cells = []
    for key, values in pixels.iterrows():
        level, network, window, stride, location, dims, sigma, normalized = key
        cost = costs.loc[key]
        cells.append([level, network, window, stride, location, dims, f"{sigma:g}", normalized])
        cells[-1] += [percent(values[name]) for name in categories]
        cells[-1] += [f"{cost.seconds_per_image:.3g}", f"{cost.peak_mb:,.0f}", f"{cost.file_mb:,.0f}"]
    return markdown([*head, *categories, "s per image", "peak MB", "file MB"], cells)


def fitting_table() -> str:
    """What fitting a patch model costs, of two commits on one machine: the rows of results/maps.csv whose note says
    what was done with the embeddings, of each the last."""
    rows = pandas.read_csv(ROOT / "results/maps.csv")
    rows = newest("results/maps.csv", rows[rows.note.isin(FITTING)], ["category", "note"])
    cells = [
        [
            row.note,
            row.category,
            row.fit_seconds,
            f"{row.peak_mb:,.0f}",
            f"{row.file_mb:.1f}",
            percent(row.pixel_auroc, 2),
        ]
        for row in rows.itertuples()
    ]
    return markdown(["embeddings", "category", "seconds to fit", "peak MB", "file MB", "pixel AUROC"], cells)


TOLD = ["category", "recipe", "budget", "width", "patch_size", "batch_size", "level", "location_chosen"]
TOLD += ["device", "amp", "note"]


def recipe_rows() -> DataFrame:
    """Detectors by recipes; those that agree in TOLD differ in seeds alone. Their budget is minutes or, else, steps."""
    rows = pandas.read_csv(ROOT / "results/recipe.csv").rename(columns={"epochs": "steps"})
    minutes = rows.minutes.map("{:g} min".format)
    rows["budget"] = minutes.where(rows.minutes.notna(), rows.steps.map("{} steps".format))
    return newest("results/recipe.csv", rows, TOLD, ["seed"])


def recipe_table() -> str:
    """Detectors by recipes within a budget of minutes or steps, mean and deviation over seeds."""
    cells = []
    for _, own in recipe_rows().groupby(TOLD, sort=False, dropna=False):
        row = own.iloc[0]
        recipe = row.recipe + ("" if pandas.isna(row.note) else f", {row.note}")
        steps = " to ".join(map(str, sorted({own.steps.min(), own.steps.max()})))
        steps += f" of {row.batch_size}, {row.patch_size} px"
        minutes = "" if pandas.isna(row.minutes) else f"{row.minutes:g}"
        size, stages = f"{row.width} x {row.height}", f"{row.level}, {row.location_chosen}"
        cells.append([row.category, size, recipe, minutes, steps, stages, len(own)])
        cells[-1] += [*figures(own), f"{row.device}, {row.amp.replace('off', 'float32')}"]
    head = ["category", "size", "recipe", "minutes", "steps of images, crops", "stages, Gaussian", "seeds"]
    return markdown([*head, *FIGURES, "processor"], cells)


FIGURES = ("image AUROC", "untrained", "pixel AUROC", "untrained", "AUPRO")


def figures(rows: DataFrame) -> list[str]:
    """The cells under FIGURES."""
    found = (rows.image_auroc, rows.control_auroc, rows.pixel_auroc, rows.control_pixel_auroc, rows.aupro)
    return [spread(values) for values in found]


def areas_table() -> str:
    """Which defects are found: image AUROC by their area, and within groups."""
    rows = newest("results/areas.csv", pandas.read_csv(ROOT / "results/areas.csv"), ["category", "width", "part"])
    areas = rows.apply(
        lambda r: "" if pandas.isna(r.least_area) else f"{r.least_area:.0f} to {r.most_area:.0f}", axis=1
    )
    told = zip(rows.category, rows.width, rows.height, rows.part, areas, rows.normal, rows.anomalous, rows.image_auroc)
    cells = ([name, f"{w} x {h}", *counts, percent(auroc)] for name, w, h, *counts, auroc in told)
    head = ["category", "size", "anomalous images", "area of the defect, pixels", "normal", "anomalous", "image AUROC"]
    return markdown(head, cells)


def invisible_table() -> str:
    """The share of views that show nothing, of each kind of view."""
    rows = pandas.read_csv(ROOT / "results/invisible.csv")
    rows["view"] += rows.patch_size.map(lambda side: ", whole image" if pandas.isna(side) else ", crop")
    rows = newest("results/invisible.csv", rows, ["category", "view", "size"])
    table = rows.pivot_table("share", "category", "view", sort=False)
    cells = ([name, *(percent(value, 0) for value in values)] for name, values in table.iterrows())
    return markdown(["category", *table.columns], cells)


def speed_table() -> str:
    """What benchmarks/speed.py measured, one column a row of the file."""
    rows = pandas.read_csv(ROOT / "results/speed.csv")
    shown = {
        "device": lambda r: r.processor if pandas.isna(r.gpu) else r.gpu,
        "cores": lambda r: r.cores,
        "torch": lambda r: r.torch,
        "commit": lambda r: r.commit,
        "recipe": lambda r: getattr(r, "recipe", "paper"),
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
    """Peak memory (without the pages of mapped files, where that was measured) and speed of training, one row a run."""
    rows = pandas.read_csv(ROOT / "results/memory.csv")
    peaks = rows.anonymous_mb.fillna(rows.peak_mb) if "anonymous_mb" in rows else rows.peak_mb
    cells = []
    for row, peak in zip(rows.itertuples(), peaks):
        held = "on disk" if row.decoded_mb > 1e3 * row.memory_gb else "in memory"
        cells.append([f"{row.images:,}", f"{row.decoded_mb:,.0f}", held, f"{peak:,.0f}", f"{row.steps_per_second:.2f}"])
    return markdown(["images", "decoded, MB", "held", "peak memory, MB", "steps per second"], cells)


TABLES = {
    "results": results_table,
    "paper": paper_table,
    "paper_runs": paper_runs_table,
    "paper_pixel": paper_pixel_table,
    "paper_made": paper_made,
    "image": image_table,
    "density": density_table,
    "pixel": pixel_table,
    "maps": maps_table,
    "fitting": fitting_table,
    "recipe": recipe_table,
    "trials": trials_table,
    "around": around_table,
    "ways": ways_table,
    "areas": areas_table,
    "invisible": invisible_table,
    "speed": speed_table,
    "memory": memory_table,
    "transfer": functools.partial(transfer_table, "image_auroc"),
    "transfer_others": functools.partial(transfer_table, "image_auroc", OTHERS),
    "transfer_pixel": functools.partial(transfer_table, "pixel_auroc"),
    "members": members_table,
    **DECIDING,
}


if __name__ == "__main__":
    run_script(main, get_parser())
