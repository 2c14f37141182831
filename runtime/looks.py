"""How photographs look, in three numbers: so that a program can tell when they have changed.

Takes tensors and arrays alike, and imports torch for the former only.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # luma weights of torchvision's rgb_to_grayscale
STATISTICS = (  # columns of ``image_statistics``: the word for less of it, the word for more, what is measured
    ("darker", "brighter", "mean gray"),
    ("lower in contrast", "higher in contrast", "deviation of gray"),
    ("less sharp", "sharper", "strength of edges"),
)


def image_statistics(images: "Tensor | np.ndarray") -> "Tensor | np.ndarray":
    """Return how images (B, 3, H, W) uint8 look: (B, 3) float32, the columns of STATISTICS. Mean and standard deviation
    of gray, in 0 to 255; the root of the mean squared Laplacian over that deviation (of at least 1), which stays the
    same in a picture that is only darker or lower in contrast."""
    if isinstance(images, np.ndarray):
        library = np
    else:
        import torch as library
    planes = (library.asarray(images[:, channel], dtype=library.float32) for channel in range(3))
    gray = sum(weight * plane for weight, plane in zip(GRAY, planes))  # (B, H, W)
    mean = gray.mean((1, 2))
    deviation = library.sqrt(library.square(gray - mean[:, None, None]).mean((1, 2)))
    edges = gray[:, 1:-1, :-2] + gray[:, 1:-1, 2:]
    edges += gray[:, :-2, 1:-1]
    edges += gray[:, 2:, 1:-1]
    edges -= 4 * gray[:, 1:-1, 1:-1]
    return library.stack([mean, deviation, library.sqrt(library.square(edges).mean((1, 2))) / deviation.clip(min=1)], 1)
