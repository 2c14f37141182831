"""A few faults of every kind, as `make faults` makes thousands of them."""

import re
import subprocess
import sys

from conftest import ROOT

ROWS = ["damaged images", "damaged files: detector", "forged files: normal images", "kills: prediction"]
ROWS += ["full disk: training", "two at once: training"]
SHORT = ["--share", "0.01", "--only", ",".join(ROWS)]


def test_nothing_is_lost_crashes_is_executed_or_is_silently_wrong():
    done = subprocess.run([sys.executable, ROOT / "tests/faults.py", *SHORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| ([a-z: ]+) \| (\d+) \| (\d+) \| (\d+) \| 0 \| 0 \| 0 \| 0 \|$", done.stdout, re.M)
    assert len(rows) == len(ROWS), done.stdout
    assert all(int(tried) == int(same) + int(told) > 0 for _, tried, same, told in rows)
