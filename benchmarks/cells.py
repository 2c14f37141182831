"""Cells of the tables: fractions as percent, seeds as mean and deviation, and the newest of rows that agree."""

from collections.abc import Iterable, Sequence

import pandas
import record  # noqa: F401  makes the project's modules importable
from pandas import DataFrame, Series

from config import Config, PatchConfig, settings_of
from runtime.files import InputError

# What a table that does not show it must not mix; of "location" it is location_chosen that counts
SETTINGS = [each.name for part in (Config, PatchConfig) for each in settings_of(part)]
SETTINGS = [name for name in SETTINGS if name not in ("category", "weights", "false_alarm_rate", "location")]


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def percent(value: float, digits: int = 1) -> str:
    """A fraction in percent; nothing where there is none."""
    return "" if pandas.isna(value) else f"{100 * value:.{digits}f}"


def spread(values: Series) -> str:
    """Mean and, of more than one, sample standard deviation of fractions, in percent."""
    return percent(values.mean()) + (f" ± {percent(values.std())}" if values.count() > 1 else "")


def yes_or_no(values: Series) -> Series:
    return values.map({True: "yes", False: "no"}).fillna("")


def newest(name: str, rows: DataFrame, told: list[str], repeated: Sequence[str] = ()) -> DataFrame:
    """Of rows that agree in the columns ``told``, which a table shows, and ``repeated``, over which it takes the mean,
    the last one, in the place of the first: the same was measured again. Raises InputError, with the file's name, if
    rows that agree in ``told`` differ in another setting: the table would mix them. A row without a value fits any."""
    untold = [column for column in SETTINGS if column in rows and column not in (*told, *repeated)]
    differ = rows.groupby(told, sort=False, dropna=False)[untold].nunique() > 1
    for key, found in differ[differ.any(axis=1)].iterrows():
        values = (key,) if len(told) == 1 else key
        shown = ", ".join(f"{column} {value}" for column, value in zip(told, values))
        raise InputError(f"{name}: rows that differ in {found.idxmax()}, which a table does not show: {shown}")
    place = rows.groupby([*told, *repeated], sort=False, dropna=False).ngroup()
    return rows.assign(place=place).drop_duplicates("place", keep="last").sort_values("place")
