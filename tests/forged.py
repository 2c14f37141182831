"""Files with a right checksum that cannot be: content that no run of this program writes.

Each forgery is a description and content, changed in one place. What could be the content of another file is none.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from normals import EMBEDDINGS, LIST

FREE = ("normal_scores", "appearance")  # how many values these have is told by nothing else
OTHER = ({}, "x", [1.0], None)  # in the place of a tensor


class Code:
    """Runs a command in the shell of whoever unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def places(content: dict, prefix: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each tensor in nested dicts and lists, but for BatchNorm's counts, which nothing reads."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, Tensor):
            if not str(key).endswith("num_batches_tracked"):
                yield (*prefix, key)
        elif isinstance(value, (dict, list)):
            yield from places(value, (*prefix, key))


def with_value(content: dict, place: tuple, change: Callable[[object], object]) -> dict:
    """Return content with one value changed, or removed if ``change`` raises KeyError; the rest is shared."""
    key, *rest = place
    copied = copy.copy(content)
    if rest:
        copied[key] = with_value(content[key], tuple(rest), change)
        return copied
    try:
        copied[key] = change(content[key] if key in content or isinstance(content, list) else None)
    except KeyError:
        del copied[key]
    return copied


def removed(value: object) -> object:
    raise KeyError


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensor.view(-1)[tensor.numel() // 2 :][:1] = value
        return tensor

    return change


def tensor_changes(tensor: Tensor, name: str) -> dict[str, Callable]:
    """Return what is done to a tensor, by its description."""
    changes = {f"is {other!r}": lambda _, other=other: other for other in OTHER} | {"is missing": removed}
    other = torch.int32 if tensor.dtype.is_floating_point else torch.float32
    changes |= {"has another dtype": lambda x: x.to(other), "has one more axis": lambda x: x[None]}
    if tensor.numel() and tensor.dtype.is_floating_point:
        changes |= {f"has {value}": filled(value) for value in (math.nan, math.inf, -math.inf)}
    if tensor.numel() and tensor.ndim:
        changes["is sparse"] = lambda x: x.to_sparse()
        changes["claims more than it holds"] = lambda x: x.reshape(-1)[:1].expand(10**6, *x.shape[1:])
        if name not in FREE:
            changes["is there twice"] = lambda x: torch.cat([x, x])
    if name.endswith("running_var"):
        changes["is negative"] = lambda x: -1 - x.abs()
    if name == "scale":
        changes |= {"is negative": torch.neg, "is zero": torch.zeros_like}
    return changes


def setting_changes(value: object) -> list[object]:
    """Return values that a setting cannot have."""
    if isinstance(value, bool):
        return [2, "yes", 1.5]
    if isinstance(value, (int, float)):
        return [math.nan, math.inf, -1, "x", [1], 1e30]
    return [7, {"a": 1}, b"x", ["x"], "\0"] if isinstance(value, str) else []


def forged_settings(config: dict, with_networks: bool) -> Iterator[tuple[str, dict]]:
    """Yield settings that cannot be, or that contradict the networks beside them."""
    for name, value in config.items():
        for other in setting_changes(value) if name not in ("ignore", "weights", "category") else ():
            yield f"{name} {other!r}", config | {name: other}
    if not with_networks:
        return
    yield "a million folds", config | {"folds": 10**6}
    yield "another depth", config | {"head_layer": config["head_layer"] + 1}
    yield "another network", config | {"backbone": "resnet50"}
    yield "another variant", config | {"variant": "cutpaste"}
    if config.get("patch_size"):
        yield "a Gaussian beyond the image", config | {"sigma": 1000.0}


def forged(content: dict) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yield forgeries of a detector's, its normal images' or a saved state's content: descriptions, and functions that
    make the content."""
    for name in content:
        for other in (-7, "x", None, [], {}):
            if (name, other) not in (("metadata", {}), ("config", {})):  # which can be
                yield f"{name} is {other!r}", partial(with_value, content, (name,), lambda _, other=other: other)
        yield f"{name} is missing", partial(with_value, content, (name,), removed)
    for place in places(content):
        value = content
        for key in place:
            value = value[key]
        for words, change in tensor_changes(value, str(place[-1])).items():
            yield f"{'.'.join(map(str, place))} {words}", partial(with_value, content, place, change)
    if "config" in content:
        for words, config in forged_settings(content["config"], "members" in content):
            yield words, partial(dict, content, config=config)


# Normal images ----------------------------------------------------------------------------------------------------


def of_version_2(parts: dict[str, bytes]) -> dict:
    """Return the tensors and values that a file of normal images of version 2 held, of the parts of version 3."""
    listed = json.loads(parts[LIST])
    jpegs = [parts[f"{number}.jpg"] for number in range(len(listed["names"]))]
    embeddings = torch.frombuffer(bytearray(parts[EMBEDDINGS]), dtype=torch.float16)
    return listed | {
        "version": 2,
        "lengths": [*map(len, jpegs)],
        "jpegs": torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8),
        "embeddings": embeddings.view(len(jpegs), -1),
    }


def forged_parts(parts: dict[str, bytes]) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yield forgeries of the parts of a file of normal images: descriptions, and functions that make the parts."""
    listed, values = json.loads(parts[LIST]), np.frombuffer(parts[EMBEDDINGS], "<f2")
    for words, make in forged(listed):
        yield words, lambda make=make: parts | {LIST: json.dumps(make()).encode()}
    for name, other in (("names", listed["names"][1:]), ("names", [*listed["names"], "x"]), ("numbers", [0.5])):
        yield f"other {name}", partial(dict, parts, **{LIST: json.dumps(listed | {name: other}).encode()})
    for text in (b"", b"[]", b"7", b"{", b"\xff", b"[" * 100_000):
        yield f"the list is {text[:9]}", partial(dict, parts, **{LIST: text})
    for value in (math.nan, math.inf, -math.inf, 2, 0):
        changed = values.copy()
        changed[: len(values) // len(listed["names"])] = value
        yield f"an embedding is {value}", partial(dict, parts, **{EMBEDDINGS: changed.tobytes()})
    for name, part in parts.items():
        for other in (b"", part[:-1] if name == EMBEDDINGS else part[:20], part + part if name == EMBEDDINGS else b"x"):
            yield f"{name} has {len(other)} bytes", partial(dict, parts, **{name: other})
        yield f"{name} is missing", partial(with_value, parts, (name,), removed)
    yield "one part more", partial(dict, parts, more=b"")
    yield "one JPEG more", partial(dict, parts, **{f"{len(listed['names'])}.jpg": parts["0.jpg"]})
