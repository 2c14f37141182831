import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms import Normalize

from model import BACKBONES, NORMALIZATIONS, CutPasteNet, WeightsError, embed, load_backbone_weights

CPU = torch.device("cpu")
IMAGES = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(head_layer=1, num_classes=3, normalize="imagenet", seed=0):
    torch.manual_seed(seed)
    return CutPasteNet("resnet18", head_layer, num_classes, normalize)


def with_statistics(network):
    """BatchNorm statistics other than those it starts with, as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean += 0.1 * torch.randn(module.num_features, generator=generator)
            module.running_var *= 0.5 + torch.rand(module.num_features, generator=generator)
    return network


@pytest.fixture(scope="module")
def trained():
    """Only to be looked at; a test that changes the network copies it or makes its own."""
    return with_statistics(make()).eval()


@pytest.fixture(scope="module")
def torchvision_state():
    torch.manual_seed(7)
    return with_statistics(torchvision.models.resnet18()).state_dict()


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    """Equal but for the rounding of float32, a hundred-thousandth of the largest value."""
    return first.shape == second.shape and (first - second).abs().max() < 1e-5 * second.abs().max()


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def train_one_step(network):
    """All parameters are given to the optimiser, with weight decay, as a careless caller would."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    logits, _ = network(IMAGES)
    nn.functional.cross_entropy(logits, torch.arange(len(IMAGES)) % 2).backward()
    optimizer.step()


# Shape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize(
    ("head_layer", "widths"), [(0, [(512, 128)]), (1, [(512, 512), (512, 128)]), (2, [(512, 512)] * 2 + [(512, 128)])]
)
def test_widths_of_the_head(head_layer, widths, num_classes):
    network = make(head_layer, num_classes)
    linear = [(m.in_features, m.out_features) for m in network.head if isinstance(m, nn.Linear)]
    assert linear == [*widths, (128, num_classes)]
    kinds = [type(m) for m in network.head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * len(widths) + [nn.Linear]
    logits, embeddings = network(IMAGES)
    assert logits.shape == (7, num_classes)
    assert embeddings.shape == (7, 512)


def test_embedding_dim_of_the_table_is_the_backbones():
    for backbone in BACKBONES.values():
        assert backbone.build().eval()(IMAGES[:2]).shape == (2, backbone.embedding_dim)


def test_embedding_is_the_pooled_feature(trained):
    b = trained.backbone
    with torch.no_grad():
        x = b.maxpool(b.relu(b.bn1(b.conv1(trained.normalized(IMAGES)))))
        x = b.layer4(b.layer3(b.layer2(b.layer1(x)))).mean((2, 3))
        logits, embeddings = trained(IMAGES)
        assert same(embeddings, x)
        assert same(logits, trained.head(x))
    assert torch.equal(embeddings, trained.embed(IMAGES))
    assert (embeddings >= 0).all()


def test_forward_changes_no_input(trained):
    images = IMAGES.clone()
    with torch.no_grad():
        logits, embeddings = trained(images)
        again = trained.head(embeddings)  # its ReLUs work in place, but not on the embeddings
    assert torch.equal(images, IMAGES)
    assert torch.equal(again, logits)
    assert torch.equal(embeddings, trained.embed(images))


def test_non_square_images(trained):
    logits, embeddings = trained(torch.rand(2, 3, 32, 64))
    assert logits.shape == (2, 3)
    assert embeddings.shape == (2, 512)


def test_normalization_is_not_part_of_the_state(trained):
    assert {name.split(".")[0] for name in trained.state_dict()} == {"backbone", "head"}


# Normalisation ----------------------------------------------------------------------------------------------------


def test_imagenet_normalization_equals_torchvision(trained):
    expected = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(IMAGES)
    assert torch.allclose(trained.normalized(IMAGES), expected, atol=1e-6)


def test_image_normalization_equals_loop():
    result = make(normalize="image").normalized(IMAGES)
    for image, normalized in zip(IMAGES.double(), result):
        mean = image.sum() / image.numel()
        std = ((image - mean).square().sum() / image.numel()).sqrt()
        assert torch.allclose(normalized.double(), (image - mean) / std, atol=1e-5)
        assert normalized.double().mean().item() == pytest.approx(0, abs=1e-5)
        assert normalized.double().square().mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("gain", "offset"), [(1, 0.2), (0.5, 0), (0.3, 0.6), (2, -0.3)])
def test_image_normalization_does_not_see_brightness_and_contrast(gain, offset):
    network = make(normalize="image")
    assert torch.allclose(network.normalized(gain * IMAGES + offset), network.normalized(IMAGES), atol=1e-4)


def test_image_normalization_keeps_the_colors_of_an_image():
    """One mean and deviation for all channels: an image's tint is left."""
    images = 0.2 * IMAGES
    images[:, 0] += 0.7
    means = make(normalize="image").normalized(images).mean((2, 3))
    assert (means[:, 0] > 1).all()
    assert (means[:, 1:] < -0.5).all()


@pytest.mark.parametrize("gray", [0.0, 0.1, 0.5, 1.0])
def test_flat_image_becomes_zeros(gray):
    result = make(normalize="image").normalized(torch.full((2, 3, 32, 32), gray))
    assert result.abs().max() < 1e-3


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_image_is_normalized_on_its_own(normalize):
    network = make(normalize=normalize)
    batch = torch.cat([IMAGES[:1], 0.1 * IMAGES[1:2]])
    assert torch.equal(network.normalized(batch)[:1], network.normalized(IMAGES[:1]))


def test_unknown_normalization():
    with pytest.raises(ValueError, match=r"'none'.*imagenet, image"):
        make(normalize="none")


# Freezing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_first", [True, False])
def test_frozen_backbone_does_not_change(train_first):
    """Neither parameters nor running statistics, whichever of freezing and train() comes last."""
    network = with_statistics(make())
    if train_first:
        network.train()
        network.freeze_backbone(True)
    else:
        network.freeze_backbone(True)
        network.eval()
        network.train()
    backbone, head = state_of(network.backbone), state_of(network.head)
    train_one_step(network)
    assert changed(network.backbone, backbone) == set()
    assert changed(network.head, head) == set(head)


def test_frozen_backbone_is_in_evaluation_mode():
    network = make()
    network.freeze_backbone(True)
    assert network.frozen
    assert network.training
    assert all(m.training for m in network.head)
    assert not any(m.training for m in network.backbone.modules())
    assert not any(p.requires_grad for p in network.backbone.parameters())
    assert all(p.requires_grad for p in network.head.parameters())


def test_unfrozen_backbone_changes_again():
    network = make()
    network.freeze_backbone(True)
    network.freeze_backbone(False)
    assert not network.frozen
    backbone = state_of(network.backbone)
    train_one_step(network)
    assert changed(network.backbone, backbone) == set(backbone)


def test_freezing_keeps_the_mode_of_the_network():
    network = make().eval()
    for frozen in (True, False):
        network.freeze_backbone(frozen)
        assert not any(m.training for m in network.modules())


# Embedding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_embedding_does_not_depend_on_its_batch(normalize):
    network = with_statistics(make(normalize=normalize))
    expected = embed(network, IMAGES, CPU)
    assert expected.shape == (7, 512)
    assert expected.dtype == torch.float32
    assert expected.std(0).max() > 0.01
    for batch_size in (1, 3, 7):
        assert same(embed(network, IMAGES, CPU, batch_size), expected)
    order = torch.tensor([4, 0, 6])
    assert same(embed(network, IMAGES[order], CPU), expected[order])
    with_outlier = torch.cat([IMAGES[:1], torch.ones(3, 3, 32, 32)])
    assert same(embed(network, with_outlier, CPU)[:1], expected[:1])


def test_embed_equals_the_network_in_evaluation_mode(trained):
    with torch.no_grad():
        _, expected = trained(IMAGES)
    assert same(embed(copy.deepcopy(trained).train(), IMAGES, CPU), expected)


def test_embed_of_uint8_equals_float(trained):
    images = (IMAGES * 255).to(torch.uint8)
    assert torch.equal(embed(trained, images, CPU), embed(trained, images.float() / 255, CPU))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_embed_leaves_the_network_as_it_was(training, frozen):
    network = make()
    network.freeze_backbone(frozen)
    network.train(training)
    before, modes = state_of(network), [m.training for m in network.modules()]
    assert not embed(network, IMAGES, CPU).requires_grad
    assert [m.training for m in network.modules()] == modes
    assert changed(network, before) == set()
    assert all(p.grad is None for p in network.parameters())


def test_embed_restores_the_mode_after_an_error():
    network = make()
    with pytest.raises(RuntimeError):
        embed(network, torch.rand(2, 5, 32, 32), CPU)
    assert network.training


def test_training_goes_on_after_embed():
    network = make()
    embed(network, IMAGES, CPU)
    before = state_of(network)
    train_one_step(network)
    assert changed(network, before) == set(before)


# Initial weights --------------------------------------------------------------------------------------------------


def test_load_torchvision_weights(tmp_path, torchvision_state):
    torch.save(torchvision_state, tmp_path / "resnet18.pth")
    network = make()
    head = state_of(network.head)
    load_backbone_weights(network, "resnet18", tmp_path / "resnet18.pth")
    loaded = network.backbone.state_dict()
    assert set(torchvision_state) - set(loaded) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, torchvision_state[name]) for name, value in loaded.items())
    assert changed(network.head, head) == set()

    reference = torchvision.models.resnet18()
    reference.load_state_dict(torchvision_state)
    reference.fc = nn.Identity()
    with torch.no_grad():
        expected = reference.eval()(Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(IMAGES))
    assert same(embed(network, IMAGES, CPU), expected)


def test_load_weights_without_the_classifier(tmp_path, torchvision_state):
    state = {name: value for name, value in torchvision_state.items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "trunk.pth")
    network = make()
    load_backbone_weights(network, "resnet18", str(tmp_path / "trunk.pth"))
    assert changed(network.backbone, state) == set()


def assert_refused(path, message):
    network = make()
    before = state_of(network)
    with pytest.raises(WeightsError) as caught:
        load_backbone_weights(network, "resnet18", path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert changed(network, before) == set()


def test_missing_weights(tmp_path):
    assert_refused(tmp_path / "nowhere.pth", "no such file (--weights")


@pytest.mark.parametrize("content", [b"", b"weights of the year\n", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_file_that_holds_no_weights(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert_refused(path, "not a file of weights that torch can read (--weights)")


def test_truncated_weights(tmp_path, torchvision_state):
    path = tmp_path / "weights.pth"
    torch.save(torchvision_state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert_refused(path, "not a file of weights that torch can read (--weights)")


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, {"weight": torch.zeros(3)}, torch.zeros(3)])
def test_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", "not the weights of torchvision's resnet18")


@pytest.mark.parametrize(
    ("architecture", "example"),
    [("resnet34", "layer1.2.conv1.weight"), ("resnet50", "layer1.0.conv1.weight"), ("mobilenet_v2", "conv1.weight")],
)
def test_weights_of_another_architecture(tmp_path, architecture, example):
    with torch.device("meta"):
        state = getattr(torchvision.models, architecture)().state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in state.items()}, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", f"torchvision's resnet18 (for example {example} does not fit)")


def test_weights_with_one_missing(tmp_path, torchvision_state):
    state = {name: value for name, value in torchvision_state.items() if name != "layer3.1.bn2.running_var"}
    torch.save(state, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", "layer3.1.bn2.running_var")


def test_under_autocast_only_the_backbone_is_in_bf16():
    network = make()
    seen = []
    network.backbone.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits, embeddings = network(torch.rand(4, 3, 32, 32))
    assert seen == [torch.bfloat16]
    assert logits.dtype == embeddings.dtype == torch.float32
