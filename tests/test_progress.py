"""Rates and times left are those of finished steps; what else a run does is told apart; a file gets lines, no bar."""

import io

import pytest

from diffusion_jax import progress


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Result:
    """What a step leaves on a device that takes a while: waiting for it makes the clock go on."""

    def __init__(self, clock, done_at):
        self.clock, self.done_at = clock, done_at

    def is_ready(self):
        return self.clock.seconds >= self.done_at

    def block_until_ready(self):
        self.clock.seconds = max(self.clock.seconds, self.done_at)


def started(pace, clock, steps, seconds):
    """Starts steps at once, which a device makes one after the other; returns how many were seen to finish."""
    begun = clock.seconds
    return sum(pace.started(Result(clock, begun + (i + 1) * seconds)) for i in range(steps))


def test_only_finished_steps_count_and_few_are_waited_for():
    clock = Clock()
    pace = progress.Pace(clock)
    assert started(pace, clock, progress.AHEAD, 2.0) == 0 and clock.seconds == 0.0 and pace.smooth() is None
    # One more waits for the first alone.
    assert pace.started(Result(clock, 100.0)) == 1 and clock.seconds == 2.0
    assert pace.finish() == progress.AHEAD and clock.seconds == 100.0


def test_what_is_no_step_changes_neither_the_rate_nor_the_time_left_but_by_its_own_share():
    clock = Clock()
    pace = progress.Pace(clock)
    breaks = {"pictures": 10}
    for seconds in (60.0, 5.0, 5.0):
        started(pace, clock, 10, 0.5)
        pace.finish()
        with pace.apart("pictures"):
            clock.seconds += seconds
    assert pace.smooth() == pytest.approx(2.0) and pace.window() == pytest.approx(2.0) and pace.window() is None
    assert pace.spent == {"steps": 15.0, "pictures": 70.0}
    # 70 steps of half a second, and seven times what pictures take once they are compiled.
    assert pace.left(30, 100, breaks) == pytest.approx(35.0 + 7 * 5.0)
    assert pace.left(100, 100, breaks) == 0.0


def test_an_old_rate_is_forgotten():
    clock = Clock()
    pace = progress.Pace(clock)
    started(pace, clock, 100, 1.0)
    pace.finish()
    for _ in range(100):
        started(pace, clock, 30, 0.1)
        pace.finish()
    assert pace.smooth() == pytest.approx(10.0, rel=0.05)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_terminal_has_a_bar_and_everything_else_lines(stream, capsys):
    stream = stream()
    shown = progress.Progress(2000, 1400, 16, {}, peak_share=0.1, stream=stream)
    with shown.compiling():
        pass
    for _ in range(4):
        shown.started(Result(Clock(), 0.0))
    shown.log(0.123456, {"steps_per_second": 4.0})
    shown.close()
    out = capsys.readouterr().out
    assert out.startswith("Compiling the training step ... 0.0 s\n")
    assert "step 1,405 of 2,000   loss 0.1235       4.0 steps/s   64.0 examples/s   MFU 40.0%" in out
    assert ("| 1405/2000 [" in stream.getvalue()) == stream.isatty()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (130, "2:10"), (3800, "1:03:20"), (180_000, "2 d 02:00:00")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_slow_rates_are_seconds_a_step():
    assert [progress.per_second(rate, "step") for rate in (0.25, 12.34, 1574.0)] == [
        "4 s/step",
        "12.3 steps/s",
        "1,574 steps/s",
    ]


def test_what_is_announced_and_fails_ends_its_line(capsys):
    with pytest.raises(ZeroDivisionError), progress.announced("Compiling"):
        raise ZeroDivisionError
    assert capsys.readouterr().out == "Compiling ...\n"
