"""The shipped configs of points, text and text to image are imported, shrunk, trained one step and sampled."""

import pytest

from tests.configs.one_step import POINTS_AND_TEXT, check_one_step_and_one_batch


@pytest.mark.parametrize("name", POINTS_AND_TEXT)
def test_one_step_and_one_batch(name, tmp_path):
    check_one_step_and_one_batch(name, tmp_path)
