"""The notebook of a time for each frame."""

from tests.notebooks.running import check_it_runs


def test_it_runs(kernel):
    check_it_runs("choose_each_parts_own_time", kernel)
