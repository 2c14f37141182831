"""The conventional way to train, which speed.py compares with: torchvision's transforms and Pillow on one image after
the other, in a DataLoader with a worker per core."""

import os
import random
import time
from collections.abc import Callable, Iterator

import record  # noqa: F401  makes the project's modules importable
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from cutpaste import SCAR_IMAGE_SIZE, VARIANTS, VIEWS
from image_ops import paste_

BOXES = 1024  # drawn beforehand for each view: to draw them one by one in torch would slow the workers by 3 %


class ConventionalViews(Dataset):
    """Views (V, 3, H, W) in [0, 1] of one image at a time, of the kinds and in the boxes of cutpaste.VIEWS.

    Raises ValueError for a view that does anything else than paste a box.
    """

    def __init__(self, images: list[Image.Image], variant: str) -> None:
        from torchvision.transforms import ColorJitter, RandomAffine, ToTensor

        self.images, self.boxes = images, []
        self.jitter, self.shift = ColorJitter(0.1, 0.1, 0.1, 0.1), RandomAffine(0, (0.04, 0.04))
        self.to_tensor = ToTensor()
        (width, height), generator = images[0].size, torch.Generator().manual_seed(0)
        for name in VARIANTS[variant].views[1:]:
            scale = min(height, width) / SCAR_IMAGE_SIZE
            pasted = name in VIEWS and VIEWS[name].act is paste_
            drawn = VIEWS[name].draw(BOXES, height, width, scale, generator) if pasted else {}
            if not pasted or "soft" in drawn:
                raise ValueError(f"view {name!r}: the conventional way is written for views that paste a hard box")
            columns = zip(*(values.tolist() for values in drawn.values()))
            self.boxes.append([dict(zip(drawn, values)) for values in columns])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        base = self.jitter(self.shift(self.images[index]))
        further = [self.paste(base, random.choice(boxes)) for boxes in self.boxes]
        return torch.stack([self.to_tensor(view) for view in (base, *further)])

    def paste(self, base: Image.Image, box: dict[str, float]) -> Image.Image:
        """A copy of the image with its source box, colors jittered, in its target box, as cutpaste.PasteParams."""
        left, top, width, height = (int(box[name]) for name in ("source_x", "source_y", "width", "height"))
        patch, mask = self.jitter(base.crop((left, top, left + width, top + height))), None
        if box["angle"]:
            turned = patch.convert("RGBA").rotate(-box["angle"], expand=True)  # Pillow turns counterclockwise
            mask, patch = turned.getchannel("A"), turned.convert("RGB")
        place = round(box["center_x"] - patch.width / 2), round(box["center_y"] - patch.height / 2)
        result = base.copy()
        result.paste(patch, place, mask)
        return result


def conventional_batches(images: Tensor, variant: str, batch_size: int, pin_memory: bool) -> Iterator[Tensor]:
    """Batches of views (V*B, 3, H, W) of images (N, 3, H, W) uint8, view after view, endlessly."""
    views = ConventionalViews([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], variant)
    loader = DataLoader(
        views,
        batch_size,
        sampler=RandomSampler(views, replacement=True, num_samples=10**9),
        num_workers=os.cpu_count(),
        collate_fn=lambda items: torch.stack(items, 1).flatten(0, 1),
        pin_memory=pin_memory,
    )
    return iter(loader)


def steady(batches: Iterator[Tensor], use: Callable[[Tensor], object], repeats: int) -> float:
    """Seconds per batch once what the workers have made ahead is used up; over whole rounds of them, for they finish
    together."""
    for _ in range(2 * os.cpu_count() + 1):
        use(next(batches))
    began = time.perf_counter()
    count = os.cpu_count() * max(4, repeats // os.cpu_count())
    for _ in range(count):
        use(next(batches))
    return (time.perf_counter() - began) / count
