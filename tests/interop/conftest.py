"""The made-up network with random parameters, known to the loader during these tests."""

import jax
import numpy as np
import pytest

from diffusion_jax import interop, models
from tests.interop.foreign import FIELDS, FOREIGN


@pytest.fixture(autouse=True)
def _foreign(monkeypatch):
    monkeypatch.setitem(interop.FAMILIES, "Foreign", FOREIGN)


@pytest.fixture(scope="module")
def pretrained():
    network = models.text_transformer(**FIELDS)
    shapes = FOREIGN.shapes(network)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype)), shapes)
    return interop.Pretrained(network, params, "Foreign", {})
