"""The training of one network: a killed run continues exactly, nothing but settings and seed matters, what is told."""

import os
import re
import resource
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import SMALL, TINY, again, network_of, one_line, same_weights, start, train, wait_for_step
from PIL import Image
from torch.nn import functional

from config import Config, PatchConfig, SettingError, config_of
from cutpaste import invisible_shares
from dataset import TrainSet, load_images, load_train
from detector import load
from image_ops import NOTHING_IGNORED
from run_training import get_parser
from runtime.cache import IN_MEMORY, Storage
from runtime.cli import suitable_precision
from runtime.files import InputError, load_tensors, save_tensors
from training.trainer import (
    Precision,
    RunOptions,
    Trainer,
    batch_values,
    check_finite,
    choose_precision,
    load_checkpoint,
    open_log,
    steps_within,
)

CPU, FLOAT32 = torch.device("cpu"), Precision(1, "off", False)
PATCHES = ("--size", 48, "--patch_size", 32, "--window", 8, "--stride", 8)
STILL = ("--jitter", 0, "--patch_jitter", 0)


def tiny_config(*flags) -> Config:
    return config_of(get_parser().parse_args([*TINY, *map(str, flags)]), "brick")


def noise(count=8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def even_and_noisy() -> torch.Tensor:
    """Four images of one gray, in which no paste shows, and four of noise: (8, 3, 32, 32) uint8."""
    images = noise()
    images[:4] = 90
    return images


def trainer(config, images, precision=FLOAT32, state=None, member=0, storage=IN_MEMORY) -> Trainer:
    train_set = TrainSet(images, [Path(f"{number}.png") for number in range(len(images))], NOTHING_IGNORED)
    return Trainer(config, train_set, RunOptions(CPU, storage=storage), precision, state, member)


def next_batch(run):
    """The numbers of the next batch's images, what was drawn for it, and the batch."""
    chosen, params = run.sample_batch()
    return chosen, params, run.make_views(run.load_batch(chosen), params)


def weights_of(network) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


# Continuing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--level", 1, *PATCHES, "--location", "each")], ids=["whole", "patches"])
def test_killed_twice_equals_uninterrupted(data, small, tmp_path, script, train_brick, more):
    folder, flags, uninterrupted = tmp_path / "models", (*SMALL, *more), small
    if more:
        uninterrupted = tmp_path / "whole/models"
        assert again(script, data, uninterrupted, "--type", "brick", *flags).code == 0
    for step in (1, 3):
        process = start(data, folder, "--type", "brick", *flags)
        wait_for_step(process, folder / "brick.checkpoint", step)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "brick.pt").exists()
    done = train_brick(*flags)
    assert done.code == 0, done.err
    assert "brick: continuing at step" in done.err
    assert same_weights(folder / "brick.pt", uninterrupted / "brick.pt")
    assert not (folder / "brick.checkpoint").exists()


def test_a_signal_saves_the_state_and_the_same_command_continues(data, small, tmp_path, train_brick):
    folder, flags = tmp_path / "models", (*SMALL, "--test_epochs", 2)
    process = start(data, folder, "--type", "brick", *flags, new=True)
    wait_for_step(process, folder / "brick.checkpoint", 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    err = process.stderr.read()
    assert "state saved; the same command continues" in err
    assert "Traceback" not in err
    done = train_brick(*flags)
    assert done.code == 0, done.err
    assert same_weights(folder / "brick.pt", small / "brick.pt")  # looking at the test images changes nothing


def test_an_interrupted_overwrite_continues_without_the_flag(data, models, tmp_path, train_brick):
    folder, flags = tmp_path / "models", (*SMALL, "--seed", 1)
    shutil.copytree(models, folder, copy_function=os.link)
    process = start(data, folder, "--type", "brick", *flags, "--overwrite")
    wait_for_step(process, folder / "brick.checkpoint", 1)
    process.terminate()
    assert process.wait(60) == 143
    assert "the same command without --overwrite continues" in process.stderr.read()
    assert same_weights(folder / "brick.pt", models / "brick.pt")  # the old one stays until the new one is there
    done = train_brick(*flags)
    assert done.code == 0, done.err
    assert "continuing at step" in done.err
    assert load(folder / "brick.pt").config.seed == 1
    assert [p.name for p in sorted(folder.iterdir())] == ["brick.normals", "brick.pt", "grass.normals", "grass.pt"]


LEVELS = {"features": "level", "level": (1, 2), "patches": PatchConfig(32, window=8)}


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "resnet18", "freeze_resnet": 1},
        {"variant": "normal", "freeze_resnet": 3, "amp": "bf16"},
        {"variant": "union", "freeze_resnet": 2, "lr_unfrozen": 0.001, "freeze_bn": True},
        {"freeze_resnet": 3, "lr_unfrozen": 0.001, "optim": "adam", "lr": 0.001},
        {"variant": "soft", "invisible": "drop", "optim": "adam", "lr": 0.001, **LEVELS},
    ],
    ids=["thawed", "frozen, bf16", "just thawed", "frozen, adam", "patches"],
)
def test_a_saved_state_continues_bit_for_bit(tmp_path, changes):
    """Four steps against two, saved and loaded, and two more."""
    config = replace(tiny_config("--epochs", 4), backbone="mobilenet_v2")
    precision = Precision(1, changes.get("amp", "off"), False)
    config = replace(config, **{name: value for name, value in changes.items() if name != "amp"})
    whole, first = (trainer(config, noise(), precision) for _ in range(2))
    initial = weights_of(whole.network.backbone)
    for run, steps in ((whole, 4), (first, 2)):
        for _ in range(steps):
            run.train_step()
    assert first.network.frozen == (config.frozen_steps > 2)
    save_tensors(first.state(), tmp_path / "state")
    second = trainer(config, noise(), precision, load_tensors(tmp_path / "state", "checkpoint"))
    assert second.step == 2
    for _ in range(2):
        second.train_step()
    expected, continued = whole.network.state_dict(), second.network.state_dict()
    assert all(torch.equal(value, continued[name]) for name, value in expected.items())
    assert not torch.equal(weights_of(second.network.backbone), initial)


def test_efficientnet_is_fine_tuned_bit_for_bit(data, tmp_path, train_brick):
    """From torchvision's state dict by the default recipe: BatchNorm as it was, all else learned, and a state that was
    saved in between continues with the same bits."""
    from torchvision.models import efficientnet_b0

    torch.manual_seed(0)
    weights = efficientnet_b0().state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    flags = ["--pretrained", "--weights", tmp_path / "weights.pth", "--backbone", "efficientnet_b0", "--epochs", 4]
    done = train_brick(*flags, "--freeze_resnet", 2, "--features", "level")
    assert done.code == 0, done.err
    made = load(tmp_path / "models/brick.pt")
    network = network_of(made)
    assert made.members[0].levels[0].density.mean.shape[-1] == 320
    assert (made.config.recipe, made.config.lr, made.config.lr_unfrozen) == ("finetune", 0.001, 0.0001)
    images, rates = load_train(data, "brick", (32, 32), 0).images, []
    run = trainer(made.config, images)
    initial = {name: value.clone() for name, value in run.network.state_dict().items()}
    for step in range(4):
        if step == 2:
            save_tensors(run.state(), tmp_path / "state")
            run = trainer(made.config, images, state=load_checkpoint(tmp_path / "state"))
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.train_step()
    assert rates == pytest.approx([0.001, 0.0005, 0.0001, 0.00005])  # a cosine for each phase
    norms = [f"backbone.{name}." for name, m in run.network.backbone.named_modules() if "BatchNorm" in str(type(m))]
    assert norms
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, initial[name]) == name.startswith(tuple(norms)), name
        if name.startswith("backbone."):
            assert torch.equal(initial[name], weights[name.removeprefix("backbone.")])
    folded = run.network.folded().state_dict()
    assert all(torch.equal(value, folded[name]) for name, value in network.state_dict().items())


# What the result depends on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--workers", 0), ("--workers", 4, "--cache_dir", "none")])
def test_workers_and_other_categories_change_nothing(data, seeds, tmp_path, script, flags):
    """In ``seeds`` grass came after brick."""
    done = again(script, data, tmp_path / "models", "--type", "grass", *SMALL, "--epochs", 1, "--seed", 2, *flags)
    assert done.code == 0, done.err
    assert same_weights(tmp_path / "models/grass.pt", seeds / "seed2/grass.pt")


def test_a_network_learns_from_the_images_it_may_see_wherever_they_live(tmp_path):
    """The second of three networks, by the same steps: from images in memory, in a file, and when others are changed
    that it may not see."""
    paths, images, losses = [], noise(9), []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    others, mapped = images.clone(), Storage(None, 1)
    others[1::3] = 255 - others[1::3]
    for same, storage in ((images, IN_MEMORY), (load_images(paths, (32, 32), 0, mapped), mapped), (others, IN_MEMORY)):
        run = trainer(tiny_config(*SMALL, "--folds", 3), same, member=1, storage=storage)
        losses.append([float(run.train_step()[0]) for _ in range(3)])
    assert losses[0] == losses[1] == losses[2]


def test_the_backbone_is_frozen_for_the_first_steps():
    run = trainer(tiny_config("--epochs", 3, "--freeze_resnet", 2), noise())
    initial = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.train_step(), run.train_step()
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, initial[name]) == name.startswith("backbone."), name
    run.train_step()
    assert not torch.equal(run.network.backbone.conv1.weight, initial["backbone.conv1.weight"])
    assert run.network.backbone.bn1.num_batches_tracked == 1


def test_two_classes_of_images_that_are_not_square(tmp_path, train_brick):
    done = train_brick(*SMALL, "--batch_size", 64, "--size", "48x32", "--variant", "scar", "--optim", "adam")
    assert done.code == 0, done.err
    made = load(tmp_path / "models/brick.pt")
    assert (made.config.size, made.config.variant, made.config.lr) == ((32, 48), "scar", 0.001)
    assert network_of(made).head[-1].out_features == 2


def test_a_crop_is_normalized_as_the_image_that_it_is_from():
    images = functional.pad(noise(), (0, 16, 0, 16))
    images[4:] //= 3  # dark ones
    run = trainer(tiny_config(*PATCHES, "--translate", 0, "--jitter", 0), images)
    chosen, params, batch = next_batch(run)
    normalized = run.network.normalized(batch.views, batch.statistics)
    whole = run.network.normalized(images[chosen].float() / 255)
    assert normalized.shape == (12, 3, 32, 32)
    for number, (y, x) in enumerate(params.corner.tolist()):
        assert torch.allclose(normalized[number], whole[number, :, y : y + 32, x : x + 32], atol=1e-5)


def test_views_that_show_nothing_are_left_out_of_the_loss():
    """The mean over the others, as by hand."""
    run = trainer(tiny_config("--invisible", "drop", *STILL, "--batch_size", 8), even_and_noisy())
    chosen, _, batch = next_batch(run)
    even, learned = (chosen < 4).repeat(3), batch.learned
    assert not learned[even].any()
    assert learned[~even].float().mean() > 0.8
    logits = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss, accuracy, left_out = batch_values(logits, batch, 1.0, run.ranks)
    assert torch.allclose(loss, functional.cross_entropy(logits[learned], batch.labels[learned]))
    assert torch.allclose(accuracy, (logits.argmax(1) == batch.labels)[learned].float().mean())
    assert left_out == pytest.approx(1 - learned.float().mean().item())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient.abs().sum(1) > 0, learned)


def test_a_batch_that_shows_nothing_changes_no_weight():
    run = trainer(tiny_config("--invisible", "drop", *STILL), torch.full((8, 3, 32, 32), 90, dtype=torch.uint8))
    before = run.network.head[0].weight.clone()
    loss, _, left_out = run.train_step()
    assert (loss, left_out) == (0, 1)
    assert torch.allclose(run.network.head[0].weight, before, atol=1e-5)  # but for the decay


def test_steps_within_takes_the_time_of_planning_off(monkeypatch):
    """With a clock that each step moves on by a second: 8 steps of planning and 92 are a hundred seconds."""
    run, now = trainer(tiny_config(), noise()), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def step():
        now[0] += 1
        return torch.zeros(3)

    monkeypatch.setattr(run, "train_step", step)
    assert steps_within(100.0, run) == 92
    assert steps_within(0.0, run) == 1


# Precision --------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_precision_it_began_with(monkeypatch, tmp_path, train_brick):
    def choose(saved=None, **asked):
        return choose_precision(asked, saved or {}, CPU, 8)

    suitable, _ = suitable_precision(CPU)
    saved = {"threads": 3, "amp": "bf16" if suitable == "off" else "off", "compile": True}
    assert choose() == Precision(8, suitable, False)
    assert choose(threads=2, amp="bf16", compile=True) == Precision(2, "bf16", True)
    assert choose(saved) == choose(saved, threads=3, amp=saved["amp"], compile=True) == Precision(**saved)
    for earlier, asked, words in (
        (saved, {"threads": 2}, "threads: made with threads 3, now 2"),
        (saved, {"amp": suitable}, f"amp: made with amp {saved['amp']}, now {suitable}"),
        (saved, {"compile": False}, "compile: made with compile 1, now 0"),
        ({}, {"amp": "fp16"}, "fp16 needs a GPU"),
        ({"amp": "fp16"}, {}, "fp16 needs a GPU"),
    ):
        with pytest.raises(SettingError, match=words):
            choose(earlier, **asked)
    done = train_brick("--amp", "fp16")
    one_line(done, "--amp: fp16 needs a GPU")
    assert "precision:" not in done.err
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match="no C\\+\\+ compiler"):
        choose(compile=True)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_the_precision_that_suits_the_processor_is_told_and_recorded(tmp_path, monkeypatch, train_brick, has_bf16):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: has_bf16, raising=False)
    precision, reason = suitable_precision(CPU)
    assert precision == ("bf16" if has_bf16 and torch.backends.mkldnn.is_available() else "off")
    done = train_brick(*SMALL, "--amp", "auto", "--epochs", 1)
    assert done.code == 0, done.err
    assert f"brick: precision {precision.replace('off', 'float32')} ({reason})\n" in done.err
    assert load(tmp_path / "models/brick.pt").metadata["amp"] == precision


def test_a_step_in_bf16_follows_one_in_float32():
    """From the same weights and batch: nearly the same loss, and an update in much the same direction; not the same."""
    losses, updates = {}, {}
    for amp in ("off", "bf16"):
        run = trainer(tiny_config("--epochs", 3, "--lr", 0.001), noise(), Precision(1, amp, False))
        before = weights_of(run.network)
        losses[amp] = run.train_step()[0]
        updates[amp] = weights_of(run.network) - before
    assert losses["off"] != losses["bf16"]
    torch.testing.assert_close(losses["bf16"], losses["off"], rtol=0.05, atol=0)
    assert torch.cosine_similarity(updates["off"], updates["bf16"], dim=0) > 0.5
    assert 0.8 < updates["off"].norm() / updates["bf16"].norm() < 1.25


# What is told -----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_what_the_readme_says(tmp_path, train_brick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train_brick(*SMALL, "--epochs", 12, "--test_epochs", 6).code == 0
    events = EventAccumulator(str(tmp_path / "logdirs/models/brick"), {"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {"loss", "acc", "lr", "eval_auc", "images_per_second", "left_out"}
    assert tags["images"] == ["views"]
    assert tags["tensors"] == ["settings/text_summary"]
    assert [e.step for e in events.Scalars("loss")] == [10, 12]
    assert [e.step for e in events.Scalars("eval_auc")] == [6, 12]
    assert events.Scalars("lr")[-1].value == pytest.approx(0, abs=1e-9)
    assert 0 < events.Scalars("loss")[0].value < 10


def test_shares_of_views_that_show_nothing_are_told(tmp_path, capsys):
    shares = invisible_shares(even_and_noisy(), tiny_config(*STILL))
    assert list(shares) == ["patch", "scar"]
    assert all(0.5 <= share < 0.7 for share in shares.values())
    union = tiny_config("--variant", "union")
    assert invisible_shares(even_and_noisy()[4:], union)["patch or scar"] < 0.2
    for choice, words in (("keep", "are learned as anomalous (--invisible drop"), ("drop", "are left out of the loss")):
        with open_log(trainer(tiny_config(*STILL, "--invisible", choice), even_and_noisy()), tmp_path, False) as log:
            log.add_samples()
        err = capsys.readouterr().err
        told = r"brick: views that show no difference from the image: \d+ % of patch, \d+ % of scar; they "
        assert re.search(told + re.escape(words), err), err


def test_a_loss_that_is_not_finite_stops(tmp_path, train_brick):
    for flags, words in (
        (SMALL, "at step"),
        ((*SMALL, "--test_epochs", 3), "at step"),
        (("--epochs", 1), "not finite"),
    ):
        one_line(train_brick("--lr", 1e9, *flags), "brick", words, "lower --lr")
        assert not (tmp_path / "models/brick.pt").exists()
    check_finite("brick", 1, 0.5, torch.zeros(3))
    for loss, weights, words in (
        (0.5, [torch.zeros(3), torch.tensor([1.0, torch.nan])], "a weight of the network is not finite at step 7"),
        (torch.nan, [], "the loss is nan at step 7"),
        (torch.inf, [], "the loss is inf at step 7"),
    ):
        with pytest.raises(InputError, match=words):
            check_finite("brick", 7, loss, *weights)


def test_a_preview_trains_nothing(data, tmp_path, train_brick):
    path = tmp_path / "sheet.png"
    for flags in ((), PATCHES):  # over that of before, which has the mark of this program
        done = train_brick("--preview", path, *flags)
        assert done.code == 0, done.err
        sheet = matplotlib.image.imread(path)
        assert min(sheet.shape[:2]) > 300
        assert sheet[..., :3].std() > 0.1
        assert not (tmp_path / "models").exists()
    one_line(train_brick("--preview", "sheet.doc"), "sheet.doc", ".png")
    photo = shutil.copy(data / "brick/train/good/000.png", tmp_path / "photo.png")
    content = photo.read_bytes()
    one_line(train_brick("--preview", photo), "photo.png: is there already")
    assert photo.read_bytes() == content


def test_location_auto_says_what_it_chose(tmp_path, train_brick):
    done = train_brick(*PATCHES, "--epochs", 1)
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "one Gaussian" in line]
    spread = dict(re.findall(r"(shared|each) (-?[\d.]+)", line))
    assert set(spread) == {"shared", "each"}
    each = float(spread["each"]) > float(spread["shared"])
    assert ("for each location" in line) == each
    made = load(tmp_path / "models/brick.pt")
    (level,) = made.members[0].levels
    assert level.shared != each
    assert level.density.mean.shape == (36 if each else 1, 64)
    assert (made.config.patches.location, made.config.patches.patch_size) == ("auto", 32)
    assert made.calibration_scores.shape == (8,)


def test_the_fast_recipe_trains_and_tells_what_it_sets(data, tmp_path, script):
    where = ["--data_dir", data, "--model_dir", tmp_path / "models", "--type", "brick"]
    small = ["--size", 32, "--patch_size", 32, "--window", 8, *SMALL, "--level", 1, "--epochs", 1, "--no-pretrained"]
    small += ["--logdir", tmp_path / "logdirs"]
    done = script("run_training", *where, "--recipe", "fast", *small)
    assert done.code == 0, done.err
    assert "recipe fast: patch_size 32, variant soft, invisible drop, optim adam," in done.err
    config = load(tmp_path / "models/brick.pt").config
    assert (config.recipe, config.variant, config.batch_size) == ("fast", "soft", 28)
    evaluated = script("eval", *where, "--eval_dir", tmp_path / "Eval", "--save_plots", 0)
    assert evaluated.code == 0, evaluated.err
    assert "brick pixel AUROC: " in evaluated.out
    one_line(script("run_training", *where, *small), "made with")


# A full disk, no network ------------------------------------------------------------------------------------------


def test_a_full_disk_gets_one_line_and_keeps_what_was_there(data, models, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder, copy_function=os.link)
    for largest, flags, words in (
        (2**20, ("--overwrite",), ("brick.checkpoint", "cannot be written")),
        (2**13, ("--overwrite",), ("logdirs/models/brick",)),  # TensorBoard's files
    ):
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
        one_line(train(data, folder, "--type", "brick", "--epochs", 1, *flags, preexec=limit), *words)
        assert (folder / "brick.pt").read_bytes() == (models / "brick.pt").read_bytes()


def test_weights_that_cannot_be_downloaded_name_the_way_out(tmp_path, monkeypatch, train_brick):
    for name, value in (("TORCH_HOME", tmp_path), ("https_proxy", "http://127.0.0.1:9"), ("no_proxy", "")):
        monkeypatch.setenv(name, str(value))
    one_line(train_brick("--pretrained"), "could not be downloaded", "--weights FILE", "--no-pretrained")


# Wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        *("--epoch 3", "--epochs -1", "--variant 4way", "--size 8", "--size axb", "--cuda yes", "--lr -1"),
        *("--jitter 0.7", "--type ../brick", "surplus", "--no-pretrained --weights resnet18.pth", "--window 32"),
        *("--patch_size 16", "--patch_size 64 --size 96x48", "--patch_size 64 --density kde"),
        *("--patch_size 64 --window 512", "--patch_size 64 --level 3 --stride 24", "--patch_size 64 --location all"),
        *("--patch_size 64 --sigma 0", "--seed=", "--seed 1,", "--seed -1", "--seed 1,1", "--seed a"),
    ],
)
def test_wrong_usage_exits_with_2(script, flags):
    done = script("run_training", *flags.split())
    assert done.code == 2
    assert "usage:" in done.err
