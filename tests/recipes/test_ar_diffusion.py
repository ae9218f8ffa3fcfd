"""AR-Diffusion: the published settings can be built, and its arms differ in nothing but their times."""

import jax
import numpy as np
import pytest

from diffusion_jax import timesteps
from diffusion_jax.config import build, load
from diffusion_jax.experiment import prepare
from diffusion_jax.models import count_params, param_shapes
from diffusion_jax.recipes.ar_diffusion import kept_claims, ways
from tests.models.drawn import drawn

CONFIG = "configs/recipes/ar_diffusion.py"


def test_the_published_settings():
    arm = load(f"{CONFIG}:paper").arms.anchored
    network, process = build(arm.model), build(arm.process)
    shapes = param_shapes(network, (1, 16, 4, 8, 4))
    # DiT-XL without classes and with one channel more than a patch of one pixel.
    assert count_params(shapes) == pytest.approx(675e6, rel=0.01)
    assert process.prediction == "x0"
    objective = build(arm.objective, network=network, process=process)
    batch = {"x0": jax.ShapeDtypeStruct((2, 16, 4, 8, 4), np.float32), "index": jax.ShapeDtypeStruct((2,), np.int32)}
    loss, _ = jax.eval_shape(objective.loss, shapes, (), batch, jax.random.key(0))
    assert loss.shape == (2,)


def test_arms_differ_in_their_times_alone():
    arms = {name: arm.to_dict() for name, arm in load(CONFIG).arms.items()}
    draws = [arm["objective"].pop("draw")["call"] for arm in arms.values()]
    assert sorted(draws) == ["timesteps.anchored", "timesteps.independent", "timesteps.shared"]
    assert all(arm == arms["anchored"] for arm in arms.values())


def test_kept_keys_decode_the_staircase_of_full_width_and_chunks_go_on():
    """The smoke run makes neither."""
    config = load(f"{CONFIG}:smoke")
    experiment = prepare(config.arms.anchored)._replace(shape=(4, 1, 1, 8))
    params = drawn(param_shapes(experiment.network, (1, *experiment.shape)))
    way = ways(experiment, timesteps.linspace(config.steps), config.clips)
    claims = kept_claims(way, params, jax.random.key(0), 6, config.steps)
    assert len(claims) == 2 and all(one.holds for one in claims)
    long = way.continued(params, jax.random.key(0), 2, 2)
    assert long.x.shape == (config.clips, 6, 1, 1, 8) and np.isfinite(long.x).all()
    assert float(long.cost.evaluations) == 2 * config.steps
