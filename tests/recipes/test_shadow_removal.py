"""What the study of shadow removal measures, and the published network."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, models
from diffusion_jax.config import build, load
from diffusion_jax.data import shadows
from diffusion_jax.recipes import shadow_removal
from diffusion_jax.recipes.published import published_inputs

SOURCE = data.shadow_pairs("test", 12)


def test_the_truth_has_no_shadow_left_and_a_gain_cannot_remove_one():
    masks, picture = SOURCE.regions(np.arange(12)), SOURCE.cond["picture"]
    assert shadow_removal.left_over(SOURCE.x0, SOURCE.x0, masks["shadow"]) == 0
    bright = shadows.shaded(SOURCE.x0, np.float32(0.0), np.float32(0.7))
    lit = shadow_removal.left_over(bright, SOURCE.x0, masks["shadow"])
    assert 0.2 < lit < -np.log(0.7) + 0.01 < shadow_removal.left_over(picture, SOURCE.x0, masks["shadow"])
    # One light for all is what a gain removes.
    np.testing.assert_allclose(shadow_removal.gained(bright, SOURCE.x0), SOURCE.x0, atol=1e-3)
    error = np.square(shadow_removal.gained(picture, SOURCE.x0) - SOURCE.x0).mean((1, 2, 3))
    assert (error < np.square(picture - SOURCE.x0).mean((1, 2, 3))).mean() > 0.7 and error.min() > 1e-4


def test_each_branch_begins_as_the_prior_and_a_residual_process_takes_its_endpoint():
    shadow = np.zeros((2, 4, 4, 8), np.float32)
    config = load("configs/recipes/shadow_removal.py")
    told = {name: shadow_removal.condition_of(build(config[name].process), shadow) for name in shadow_removal.WAYS}
    assert [sorted(cond) for cond in told.values()] == [["control"], *[["control", "endpoint"]] * 2]
    learned = {"weights": 1}
    state = type("State", (), {"frozen": type("Frozen", (), {"value": {"unet": 2}})})
    assert shadow_removal.with_prior(learned, state) == {"unet": 2, "control": learned}


def test_the_published_network_is_stable_diffusion_with_a_branch_that_sees_latents():
    config = load("configs/recipes/shadow_removal.py:paper")
    network, process = build(config.model), build(config.process)
    x, t, cond = published_inputs(config)
    params = jax.eval_shape(network.init, jax.random.key(0), x, t, cond)
    sizes = {name: models.count_params(tree) for name, tree in params.items()}
    assert sizes["unet"] == 859_520_964 and 3.4e8 < sizes["control"] < 3.7e8
    np.testing.assert_array_equal(process.network_time(jnp.float32(1.0)), 999)
