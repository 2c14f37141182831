"""log.py: what TensorBoard holds, the warning of views that show nothing, the end of a run that diverges."""

import re

import pytest
import torch
from conftest import TINY, one_line
from PIL import Image
from test_trainer import even_and_noisy, flags, tiny_config

from runtime.files import InputError
from training.trainer import check_finite, invisible_shares


def test_tensorboard_holds_what_the_readme_says(data, tmp_path, script):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert script("run_training", *flags(data, tmp_path, "--test_epochs", 6)).code == 0
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


def test_shares_of_views_that_show_nothing_are_told(tmp_path, script):
    still = ["--jitter", 0, "--patch_jitter", 0]
    config = tiny_config(*still)
    shares = invisible_shares(config, even_and_noisy())
    assert list(shares) == ["patch", "scar"]
    assert all(0.5 <= share < 0.7 for share in shares.values())
    assert invisible_shares(tiny_config("--variant", "union"), even_and_noisy()[4:])["patch or scar"] < 0.2
    folder = tmp_path / "Data/plate/train/good"
    folder.mkdir(parents=True)
    for number, image in enumerate(even_and_noisy()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    where = ["--data_dir", tmp_path / "Data", "--model_dir", tmp_path / "models", "--logdir", tmp_path / "logdirs"]
    for name, word in (("keep", "are learned as anomalous (--invisible drop"), ("drop", "are left out of the loss")):
        done = script("run_training", *where, *TINY, *still, "--epochs", 1, "--overwrite", "--invisible", name)
        assert done.code == 0, done.err
        assert re.search(
            r"plate: views that show no difference from the image: \d+ % of patch, \d+ % of scar; ", done.err
        )
        assert word in done.err


def test_a_loss_that_is_not_finite_stops(data, tmp_path, script):
    for more in ([], ["--test_epochs", 3], ["--epochs", 1]):
        done = script("run_training", *flags(data, tmp_path, "--lr", 1e9, *more))
        one_line(done, "brick", "not finite" if "--epochs" in more else "at step", "lower --lr")
        assert not (tmp_path / "models/brick.pt").exists()
    check_finite("brick", 1, 0.5, torch.zeros(3))
    with pytest.raises(InputError, match="a weight of the network is not finite at step 3"):
        check_finite("brick", 3, 0.5, torch.zeros(3), torch.tensor([1.0, float("nan")]))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="at step 7"):
            check_finite("brick", 7, bad)
