"""Grad-CAM of the anomaly score: which part of an image an image-level detector's score comes from.

Source: Selvaraju et al., "Grad-CAM", ICCV 2017, of the score instead of a class (CutPaste, section 4.2: of the anomaly
decision). Needs no network: whoever calls it gives the features of the last stage, and the way from them to the score.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


@torch.inference_mode(False)
@torch.enable_grad()
def grad_cam(features: Tensor, score: Callable[[Tensor], Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scores (B,) of images and their maps (B, H, W) float32 of ``size`` (H, W), from the features (B, C, h, w) that
    the last stage makes of them.

    score: features (B, C, h, w) -> (B,), each from its own image alone, differentiable; higher is more anomalous.
    A map is at least 0: the channels weighted by the mean of the score's gradient, summed, what is negative set to 0
    (it speaks for a normal image), bilinearly enlarged. Its unit is the score's, per feature. Works wherever gradients
    are off, and leaves none on any parameter.
    """
    features = features.detach().clone().requires_grad_()  # the graph begins here; a clone is no inference tensor
    scores = score(features)
    (gradient,) = torch.autograd.grad(scores.sum(), features)  # a score has a gradient in its own image alone
    gradient = gradient.nan_to_num(0, 0, 0)  # a distance of 0 has none
    maps = (gradient.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True).relu()
    maps = functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    return scores.detach(), maps[:, 0].float()
