"""Keep results/*.csv, and the tables that README.md and docs/*.md show of them.

    python benchmarks/tables.py write
    python benchmarks/tables.py add Eval/models/results.csv results/paper.csv

write brings what is between <!-- table: NAME --> and <!-- end of table --> up to date; check fails if a table is not,
or is shown nowhere; add appends the rows that eval.py wrote. Reads and writes results/, README.md and docs/, nothing
else.
"""

import argparse
import csv
import functools
import io
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas
from pandas import DataFrame, Series

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import config
from config import BACKBONES
from runtime.cli import new_parser, run_script
from runtime.files import InputError, write_file

ROOT = Path(__file__).resolve().parents[1]
START, END = re.compile(r"<!-- table: (.*) -->\n"), "<!-- end of table -->"
# What a table that does not show it must not mix; of "location" it is location_chosen that counts
SETTINGS = [name for name in config.SETTINGS if name not in ("category", "weights", "false_alarm_rate", "location")]


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
    """Return a document with every table in it as results/ has it.

    Raises InputError for a name that is no table's, and for a table without an end.
    """
    head, *parts = START.split(text)  # text, name, text, name, text ...
    for name, rest in zip(parts[::2], parts[1::2]):
        if name not in TABLES:
            raise InputError(f"{path}: unknown table {name!r}; it is one of {', '.join(TABLES)}")
        _, end, tail = rest.partition(END)
        if not end:
            raise InputError(f"{path}: the table {name!r} has no end; put {END} behind it")
        head += f"<!-- table: {name} -->\n{TABLES[name]()}\n{END}{tail}"
    return head


# Rows -------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text, so that numbers keep their digits; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(row: dict, path: Path) -> None:
    """Add a row at the end of a CSV file, unless the very same is in it.

    Columns that only this row has become the last ones; None, and what a row has not, is empty. The file is replaced
    as a whole or not at all.
    """
    rows = [*read(path), {name: "" if value is None else str(value) for name, value in row.items()}]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = dict.fromkeys(tuple(row.get(name, "") for name in names) for row in rows)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([names, *cells])
    write_file(text.getvalue().encode(), path)


def newest(name: str, rows: DataFrame, shown: list[str], repeated: Sequence[str] = ()) -> DataFrame:
    """Keep, of rows that agree in ``shown`` and ``repeated``, the last one, in the place of the first.

    ``shown`` are the columns that a table shows, ``repeated`` those that it takes the mean over. Raises InputError
    with the file's name if rows that agree in ``shown`` differ in another setting: the table would mix them. A row
    without a value fits any.
    """
    hidden = [column for column in SETTINGS if column in rows and column not in (*shown, *repeated)]
    differ = rows.groupby(shown, sort=False, dropna=False)[hidden].nunique() > 1
    for key, settings in differ[differ.any(axis=1)].iterrows():
        values = (key,) if len(shown) == 1 else key
        words = ", ".join(f"{column} {value}" for column, value in zip(shown, values))
        raise InputError(f"{name}: rows that differ in {settings.idxmax()}, which a table does not show: {words}")
    place = rows.groupby([*shown, *repeated], sort=False, dropna=False).ngroup()
    return rows.assign(place=place).drop_duplicates("place", keep="last").sort_values("place")


def published(variant: str, measure: str = "image_auroc", source: str = "paper") -> dict[str, float]:
    """Return fractions by category, in the paper's order; of some variants the average is all that is known."""
    rows = pandas.read_csv(ROOT / "results/published.csv")
    rows = rows[(rows.source == source) & (rows.variant == variant)]
    return dict(zip(rows.category, rows[measure]))


# Cells ------------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def percent(value: float) -> str:
    """Write a fraction in percent; nothing where there is none."""
    return "" if pandas.isna(value) else f"{100 * value:.1f}"


def spread(values: Series) -> str:
    """Write mean and, of more than one, sample standard deviation of fractions, in percent."""
    return percent(values.mean()) + (f" ± {percent(values.std())}" if values.count() > 1 else "")


def with_error(values: Series) -> str:
    """Write mean and, of more than one, standard error of fractions, in percent; behind them how many there are."""
    values = values.dropna()
    error = f" ± {percent(values.sem())}" if len(values) > 1 else ""
    return f"{percent(values.mean())}{error} ({len(values)})" if len(values) else ""


# Pretrained networks, and the fast recipe ---------------------------------------------------------------------------

FROZEN = ("efficientnet_lite0", "mobilenet_v2")  # pretrained networks, as they are, that the README shows
RESULT_MINUTES, RESULT_DEVICE = 10, "AMD EPYC"  # of the rows of the fast recipe that the README shows
OTHER = "re-implementation"
CROPS, IMAGE, STRIDES = "patch model, 64 px", "whole image", "strides 8, 16"
TAKEN = {"pool": IMAGE, STRIDES: CROPS, "all": CROPS}  # features that the tables show, and of which models
SINGLE = ["level", "dims", "location_chosen"]  # settings that follow from what the table shows
CATEGORIES = ("bottle", "screw", "grid", "ball_screw", "solar_mono", "solar_poly", "brick", "grass", "gravel")


def transfer_rows() -> DataFrame:
    """Return rows of results/transfer.csv: networks as they are, and fine-tuned as without further flags.

    Whole images are of 128 px, where both were measured.
    """
    rows, recipe = pandas.read_csv(ROOT / "results/transfer.csv"), config.RECIPES["finetune"]
    rows["model"] = rows.patch_size.map({64: CROPS}).fillna(IMAGE)
    default = rows.backbone.map(lambda name: ",".join(map(str, BACKBONES[name].middle)))
    rows["taken"] = rows.features.mask(rows.level == default, STRIDES)
    rows = rows[rows.taken.map(TAKEN) == rows.model]
    rows = rows[rows.pretrained & rows.freeze_bn & (rows.invisible == "keep")]
    tuned = (rows.epochs == recipe["epochs"]) & (rows.batch_size == recipe["batch_size"])
    rows = rows[tuned | (rows.epochs == 0)]
    rows = rows[(rows.model == CROPS) | (rows.width == 128)].assign(level=None)  # STRIDES says it
    return newest("results/transfer.csv", rows, ["model", "backbone", "taken", "epochs", "category"], ["seed"])


def transfer_table(measure: str) -> str:
    """Show a figure of each category, in percent: mean and deviation over the seeds."""
    rows, cells = transfer_rows().dropna(subset=[measure]), []
    categories = [category for category in CATEGORIES if category in set(rows.category)]
    for (model, backbone, taken, epochs), runs in rows.groupby(["model", "backbone", "taken", "epochs"]):
        figures = [spread(runs[runs.category == category][measure]) for category in categories]
        cells.append([model, backbone, taken, f"{epochs} steps" if epochs else "as it is", *figures])
    return markdown(["model", "backbone", "features", "training", *categories], cells)


def results_table() -> str:
    """Show pretrained patch models and the fast recipe after ten minutes on each category, next to the paper."""
    rows, fast = pandas.read_csv(ROOT / "results/recipe.csv"), config.RECIPES["fast"]
    rows = rows[(rows.recipe == "fast") & rows.note.isna() & (rows.minutes == RESULT_MINUTES)]
    rows = rows[(rows.patch_size == fast["patch_size"]) & (rows.batch_size == fast["batch_size"])]
    rows = rows[rows.device == RESULT_DEVICE].drop(columns="epochs")  # steps follow from minutes: seeds may differ
    rows = newest("results/recipe.csv", rows, ["category"], ["seed"])
    made = density_rows()
    made = made[(made.epochs == 0) & (made.described == "both")]
    image, other = published("3way"), published("3way", source=OTHER)
    pixel, cells = published("3way patches", "pixel_auroc"), []
    for category in CATEGORIES:
        fast = rows[rows.category == category]
        frozen = [made[(made.backbone == name) & (made.category == category)] for name in FROZEN]
        cells.append([category, *(spread(part.image_auroc) for part in (*frozen, fast)), spread(fast.control_auroc)])
        cells[-1] += [percent(values.get(category)) for values in (image, other)]
        cells[-1] += [*(spread(part.pixel_auroc) for part in (*frozen, fast)), spread(fast.control_pixel_auroc)]
        cells[-1] += [percent(pixel.get(category)), *(spread(part.aupro) for part in (*frozen, fast))]
    taken = [*FROZEN, "from scratch"]
    head = ["category", *taken, "untrained", "paper", "re-impl."]
    head += [f"pixel: {name}" for name in (*taken, "untrained", "paper")]
    return markdown([*head, *(f"AUPRO: {name}" for name in taken)], cells)


# Densities --------------------------------------------------------------------------------------------------------

FIGURES = ("image_auroc", "pixel_auroc", "aupro")


def density_rows() -> DataFrame:
    """Return rows of results/density.csv, with the network and the density in words; a density of joined stages has the
    name of its flag."""
    rows = pandas.read_csv(ROOT / "results/density.csv").fillna({"join": False})
    tuned = rows.epochs.map(lambda steps: f"{steps} steps" if steps else "as it is")
    rows["network"] = (rows.backbone + ", " + tuned).where(rows.pretrained, rows.backbone + ", recipe " + rows.recipe)
    shared = rows.location_chosen.map(lambda kinds: " shared" if set(kinds.split(",")) == {"shared"} else "")
    joined = rows["join"].astype(bool)  # not rows.join, which pandas has
    rows["described"] = (rows.density + shared).where(joined, "one Gaussian for each stage")
    as_trained = rows.backbone.map(lambda name: BACKBONES[name].normalize)
    for normalize, words in {"image": "each image's", "imagenet": "ImageNet's"}.items():
        other = rows.normalize.eq(normalize) & as_trained.ne(normalize) & joined & rows.pretrained
        rows.loc[other, "described"] += f", {words} normalization"
    other = rows.window.ne(config.JOINED_WINDOW) & joined & rows.pretrained
    rows.loc[other, "described"] += ", window " + rows.window[other].astype(str)
    return newest("results/density.csv", rows.drop(columns=SINGLE), ["network", "described", "category"], ["seed"])


def density_table() -> str:
    """Show what patch models reach with each density: image AUROC / pixel AUROC / AUPRO, in percent."""
    rows = density_rows()
    categories, cells = [category for category in CATEGORIES if category in set(rows.category)], []
    for (network, described), runs in rows.groupby(["network", "described"], sort=False):
        parts = (runs[runs.category == category] for category in categories)
        figures = [" / ".join(text for name in FIGURES if (text := spread(part[name]))) for part in parts]
        cells.append([network, described, *figures])
    return markdown(["network", "density", *categories], cells)


def choice_table() -> str:
    """Show what ``check_data.py --choose`` took in its draws, and what that reaches, on the network of density_rows."""
    draws, made = pandas.read_csv(ROOT / "results/choice.csv"), density_rows()
    made = made[(made.backbone == "mobilenet_v2") & (made.epochs == 0)].set_index(["category", "described"])
    cells, names = [], config.CANDIDATES
    for category in (name for name in CATEGORIES if name in set(draws.category)):
        rows = draws[draws.category == category]
        picks = rows.drop_duplicates("draw").chosen
        counts = ", ".join(f"{name} {sum(picks == name)}" for name in names if sum(picks == name))
        pasted = " / ".join(percent(rows[rows.density == name].pasted_auroc.mean()) for name in names)
        figures_of = {name: made.loc[(category, name), ["image_auroc", "aupro"]] for name in names}
        chosen = pandas.concat([figures_of[name] for name in picks], axis=1).mean(axis=1)
        best = pandas.concat(figures_of.values(), axis=1).max(axis=1)
        before = made.loc[(category, "one Gaussian for each stage"), ["image_auroc", "aupro"]]
        figures = (chosen, figures_of["both"], best, before)
        cells.append([category, counts, pasted, *(" / ".join(filter(None, map(percent, part))) for part in figures)])
    head = ["category", "chosen in ten draws", f"pasted: {' / '.join(names)}"]
    return markdown([*head, "the choice", "both", "the best of the four", "one Gaussian for each stage"], cells)


def peers_table() -> str:
    """Show what benchmarks/peers.py measured; of the same model and category the newest row counts."""
    rows = pandas.read_csv(ROOT / "results/peers.csv").drop_duplicates(["category", "model"], keep="last")
    categories = [category for category in CATEGORIES if category in set(rows.category)]
    cells = []
    for model in rows.model.drop_duplicates():
        runs = rows[rows.model == model].set_index("category")
        done = [runs.loc[category] if category in runs.index else None for category in categories]
        figures = ["" if run is None else " / ".join(percent(run[name]) for name in FIGURES) for run in done]
        seconds, image_ms = ([run[name] for run in done if run is not None] for name in ("fit_seconds", "image_ms"))
        name = model.removeprefix("anomalib ")
        name = f"anomalib's {name}" if name != model else f"`--density {model}`"
        cells.append([name, *figures, f"{min(seconds):.0f} to {max(seconds):.0f}", f"{statistics.mean(image_ms):.0f}"])
    return markdown(["model", *categories, "seconds to fit", "ms an image"], cells)


# Next to the paper ------------------------------------------------------------------------------------------------

NEEDED = ["category", "seed", "image_auroc", "control_auroc", "pixel_auroc", "control_pixel_auroc", "aupro"]
NEEDED += ["device", "torch", "train_seconds", "train_command", "eval_command", "eval_date"]
LEVEL, POOL = "efficientnet_b4 level 7", "efficientnet_b4 pool"
RUNS = {  # what follows --model_dir reproduce/ in eval.py's command: what it is; whose figure stands beside it
    "10000_normal": ("CutPaste, 10,000 steps", "normal", "normal"),
    "10000_scar": ("CutPaste-Scar, 10,000 steps", "scar", "scar"),
    "10000_3way": ("3-way, 10,000 steps", "3way", "3way"),
    "65536_3way": ("3-way, 65,536 steps", "3way", ""),
    "ensemble": ("3-way, ensemble of five, 10,000 steps", "ensemble", ""),
    "finetune_b4 --features pool": ("EfficientNet-B4 finetuned, pooled features", f"{POOL} finetuned", ""),
    "finetune_b4": ("EfficientNet-B4 finetuned, level 7", f"{LEVEL} finetuned", ""),
    "frozen_b4 --features pool": ("EfficientNet-B4 as it is, pooled features", f"{POOL} frozen", ""),
    "frozen_b4": ("EfficientNet-B4 as it is, level 7", f"{LEVEL} frozen", ""),
    "frozen_b4 --features all": ("EfficientNet-B4 as it is, all levels", "", ""),
    "frozen_resnet18": ("ResNet-18 as it is, pooled features", "", ""),
}
COLUMNS = {  # a run and a measure
    "10,000 steps": ("10000_3way", "image_auroc"),
    "65,536 steps": ("65536_3way", "image_auroc"),
    "ensemble": ("ensemble", "image_auroc"),
    "finetuned B4": ("finetune_b4", "image_auroc"),
    "frozen B4": ("frozen_b4", "image_auroc"),
    "patch model": ("patches", "image_auroc"),
}
PIXEL_COLUMNS = {
    "pixel AUROC": ("patches", "pixel_auroc"),
    "untrained": ("patches", "control_pixel_auroc"),
    "AUPRO": ("patches", "aupro"),
}


def paper_rows() -> DataFrame:
    """Return rows of results/paper.csv, the newest of each run, category and seed; none if there is no file yet."""
    path = ROOT / "results/paper.csv"
    rows = pandas.read_csv(path) if read(path) else DataFrame()
    rows = rows.reindex(columns=[*dict.fromkeys([*rows.columns, *NEEDED])])
    rows["run"] = rows.eval_command.astype(str).str.extract(r"--model_dir reproduce/(.*?) --cuda ", expand=False)
    return newest("results/paper.csv", rows[rows.run.notna()], ["run", "category"], ["seed"])


def averages(rows: DataFrame, measure: str) -> Series:
    """Return, of each seed that has all categories, their mean."""
    table = rows.pivot(index="seed", columns="category", values=measure).reindex(columns=list(published("3way")))
    return table.astype(float).mean(axis=1, skipna=False)


def paper_table() -> str:
    """Show published and own figures of each category and their average; no column of what is not measured yet."""
    image, other = published("3way"), published("3way", source=OTHER)
    columns = {"paper, 3-way": known(image), "re-impl., 3-way": known(other), **measured(COLUMNS)}
    columns |= {"paper, pixel AUROC": known(published("3way patches", "pixel_auroc")), **measured(PIXEL_COLUMNS)}
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    return markdown(["category", *columns], zip([*image, "average"], *columns.values()))


def known(values: dict[str, float]) -> list[str]:
    """Return a published figure of each category, and their mean."""
    return [*map(percent, values.values()), percent(statistics.mean(values.values()))]


def measured(columns: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Return, for each column, our own figure of each category, and their mean."""
    rows, cells = paper_rows(), {}
    for title, (run, measure) in columns.items():
        runs = rows[rows.run == run]
        cells[title] = [with_error(runs[runs.category == category][measure]) for category in published("3way")]
        cells[title].append(with_error(averages(runs, measure)))
    return cells


def paper_runs_table() -> str:
    """Show the average image AUROC of everything that reproduce.sh measures."""
    rows, cells = paper_rows(), []
    for run, (words, *variants) in RUNS.items():
        runs = rows[rows.run == run]
        figures = [published(variant, source=source) for variant, source in zip(variants, ("paper", OTHER))]
        figures = [percent(statistics.mean(values.values())) if values else "" for values in figures]
        ours = [with_error(averages(runs, measure)) for measure in ("image_auroc", "control_auroc")]
        cells.append([words, *figures, *ours])
    return markdown(["average over the 15 categories", "paper", "re-impl.", "here", "untrained"], cells)


def paper_made() -> str:
    """Say on what, with what and when the rows of results/paper.csv were made."""
    rows = paper_rows()
    if rows.empty:
        return "Nothing has been measured yet."
    trained = rows.drop_duplicates(["category", "seed", "train_command"])
    devices, versions = (", ".join(sorted(set(rows[name].dropna().astype(str)))) for name in ("device", "torch"))
    hours = f"{trained.train_seconds.sum() / 3600:,.1f} hours of training"
    dates = sorted(set(rows.eval_date.dropna().astype(str).str[:10]))
    when = f"; evaluated {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}" if dates else ""
    return f"Hardware: {devices}; torch {versions}; {hours}{when}."


# Speed ------------------------------------------------------------------------------------------------------------


def speed_rows(*named: str) -> DataFrame:
    """Return the rows of results/speed.csv, with the columns named, empty where the file has none of them."""
    rows = pandas.read_csv(ROOT / "results/speed.csv")
    return rows.reindex(columns=[*rows, *(name for name in named if name not in rows)])


def columns(rows: DataFrame, lines: dict[str, Callable[[Series], str]]) -> str:
    """Show rows as columns. lines: what a line shows of each; one that shows nothing of any is left out."""
    cells = []
    for title, cell in lines.items():
        texts = [str(cell(row)) for row in rows.itertuples()]
        texts = ["" if text.startswith("nan") else text for text in texts]
        if any(texts):
            cells.append([title, *texts])
    return markdown([""] * (1 + len(rows)), cells)


WHERE = {
    "device": lambda r: r.processor if pandas.isna(r.gpu) else r.gpu,
    "cores": lambda r: r.cores,
    "torch": lambda r: r.torch,
    "commit": lambda r: r.commit,
    "recipe": lambda r: r.recipe,
    "variant, size, images per step": lambda r: f"{r.variant}, {r.width} x {r.height}, {r.batch_size}",
    "precision": lambda r: r.amp + (", network compiled" if r.compile else ""),
}


def speed_table() -> str:
    """Show what benchmarks/speed.py measured on CPUs, one column a row of the file."""
    rows = speed_rows()
    lines = {
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
    timed = rows.step_seconds.notna() | rows.scoring_images_per_second.notna()
    return columns(rows[rows.gpu.isna() & timed], WHERE | lines)


def gpu_table() -> str:
    """Show what benchmarks/speed.py measured on GPUs, one column a row of the file."""
    measured = ("views_seconds", "issued_step_seconds", "settling_seconds", "step_kernels", "step_kernel_seconds")
    measured += ("views_kernels", "replayed_equal", "replayed_steps", "views_pixels", "views_pixels_that_differ")
    rows = speed_rows(*measured)
    equal = lambda r: f"{r.replayed_steps:.0f}" if r.replayed_equal else "not all"  # noqa: E731
    differ = lambda r: f"{r.views_pixels_that_differ:.0f} of {r.views_pixels:,.0f}"  # noqa: E731
    lines = {
        "training step, ms": lambda r: f"{1000 * r.step_seconds:.2f}",
        "bare step, ms": lambda r: f"{1000 * r.bare_seconds:.2f}",
        "training step over bare step": lambda r: f"{r.step_over_bare:.3f}",
        "the step issued operation by operation, ms": lambda r: f"{1000 * r.issued_step_seconds:.1f}",
        "views of a step, ms": lambda r: f"{1000 * r.views_seconds:.3f}",
        "kernels of a step": lambda r: f"{r.step_kernels:.0f}",
        "those of the views": lambda r: f"{r.views_kernels:.0f}",
        "time of a step's kernels alone, ms": lambda r: f"{1000 * r.step_kernel_seconds:.2f}",
        "first steps (compiling, recording), s": lambda r: f"{r.settling_seconds:.0f}",
        "10,000 steps, s": lambda r: f"{r.settling_seconds + 10_000 * r.step_seconds:.0f}",
        "replayed steps that equal issued ones": lambda r: "" if pandas.isna(r.replayed_equal) else equal(r),
        "pixels of views that differ from a CPU's": differ,
        "peak memory of training, MB": lambda r: f"{r.training_peak_mb:.0f}",
    }
    return columns(rows[rows.gpu.notna() & rows.step_seconds.notna()], WHERE | lines)


def launches_table() -> str:
    """Show what a step issues on the device, of each recipe; the newest row counts."""
    rows = speed_rows()
    rows = rows[rows.views_operations.notna()].drop_duplicates("recipe", keep="last")
    lines = {
        "views, operations one by one": lambda r: f"{r.views_operations:.0f}",
        "with copies to the device": lambda r: f"{r.views_copies:.0f}",
        "network, loss, optimizer": lambda r: f"{r.network_operations:.0f}",
    }
    return columns(rows, {"recipe": WHERE["recipe"]} | lines)


def runtimes_table() -> str:
    """Show what whole detectors take in each runtime: milliseconds of a batch, of one image with the 99th percentile,
    and in parentheses how many times the bare backbone, of the newest commit that was measured."""
    shown = ["backbone", "model", "threads", "batch_size"]
    rows = speed_rows("runtime", "backbone", "model", "scoring_ms", "scoring_p99_ms", "whole_over_bare")
    rows = rows[rows.scoring_ms.notna()]
    rows = rows[rows.commit == rows.commit.iloc[-1]].drop_duplicates([*shown, "runtime"], keep="last")
    names = list(dict.fromkeys(rows.runtime))
    cells = []
    for key, group in rows.groupby(shown):
        texts = {}
        for row in group.itertuples():
            digits = ".1f" if row.batch_size == 1 else ".0f"
            latest = f" to {row.scoring_p99_ms:{digits}}" if row.batch_size == 1 else ""
            texts[row.runtime] = f"{row.scoring_ms:{digits}}{latest} ({row.whole_over_bare:.2f})"
        cells.append([*key, *(texts.get(name, "") for name in names)])
    return markdown(["backbone", "model", "threads", "images", *names], cells)


def line_table() -> str:
    """Show how many files predict.py scores in a second, of each exported model and size of files; the newest rows
    count."""
    shown = ["backbone", "model", "threads", "file_width", "file_height"]
    rows = speed_rows("backbone", "model", "file_width", "file_height", "line_over_slower")
    rows = rows[rows.line_over_slower.notna()].drop_duplicates(shown, keep="last")
    rates = ("files_images_per_second", "decoding_images_per_second", "scored_per_second")
    titles = ["backbone", "model", "files", "predict.py", "decoding alone", "scoring alone", "over the slower"]
    cells = [
        [row.backbone, row.model, f"{row.file_width:.0f} x {row.file_height:.0f}"]
        + [f"{getattr(row, name):.0f}" for name in rates]
        + [f"{row.line_over_slower:.2f}"]
        for row in rows.itertuples()
    ]
    return markdown(titles, cells)


TABLES = {
    "transfer": functools.partial(transfer_table, "image_auroc"),
    "transfer_pixel": functools.partial(transfer_table, "pixel_auroc"),
    "density": density_table,
    "choice": choice_table,
    "peers": peers_table,
    "results": results_table,
    "paper": paper_table,
    "paper_runs": paper_runs_table,
    "paper_made": paper_made,
    "speed": speed_table,
    "speed_gpu": gpu_table,
    "launches": launches_table,
    "runtimes": runtimes_table,
    "line": line_table,
}


if __name__ == "__main__":
    run_script(main, get_parser())
