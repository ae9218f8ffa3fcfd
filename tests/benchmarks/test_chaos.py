"""Killed, interrupted, damaged and denied the disk, a run of the command line ends bit for bit as one that was not.

What is compared is all that it keeps: state, averages, the objective's state, the position in the data, snapshots and
log. `python -m benchmarks.chaos` does more than a hundred times what is done here once.
"""

import json
import os
import subprocess
import sys

from benchmarks import chaos
from benchmarks.report import Result, write, write_page


def test_nothing_is_lost_whatever_is_done_to_a_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.chaos", "--quick", "--seed=3", f"--results={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    tallies = json.loads((tmp_path / "chaos.json").read_text())["tally"]
    assert set(tallies) == {title for title, kind in chaos.KINDS.items() if kind.quick}
    for title, tally in tallies.items():
        assert tally == {"tried": 1, "documented": 1, "recovered": 1, "equal": 1, "lost": 0}, (title, done.stdout)
    assert "| **all** | 6 | 6 | 6 | 6 | 0 |" in (tmp_path / "chaos.md").read_text()
    # The page of timings has no place for it.
    write(
        Result(
            "timings",
            "python",
            1.0,
            {"versions": {}, "device": "", "processor": "", "cores": 1, "python": "", "load_before": 0, "date": ""},
            (),
        ),
        tmp_path,
    )
    assert "chaos" not in write_page(tmp_path).read_text()


def test_the_whole_run_strikes_more_than_a_hundred_times_in_one_and_in_two_processes():
    kills = {title: kind for title, kind in chaos.KINDS.items() if "SIG" in title}
    assert sum(kind.full for kind in kills.values()) >= 100
    assert {kind.processes for kind in kills.values()} == {1, 2}
    planned = [one for plan in chaos.plans(False, ()) for one in plan]
    assert {title: sum(one[0] == title for one in planned) for title in chaos.KINDS} == {
        title: kind.full for title, kind in chaos.KINDS.items()
    }
