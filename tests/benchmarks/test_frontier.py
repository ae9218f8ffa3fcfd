"""What the frontier says of its measurements: who beats fewer steps of the plain solver, and the picture of it."""

from benchmarks import frontier
from benchmarks.frontier import GUIDED, MEASURES, PLAIN, Measured
from benchmarks.frontier_picture import draw, family_of


def measured(family, label, seconds, *errors):
    """One setting; errors: by measure, one a round."""
    return Measured(family, label, [seconds] * len(errors[0]), dict(zip(MEASURES, errors, strict=True)), 1.0, seconds)


SOLVER = [
    measured(PLAIN, "8 steps", 8.0, [0.0, 0.0], [1.0, 1.1]),
    measured(PLAIN, "4 steps", 4.0, [0.1, 0.2], [2.0, 2.1]),
    measured(PLAIN, "2 steps", 2.0, [0.4, 0.8], [8.0, 8.1]),
]


def beaten(seconds, ends, distances):
    return frontier.beating([*SOLVER, measured("other", "a", seconds, ends, distances)])[-1]


def test_a_setting_beats_fewer_steps_where_it_is_below_their_curve_in_every_round():
    assert beaten(4.0, [0.09, 0.19], [1.9, 2.0]) == dict.fromkeys(MEASURES, True)
    assert beaten(4.0, [0.11, 0.19], [1.9, 2.2]) == dict.fromkeys(MEASURES, False)
    # Between 2 and 4 seconds the logarithm of the error is a line.
    assert beaten(3.0, [0.19, 0.39], [4.1, 3.9]) == {MEASURES[0]: True, MEASURES[1]: False}
    # In less time than all of the curve it is compared with its fastest point.
    assert beaten(1.0, [0.39, 0.79], [8.2, 8.0]) == {MEASURES[0]: True, MEASURES[1]: False}


def test_the_full_run_is_without_error_by_definition_and_nothing_that_takes_longer_than_fewer_steps_beats_it():
    assert beaten(6.0, [0.01, 0.01], [0.5, 0.5]) == {MEASURES[0]: False, MEASURES[1]: True}
    assert beaten(9.0, [0.01, 0.01], [0.5, 0.5]) == dict.fromkeys(MEASURES, False)
    assert not any(any(one.values()) for one in frontier.beating(SOLVER))


def test_guided_settings_are_compared_with_the_guided_solver_and_drawn_in_panels_of_their_own(tmp_path):
    guided = [one._replace(family=GUIDED + one.family, seconds=[2 * t for t in one.seconds]) for one in SOLVER]
    other = measured(f"{GUIDED}other", "a", 8.0, [0.09, 0.19], [1.9, 2.0])
    found = [*SOLVER, *guided, other]
    better = frontier.beating(found)
    assert better[-1] == dict.fromkeys(MEASURES, True)
    draw(frontier.rows_of(found, better), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_a_family_is_told_from_its_setting():
    cases = ("TaylorSeer, m = 3, N = 5", "early exit, clipped, 85% of the blocks", "ERTACache, 8 of 50 steps")
    assert [family_of(case) for case in cases] == ["TaylorSeer, m = 3", "early exit, clipped", "ERTACache"]
    assert family_of("T-Stitch + output forecast, r = 0.2, N = 3") == "T-Stitch + output forecast"
