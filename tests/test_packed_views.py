"""The views that a GPU makes of packed numbers: the same as a CPU's, and the same operations for every batch."""

import pytest
import torch
from test_image_ops import STILL, noise, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from cutpaste import (
    VARIANTS,
    Drawn,
    make_packed_views,
    make_views_and_sample,
    pack_params,
    packable,
    sample_params,
    visible,
)

AGREE = 1e-5  # of values in [0, 1]: the order of operations rounds otherwise


def pictures(count, height, width):
    """Smooth, colored images, one of them flat, one gray: (count, 3, height, width) uint8."""
    coarse = noise(count, 3, 6, 6)
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    images[0], images[1] = 0.4, images[1, :1]
    return (255 * images).byte()


@pytest.mark.parametrize("amounts", [{}, {"translate": 0.3, "jitter": 0.5, "patch_jitter": 0.5}, STILL])
@pytest.mark.parametrize("patch_size", [None, 48])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_views_are_those_of_a_cpu(variant, patch_size, amounts):
    images = pictures(6, 128, 150)
    params = sample_params(variant, 6, 128, 150, seeded(), patch_size=patch_size, **amounts)
    expected, _, whole = make_views_and_sample(images, params)
    views, sample, seen = make_packed_views(images, pack_params(params), variant, patch_size, True)
    assert views.shape == expected.shape
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert (views - expected).abs().amax() < AGREE
    assert torch.equal(seen, visible(expected, params, whole))
    assert (sample is None) == (patch_size is None)
    if sample is not None:
        assert (sample - whole).abs().amax() < AGREE


class Operations(TorchDispatchMode):
    """Notes every operation with the shape and the device of its result."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, list | tuple) else [result]:
            self.found.append((str(function), each.shape, each.device.type))
        return result


@pytest.mark.parametrize(("variant", "patch_size"), [("3way", None), ("soft", 48)])
def test_operations_and_shapes_do_not_depend_on_what_was_drawn(variant, patch_size):
    """On tensors without values, of which none could be read; and nothing comes from the host."""
    found = []
    for seed in range(3):
        params = sample_params(variant, 4, 128, 128, seeded(seed), patch_size=patch_size)
        images, numbers = torch.empty(4, 3, 128, 128, dtype=torch.uint8, device="meta"), pack_params(params).to("meta")
        with Operations() as operations:
            make_packed_views(images, numbers, variant, patch_size, True)
        found.append(operations.found)
    assert found[0] == found[1] == found[2]
    assert {device for _, _, device in found[0]} == {"meta"}


def test_torch_compile_traces_them_as_one_graph():
    params = sample_params("soft", 4, 64, 64, seeded(), patch_size=32)
    images, numbers = pictures(4, 64, 64), pack_params(params)
    torch.compiler.reset()
    traced = torch.compile(make_packed_views, backend="aot_eager", fullgraph=True, dynamic=False)
    for one, other in zip(
        traced(images, numbers, "soft", 32, True), make_packed_views(images, numbers, "soft", 32, True)
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("variant", "patch_size"), [("3way", None), ("soft", 40), ("union", 40), ("normal", None)])
def test_parameters_of_many_batches_at_once_are_those_of_each(variant, patch_size):
    def sample(count, source):
        return pack_params(sample_params(variant, count, 64, 96, source, patch_size=patch_size))

    needed = Drawn(torch.zeros(1, 1).expand(1, 2**30))
    sample(7, needed)
    alone = seeded()
    expected = torch.cat([sample(7, alone) for _ in range(3)])
    together = seeded()
    numbers = torch.stack([torch.rand(needed.taken, generator=together) for _ in range(3)])
    assert torch.equal(sample(21, Drawn(numbers)), expected)
    assert torch.equal(together.get_state(), alone.get_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("variant", "patch_size"), [("3way", None), ("soft", 48)])
def test_compiled_views_of_a_gpu_are_those_of_a_cpu(variant, patch_size):
    images, params = pictures(8, 256, 256), sample_params(variant, 8, 256, 256, seeded(), patch_size=patch_size)
    expected = make_views_and_sample(images, params)[0]
    compiled = torch.compile(make_packed_views, fullgraph=True, dynamic=False)
    views = compiled(images.cuda(), pack_params(params).cuda(), variant, patch_size)[0]
    far = ((views.cpu() - expected).abs().amax(1) > AGREE).float().mean()
    assert far < 1e-5  # a pixel on the edge of a rotated box may fall to either side


def test_views_of_another_kind_are_not_packed(monkeypatch):
    from config import Variant
    from cutpaste import VIEWS, View, draw_patch

    assert all(map(packable, VARIANTS))
    monkeypatch.setitem(VIEWS, "black", View(draw_patch, lambda target, images, params: target.zero_(), "", ""))
    monkeypatch.setitem(VARIANTS, "black", Variant(("image", "patch", "black"), ""))
    assert not packable("black")
