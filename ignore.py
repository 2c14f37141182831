"""Regions of an image that do not count, such as a clamp or a date stamp: their masks, and what takes their place.

Owns what a mask may be, and how what it ignores is filled: each such pixel with the nearest one that counts. So nothing
that lies there is ever seen, and nothing has to be learned for it. Knows no flag but in its messages.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset import decode_mask, read_size
from runtime.files import InputError

ALL_COUNT = torch.empty(0, dtype=torch.int32)  # the sources of images without such a region


def mask_path(where: str, category: str) -> Path | None:
    """The mask of a category: the file ``where``, or <category>.png if that is a folder; None if it is not in there."""
    path = Path(where)
    if not path.is_dir():
        return path
    return own if (own := path / f"{category}.png").exists() else None


def load_mask(path: Path, size: tuple[int, int], file_size: tuple[int, int] | None) -> Tensor:
    """The pixels that do not count in images resized to ``size`` (H, W), as (H, W) bool: those of which any part is not
    black in the mask.

    file_size: (H, W) of the image files, None if unknown. The mask has it, or ``size``. Raises InputError if not, if
    the file is no image, or if it ignores every pixel or none.
    """
    mask = decode_mask(path)
    if file_size is not None and mask.shape not in (size, file_size):
        here, files, own = (f"{width}x{height}" for height, width in (mask.shape, file_size, size))
        raise InputError(f"{path}: mask of {here} pixels for images of {files}; give it their size, or {own}")
    # By the filter that the images are resized with, which reaches beyond the pixel: what it mixes in is a part too
    parts = Image.fromarray(mask.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    ignored = torch.from_numpy(np.array(parts) > 0)
    if ignored.all() or not ignored.any():
        which = f"{'every' if ignored.any() else 'no'} pixel is ignored at {size[1]}x{size[0]}"
        raise InputError(f"{path}: {which}; leave black what counts, and paint the rest white")
    return ignored


def load_sources(where: str | None, category: str, size: tuple[int, int], example: Path) -> Tensor:
    """``sources_of`` the mask of a category, see ``mask_path``; ALL_COUNT without one. example: one of its images."""
    path = mask_path(where, category) if where else None
    return ALL_COUNT if path is None else sources_of(load_mask(path, size, read_size(example)))


def sources_of(ignored: Tensor) -> Tensor:
    """For each pixel of a mask (H, W) bool the number, row by row, of the nearest one that counts, which may be itself:
    (H, W) int32."""
    from scipy.ndimage import distance_transform_edt

    down, across = distance_transform_edt(ignored.numpy(), return_distances=False, return_indices=True)
    return torch.from_numpy(down * ignored.shape[1] + across).int()


def ignored_by(sources: Tensor) -> Tensor:
    """The mask (H, W) bool that ``sources_of`` was given; empty of ALL_COUNT."""
    return sources != torch.arange(sources.numel(), device=sources.device).view(sources.shape)


def filled(images: Tensor, sources: Tensor) -> Tensor:
    """Images (B, C, H, W), each ignored pixel replaced by its source in the same image; themselves of ALL_COUNT."""
    if not sources.numel():
        return images
    return images.flatten(2).index_select(2, sources.flatten()).unflatten(2, tuple(sources.shape))
