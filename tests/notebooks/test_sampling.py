"""The notebooks without training: of the timestep, and of samplers."""

from pathlib import Path

import pytest

from tests.notebooks.running import SMALL, check_it_runs


def test_every_notebook_has_a_test():
    assert {path.stem for path in Path("notebooks").glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", ["tour_of_the_timestep", "compose_your_own_sampler"])
def test_it_runs(name, kernel):
    check_it_runs(name, kernel)
