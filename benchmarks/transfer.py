"""The tables of results/transfer.csv and results/members.csv: pretrained networks, as they are and fine-tuned."""

from collections.abc import Sequence

import pandas
from cells import markdown, newest, percent, spread
from pandas import DataFrame
from record import ROOT

from config import RECIPES

CATEGORIES = ("bottle", "screw", "grid", "ball_screw")  # that stages and rates were chosen on
OTHERS = ("solar_mono", "solar_poly", "brick", "grass", "gravel")
TOLD = ["backbone", "weights", "model", "width", "trained", "taken"]


def transfer_rows() -> DataFrame:
    """results/transfer.csv, the newest row of each setting and seed."""
    rows = pandas.read_csv(ROOT / "results/transfer.csv")
    rows["model"] = rows.patch_size.map(lambda side: "image" if pandas.isna(side) else f"crops of {side:.0f} px")
    rows["weights"] = rows.pretrained.map({True: "ImageNet", False: "none"})
    rows["trained"] = rows.apply(trained, axis=1)
    rows["taken"] = rows.features.where(rows.level.isna(), "level " + rows.level.astype(str))
    return newest("results/transfer.csv", rows, [*TOLD, "category"], ["seed"])


def trained(row: pandas.Series) -> str:
    """How a network was trained, in words."""
    if row.epochs == 0:
        return "as it is"
    rates = f"{row.optim} {row.lr:g}" + ("" if pandas.isna(row.lr_unfrozen) else f", then {row.lr_unfrozen:g}")
    norm = "frozen" if row.freeze_bn else "trained"
    views = ", visible views alone" if row.get("invisible") == "drop" else ""
    return f"{row.epochs} steps of {row.batch_size}, {rates}, BatchNorm {norm}{views}"


def transfer_table(column: str, categories: Sequence[str] = CATEGORIES) -> str:
    """A figure of each category, percent: mean and deviation over seeds."""
    rows = transfer_rows()
    rows = rows[rows[column].notna() & rows.category.isin(categories)]
    cells = []
    for key, own in rows.groupby(TOLD, sort=False, dropna=False):
        by_category = dict(list(own.groupby("category")))
        found = [spread(by_category[name][column]) if name in by_category else "" for name in categories]
        cells.append([*key, own.seed.nunique(), *found])
    head = ["backbone", "weights", "model", "size", "training", "features", "seeds"]
    return markdown([*head, *categories], cells)


def tuned_figures() -> dict[str, str]:
    """Image AUROC by category of the fine-tuned patch models that README.md shows: mobilenet_v2, as the flags have it
    that are not given."""
    rows, own = transfer_rows(), RECIPES["finetune"]
    rows = rows[(rows.backbone == "mobilenet_v2") & (rows.patch_size == 64) & (rows.taken == "level 2,3")]
    rows = rows[
        (rows.recipe == "finetune")
        & (rows.invisible == "keep")
        & (rows.epochs == own["epochs"])
        & (rows.batch_size == own["batch_size"])
    ]
    return {category: spread(found.image_auroc) for category, found in rows.groupby("category")}


def members_table() -> str:
    """Detectors of several networks against the mean of these."""
    told = ["category", "backbone", "width", "epochs", "batch_size", "folds", "seed"]
    rows = newest("results/members.csv", pandas.read_csv(ROOT / "results/members.csv"), told)
    cells = []
    for row in rows.itertuples():
        alone = ", ".join(percent(float(value)) for value in row.members.split())
        start = "ImageNet" if row.pretrained else "none"
        setting = [row.category, row.backbone, start, row.width, f"{row.epochs} of {row.batch_size}", row.folds]
        cells.append([*setting, percent(row.ensemble), percent(row.members_mean), alone])
    head = ["category", "backbone", "weights", "size", "steps", "networks", "together", "their mean", "each alone"]
    return markdown(head, cells)
