"""Check the tensors of a file before anything is done with them: rules by name, and their check.

A checksum tells damage; it does not tell a file that was made by something else, or by hand.
"""

import math
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-300  # the least of what is divided by
FLOATS = (torch.float32, torch.float64)


class TensorRule(NamedTuple):
    """A rule for a tensor. shape: its sizes, numbers or names; a size is the same wherever its name stands. dtypes:
    any of them. least, most: of its values, all of them finite."""

    shape: tuple[int | str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    least: float = -math.inf
    most: float = math.inf


def check_tensors(
    tensors: Mapping[str, object], rules: Mapping[str, TensorRule], sizes: MutableMapping[str, int]
) -> None:
    """Raise ValueError, naming the first one, for tensors that are missing, that have no rule, or that are not as their
    rules say. sizes: those that are known, by name; what the tensors tell of others is added."""
    for word, names in (("lacks", rules.keys() - tensors.keys()), ("has the unknown", tensors.keys() - rules.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"it {word} {min(map(str, names))}{more}")
    for name, rule in rules.items():
        check_tensor(name, tensors[name], rule, sizes)


def check_tensor(name: str, value: object, rule: TensorRule, sizes: MutableMapping[str, int]) -> None:
    """Raise ValueError, naming it, if a tensor is not as its rule says. sizes: see ``check_tensors``."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{name} is no dense tensor")
    if value.dtype not in rule.dtypes:
        raise ValueError(f"{name} is {value.dtype}, not {' or '.join(map(str, rule.dtypes))}")
    known = {} if value.ndim != len(rule.shape) else dict(zip(rule.shape, value.shape))
    expected = tuple(size if isinstance(size, int) else sizes.get(size, known.get(size, size)) for size in rule.shape)
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, not ({', '.join(map(str, expected))})")
    sizes.update((size, known[size]) for size in rule.shape if isinstance(size, str))
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{name} claims {value.numel()} values and holds fewer")
    if value.numel():
        low, high = (end.item() for end in torch.aminmax(value))
        if not (math.isfinite(low) and math.isfinite(high) and rule.least <= low and high <= rule.most):
            raise ValueError(f"{name} has values from {low:g} to {high:g}, not from {rule.least:g} to {rule.most:g}")


def rules_of(state: Mapping[str, Tensor]) -> dict[str, TensorRule]:
    """Return rules for a module's state: shapes and dtypes as they are; no variance is negative."""
    return {
        name: TensorRule(tuple(value.shape), (value.dtype,), 0 if name.endswith("running_var") else -math.inf)
        for name, value in state.items()
    }


def standardization(alone: bool, shape: tuple[int | str, ...] = ()) -> dict[str, TensorRule]:
    """Return the rules of a center and a scale of a shape: 0 and 1 of what stands alone."""
    if alone:
        return {"center": TensorRule(shape, least=0, most=0), "scale": TensorRule(shape, least=1, most=1)}
    return {"center": TensorRule(shape), "scale": TensorRule(shape, least=TINY)}
