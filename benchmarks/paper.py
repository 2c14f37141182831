"""The tables of results/paper.csv, which benchmarks/reproduce.sh fills, next to results/published.csv: the figures of
the paper (Tables 1 to 3) and of an earlier public re-implementation in PyTorch, fractions too."""

import statistics

import pandas
from cells import markdown, newest, percent
from pandas import DataFrame, Series
from record import ROOT, read

NEEDED = ["category", "seed", "image_auroc", "control_auroc", "pixel_auroc", "control_pixel_auroc", "aupro"]
NEEDED += ["device", "torch", "train_seconds", "train_command", "eval_command", "eval_date"]
OTHER = "re-implementation"
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


# Figures ----------------------------------------------------------------------------------------------------------


def published(variant: str, measure: str = "image_auroc", source: str = "paper") -> dict[str, float]:
    """Fractions by category, in the paper's order; of some variants the average is all that is known."""
    rows = pandas.read_csv(ROOT / "results/published.csv")
    rows = rows[(rows.source == source) & (rows.variant == variant)]
    return dict(zip(rows.category, rows[measure]))


def paper_rows() -> DataFrame:
    """results/paper.csv, the newest row of each run, category and seed; no row if there is no file yet."""
    path = ROOT / "results/paper.csv"
    rows = pandas.read_csv(path) if read(path) else DataFrame()
    rows = rows.reindex(columns=[*dict.fromkeys([*rows.columns, *NEEDED])])
    rows["run"] = rows.eval_command.astype(str).str.extract(r"--model_dir reproduce/(.*?) --cuda ", expand=False)
    return newest("results/paper.csv", rows[rows.run.notna()], ["run", "category"], ["seed"])


def with_error(values: Series) -> str:
    """Mean and, of more than one, standard error of fractions, in percent; behind them how many there are."""
    values = values.dropna()
    error = f" ± {percent(values.sem())}" if len(values) > 1 else ""
    return f"{percent(values.mean())}{error} ({len(values)})" if len(values) else ""


def averages(rows: DataFrame, measure: str) -> Series:
    """The mean over the categories of each seed that has all of them."""
    table = rows.pivot(index="seed", columns="category", values=measure).reindex(columns=list(published("3way")))
    return table.astype(float).mean(axis=1, skipna=False)


# Tables -----------------------------------------------------------------------------------------------------------


def paper_table() -> str:
    """Image AUROC by category."""
    beside = {"paper, 3-way": published("3way"), "re-impl., 3-way": published("3way", source=OTHER)}
    runs = {"10,000 steps": "10000_3way", "65,536 steps": "65536_3way", "ensemble": "ensemble"}
    runs |= {"finetuned B4": "finetune_b4", "frozen B4": "frozen_b4"}
    return by_category(beside, {title: (run, "image_auroc") for title, run in runs.items()})


def paper_pixel_table() -> str:
    """Pixel AUROC of patch models by category."""
    shown = {"pixel AUROC": "pixel_auroc", "untrained": "control_pixel_auroc", "AUPRO": "aupro"}
    shown |= {"image AUROC": "image_auroc"}
    beside = {"paper, pixel AUROC": published("3way patches", "pixel_auroc")}
    return by_category(beside, {title: ("patches", measure) for title, measure in shown.items()})


def by_category(beside: dict[str, dict[str, float]], ours: dict[str, tuple[str, str]]) -> str:
    """Published figures and, of each run and measure, our own: a row for each category and their average."""
    rows, cells = paper_rows(), []
    columns = [(rows[rows.run == run], measure) for run, measure in ours.values()]
    for category in published("3way"):
        found = [with_error(own[own.category == category][measure]) for own, measure in columns]
        cells.append([category, *(percent(values[category]) for values in beside.values()), *found])
    found = [with_error(averages(*column)) for column in columns]
    cells.append(["average", *(percent(statistics.mean(values.values())) for values in beside.values()), *found])
    return markdown(["category", *beside, *ours], cells)


def paper_runs_table() -> str:
    """Average image AUROC of all that is measured."""
    rows, cells = paper_rows(), []
    for run, (what, *variants) in RUNS.items():
        own = rows[rows.run == run]
        known = [published(variant, source=source) for variant, source in zip(variants, ("paper", OTHER))]
        known = [percent(statistics.mean(values.values())) if values else "" for values in known]
        cells.append([what, *known, *(with_error(averages(own, name)) for name in ("image_auroc", "control_auroc"))])
    return markdown(["average over the 15 categories", "paper", "re-impl.", "here", "untrained"], cells)


def paper_made() -> str:
    """The line below the tables: on what, with what and when their rows were made."""
    rows = paper_rows()
    if rows.empty:
        return "Nothing has been measured yet."
    trained = rows.drop_duplicates(["category", "seed", "train_command"])
    devices, versions = (", ".join(sorted(set(rows[name].dropna().astype(str)))) for name in ("device", "torch"))
    hours = f"{trained.train_seconds.sum() / 3600:,.1f} hours of training"
    dates = sorted(set(rows.eval_date.dropna().astype(str).str[:10]))
    when = f"; evaluated {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}" if dates else ""
    return f"Hardware: {devices}; torch {versions}; {hours}{when}."
