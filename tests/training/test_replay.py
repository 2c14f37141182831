"""The step that a GPU replays: the same as the one that is issued operation by operation."""

import gc
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_trainer import PATCHES, tiny_config, trainer

from dataset import TrainSet
from image_ops import NOTHING_IGNORED
from runtime.cache import IN_MEMORY, Storage
from runtime.files import load_tensors, save_tensors
from training.trainer import DRAWN_AHEAD, Precision, RunOptions, Trainer, compiled_views, rate_of

SMALL = ("--epochs", 30, "--lr", 1e-4)
CROPS = (*SMALL, *PATCHES)
SETTINGS = [
    SMALL,
    ("--variant", "soft", "--invisible", "drop", "--optim", "adam", *CROPS),
    ("--freeze_resnet", 2, "--lr_unfrozen", 1e-4, *SMALL),
    ("--normalize", "imagenet", "--optim", "adam", *CROPS),
]


class Issued:
    """Stands where a GPU's recording would: the work runs as it is."""

    def __call__(self, work, *inputs):
        return work(*inputs)


def noise(config) -> torch.Tensor:
    shape = 8, 3, *config.size
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def packed(config, **more) -> Trainer:
    """A trainer whose steps are those that a GPU replays."""
    run = trainer(config, noise(config), **more)
    run.recorded = Issued()
    return run


@pytest.mark.parametrize("flags", SETTINGS)
def test_a_packed_step_is_the_step(flags):
    config = tiny_config(*flags)
    plain, run = trainer(config, noise(config)), packed(config)
    for step in range(4):
        expected, values = plain.train_step(), run.train_step()
        run.recorded = Issued()  # which the end of the frozen steps takes away
        assert torch.allclose(values, expected, atol=5e-3 if step else 1e-5)  # a difference of rounding grows
    state, expected = run.state(), plain.state()
    assert state["schedule"] == expected["schedule"]
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]  # floats, nothing of a recording
    assert torch.equal(state["generator"], expected["generator"])
    for name, value in state["network"].items():
        assert torch.allclose(value.float(), expected["network"][name].float(), atol=2e-3), name


def test_images_that_do_not_lie_on_the_device_are_given():
    held, mapped = (packed(tiny_config(*SMALL, "--folds", 2), member=1) for _ in range(2))
    for _ in range(3):
        (numbers,) = held.sample_packed()
        batch = mapped.images[numbers[:, 1].long()]
        assert set(numbers[:, 1].tolist()) <= {0, 2, 4, 6}  # those that the second network sees
        assert torch.equal(held.packed_step(numbers), mapped.packed_step(numbers, batch))


@pytest.mark.parametrize("done", [1, DRAWN_AHEAD, DRAWN_AHEAD + 1])
def test_a_saved_state_continues_with_the_next_batch(done, tmp_path):
    """Though those that follow were drawn already; by either kind of step."""
    config = tiny_config(*SMALL)
    run, plain = packed(config), trainer(config, noise(config))
    for _ in range(done):
        run.sample_packed()
        plain.sample_batch()
    save_tensors(run.state(), tmp_path / "state")
    state = load_tensors(tmp_path / "state", "checkpoint")
    expected = run.sample_packed()[0]
    assert torch.equal(packed(config, state=state).sample_packed()[0], expected)
    chosen = trainer(config, noise(config), state=state).sample_batch()[0]
    assert torch.equal(chosen, plain.sample_batch()[0])
    assert torch.equal(chosen.float(), expected[:, 1])


def test_a_rate_on_the_device_is_the_steps_alone():
    run = packed(tiny_config(*SMALL, "--optim", "adam"))
    before = dict(run.optimizer.param_groups[0])
    rate = torch.tensor(0.5)
    with suppress(KeyError), rate_of(run.optimizer, rate):
        assert run.optimizer.param_groups[0]["lr"] is rate
        raise KeyError
    assert run.optimizer.param_groups[0] == before


def test_nothing_holds_a_trainer_that_is_done():
    """Nor then its recording, whose memory no collector knows of."""
    run = packed(tiny_config(*SMALL))
    run.train_step()
    gone = weakref.ref(run)
    gc.disable()
    try:
        del run
        assert gone() is None
    finally:
        gc.enable()


def test_many_shapes_are_compiled(monkeypatch):
    """More than torch compiles of one function by itself; a small one stands for the views, which take seconds."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend="eager", **how))
    monkeypatch.setattr("training.trainer.make_packed_views", lambda images: images + 1)
    for side in range(1, 11):
        assert compiled_views(side)(torch.zeros(side)).sum() == side
    assert compiled_views(10) is compiled_views(10)
    compiled_views.cache_clear()


# On a GPU -----------------------------------------------------------------------------------------------------------

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@GPU
@pytest.mark.parametrize(("amp", "on_device"), [("off", True), ("bf16", True), ("bf16", False)])
@pytest.mark.parametrize("flags", SETTINGS)
def test_replayed_steps_are_the_eager_ones(flags, amp, on_device, tmp_path):
    """Bit for bit, with a state saved and loaded in between; and that state continues on a CPU."""
    torch.backends.cudnn.deterministic = True
    config, device = tiny_config(*flags), torch.device("cuda", 0)

    def started(state=None):
        train_set = TrainSet(noise(config), [Path(f"{number}.png") for number in range(8)], NOTHING_IGNORED)
        storage = IN_MEMORY if on_device else Storage(tmp_path, memory=0)
        return Trainer(
            config, train_set, RunOptions(device, storage=storage), Precision(1, amp, False, replay=True), state
        )

    eager, run = started(), started()
    inputs, eager.recorded = eager.sample_packed, Issued()
    eager.sample_packed = lambda: [x.to(device) for x in inputs()]
    for step in range(16):
        if step == 10:
            save_tensors(run.state(), tmp_path / "state")
            run = started(load_tensors(tmp_path / "state", ""))
        expected, values = eager.train_step(), run.train_step()
        eager.recorded = Issued()
        assert torch.equal(values, expected), step
    assert run.recorded.graph is not None
    for name, value in eager.network.state_dict().items():
        assert torch.equal(run.network.state_dict()[name], value), name
    state = load_tensors(tmp_path / "state", "")
    assert torch.isfinite(trainer(config, noise(config), state=state).train_step()).all()
