"""Parts of ERTACache at equal evaluations, the world of the mixture, and the published size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.acceleration import calibrate, record_outputs
from diffusion_jax.config import load
from diffusion_jax.recipes import ertacache
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.study import Arm, Study, table
from diffusion_jax.sampling import sample
from diffusion_jax.timesteps import linspace


@pytest.fixture
def s(tmp_path):
    config = load("configs/recipes/ertacache.py")
    config.mixture.update({"modes": 3, "dims": 4, "steps": 8, "calibration": 8, "samples": 8, "settings": (0.4,)})
    return Study(config, (0, 1), tmp_path, True, {})


def test_every_part_asks_as_often_and_fewer_steps_are_the_plain_solver(s):
    world = ertacache.mixture_world(s)
    params, key = world.params(0), jax.random.key(1)
    runs = record_outputs(key, world.inner, params, world.solver, world.grid, shape=(8, 4))
    calibration = calibrate(runs, world.grid, world.inner.process, 0.4)
    count = int(calibration.computed.sum())
    assert 2 < count < 8

    weighted = ertacache.by_influence(world, runs, count)

    def arm(part):
        fitted = weighted if part == "by influence" else calibration
        grid, settings = ertacache.settings_of(world, fitted, part)
        denoiser = ertacache.partial(ertacache.reusing, world.inner, fitted.valid_for["residual"])
        return Arm(denoiser, params, world.solver, grid, None, settings)

    found = table({part: arm(part) for part in ertacache.PARTS}, (5,), {}, shape=(4,), count=8)
    assert {row["evaluations"][0] for row in found.figures.values()} == {count}
    coarse = sample(jax.random.key(5), world.inner, params, world.solver, linspace(count), shape=(8, 4))
    np.testing.assert_allclose(found.samples["fewer steps"], coarse.x, atol=1e-4)
    assert len({float(jnp.abs(x).sum()) for x in found.samples.values()}) == len(ertacache.PARTS)


def test_the_mixture_is_measured(s):
    """The smoke run has the digits alone."""
    found, overlaps = ertacache.compared(s, ertacache.mixture_world(s), s.config.mixture)
    rows = ertacache.part_rows(found, "mixture", s.config.mixture) + ertacache.mixture_rows(found)
    assert len({row.title for row in rows}) == len(rows) == 7 and overlaps == []
    assert all(len(row.ours) == 2 and np.isfinite(row.ours).all() for row in rows)
    assert max(found["none"]["error"]) < 1e-5 < min(found["all three parts 0.4"]["error"])


def test_the_released_settings_are_of_the_published_size(capsys):
    main(["ertacache:paper"])
    millions = float(capsys.readouterr().out.split("network: ")[1].split()[0].replace(",", ""))
    assert 1100 < millions < 2100
