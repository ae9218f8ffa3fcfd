"""The shipped configs of images are imported, shrunk, trained one step and sampled."""

import pytest

from tests.configs.one_step import IMAGES, check_one_step_and_one_batch


@pytest.mark.parametrize("name", IMAGES)
def test_one_step_and_one_batch(name, tmp_path):
    check_one_step_and_one_batch(name, tmp_path)
