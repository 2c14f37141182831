"""Ranks under torchrun: two processes do the work of one, with the same results."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, TINY, one_line, same_weights, wait_for_step
from forked import Forked
from torch.distributed import run as torch_run
from torch.nn.functional import cross_entropy

from config import config_of
from cutpaste import make_views, sample_params, visible
from model import CutPasteNet
from run_training import check_ranks, get_parser
from runtime.distributed import Ranks, from_environment
from runtime.files import InputError, load_tensors


def torchrun(*command, restarts):
    """A script under torchrun on two CPU processes of one thread each, left running. They are forks of torchrun, which
    is one itself: five processes that imported torch would take a minute of a processor."""
    where = ["--nnodes", 1, "--nproc_per_node", 2, "--max_restarts", restarts, "--local_addr", "127.0.0.1"]
    store = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--start_method", "fork", "--run_path"]
    script = [ROOT / command[0], *command[1:]]
    beside = partial(exec, f"import sys; sys.path[0] = {str(ROOT)!r}")  # as where the script is, not torchrun
    return Forked(torch_run.__file__, *where, *store, *script, preexec=beside, GLOO_SOCKET_IFNAME="lo")


def start_two_ranks(start):
    """Call ``start`` with the environment that torchrun would give the first of two ranks, then the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0, "GROUP_WORLD_SIZE": 1}
    return [start({k: str(v) for k, v in (env | {"RANK": rank, "LOCAL_RANK": rank}).items()}) for rank in range(2)]


def two_ranks(*command):
    """A script as two ranks without torchrun."""
    both = start_two_ranks(lambda env: Forked(ROOT / command[0], *command[1:], **env))
    texts = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    return SimpleNamespace(out="".join(out for out, _ in texts), err="".join(err for _, err in texts))


def flags(data, folder, *more):
    where = ("--data_dir", data, "--model_dir", folder, "--logdir", folder.parent / "logdirs")
    return ("run_training.py", *where, *TINY, *more)


def test_each_rank_trains_its_categories_and_eval_shares_them(data, models, tmp_path, script):
    folder = tmp_path / "models"
    assert two_ranks(*flags(data, folder, "--type", "brick,grass")).out == ""
    assert [p.name for p in sorted(folder.iterdir())] == ["brick.normals", "brick.pt", "grass.normals", "grass.pt"]
    for name in ("brick.pt", "grass.pt"):
        assert same_weights(folder / name, models / name)

    where = ("--data_dir", data, "--model_dir", folder, "--control", 1)
    alone = script("eval", *where, "--eval_dir", tmp_path / "alone", "--save_plots", 0)
    shared = two_ranks("eval.py", *where, "--eval_dir", tmp_path / "shared")
    assert alone.code == 0, alone.err
    assert shared.out == alone.out
    assert len(shared.out.splitlines()) == 6
    assert len([path for path in (tmp_path / "shared").rglob("*") if path.is_file()]) == 9  # plots of both categories
    for name in ("results.csv", "scores.csv"):
        expected = (tmp_path / "alone/models" / name).read_text().replace("/alone --save_plots 0", "/shared")
        assert (tmp_path / "shared/models" / name).read_text() == expected


def test_ranks_share_the_networks_of_a_detector(data, tmp_path, script):
    more = ("--folds", 2, "--type", "brick,grass", *SMALL, "--epochs", 2)
    shared, alone = tmp_path / "shared" / "models", tmp_path / "alone" / "models"
    two_ranks(*flags(data, shared, *more))
    assert script("run_training", *flags(data, alone, *more)[1:]).code == 0
    for folder in (shared, alone):
        assert [p.name for p in sorted(folder.iterdir())] == ["brick.normals", "brick.pt", "grass.normals", "grass.pt"]
    for name in ("brick.pt", "grass.pt"):
        assert same_weights(shared / name, alone / name)
    args = get_parser().parse_args(["--folds", "3", "--minutes", "1"])
    with pytest.raises(InputError, match="--minutes: not with --folds"):  # each rank would count other steps
        check_ranks(args, config_of(args, "brick"), Ranks(0, 2))


def child_pids(process):
    return [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]


def test_a_killed_rank_is_restarted_and_interrupted_ranks_stop_at_one_step(data, tmp_path):
    """With one restart of torchrun: kill -9 of one rank in the middle, SIGTERM later, the same command after that."""
    more = ("--type", "brick", "--save_minutes", 0, "--ddp", 1, *SMALL, "--epochs", 12)
    plain = tmp_path / "plain" / "models"
    two_ranks(*flags(data, plain, *more))
    folder = tmp_path / "killed" / "models"
    state = folder / "brick.checkpoint"
    process = torchrun(*flags(data, folder, *more), restarts=1)
    wait_for_step(process, state, 1)
    os.kill(child_pids(process)[1], signal.SIGKILL)
    time.sleep(0.5)  # no rank writes any more
    wait_for_step(process, state, load_tensors(state, "checkpoint")["step"] + 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert err.count("brick: continuing at step") == 1
    (step,) = re.findall(r"brick: stopped at step (\d+), state saved", err)
    assert load_tensors(state, "checkpoint")["step"] == int(step) < 12
    assert not (folder / "brick.pt").exists()
    done = two_ranks(*flags(data, folder, *more))
    assert f"brick: continuing at step {step} of 12" in done.err
    assert same_weights(folder / "brick.pt", plain / "brick.pt")
    assert not state.exists()


ENDING = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from torch.distributed import all_reduce
from runtime import distributed as ranks

class Slow:
    def __del__(self):
        time.sleep(1)

here = ranks.from_environment()
with ranks.ending():
    sys.while_the_interpreter_goes = [Slow()]
    with here.joined(False):
        number = torch.ones(1)
        number.slow = Slow()
        if here.is_main:
            time.sleep(0.5)
        all_reduce(number, async_op=True)
        del number  # now the last to let go of it is Gloo's thread, when the first rank has come
        time.sleep(1)
    print("left", here.rank, file=sys.stderr)
    code = {codes}[here.rank]
    if code is None:
        raise ValueError("a bug")
    if code:
        sys.exit(code)
"""


@pytest.mark.parametrize("codes", [(None, 0), (3, None)])
def test_a_rank_ends_while_a_thread_frees_a_tensor(tmp_path, codes):
    """It neither aborts nor waits for ever, and has its exit code; a bug its traceback."""
    script = tmp_path / "ending.py"
    script.write_text(ENDING.format(root=str(ROOT), codes=codes))
    command = [sys.executable, script]
    start = lambda env: subprocess.Popen(command, env=os.environ | env, stderr=subprocess.PIPE, text=True)  # noqa: E731
    for rank, (process, code) in enumerate(zip(start_two_ranks(start), codes)):
        _, err = process.communicate(timeout=100)
        assert process.returncode == (1 if code is None else code), err
        assert f"left {rank}" in err
        assert ("ValueError: a bug" in err) == (code is None)


GRADIENTS = """
import sys, torch
sys.path.insert(0, {root!r})
from cutpaste import make_views, rows, sample_params, visible
from model import CutPasteNet
from runtime import distributed as ranks
from training.trainer import Batch, batch_values
here = ranks.from_environment()
with ranks.ending(), here.joined(False):
    for case, (images, drop) in enumerate(torch.load({folder!r} + "/cases", weights_only=True)):
        torch.manual_seed(0)
        network = CutPasteNet("resnet18", 1, 3, "image").double().train()
        network = ranks.sync_batch_norm(network, False)
        forward = ranks.data_parallel(network, here, False)
        params = sample_params("3way", len(images), 48, 64, torch.Generator().manual_seed(1), jitter=0, patch_jitter=0)
        params, images, share = rows(params, here.rows), images[here.rows], len(images[here.rows]) / len(images)
        views, labels = make_views(images, params)
        learned = visible(views, params, images.float() / 255) if drop else None
        batch = Batch(views, labels, None, learned)
        (batch_values(forward(views.double())[0], batch, share, here)[0] * here.world_size).backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        torch.save((gradients, dict(network.named_buffers())), {folder!r} + f"/{{case}}.{{here.rank}}")
"""


def test_ddp_gives_the_gradients_of_the_whole_batch(tmp_path):
    """Also of a batch that does not divide by two, and of one whose first images show nothing. In float64: in float32
    rounding alone, blown up by batch normalization over a few pixels, moves the gradient of so small a batch by 0.2
    percent."""
    cases = []
    for count, drop in ((8, False), (7, True)):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (count, 3, 48, 64), dtype=torch.uint8, generator=generator)
        images[:3] = 90
        cases.append((images, drop))
    torch.save(cases, tmp_path / "cases")
    (tmp_path / "gradients.py").write_text(GRADIENTS.format(root=str(ROOT), folder=str(tmp_path)))
    two_ranks(tmp_path / "gradients.py")

    for case, (images, drop) in enumerate(cases):
        count = len(images)
        torch.manual_seed(0)
        network = CutPasteNet("resnet18", 1, 3, "image").double().train()
        params = sample_params("3way", count, 48, 64, torch.Generator().manual_seed(1), jitter=0, patch_jitter=0)
        views, labels = make_views(images, params)
        learned = visible(views, params, images / 255) if drop else torch.ones(len(views), dtype=torch.bool)
        assert learned.view(3, count)[:, :3].any() != drop
        cross_entropy(network(views.double())[0][learned], labels[learned]).backward()
        expected = [parameter.grad for parameter in network.parameters()]
        both = [torch.load(tmp_path / f"{case}.{rank}", weights_only=True) for rank in (0, 1)]
        (one, _), (other, _) = both
        assert all(torch.equal(a, b) for a, b in zip(one, other))
        difference = sum((a - b).square().sum() for a, b in zip(expected, one)).sqrt()
        assert difference < 1e-6 * sum(a.square().sum() for a in expected).sqrt()
        for _, buffers in both:
            for name, buffer in network.named_buffers():
                torch.testing.assert_close(buffers[name], buffer, rtol=1e-6, atol=1e-6)


def torchrun_says(monkeypatch, rank, count, restarts=0, machines=1):
    for name, value in {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(machines))


def test_what_ranks_cannot_do_gets_one_line(data, tmp_path, monkeypatch, script):
    torchrun_says(monkeypatch, 2, 5, restarts=1)
    assert from_environment() == Ranks(2, 5, 2, 1)
    done = script("run_training", *flags(data, tmp_path, "--ddp", 1)[1:])
    one_line(done, "--batch_size 4", "5 ranks")
    done = script("run_training", *flags(data, tmp_path, "--overwrite")[1:])
    one_line(done, "--overwrite would start anew")
    torchrun_says(monkeypatch, 2, 5, machines=2)
    one_line(script("run_training", *flags(data, tmp_path, "--overwrite")[1:]), "--overwrite: not on several machines")
    assert not (tmp_path / "models").exists()


def test_shards_are_disjoint_and_whole(monkeypatch):
    items = [*"abcdefg"]
    for count in (1, 2, 3, 9):
        shards = [Ranks(rank, count).shard(items) for rank in range(count)]
        assert sorted(item for shard in shards for item in shard) == items
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
        assert [items[Ranks(rank, count).rows] for rank in range(count)] == shards
    monkeypatch.setenv("RANK", "5")  # left by something else
    assert from_environment() == Ranks()


def test_alone_nothing_is_set_up():
    alone = Ranks()
    assert alone.is_main
    with alone.joined(False):
        assert not torch.distributed.is_initialized()
        assert alone.gather(3) == [3]
        assert alone.broadcast(lambda: 4) == 4
        assert alone.all_reduce_max(5) == 5
        assert alone.all_reduce_sum(torch.tensor(6.0)) == 6
