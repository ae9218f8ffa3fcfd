"""What is ignored stays out of the exact denoiser's answer if and only if the schedule ends in pure noise."""

import jax
import numpy as np
import pytest

from diffusion_jax import processes
from diffusion_jax.denoisers import analytic, gaussian_mixture, sample_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.metrics import leakage

KEY = jax.random.key(0)
WORLD = gaussian_mixture({"x": np.zeros((1, 2)), "y": np.zeros((1, 2))}, covariances=(0.1 * np.eye(4) + 0.9)[None])


def leak(process, world=WORLD, **options):
    joint = processes.JointProcess({"x": process, "y": process})
    x0, _ = sample_mixture(KEY, world, 64)
    return leakage(KEY, analytic(joint), world, x0, options.pop("t", 0.7), **{"ignored": ["y"], **options})


def test_a_schedule_that_ends_in_noise_does_not_leak():
    found = leak(processes.rectified_flow())
    assert set(found) == {"x"} and found["x"] < 1e-10


def test_a_schedule_that_ends_above_leaks():
    assert leak(processes.vp_scaled_linear())["x"] > 1e-4


def test_independent_modalities_have_nothing_to_leak():
    apart = gaussian_mixture({"x": np.zeros((1, 2)), "y": np.zeros((1, 2))}, {"x": 0.5, "y": 0.5})
    assert leak(processes.vp_scaled_linear(), apart)["x"] < 1e-10


def test_mistakes_are_told():
    with pytest.raises(InvalidInput, match="ignored is 'z'"):
        leak(processes.rectified_flow(), ignored=["z"])
    with pytest.raises(InvalidInput, match="redraws is 1"):
        leak(processes.rectified_flow(), redraws=1)
