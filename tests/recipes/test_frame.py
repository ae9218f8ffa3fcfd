"""What recipes share."""

import jax

from diffusion_jax.recipes.frame import on_devices


def test_work_goes_where_there_are_devices_enough():
    here = jax.device_count()
    assert on_devices(here, jax.device_count) == here
    # One more than there are: a new process sees them.
    assert on_devices(here + 1, jax.device_count) == here + 1
