"""What the recipe of DyDiT compares with: the largest heads and groups, widths by a table, factors under routers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, objectives
from diffusion_jax.config import build, call, load
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes.dydit import unchanged
from diffusion_jax.recipes.parts import dynamic_widths as parts
from tests.models.shared import scramble


@pytest.fixture(scope="module")
def small():
    """`(config, experiment, routed, parameters)` of the smoke variant."""
    config = load("configs/recipes/dydit.py:smoke")
    config.published = call("adapters.routed", groups=2, tokens=True)
    experiment = prepare(config.arms.dynamic)
    params = jax.jit(lambda key: scramble(experiment.init_params(key)))(jax.random.key(0))
    return config, experiment, build(config.routed, network=experiment.network), params


def test_the_uniform_arm_is_the_network_without_the_heads_and_groups_that_are_not_kept(small):
    _, experiment, routed, params = small
    arm = parts.uniform_arm(experiment, routed, params, 1)
    tree, cut = arm.whole(arm.init(jax.random.key(0))), jax.tree.map(np.array, params)
    gates = models.by_path(tree["gates"])
    for branch, leaf, name in (("attention", "attend", "out"), ("mlp", "up", "down")):
        inner = "attention" if branch == "attention" else "feed_forward"
        kept = np.asarray(gates[f"blocks/block/{branch}/{inner}/{leaf}/gate"])[0, 0]
        assert sorted(kept) == [0, 1]
        kernel = cut["blocks"]["block"][branch][inner][name]["kernel"]
        kernel *= np.repeat(kept, kernel.shape[1] // 2)[None, :, None]
    batch, t = experiment.example(2), jnp.array([100.0, 900.0])
    ours = jax.jit(arm.network.apply)(tree, batch["x0"], t, batch["cond"])[0]
    expected = jax.jit(experiment.network.apply)(cut, batch["x0"], t, batch["cond"])[0]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_cut_weights_are_masked_weights_at_every_step(small):
    config, experiment, routed, params = small
    made = jax.eval_shape(lambda key: routed.init(key, params, *parts.example_inputs(experiment)), jax.random.key(1))
    draws = np.random.default_rng(0)
    routers = jax.tree.map(lambda leaf: jnp.asarray(draws.normal(0, 1, leaf.shape), jnp.float32), made["routers"])
    config.sampling.steps, config.timing.repeats, config.timing.batch = 3, 1, 8
    tree = {"params": params, "routers": routers}
    executed = parts.execution(experiment, routed, tree, config.sampling, config.timing)
    assert executed.difference < 1e-5
    assert 0 < executed.narrow[1] <= executed.share <= executed.wide[1] <= 1
    assert min(executed.dense, executed.masked, executed.cut) > 0


def test_routers_of_tokens_too_with_the_published_biases_change_nothing_at_first(small):
    config, experiment, _, params = small
    assert unchanged(experiment, config, params) == 0.0


@pytest.mark.parametrize("experts", [0, 3])
def test_factors_under_routers_begin_as_the_network_and_all_of_them_learn(small, experts):
    config, experiment, _, params = small
    arm = parts.lora_arm(config.lora, experiment, config.published, params, 2, experts)
    learned = arm.init(jax.random.key(0))
    assert set(learned) == {"lora", "routers", "token_router"} | ({"mixers"} if experts else set())
    batch = experiment.example(2)
    t = jnp.array([100.0, 900.0])
    ours = jax.jit(arm.network.apply)(arm.whole(learned), batch["x0"], t, batch["cond"])[0]
    expected = jax.jit(experiment.network.apply)(params, batch["x0"], t, batch["cond"])[0]
    np.testing.assert_array_equal(ours, expected)


def test_the_published_settings_build():
    config = load("configs/recipes/dydit.py:paper")
    network = build(config.model)
    routed = build(config.routed, network=network)
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    made = jax.eval_shape(routed.init, jax.random.key(0), params, *inputs)
    shapes = {path: leaf.shape for path, leaf in models.by_path(made["routers"]).items()}
    assert shapes["blocks/block/attention/attention/attend/gate/kernel"] == (28, 1152, 15)
    assert set(build(config.optimizer).init(dict.fromkeys(("params", "routers", "token_router"), jnp.zeros(1))))
    limit = objectives.budget_at(1100, config.budget.target, config.budget.full_steps, config.budget.warmup_steps)
    assert float(limit) == pytest.approx(0.5)
