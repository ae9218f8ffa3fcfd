"""What the study of shadow removal measures, and the published network."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import models
from diffusion_jax.config import build, load
from diffusion_jax.recipes import shadow_removal
from diffusion_jax.recipes.published import published_inputs


def test_each_branch_begins_as_the_prior_and_a_residual_process_takes_its_endpoint():
    shadow = np.zeros((2, 4, 4, 8), np.float32)
    config = load("configs/recipes/shadow_removal.py")
    told = {name: shadow_removal.condition_of(build(config[name].process), shadow) for name in shadow_removal.WAYS}
    assert [sorted(cond) for cond in told.values()] == [["control"], *[["control", "endpoint"]] * 2]
    # Each branch stands beside a prior of its own prediction.
    for name, prior in (("noise", "noise"), ("residual", "residual"), ("enhanced", "residual")):
        kinds = {build(one.process).prediction for one in (config.priors[prior], config[name])}
        assert kinds == ({"v"} if prior == "noise" else {"epsilon", "residual_noise"}), name


def test_the_published_network_is_stable_diffusion_with_a_branch_that_sees_latents():
    config = load("configs/recipes/shadow_removal.py:paper")
    branch, process = build(config.model.control), build(config.process)
    x, t, cond = published_inputs(config)
    params = jax.eval_shape(branch.init, jax.random.key(0), x, t, cond)
    # The ControlNet of Stable Diffusion 1.5 has 361 279 120 with its eight convolutions over pictures.
    assert 3.4e8 < models.count_params(params) < 3.7e8
    np.testing.assert_array_equal(process.network_time(jnp.float32(1.0)), 999)
