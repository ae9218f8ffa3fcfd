"""The comparison is fair and its statistics are right, on clocks that the tests turn themselves; nothing is timed."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import report
from benchmarks.gpu import forward_flops
from benchmarks.harness import Ratio, Summary, calls_per_turn, interleave, ratio, summarise
from benchmarks.report import Result, Row, environment, page, read, write, write_page
from benchmarks.run import main
from benchmarks.workload import DIT, UNET


class World:
    """A clock that only moves when somebody works; it remembers who worked."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def worker(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds(len(self.log)) if callable(seconds) else seconds

        return call

    def run(self, contenders, rounds, **options):
        options = {
            "warmup": 1,
            "turn": 1.0,
            "settled": 0.0,
            "clock": lambda: self.now,
            "sleep": lambda _: None,
            **options,
        }
        return interleave(contenders, rounds, **options)


def test_every_round_gives_everyone_one_turn_and_nobody_is_always_first():
    world = World()
    names = ("a", "b", "c")
    times = world.run({name: world.worker(name, 1.0) for name in names}, 6)
    turns = np.reshape(world.log[3:], (6, 3))
    assert all(set(turn) == set(names) for turn in turns)
    assert [list(turns[:, 0]).count(name) for name in names] == [2, 2, 2]
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(names, 6)


def test_warm_up_is_not_timed():
    world = World()
    times = world.run({"a": world.worker("a", lambda call: 100.0 if call <= 3 else 2.0)}, 4, warmup=3)
    assert times == {"a": [2.0] * 4}


def test_short_work_is_repeated_and_the_time_is_that_of_one_call():
    world = World()
    times = world.run({"short": world.worker("short", 0.125), "long": world.worker("long", 3.0)}, 2)
    assert world.log.count("short") == 1 + 2 * 8
    assert world.log.count("long") == 1 + 2
    assert times == {"short": [0.125] * 2, "long": [3.0] * 2}
    assert calls_per_turn(0.0) >= 1


def test_the_first_call_after_somebody_else_is_not_timed():
    world = World()

    def seconds(call):
        return 2.0 if world.log[-2:-1] == ["a"] else 50.0

    times = world.run({"a": world.worker("a", seconds), "b": world.worker("b", 60.0)}, 3, warmup=2, settled=30.0)
    assert times == {"a": [2.0] * 3, "b": [60.0] * 3}
    assert world.log.count("b") == 2 + 3, "long work settles within itself"


def test_pauses_come_before_turns_and_are_not_timed():
    world = World()

    def sleep(seconds):
        world.now += 1000.0 * seconds

    times = world.run({"a": world.worker("a", 1.0)}, 3, pause=1.0, sleep=sleep)
    assert times == {"a": [1.0] * 3}
    assert world.now > 3000.0


def test_summary_is_the_median_with_its_quartiles_and_one_outlier_does_not_move_it():
    assert summarise([1.0, 2.0, 3.0, 4.0, 5.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert summarise([1.0, 2.0, 3.0, 4.0, 1e6]).median == 3.0


def test_ratio_is_how_many_times_faster_ours_is():
    assert ratio([4.0] * 5, [2.0] * 5) == Ratio(2.0, 2.0, 2.0)


def test_noise_that_hits_both_does_not_widen_the_interval():
    machine = np.exp(np.random.default_rng(0).normal(0, 0.5, 31))
    together = ratio(3 * machine, machine)
    np.testing.assert_allclose(together, (3, 3, 3), rtol=1e-9)
    apart = ratio(3 * np.random.default_rng(1).permutation(machine), machine)
    assert apart.high - apart.low > 0.5


def test_interval_covers_the_true_ratio_and_shrinks_with_rounds():
    rng = np.random.default_rng(2)

    def draw(rounds):
        return ratio(2 * np.exp(rng.normal(0, 0.2, rounds)), np.exp(rng.normal(0, 0.2, rounds)), resamples=500)

    intervals = [draw(25) for _ in range(100)]
    covered = sum(low <= 2 <= high for _, low, high in intervals)
    assert 85 <= covered <= 100
    assert np.mean([r.high - r.low for r in intervals]) > 1.5 * np.mean([np.diff(draw(225)[1:])[0] for _ in range(20)])


def test_ratio_needs_whole_rounds():
    with pytest.raises(ValueError, match="same number of rounds"):
        ratio([1.0, 2.0], [1.0])


def row(**fields):
    return Row(**{"case": "work", "ours": Summary(0.5, 0.4, 0.6, 7), **fields})


def against(value, aim):
    return row(peer="other", theirs=Summary(1.0, 0.9, 1.1, 7), ratio=Ratio(value, value - 0.1, value + 0.1), aim=aim)


def test_aims():
    assert against(1.3, 1.3).holds
    assert against(1.2, 1.3).holds is False
    assert row(limit=0.5).holds
    assert row(limit=0.4).holds is False
    assert row().holds is None


def test_results_are_read_back_and_the_page_shows_what_missed_its_aim(tmp_path):
    rows = (against(2.0, 1.3), against(0.9, 1.0), row(limit=0.1, compile_seconds=3.0, memory=100.0, note="slow"))
    result = Result("fake", "python -m benchmarks.run fake", 12.0, environment("cpu"), rows)
    path = write(result, tmp_path)
    assert json.loads(path.read_text())["environment"]["cores"] >= 1
    assert read(path) == result
    text = write_page(tmp_path).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| work")]
    assert len(lines) == 3
    assert "2.00× (1.90 to 2.10) | ≥ 1.3×: reached" in lines[0]
    assert "≥ 1×: **missed**" in lines[1]
    assert "≤ 0.1 s: **missed** | 3.0 s | 100 MiB | slow" in lines[2]
    assert "`python -m benchmarks.run fake`" in text


def test_committed_page_is_the_one_made_from_the_committed_results():
    files = [file for file in sorted(report.RESULTS.glob("*.json")) if file.stem not in report.NO_TIMINGS]
    results = [read(file) for file in files]
    assert (report.RESULTS / "README.md").read_text(encoding="utf-8") == page(results)


def test_flops_of_the_published_model():
    # Peebles & Xie 2023, table 4: 6.06 and 118.64 GFLOP (multiply-adds) for S/2 and XL/2 at 32 x 32 x 4.
    xl = dataclasses.replace(DIT, width=1152, depth=28, heads=16)
    assert forward_flops(DIT) / 2e9 == pytest.approx(6.06, rel=0.02)
    assert forward_flops(xl) / 2e9 == pytest.approx(118.64, rel=0.02)


@pytest.mark.parametrize("argv", [["dti"], ["--rounds", "0"]])
def test_wrong_command_lines_end_with_2(argv, capsys):
    assert main(argv) == 2
    assert "error: " in capsys.readouterr().err


def test_list_says_what_there_is(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "dit",
        "unet",
        "allocation",
        "families",
        "loading",
        "attention",
        "acceleration",
        "frontier",
        "caching",
        "compilation",
        "gpu",
    ]


def test_without_a_gpu_the_gpu_benchmark_says_so(tmp_path, capsys):
    assert main(["gpu", "--results", str(tmp_path)]) == 0
    assert "needs a GPU" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(("work", "part"), [(DIT, "forward"), (DIT, "train"), (DIT, "sample"), (UNET, "forward")])
def test_our_side_of_a_case_runs(work, part):
    from benchmarks import ours

    settings = "blocks scanned, dense outputs kept"
    program = ours.build(dataclasses.replace(work.small(), part=part, settings=settings))
    program.call()
    program.call()
    assert program.parameters > 1000
