"""Exit codes, signals and the precision that suits a device."""

import argparse
import io
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run

from runtime import cli as script
from runtime.cli import (
    Interrupts,
    check_usage,
    choose_device,
    device_name,
    folder_name,
    progress_bar,
    run_script,
    suitable_precision,
)
from runtime.distributed import RankError
from runtime.files import InputError, print_line, say, shown

CPU = torch.device("cpu")
FULL = "train.py: error: the memory is full; lower --batch_size, --size, --workers or --memory_gb, or free some"


def too_much_for(allocate):
    """Return the error that asking for too much memory raises."""
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    return caught.value


def ends(error, capsys, monkeypatch):
    """Exit code and stderr of a script whose main function raises an error."""

    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(main, argparse.ArgumentParser(prog="train.py"))
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.png: no image; remove it"), 1, "train.py: error: a.png: no image; remove it"),
        (RankError("rank 0 lost another rank"), 1, "train.py: error: rank 0 lost another rank"),
        (OSError(28, "No space left on device", "a.pt"), 1, "train.py: error: a.pt: No space left on device"),
        (OSError("no number"), 1, "train.py: error: no number"),
        (MemoryError("Unable to allocate 9 EiB"), 1, FULL),
        (too_much_for(lambda: torch.empty(2**60)), 1, FULL),
        (too_much_for(lambda: np.empty(2**58)), 1, FULL),
        (argparse.ArgumentTypeError("--a contradicts --b"), 2, "train.py: error: --a contradicts --b"),
        (KeyboardInterrupt(), 130, "train.py: interrupted"),
        (SystemExit(143), 143, ""),
    ],
)
def test_exit_codes(error, code, line, capsys, monkeypatch):
    found, err = ends(error, capsys, monkeypatch)
    assert found == code
    assert err.rstrip("\n").split("\n")[-1] == line
    assert len(err.splitlines()) == (2 if code == 2 else bool(line))  # usage, then the error


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(ValueError, match="a bug"):
        ends(ValueError("a bug"), capsys, monkeypatch)


def test_messages_go_to_stderr(capsys):
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_a_name_breaks_no_line(capsys):
    """Neither its line breaks nor its bytes that are no UTF-8."""
    name, escaped = "a\nb\r\udcff\x1b[31m é日$.png", "a\\nb\\r\\udcff\\x1b[31m é日$.png"
    assert shown(name) == escaped
    say(name)
    print_line(name)
    assert capsys.readouterr() == (f"{escaped}\n", f"{escaped}\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_name_ends_a_script_whose_streams_lack_its_letters(encoding, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    monkeypatch.setattr("sys.argv", ["train.py"])

    def main(args):
        print_line("日.png")
        raise InputError("日.png: no image")

    with pytest.raises(SystemExit):
        run_script(main, argparse.ArgumentParser(prog="train.py"))
    name = "日" if encoding == "utf-8" else "\\u65e5"
    for stream, line in zip(streams, (f"{name}.png", f"train.py: error: {name}.png: no image")):
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding) == line + "\n"


def test_interrupts():
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with Interrupts() as interrupts:
            assert interrupts.signal == 0
            os.kill(os.getpid(), number)
            assert interrupts.signal == number
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run_training", ["--type", "brick"]),
        ("eval", ["--type", "brick"]),
        ("check_data", ["--type", "brick"]),
        ("prepare_data", ["textures"]),
        ("predict", [ROOT / "README.md", ROOT]),
    ],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(name, words, tmp_path):
    command = [sys.executable, "-X", "importtime", ROOT / f"{name}.py", *words]
    plain = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  tests may run where it is ignored
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=plain,
    )
    try:
        assert any(" numpy." in line for line in process.stderr)  # wait until that is being imported
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1].splitlines()
    finally:
        process.kill()
    assert process.returncode == 130
    assert [line for line in told if not line.startswith("import time:")] == [f"{name}.py: interrupted"]


def test_a_script_itself_is_interrupted_by_an_exception(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    parser, ends = argparse.ArgumentParser(prog="train.py"), []

    def main(args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            ends.append("saved")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check_usage(parser)
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        with pytest.raises(SystemExit, match="130"):
            run_script(main, parser)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        check_usage(parser)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as it is after nohup ... &
    finally:
        signal.signal(signal.SIGINT, before)
    assert ends == ["saved"]
    assert capsys.readouterr().err == "train.py: interrupted\n"


# Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["torch", "/proc/cpuinfo"])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx2 amx_tile avx512_bf16", ("bf16", "amx_tile")),
        ("avx2 avx512_bf16", ("bf16", "avx512_bf16")),
        ("avx2 avx512_bf16x", ("off", "neither amx_tile nor avx512_bf16")),
    ],
)
def test_bf16_where_the_processor_has_it(monkeypatch, asked, flags, expected):
    """By torch's word where it has one, else by the system's."""
    for name in ("amx_tile", "avx512_bf16"):
        if asked == "torch":
            has = name in flags.split()
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=has: has, raising=False)
        else:
            monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
    monkeypatch.setattr(script, "_cpuinfo", {"flags": flags if asked != "torch" else ""}.get)
    assert suitable_precision(CPU) == expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert suitable_precision(CPU)[0] == "off"


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "bf16"), ((8, 6), "bf16"), ((7, 5), "fp16"), ((6, 1), "off")]
)
def test_precision_of_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert suitable_precision(torch.device("cuda")) == (expected, "compute capability {}.{}".format(*capability))


def test_this_device():
    precision, reason = suitable_precision(CPU)
    assert precision in script.PRECISIONS
    assert reason
    assert device_name(CPU)
    assert choose_device(False) == CPU


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--cuda 1: torch sees no CUDA device"):
        choose_device(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="rank 2 of this machine needs a GPU of its own"):
        choose_device(True, 2)


def test_folder_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [folder_name(path) for path in ("runs/a/", "a", ".")] == ["a", "a", tmp_path.name]


# Wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("run_training.py --patchsize 64", 2, "unrecognized arguments: --patchsize 64; did you mean --patch_size?"),
        ("run_training.py --Batch-Size=4", 2, "did you mean --batch_size?"),
        ("run_training.py --frobnicate", 2, "unrecognized arguments: --frobnicate (usage: run_training.py --help)"),
        ("run_training.py --epochs many", 2, "argument --epochs: 'many': a whole number"),
        ("run_training.py --ignore {folder} --epoch 1", 2, "did you mean --epochs?"),
        ("run_training.py --weights {folder}", 1, "--weights {folder}: Is a directory; the name of a file is needed"),
        ("eval.py --model_dir {file}", 1, "--model_dir {file}: is a file; a folder is needed"),
        ("check_data.py --data_dir {file}", 1, "--data_dir {file}: is a file; a folder is needed"),
        ("prepare_data.py folder --god photos", 2, "required: --good; did you mean --good?"),
        ("prepare_data.py folder --good x --heldout 0.1", 2, "did you mean --held_out?"),
        ("prepare_data.py folder --good {file}", 1, "--good {file}: is a file; a folder is needed"),
        ("predict.py {folder} {file}", 2, "{folder}: is a folder; a detector file comes first, here {file}"),
        ("predict.py a.png {file}", 2, "a.png: is no detector; a detector file comes first, here {file}"),
        ("predict.py {file}", 2, "a detector file and images are needed"),
        ("predict.py {file} {folder} none.png", 1, "none.png: no such file or folder"),
        ("predict.py {file} {folder} --heatmap why", 2, "did you mean --heatmaps?"),
        ("predict.py {file} {folder} --output {folder}", 1, "--output {folder}: Is a directory"),
    ],
)
def test_wrong_usage_is_one_line_that_helps(tmp_path, command, code, words):
    """Told by the script itself, in a process of its own."""
    names = {"folder": str(tmp_path), "file": str(tmp_path / "lid.pt")}
    (tmp_path / "lid.pt").touch()
    done = run(*(word.format(**names) for word in command.split()))
    assert done.code == code
    assert len(done.err.splitlines()) == 1
    assert "error: " in done.err
    assert words.format(**names) in done.err


# Progress ---------------------------------------------------------------------------------------------------------


def test_where_stderr_is_no_terminal_bars_and_messages_are_lines(capsys):
    with progress_bar("bottle", 0, 4, True) as bar:
        for number in range(4):
            say(f"message {number}")
            bar.update()
            if number == 2:
                bar.refresh()
    lines = capsys.readouterr().err.split("\n")
    assert lines[:3] == ["message 0", "message 1", "message 2"]
    assert re.match(r"bottle:  75%.*\| 3/4 ", lines[3])
    assert lines[4:] == ["message 3", ""]  # a run of seconds shows no bar of its own accord
    assert not any("\r" in line for line in lines)


def test_on_a_terminal_a_message_is_never_behind_a_bar(monkeypatch):
    """The bar is cleared before, and drawn again after it."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("bottle", 0, 4, True) as bar:
        bar.update(2)
        say("message")
    before, _, after = terminal.getvalue().partition("message\n")
    assert re.search(r"bottle: .*\r +\r$", before, re.S)
    assert "bottle: " in after
