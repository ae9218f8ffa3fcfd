"""What tests of recipes share."""

import jax
import pytest

from diffusion_jax import distributed


@pytest.fixture
def one_device(monkeypatch):
    """Recipes train on one device, as where they were reported: for eight, each program takes twice as long to compile.

    What asks for devices by number, as pipelines do, has them.
    """
    made = distributed.make_mesh
    monkeypatch.setattr(
        distributed, "make_mesh", lambda **axes: made(**{**axes, "devices": axes.get("devices") or jax.devices()[:1]})
    )
