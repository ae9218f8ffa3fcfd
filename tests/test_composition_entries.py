"""The composition matrix where each entry has a time of its own: the part of its covering sample with such grids."""

import pytest

from tests.test_composition import check_that_it_runs_is_finite_and_agrees, covering_sample, in_file, name_of


@pytest.mark.parametrize("case", [case for case in covering_sample() if in_file(case) == "entries"], ids=name_of)
def test_runs_is_finite_and_agrees_between_one_device_and_eight(case):
    check_that_it_runs_is_finite_and_agrees(case)
