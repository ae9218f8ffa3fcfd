"""The notebook that trains, samples and measures."""

from tests.notebooks.running import check_it_runs


def test_it_runs(kernel):
    check_it_runs("quickstart", kernel)
