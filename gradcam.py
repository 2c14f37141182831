"""Grad-CAM of the anomaly score: which part of an image an image-level detector's score comes from.

Owns the hook on the last convolutional stage and what it needs of the network for as long as it is in use; leaves the
network as it found it. Source: Selvaraju et al., "Grad-CAM", ICCV 2017, of the score instead of a class (CutPaste,
section 4.2: of the anomaly decision).
"""

from types import TracebackType

import torch
from torch import Tensor
from torch.nn import functional

from cutpaste import to_float
from model import CutPasteNet


class GradCAM:
    """``with GradCAM(network) as cam: scores, maps = cam(images, score)``.

    Within the block the network is in evaluation mode and no parameter of it asks for a gradient; at its end, also
    after an exception, hook, modes, flags and gradients are as they were.
    """

    def __init__(self, network: CutPasteNet) -> None:
        self.network = network
        self.features: Tensor | None = None

    def __enter__(self) -> "GradCAM":
        self.modes = {module: module.training for module in self.network.modules()}
        self.flags = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        self.hook = self.network.last_stage.register_forward_hook(self.keep)
        self.network.requires_grad_(False)
        self.network.eval()
        return self

    def keep(self, _module, _inputs, output: Tensor) -> Tensor:
        """Begin the graph here: nothing before the last stage is differentiated."""
        self.features = output.detach().requires_grad_()
        return self.features

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hook.remove()
        self.features = None
        for module, training in self.modes.items():
            module.training = training
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self, images: Tensor, score) -> tuple[Tensor, Tensor]:
        """Scores (M,) of images (M, 3, H, W), uint8 or float in [0, 1], on the network's device, and their maps.

        score: embeddings (M, D) -> (M,), each from its own embedding alone, differentiable. Maps (M, H, W) float32, at
        least 0, bilinearly enlarged from the last stage: the channels weighted by the mean of the score's gradient,
        summed, what is negative set to 0 (it speaks for a normal image). Their unit is the score's, per feature.
        """
        scores = score(self.network.embed(to_float(images).contiguous(memory_format=torch.channels_last)))
        (gradient,) = torch.autograd.grad(scores.sum(), self.features)  # a score has a gradient in its own image alone
        gradient = gradient.nan_to_num()  # a distance of 0 has none
        maps = (gradient.mean((2, 3), keepdim=True) * self.features).sum(1, keepdim=True).relu()
        maps = functional.interpolate(maps.detach(), images.shape[2:], mode="bilinear", align_corners=False)
        return scores.detach(), maps[:, 0].float()
