"""The network: input normalisation, backbone, projection head; freezing; initial weights.

Owns the table ``BACKBONES`` and everything between an image in [0, 1] and its embedding and logits. Knows nothing of
files but the pretrained weights it starts from, nothing of densities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cache import blocks
from cutpaste import to_float

HIDDEN = 512  # width of each of the --head_layer layers
PROJECTION = 128  # width of the layer before the output
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORMALIZATIONS = ("imagenet", "image")
LEVELS = (1, 2, 3, 4)  # stages of a backbone after its stem; the embedding is the last one's


class WeightsError(RuntimeError):
    """Initial weights that cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Backbone:
    """How a backbone is built. ``build()`` gives a module (B, 3, H, W) -> (B, embedding_dim)."""

    build: Callable[[], nn.Module]
    embedding_dim: int
    weights: str  # torchvision's name of the ImageNet weights
    last_stage: str  # the module whose output is pooled


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18  # imported late: torchvision takes seconds

    network = resnet18(weights=None)
    network.fc = nn.Identity()  # the embedding is the pooled feature (section 4)
    return network


BACKBONES = {"resnet18": Backbone(_resnet18, 512, "ResNet18_Weights.IMAGENET1K_V1", "layer4")}


class CutPasteNet(nn.Module):
    """Backbone and projection head: images (B, 3, H, W) in [0, 1] -> logits (B, C), embeddings (B, D).

    normalize: "imagenet", the fixed ImageNet statistics, or "image", each image to zero mean and unit deviation over
    all its pixels and channels. head_layer: n layers of 512, then one of 128, then the output (the paper leaves the
    depth open).
    """

    def __init__(self, backbone: str, head_layer: int, num_classes: int, normalize: str) -> None:
        super().__init__()
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"unknown normalization {normalize!r}: choose one of {', '.join(NORMALIZATIONS)}")
        self.normalize, self._last_stage = normalize, BACKBONES[backbone].last_stage
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.backbone = BACKBONES[backbone].build()
        self.frozen = False
        layers: list[nn.Module] = []
        width = BACKBONES[backbone].embedding_dim
        for out in [HIDDEN] * head_layer + [PROJECTION]:
            layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
            width = out
        self.head = nn.Sequential(*layers, nn.Linear(width, num_classes))

    @property
    def last_stage(self) -> nn.Module:
        """The last convolutional stage, whose output (B, D, h, w) is pooled to the embedding."""
        return self.backbone.get_submodule(self._last_stage)

    def forward(self, images: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """statistics: mean and deviation to normalise by, if not the images' own; see ``statistics``."""
        embeddings = self.backbone(self.normalized(images, statistics))
        if embeddings.dtype in (torch.bfloat16, torch.float16):
            embeddings = embeddings.float()
        with torch.autocast(images.device.type, enabled=False):  # small, and its logits deserve more than 8 bits
            return self.head(embeddings), embeddings

    def embed(self, images: Tensor) -> Tensor:
        """The pooled features (B, D) that the density is fitted on; the head is not run."""
        return self.backbone(self.normalized(images))

    def normalized(self, images: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Images in [0, 1] as the backbone wants them. A flat image becomes zeros under "image"."""
        mean, std = self.statistics(images) if statistics is None else statistics
        return (images - mean) / std

    def statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation that images (B, 3, H, W) are normalised by: (3, 1, 1), or under "image" (B, 1, 1, 1)."""
        if self.normalize == "imagenet":
            return self.mean, self.std
        std, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True, correction=0)
        return mean, std.clamp(min=1e-3)  # a quarter of a grey level: less is noise

    def freeze_backbone(self, frozen: bool) -> None:
        """Stop (or let go on) every change of the backbone: gradients, and BatchNorm's running statistics too."""
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "CutPasteNet":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()  # else the statistics drift although no gradient flows
        return self


def load_backbone_weights(network: CutPasteNet, backbone: str, weights: str | Path | None) -> None:
    """Set the backbone to ImageNet weights: a file in torchvision's format, or (None) torchvision's own download.

    Raises WeightsError if the file does not fit or the weights cannot be downloaded.
    """
    if weights is None:
        from torchvision.models import get_weight

        try:
            state = get_weight(BACKBONES[backbone].weights).get_state_dict(progress=False)
        except Exception as error:  # every way a download fails: no route, proxy, certificate, full disk
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsError(
                f"the pretrained weights of {backbone} could not be downloaded ({reason}); "
                "give a file with --weights FILE or train from scratch with --no-pretrained"
            ) from error
        source = BACKBONES[backbone].weights
    else:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise WeightsError(f"{weights}: no such file (--weights, now or when it was trained)") from error
        except Exception as error:  # torch.load has no error of its own for a bad file
            raise WeightsError(f"{weights}: not a file of weights that torch can read (--weights)") from error
        source = str(weights)
    own = network.backbone.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("fc.")} if _is_state(state) else {}
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if wrong or len(state) != len(own):
        wrong += [name for name in state if name not in own]
        example = wrong[0] if wrong else "nothing in it"
        raise WeightsError(
            f"{source}: not the weights of torchvision's {backbone} (for example {example} does not fit)"
        )
    network.backbone.load_state_dict(state)


def _is_state(state: object) -> bool:
    return isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


@torch.inference_mode()
def embed(network: CutPasteNet, images: Tensor, device: torch.device, batch_size: int = 64) -> Tensor:
    """Embeddings (N, D) float32 on ``device`` of images (N, 3, H, W), uint8 or float in [0, 1], in float32 precision.

    The network runs in evaluation mode, so that no embedding depends on its batch, and is left in the mode it was in.
    """
    training = network.training
    network.eval()
    try:
        parts = [network.embed(_channels_last(to_float(b.to(device)))) for b in blocks(images, batch_size)]
    finally:
        network.train(training)
    return torch.cat(parts).float()


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


# Features of a stage ----------------------------------------------------------------------------------------------


def stage_stride(level: int) -> int:
    """Pixels between two features of stage ``level``."""
    return 2 ** (level + 1)


def stage_features(backbone: nn.Module, images: Tensor, level: int) -> Tensor:
    """What stage ``level`` (one of LEVELS) of a ResNet gives for images as ``normalized`` gives them: (B, 3, H, W) ->
    (B, C, h, w), a feature every ``stage_stride(level)`` pixels. The mean over the last stage's is the embedding."""
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
    for number in range(1, level + 1):
        x = backbone.get_submodule(f"layer{number}")(x)
    return x
