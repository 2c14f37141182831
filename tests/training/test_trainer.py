"""run_training.py: what it writes, that it continues exactly, that nothing beside the seed matters."""

import re
import resource
import shutil
import signal
import time
from dataclasses import replace
from functools import partial

import matplotlib.image
import pytest
import torch
from conftest import ROOT, TINY, again, network_of, one_line, same_weights, start, train, wait_for_step
from forked import Forked
from PIL import Image
from torch.nn import functional

from config import Config, PatchConfig, SettingError, config_of
from dataset import load_train
from detector import load
from run_training import get_parser
from runtime.cache import digest
from runtime.cli import suitable_precision
from runtime.files import load_tensors, save_tensors
from training.trainer import Precision, Trainer, batch_values, choose_precision, load_checkpoint, steps_within

LEVELS = {"features": "level", "level": (1, 2), "patches": PatchConfig(32, window=8)}


def tiny_config(*more) -> Config:
    return config_of(get_parser().parse_args([*TINY, *map(str, more)]), "brick")


def flags(data, tmp_path, *more):
    """Flags for a run in this process."""
    where = ["--data_dir", data, "--model_dir", tmp_path / "models", "--logdir", tmp_path / "logdirs"]
    return [*where, *TINY, "--type", "brick", *more]


# Continuing -------------------------------------------------------------------------------------------------------


def test_killed_twice_equals_uninterrupted(data, models, tmp_path, script):
    folder = tmp_path / "models"
    more = ("--type", "brick")
    for step in (1, 6):
        process = start(data, folder, *more, new=step == 1)
        wait_for_step(process, folder / "brick.checkpoint", step)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "brick.pt").exists()
    done = again(script, data, folder, *more)
    assert done.code == 0, done.err
    assert "brick: continuing at step" in done.err
    assert same_weights(folder / "brick.pt", models / "brick.pt")
    assert not (folder / "brick.checkpoint").exists()


def test_a_signal_saves_the_state_and_the_same_command_continues(data, models, tmp_path, script):
    folder = tmp_path / "models"
    more = ("--type", "brick", "--test_epochs", 2)
    process = start(data, folder, *more, new=True)
    wait_for_step(process, folder / "brick.checkpoint", 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    err = process.stderr.read()
    assert "state saved; the same command continues" in err
    assert "Traceback" not in err
    done = again(script, data, folder, *more)
    assert done.code == 0, done.err
    assert same_weights(folder / "brick.pt", models / "brick.pt")  # looking at the test images changes nothing


def test_an_interrupted_overwrite_continues_without_the_flag(data, models, tmp_path, script):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    more = ("--type", "brick", "--seed", 1)
    process = start(data, folder, *more, "--overwrite")
    wait_for_step(process, folder / "brick.checkpoint", 2)
    process.terminate()
    assert process.wait(60) == 143
    assert "the same command without --overwrite continues" in process.stderr.read()
    assert same_weights(folder / "brick.pt", models / "brick.pt")  # the old one stays until the new one is there
    done = again(script, data, folder, *more)
    assert done.code == 0, done.err
    assert "continuing at step" in done.err
    assert load(folder / "brick.pt").config.seed == 1
    assert [p.name for p in sorted(folder.iterdir())] == ["brick.normals", "brick.pt", "grass.normals", "grass.pt"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optim": "adam", "lr": 0.001},
        {"freeze_resnet": 4},
        {"freeze_resnet": 2},
        {"variant": "union"},
        {"variant": "soft", "invisible": "drop", "optim": "adam", **LEVELS},
        {"freeze_resnet": 3, "lr_unfrozen": 0.001, "freeze_bn": True},
        {"freeze_resnet": 4, "lr_unfrozen": 0.001, "optim": "adam"},
        {"amp": "bf16"},
    ],
)
def test_a_saved_state_continues_bit_for_bit(tmp_path, change):
    """Six steps against three, saved and loaded, and three more."""
    numerics = Precision(1, change.pop("amp", "off"), False)
    config = replace(tiny_config("--epochs", 6), **change)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def started(state):
        return Trainer(config, images, "digest", torch.device("cpu"), numerics, state)

    whole, first = started(None), started(None)
    for _ in range(6):
        whole.train_step()
    for _ in range(3):
        first.train_step()
    assert first.network.frozen == (change.get("freeze_resnet") == 4)
    save_tensors(first.state(), tmp_path / "state")
    second = started(load_tensors(tmp_path / "state", "checkpoint"))
    assert second.step == 3
    for _ in range(3):
        second.train_step()
    expected, found = whole.network.state_dict(), second.network.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    before = started(None).network.state_dict()
    assert not torch.equal(before["backbone.conv1.weight"], found["backbone.conv1.weight"])


def test_efficientnet_b4_is_fine_tuned_bit_for_bit(data, tmp_path, script):
    """From torchvision's state dict by the default recipe: BatchNorm as it was, all else learned, and a state that was
    saved in between continues with the same bits."""
    from torchvision.models import efficientnet_b4

    torch.manual_seed(0)
    weights = efficientnet_b4().state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    more = ["--pretrained", "--weights", tmp_path / "weights.pth", "--backbone", "efficientnet_b4", "--epochs", 4]
    more += ["--freeze_resnet", 2, "--features", "level"]
    assert script("run_training", *flags(data, tmp_path, *more)).code == 0
    made = load(tmp_path / "models/brick.pt")
    assert made.members[0].levels[0].density.mean.shape[-1] == 448
    assert (made.config.recipe, made.config.lr, made.config.lr_unfrozen) == ("finetune", 0.001, 0.0001)
    start = network_of(made.untrained()).state_dict()
    norms = [
        f"backbone.{name}." for name, m in network_of(made).backbone.named_modules() if "BatchNorm" in str(type(m))
    ]
    for name, value in network_of(made).state_dict().items():
        same = torch.equal(value, start[name])
        assert same == name.startswith(tuple(norms)), name
        assert not name.startswith("backbone.") or torch.equal(start[name], weights[name.removeprefix("backbone.")])
    images, numerics = load_train(data, "brick", (32, 32), 0).images, Precision(1, "off", False)
    run = Trainer(made.config, images, "digest", torch.device("cpu"), numerics)
    rates = []
    for step in range(4):
        if step:
            save_tensors(run.state(), tmp_path / "state")
            run = Trainer(
                made.config, images, "digest", torch.device("cpu"), numerics, load_checkpoint(tmp_path / "state")
            )
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.train_step()
    assert rates == pytest.approx([0.001, 0.0005, 0.0001, 0.00005])  # a cosine for each phase
    assert all(torch.equal(v, network_of(made).state_dict()[name]) for name, v in run.network.state_dict().items())


# What the result depends on ---------------------------------------------------------------------------------------


def test_workers_and_other_categories_change_nothing(data, models, tmp_path, script):
    # in ``models`` it came after brick
    done = again(script, data, tmp_path / "none", "--type", "grass", "--workers", 0)
    assert done.code == 0, done.err
    assert same_weights(tmp_path / "none/grass.pt", models / "grass.pt")
    done = again(script, data, tmp_path / "four", "--type", "grass", "--workers", 4, "--cache_dir", "none")
    assert same_weights(tmp_path / "four/grass.pt", models / "grass.pt")


def test_another_seed_gives_another_network(data, models, tmp_path, script):
    assert script("run_training", *flags(data, tmp_path, "--seed", 1)).code == 0
    assert not same_weights(tmp_path / "models/brick.pt", models / "brick.pt")


@pytest.mark.parametrize(
    "more", [["--variant", "normal"], ["--variant", "scar", "--optim", "adam"], ["--variant", "union"]]
)
def test_variants_and_optimizers_train(data, tmp_path, script, more):
    done = script("run_training", *flags(data, tmp_path, "--epochs", 3, "--batch_size", 64, "--size", "48x32", *more))
    assert done.code == 0, done.err
    made = load(tmp_path / "models/brick.pt")
    assert made.config.size == (32, 48)
    assert made.config.variant == more[1]
    assert network_of(made).head[-1].out_features == 2
    assert made.config.lr == (0.001 if "adam" in more else 0.03)


def test_frozen_steps_leave_the_backbone_as_it_was(data, tmp_path, script):
    assert script("run_training", *flags(data, tmp_path, "--epochs", 3, "--freeze_resnet", 3)).code == 0
    made = load(tmp_path / "models/brick.pt")
    start = network_of(made.untrained()).state_dict()
    for name, value in network_of(made).state_dict().items():
        assert torch.equal(value, start[name]) == name.startswith("backbone."), name


def test_thawed_after_the_frozen_steps(data, tmp_path, script):
    assert script("run_training", *flags(data, tmp_path, "--epochs", 3, "--freeze_resnet", 2)).code == 0
    made = load(tmp_path / "models/brick.pt")
    start = network_of(made.untrained()).state_dict()
    assert not torch.equal(network_of(made).state_dict()["backbone.conv1.weight"], start["backbone.conv1.weight"])
    assert network_of(made).state_dict()["backbone.bn1.num_batches_tracked"] == 1


def test_pretrained_weights_from_a_file(data, tmp_path, script):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    state = resnet18().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    more = ["--pretrained", "--weights", tmp_path / "weights.pth", "--epochs", 2, "--freeze_resnet", 2]
    assert script("run_training", *flags(data, tmp_path, *more)).code == 0
    made = load(tmp_path / "models/brick.pt")
    assert (made.config.recipe, made.config.frozen_steps) == ("finetune", 2)
    assert torch.equal(
        network_of(made).backbone.conv1.weight, state["conv1.weight"]
    )  # frozen for longer than it trained


# What it writes ---------------------------------------------------------------------------------------------------


def test_preview_writes_a_sheet_and_trains_nothing(data, tmp_path, script):
    done = script("run_training", *flags(data, tmp_path, "--preview", tmp_path / "sheet.png"))
    assert done.code == 0, done.err
    sheet = matplotlib.image.imread(tmp_path / "sheet.png")
    assert min(sheet.shape[:2]) > 300
    assert sheet[..., :3].std() > 0.1
    assert not (tmp_path / "models").exists()
    one_line(script("run_training", *flags(data, tmp_path, "--preview", "sheet.doc")), "sheet.doc", ".png")
    assert script("run_training", *flags(data, tmp_path, "--preview", tmp_path / "sheet.png")).code == 0
    photo = shutil.copy(data / "brick/train/good/000.png", tmp_path / "photo.png")
    content = photo.read_bytes()
    one_line(script("run_training", *flags(data, tmp_path, "--preview", photo)), "photo.png: is there already")
    assert photo.read_bytes() == content


def test_a_finished_category_is_skipped_and_other_settings_are_named(data, models, tmp_path, script):
    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models/brick.pt"
    before = path.stat().st_mtime_ns
    done = script("run_training", *flags(data, tmp_path))
    assert done.code == 0
    assert "is finished; skipped" in done.err
    one_line(script("run_training", *flags(data, tmp_path, "--lr", 0.1)), str(path), "lr 0.03", "0.1", "--overwrite")
    one_line(script("run_training", *flags(data, tmp_path, "--variant", "scar")), "3way", "scar")
    assert path.stat().st_mtime_ns == before
    assert script("run_training", *flags(data, tmp_path, "--epochs", 2, "--overwrite")).code == 0
    assert load(path).config.epochs == 2


PATCHES = ("--size", 48, "--patch_size", 32, "--window", 8, "--stride", 8)


def test_a_patch_model_trains_and_continues_bit_for_bit(data, tmp_path, script):
    more = (*PATCHES, "--location", "each")
    done = script("run_training", *flags(data, tmp_path / "whole", *more))
    assert done.code == 0, done.err
    made = load(tmp_path / "whole/models/brick.pt")
    assert made.config.patches.patch_size == 32
    assert made.members[0].levels[0].density.mean.shape == (6 * 6, 64)
    assert made.calibration_scores.shape == (8,)
    folder = tmp_path / "cut/models"
    process = start(data, folder, "--type", "brick", *more)
    wait_for_step(process, folder / "brick.checkpoint", 3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = again(script, data, folder, "--type", "brick", *more)
    assert "brick: continuing at step" in done.err
    assert same_weights(folder / "brick.pt", tmp_path / "whole/models/brick.pt")


def test_location_auto_says_what_it_chose(data, tmp_path, script):
    done = script("run_training", *flags(data, tmp_path, *PATCHES, "--epochs", 1))
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "one Gaussian" in line]
    found = dict(re.findall(r"(shared|each) (-?[\d.]+)", line))
    assert set(found) == {"shared", "each"}
    each = float(found["each"]) > float(found["shared"])
    assert ("for each location" in line) == each
    made = load(tmp_path / "models/brick.pt")
    assert made.members[0].levels[0].shared != each
    assert made.config.patches.location == "auto"


def test_too_few_images_for_a_gaussian_each_are_told_before_training(data, tmp_path, script):
    shutil.copytree(data / "brick", tmp_path / "Data/brick")
    for path in sorted((tmp_path / "Data/brick/train/good").iterdir())[5:]:
        path.unlink()
    done = script("run_training", *flags(tmp_path / "Data", tmp_path, *PATCHES, "--location", "each"))
    one_line(done, "--location", "brick: 5 training images", "needs 8", "take shared or auto")
    assert not (tmp_path / "logdirs").exists()


def test_a_crop_is_normalized_as_the_image_that_it_is_from():
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = functional.pad(images, (0, 16, 0, 16))
    images[4:] //= 3  # dark ones
    config = tiny_config(*PATCHES, "--translate", 0, "--jitter", 0)
    run = Trainer(config, images, "digest", torch.device("cpu"), Precision(1, "off", False))
    chosen, params = run.sample_batch()
    batch = run.make_views(run.load_batch(chosen), params)
    found = run.network.normalized(batch.views, batch.statistics)
    whole = run.network.normalized(images[chosen].float() / 255)
    assert found.shape == (12, 3, 32, 32)
    for image, (y, x) in enumerate(params.corner.tolist()):
        assert torch.allclose(found[image], whole[image, :, y : y + 32, x : x + 32], atol=1e-5)


def even_and_noisy() -> torch.Tensor:
    """Four images of one gray, in which no paste shows, and four of noise: (8, 3, 32, 32) uint8."""
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:4] = 90
    return images


def test_views_that_show_nothing_are_left_out_of_the_loss():
    """The mean over the others, as by hand."""
    flags = ("--invisible", "drop", "--jitter", 0, "--patch_jitter", 0, "--batch_size", 8)
    run = Trainer(tiny_config(*flags), even_and_noisy(), "", torch.device("cpu"), Precision(1, "off", False))
    chosen, params = run.sample_batch()
    batch = run.make_views(run.load_batch(chosen), params)
    even = (chosen < 4).repeat(3)
    assert not batch.learned[even].any()
    assert batch.learned[~even].float().mean() > 0.8
    logits = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss, accuracy, left_out = batch_values(logits, batch, 1.0, run.ranks)
    kept = batch.learned
    assert torch.allclose(loss, functional.cross_entropy(logits[kept], batch.labels[kept]))
    assert torch.allclose(accuracy, (logits.argmax(1) == batch.labels)[kept].float().mean())
    assert left_out == pytest.approx(1 - kept.float().mean().item())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient.abs().sum(1) > 0, kept)


def test_a_batch_that_shows_nothing_changes_no_weight():
    images = torch.full((8, 3, 32, 32), 90, dtype=torch.uint8)
    flags = ("--invisible", "drop", "--jitter", 0, "--patch_jitter", 0)
    run = Trainer(tiny_config(*flags), images, "", torch.device("cpu"), Precision(1, "off", False))
    before = run.network.head[0].weight.clone()
    loss, _, left_out = run.train_step()
    assert (loss, left_out) == (0, 1)
    assert torch.allclose(run.network.head[0].weight, before, atol=1e-5)  # but for the decay


def test_a_budget_of_minutes_sets_the_number_of_steps(data, tmp_path, script):
    """It is stored, and an interrupted run continues with it; another budget is another setting."""
    given = [str(flag) for flag in flags(data, tmp_path, "--minutes", 0.15)]
    place = given.index("--epochs")
    del given[place : place + 2]
    process = Forked(ROOT / "run_training.py", "--save_minutes", "0", *given)
    state = tmp_path / "models/brick.checkpoint"
    wait_for_step(process, state, 1)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[1]
    steps = int(re.search(r"brick: (\d+) steps in 0.15 minutes", told)[1])
    assert process.returncode == 130
    assert load_tensors(state, "checkpoint")["config"]["epochs"] == steps
    done = script("run_training", *given)
    assert done.code == 0, done.err
    assert re.search(rf"continuing at step \d+ of {steps}", done.err)
    config = load(tmp_path / "models/brick.pt").config
    assert (config.epochs, config.minutes) == (steps, 0.15)
    assert "is finished; skipped" in script("run_training", *given).err
    given[-1] = "0.5"
    one_line(script("run_training", *given), "minutes 0.15, now 0.5")


def test_steps_within_takes_the_time_of_planning_off(monkeypatch):
    """With a clock that each step moves on by a second: 8 steps of planning and 92 are a hundred seconds."""
    run = Trainer(tiny_config(), even_and_noisy(), "", torch.device("cpu"), Precision(1, "off", False))
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def step():
        now[0] += 1
        return torch.zeros(3)

    monkeypatch.setattr(run, "train_step", step)
    assert steps_within(100.0, run) == 92
    assert steps_within(0.0, run) == 1


def test_the_fast_recipe_trains_and_tells_what_it_sets(data, tmp_path, script):
    where = [
        "--data_dir",
        data,
        "--model_dir",
        tmp_path / "models",
        "--logdir",
        tmp_path / "logdirs",
        "--type",
        "brick",
    ]
    small = ["--size", 32, "--patch_size", 32, "--window", 8, "--epochs", 3, "--no-pretrained"]
    done = script("run_training", *where, "--recipe", "fast", *small)
    assert done.code == 0, done.err
    assert "recipe fast: patch_size 32, variant soft, invisible drop, optim adam," in done.err
    made = load(tmp_path / "models/brick.pt")
    assert (made.config.recipe, made.config.variant, made.config.batch_size) == ("fast", "soft", 28)
    evaluated = script("eval", *where[:4], "--eval_dir", tmp_path / "Eval", "--save_plots", 0)
    assert evaluated.code == 0, evaluated.err
    assert "brick pixel AUROC: " in evaluated.out
    one_line(script("run_training", *where, *small), "made with")


def test_preview_of_a_patch_model(data, tmp_path, script):
    done = script("run_training", *flags(data, tmp_path, *PATCHES, "--preview", tmp_path / "sheet.png"))
    assert done.code == 0, done.err
    assert matplotlib.image.imread(tmp_path / "sheet.png")[..., :3].std() > 0.1


# Bad input --------------------------------------------------------------------------------------------------------


def test_a_state_of_other_images_is_refused(data, tmp_path, script):
    own = tmp_path / "Data"
    shutil.copytree(data / "brick", own / "brick")
    process = start(own, tmp_path / "models", "--type", "brick")
    wait_for_step(process, tmp_path / "models/brick.checkpoint", 1)
    process.terminate()
    assert process.wait(60) == 143
    (own / "brick/train/good/000.png").unlink()
    one_line(script("run_training", *flags(own, tmp_path)), "brick.checkpoint", "other images", "--overwrite")
    (tmp_path / "models/brick.checkpoint").write_text("hello")
    one_line(script("run_training", *flags(own, tmp_path)), "brick.checkpoint", "truncated, damaged")


def test_a_run_keeps_the_numerics_it_began_with(data, tmp_path, monkeypatch, script):
    def chosen(saved=None, **asked):
        return choose_precision(asked, saved or {}, torch.device("cpu"), 8)

    fitting, _ = suitable_precision(torch.device("cpu"))
    saved = {"threads": 3, "amp": "bf16" if fitting == "off" else "off", "compile": True}
    assert chosen() == Precision(8, fitting, False)
    assert chosen(threads=2, amp="bf16", compile=True) == Precision(2, "bf16", True)
    assert chosen(saved) == chosen(saved, threads=3, amp=saved["amp"], compile=True) == Precision(**saved)
    for change, words in (
        ({"threads": 2}, "threads: made with threads 3, now 2"),
        ({"amp": fitting}, f"amp: made with amp {saved['amp']}, now {fitting}"),
        ({"compile": False}, "compile: made with compile 1, now 0"),
    ):
        with pytest.raises(SettingError, match=words):
            chosen(saved, **change)
    for kept, asked in (({}, {"amp": "fp16"}), ({"amp": "fp16"}, {})):
        with pytest.raises(SettingError, match="fp16 needs a GPU"):
            chosen(kept, **asked)
    done = script("run_training", *flags(data, tmp_path, "--amp", "fp16"))
    one_line(done, "--amp: fp16 needs a GPU")
    assert "precision:" not in done.err
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match="no C\\+\\+ compiler"):
        chosen(compile=True)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_the_precision_that_suits_the_processor_is_told_and_recorded(data, tmp_path, monkeypatch, script, has_bf16):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: has_bf16, raising=False)
    precision, reason = suitable_precision(torch.device("cpu"))
    assert precision == ("bf16" if has_bf16 and torch.backends.mkldnn.is_available() else "off")
    done = script("run_training", *flags(data, tmp_path, "--amp", "auto", "--epochs", 1))
    assert done.code == 0, done.err
    assert f"brick: precision {precision.replace('off', 'float32')} ({reason})\n" in done.err
    assert load(tmp_path / "models/brick.pt").metadata["amp"] == precision


def test_a_step_in_bf16_follows_one_in_float32():
    """From the same weights and batch: nearly the same loss, and an update in much the same direction; not the same."""
    config = tiny_config("--epochs", 3, "--lr", 0.001)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    losses, updates = {}, {}
    for amp in ("off", "bf16"):
        run = Trainer(config, images, "digest", torch.device("cpu"), Precision(1, amp, False))
        before = torch.cat([weight.detach().flatten() for weight in run.network.parameters()])
        losses[amp] = run.train_step()[0]
        updates[amp] = torch.cat([weight.detach().flatten() for weight in run.network.parameters()]) - before
    assert losses["off"] != losses["bf16"]
    torch.testing.assert_close(losses["bf16"], losses["off"], rtol=0.05, atol=0)
    assert torch.cosine_similarity(updates["off"], updates["bf16"], dim=0) > 0.5
    assert 0.8 < updates["off"].norm() / updates["bf16"].norm() < 1.25


def test_a_network_learns_from_the_images_it_may_see_wherever_they_live(tmp_path):
    """The second of three networks, by the same steps: from images in memory, in a file, and when others are changed
    that it may not see."""
    from dataset import load_images
    from runtime.cache import Storage

    paths = []
    for number in range(9):
        noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(noise.numpy()).save(paths[-1])
    images = load_images(paths, (32, 32), 0)
    others = images.clone()
    others[1::3] = 255 - others[1::3]
    losses = []
    for same in (images, load_images(paths, (32, 32), 0, Storage(None, 1)), others):
        config = tiny_config("--epochs", 4, "--folds", 3)
        run = Trainer(config, same, "digest", torch.device("cpu"), Precision(1, "off", False), member=1)
        losses.append([float(run.train_step()[0]) for _ in range(4)])
    assert losses[0] == losses[1] == losses[2]


def test_digest_tells_images_apart():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = images.clone()
    other[1, 2, 3, 3] = 1
    assert digest(images) == digest(images.clone()) != digest(other)


def test_bad_input_gets_one_line(data, tmp_path, script):
    def fails(*words, more=(), where=data):
        one_line(script("run_training", *flags(where, tmp_path, *more)), *words)
        assert not (tmp_path / "models/brick.pt").exists()

    fails("nowhere", "no such folder", where=tmp_path / "nowhere")
    fails("glass", "no such category", "brick, grass, gravel", more=("--type", "glass"))
    own = tmp_path / "Data"
    (own / "brick").mkdir(parents=True)
    fails("brick/train/good", "no such folder", where=own)
    good = own / "brick/train/good"
    good.mkdir(parents=True)
    fails(str(good), "0 image(s) found, at least 2", "png", where=own)
    shutil.copy(data / "brick/train/good/000.png", good)
    fails(str(good), "1 image(s) found, at least 2", where=own)
    whole = (good / "000.png").read_bytes()
    (good / "001.png").write_bytes(whole[: len(whole) // 2])
    fails("001.png", "not a readable image", where=own)
    fails("--cuda 1", more=("--cuda", 1)) if not torch.cuda.is_available() else None
    (tmp_path / "file").write_text("")
    fails("file/models", more=("--model_dir", tmp_path / "file/models"))
    fails("weights.pth", "no such file", more=("--pretrained", "--weights", "weights.pth"))


def test_weights_that_cannot_be_downloaded_name_the_way_out(data, tmp_path):
    offline = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = train(data, tmp_path / "models", "--type", "brick", "--pretrained", **offline)
    one_line(done, "could not be downloaded", "--weights FILE", "--no-pretrained")


def test_a_full_disk_gets_one_line_and_keeps_what_was_there(data, models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    before = (tmp_path / "models/brick.pt").read_bytes()
    small_disk = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, 2**20))  # no file over 1 MiB
    done = train(data, tmp_path / "models", "--type", "brick", "--overwrite", "--epochs", 2, preexec=small_disk)
    one_line(done, "brick.checkpoint", "cannot be written")
    assert (tmp_path / "models/brick.pt").read_bytes() == before


def test_a_full_disk_for_tensorboard_gets_one_line(data, tmp_path):
    tiny_disk = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**13, 2**13))
    done = train(data, tmp_path / "models", "--type", "brick", preexec=tiny_disk)
    one_line(done, "logdirs/models/brick")


def test_equal_images_are_refused_and_copies_of_one_are_not(data, tmp_path, script):
    good = tmp_path / "Data/brick/train/good"
    good.mkdir(parents=True)
    for index in range(4):
        shutil.copy(data / "brick/train/good/000.png", good / f"{index}.png")
    one_line(script("run_training", *flags(tmp_path / "Data", tmp_path)), "brick", "all training images are equal")
    shutil.copy(data / "brick/train/good/001.png", good / "5.png")
    done = script("run_training", *flags(tmp_path / "Data", tmp_path, "--epochs", 2, "--batch_size", 16))
    assert done.code == 0, done.err
    assert "5 training images, so 5 per step" in done.err
    assert load(tmp_path / "models/brick.pt").threshold > 0


def test_without_test_images_it_trains_all_the_same(data, tmp_path, script):
    shutil.copytree(data / "brick/train", tmp_path / "Data/brick/train")
    (tmp_path / "Data/brick/test").mkdir()
    done = script("run_training", *flags(tmp_path / "Data", tmp_path, "--epochs", 2, "--test_epochs", 1))
    assert done.code == 0, done.err
    assert "no test images, so no AUROC while training" in done.err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--epoch", "3"],
        ["--epochs", "-1"],
        ["--variant", "4way"],
        ["--size", "8"],
        ["--size", "axb"],
        ["--cuda", "yes"],
        ["--lr", "-1"],
        ["--jitter", "0.7"],
        ["--type", "../brick"],
        ["surplus"],
        ["--no-pretrained", "--weights", "resnet18.pth"],
        ["--window", "32"],
        ["--patch_size", "16"],
        ["--patch_size", "64", "--size", "96x48"],
        ["--patch_size", "64", "--density", "kde"],
        ["--patch_size", "64", "--window", "512"],
        ["--patch_size", "64", "--level", "3", "--stride", "24"],
        ["--patch_size", "64", "--location", "all"],
        ["--patch_size", "64", "--sigma", "0"],
    ],
)
def test_wrong_usage_exits_with_2(script, wrong):
    done = script("run_training", *wrong)
    assert done.code == 2
    assert "usage:" in done.err
