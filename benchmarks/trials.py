"""The tables of results/trials.csv: what was tried on the way to the fast recipe, and around it."""

import pandas
from cells import markdown, percent
from pandas import DataFrame
from record import ROOT

CATEGORIES = ("screw", "ball_screw", "bottle", "brick", "grass", "gravel")
SIDE = 256  # pixels of the images, where a table says no other
WAYS = {  # columns of results/trials.csv
    **{f"image_stage{level}": f"stage {level}, maximum of the map" for level in (1, 2, 3, 4)},
    "image_sum12": "stages 1 and 2 added, maximum",
    "image_sum12_top1": "stages 1 and 2 added, mean of the largest 1 %",
    "image_sum12_mean": "stages 1 and 2 added, mean of the map",
    "image_sum123": "stages 1 to 3 added, maximum",
    "image_sum1234": "all stages added, maximum",
    "image_shared2": "stage 2, one Gaussian for all locations, mean of the largest 1 %",
    "image_nearest2": "stage 2, distance to the nearest of 20,000 normal windows, maximum",
    "image_pooled3": "stage 3, one Gaussian of the image's mean",
    "image_pooled4": "stage 4, one Gaussian of the image's mean",
    "image_pooled4_deviation": "stage 4, of its mean and deviation",
    "image_head": "the classifier's log odds, maximum over windows of 64 px",
}


def trial_rows(later: bool) -> DataFrame:
    """Trials of rounds 1 and 2, by which the recipe was first chosen, or of the later ones, around it."""
    rows = pandas.read_csv(ROOT / "results/trials.csv")
    return rows[(rows["round"] > 2) == later]


def trials_table() -> str:
    """What was tried on the way to the recipe: image and pixel AUROC of the sum of stages 1 and 2, mean over seeds."""
    rows = trial_rows(later=False)
    categories = [name for name in CATEGORIES if name in set(rows.category)]
    head = ["trial", "what it is", *(f"{name} {kind}" for name in categories for kind in ("image", "pixel"))]
    cells = []
    for trial, own in rows.groupby("trial", sort=False):
        of = {name: own[own.category == name] for name in categories}
        found = [percent(part[name].mean()) for part in of.values() for name in ("image_sum12", "pixel_sum12")]
        seeds = own.groupby("category").seed.nunique()
        several = ", ".join(f"{name} {count} seeds" for name, count in seeds.items() if count > 1)
        cells.append([trial, own.what.iloc[0] + (f" ({several})" if several else ""), *found])
    return markdown(head, cells)


def around_table() -> str:
    """What was tried around the recipe: image and pixel AUROC of stage 1, mean over seeds; with the Gaussian that
    --location auto chose, and in the last rows with one for each location whatever it chose."""
    rows = trial_rows(later=True)
    rows = rows.assign(place=rows.category + rows.side.map(lambda side: "" if side == SIDE else f", {side} px"))
    places = list(rows.sort_values("side", ascending=False, kind="stable").place.unique())
    trials = [(trial, own, "auto1") for trial, own in rows.groupby("trial", sort=False)]
    trials += [(f"{trial}, each", rows[rows.trial == trial], "stage1") for trial in ("half soft", "untrained")]
    cells = []
    for trial, own, way in trials:
        mean = own.groupby("place")[[f"image_{way}", f"pixel_{way}"]].mean()
        seeds = own.groupby("place").seed.nunique()
        counts = " to ".join(map(str, sorted({seeds.min(), seeds.max()})))
        found = [" / ".join(map(percent, mean.loc[place])) if place in mean.index else "" for place in places]
        cells.append([trial, own.what.iloc[0], counts, *found])
    return markdown(["trial", "what it is", "seeds", *places], cells)


def ways_table() -> str:
    """Image AUROC of the ways to look at one network: untrained, by the paper's recipe, and with Adam and patches from
    other images with soft edges."""
    rows = trial_rows(later=False)
    trials = ["untrained", "paper", "adam other soft"]
    categories = ["screw", "ball_screw", "bottle"]
    cells = []
    for column, words in WAYS.items():
        found = [
            percent(rows[(rows.trial == trial) & (rows.category == name)][column].mean())
            for name in categories
            for trial in trials
        ]
        cells.append([words, *found])
    return markdown(["way", *(f"{name}: {trial}" for name in categories for trial in trials)], cells)
