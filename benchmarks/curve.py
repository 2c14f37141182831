"""Test AUROC and pretext accuracy against seconds of training -> results/curve.csv -> images/curve.png.

    python run_training.py --type screw --model_dir fast --recipe fast --no-pretrained --minutes 10 --test_epochs 60
    python eval.py --type screw --model_dir fast --control 1
    python benchmarks/curve.py add logdirs/fast Eval/fast/results.csv
    python benchmarks/curve.py draw

add takes what training wrote for TensorBoard. The time of the looks at the test images does not count, and these chose
nothing: the curve is for looking at.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas
import seaborn
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from record import ROOT, add_record_flags, append, read

from reporting.figures import ANOMALY_COLOR, NORMAL_COLOR
from runtime.cli import new_parser, run_script
from runtime.files import InputError, say, write_file

KEPT = ("category", "recipe", "seed", "batch_size", "minutes", "device", "amp", "torch", "train_command")


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("command", choices=("add", "draw"))
    parser.add_argument(
        "files", nargs="*", type=Path, help="add: a folder of TensorBoard's files, results.csv of eval.py"
    )
    add_record_flags(parser, "curve.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    if len(args.files) != (2 if args.command == "add" else 0):
        raise argparse.ArgumentTypeError("add needs a folder of TensorBoard's files and a results.csv, draw needs none")
    if args.command == "add":
        logdir, results = args.files
        if not (rows := read(results)):
            raise InputError(f"{results}: no such file; eval.py writes it")
        for row in rows:
            for point in curve(logdir / row["category"], row):
                append(point, args.results)
        return
    from reporting import figures as plots

    rows = pandas.read_csv(args.results)
    rows = rows[rows.note.isna()]  # of the recipes as they are
    write_file(plots.png(curves(rows)), ROOT / "images/curve.png")
    say("wrote images/curve.png")


def curve(folder: Path, row: dict[str, str]) -> list[dict]:
    """Points of one training: its settings, step, seconds, image AUROC and accuracy of the pretext task since the point
    before, where there are such; the first is the untrained baseline."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    if "eval_auc" not in events.Tags()["scalars"]:
        raise InputError(f"{folder}: no test AUROC; train with --test_epochs N")
    steps, seconds = [0], [0.0]
    for entry in events.Scalars("images_per_second"):
        images = min(int(row["batch_size"]), int(row["train_images"])) * (entry.step - steps[-1])
        seconds.append(seconds[-1] + images / entry.value)
        steps.append(entry.step)
    points = {0: {"image_auroc": row["control_auroc"]}} if row["control_auroc"] else {}
    for tag, column in (("eval_auc", "image_auroc"), ("acc", "accuracy")):
        for entry in events.Scalars(tag):
            points.setdefault(entry.step, {})[column] = entry.value
    kept = {name: row[name] for name in KEPT} | {"note": row.get("note", "")}
    return [
        kept
        | {"step": step, "seconds": round(float(np.interp(step, steps, seconds)), 1)}
        | {column: found.get(column, "") for column in ("image_auroc", "accuracy")}
        for step, found in sorted(points.items())
    ]


def curves(rows: pandas.DataFrame) -> Figure:
    """Image AUROC and, below, accuracy of the pretext task against minutes of training, a column of panels a category,
    a line a recipe and seed; from rows with category, recipe, seed, seconds, image_auroc, accuracy."""
    categories = list(dict.fromkeys(rows.category))
    figure = Figure(figsize=(4.2 * len(categories), 5.8), layout="constrained")
    with seaborn.axes_style("whitegrid", {"axes.edgecolor": "0.6", "grid.color": "0.9"}):
        panels = figure.subplots(2, len(categories), squeeze=False, sharex="col", sharey="row")
    colors = dict(zip(dict.fromkeys(rows.recipe), (ANOMALY_COLOR, NORMAL_COLOR, "#6aa84f", "#e8a33d")))
    for column, category in enumerate(categories):
        for axes, name, style in zip(panels[:, column], ("image_auroc", "accuracy"), (".-", "-")):
            for (recipe, _), own in rows[rows.category == category].groupby(["recipe", "seed"], sort=False):
                own = own.dropna(subset=[name])
                axes.plot(own.seconds / 60, 100 * own[name], style, color=colors[recipe])
            seaborn.despine(ax=axes)
        panels[0, column].set(title=category)
        panels[1, column].set(xlabel="minutes of training", xlim=(0, None))
    panels[0, 0].set(ylabel="image AUROC, percent")
    panels[1, 0].set(ylabel="pretext accuracy, percent")
    handles = [Line2D([], [], color=color, label=recipe) for recipe, color in colors.items()]
    panels[0, -1].legend(handles=handles, title="recipe", loc="lower right", frameon=True)
    return figure


if __name__ == "__main__":
    run_script(main, get_parser())
