"""Pictures that are in a set twice: pixel for pixel, or nearly so.

Images in, pairs of their numbers out. Knows nothing of files, detectors or categories.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from runtime.cache import ImageArray, iterate

CELLS, CELL = 32, 8  # a thumbnail: so many cells a side, each the mean of so many points a side
REACH = 2  # points that one of two pictures is moved at most: a 130th of the side
BLUR = 5  # cells; slower changes, such as of the light, count for nothing
NEIGHBOR = 4  # whose distance is typical of pictures that are no copies, though most of them are there twice
NEAR = 0.1  # of that distance, up to which two pictures are taken for one
MOST = 0.005  # and never more: what repeats, such as a mesh, is often alike by chance
AT_ONCE = 32


class Pair(NamedTuple):
    """Numbers of two images; kind: exact (the same pixels) or near; similarity: at most 1, of the same."""

    kind: str
    first: int
    second: int
    similarity: float


def find_duplicates(images: ImageArray, others: ImageArray | None = None) -> tuple[list[Pair], list[Pair]]:
    """Pairs within images (N, 3, H, W) uint8, N >= 2, and between them and others (M, 3, H, W), the most similar first.

    Two pictures are near if 1 - similarity is at most NEAR of what is typical of the images: the median of the distance
    to the NEIGHBOR-th nearest. So photographs of fixed parts, all of them alike, are not taken for copies.
    """
    known = torch.cat([thumbnails(block, [REACH])[:, 0] for block in iterate(images, AT_ONCE)])
    within = similarities(images, known)
    neighbor = min(NEIGHBOR, len(images) - 1)
    typical = (1 - within.fill_diagonal_(-1)).kthvalue(neighbor, 1).values.median()
    least = 1 - min(MOST, NEAR * typical.item())
    inside = pairs(digests(images), digests(images), within, least, lambda i, j: i < j)
    if others is None:
        return inside, []
    return inside, pairs(digests(images), digests(others), similarities(others, known).T, least)


def pairs(
    own: list[bytes],
    others: list[bytes],
    similar: Tensor,
    least: float,
    wanted: Callable[[int, int], bool] = lambda i, j: True,
) -> list[Pair]:
    """Wanted pairs of the same digest, and those of other digests with a similarity (N, M) of at least ``least``."""
    places = defaultdict(list)
    for j, digest in enumerate(others):
        places[digest].append(j)
    exact = [(i, j) for i, digest in enumerate(own) for j in places[digest] if wanted(i, j)]
    near = {(i, j): similar[i, j].item() for i, j in (similar >= least).nonzero().tolist()}
    near = {(i, j): value for (i, j), value in near.items() if wanted(i, j) and own[i] != others[j]}
    found = [Pair("exact", i, j, 1.0) for i, j in exact]
    return found + sorted((Pair("near", *pair, value) for pair, value in near.items()), key=lambda p: -p.similarity)


def digests(images: ImageArray) -> list[bytes]:
    """Of the pixels of each image."""
    return [hashlib.blake2b(image.numpy().tobytes()).digest() for block in iterate(images) for image in block]


def similarities(images: ImageArray, known: Tensor) -> Tensor:
    """Correlations (M, N) in [-1, 1] of images (M, 3, H, W), each moved as it fits best, with thumbnails (N, D)."""
    moves = range(2 * REACH + 1)
    blocks = (thumbnails(block, moves) @ known.T for block in iterate(images, AT_ONCE))
    return torch.cat([block.amax(1) for block in blocks])


def thumbnails(images: Tensor, moves: Sequence[int]) -> Tensor:
    """Thumbnails (B, S, D) float32 of zero mean and length 1 of images (B, 3, H, W), gray, without slow changes, cut
    out at every two of ``moves``, in points from the upper left; all 0 of an image without any change."""
    side = CELLS * CELL
    gray = functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), side + 2 * REACH)
    moved = torch.cat([gray[:, :, y : y + side, x : x + side] for y in moves for x in moves], 1)
    small = functional.avg_pool2d(moved, CELL)
    small = small - functional.avg_pool2d(small, BLUR, 1, BLUR // 2, count_include_pad=False)
    small = (small - small.mean((2, 3), keepdim=True)).flatten(2)
    return functional.normalize(small, dim=2, eps=1e-3)
