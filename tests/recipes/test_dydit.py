"""What the study of DyDiT compares with: one width at all times, and factors under routers; the published settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, objectives
from diffusion_jax.config import build, call, load
from diffusion_jax.recipes import dydit
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.stages import stage
from diffusion_jax.timesteps import stratified
from tests.models.shared import scramble


@pytest.fixture(scope="module")
def small():
    """`(config, base)` of the smoke variant, with weights that are nowhere zero."""
    config = load("configs/recipes/dydit.py:smoke")
    base = stage("digits", config.base, keep=False)
    return config, base._replace(value=scramble(base.value))


def answers(network, params, base):
    batch = base.trained.example(2)
    return jax.jit(network.apply)(params, batch["x0"], jnp.array([100.0, 900.0]), batch["cond"])[0]


def test_one_width_is_the_network_without_the_heads_and_groups_that_are_not_kept(small):
    config, base = small
    experiment = dydit.with_one_width(config.uniform, base)
    gates = dydit.gates_of(config.uniform, base, 1)
    cut, by_path = jax.tree.map(np.array, base.value), models.by_path(gates)
    for branch, inner, leaf, name in (
        ("attention", "attention", "attend", "out"),
        ("mlp", "feed_forward", "up", "down"),
    ):
        kept = np.asarray(by_path[f"blocks/block/{branch}/{inner}/{leaf}/gate"])[0, 0]
        assert sorted(kept) == [0, 1]
        kernel = cut["blocks"]["block"][branch][inner][name]["kernel"]
        kernel *= np.repeat(kept, kernel.shape[1] // 2)[None, :, None]
    ours = answers(experiment.network, {"params": experiment.begin(jax.random.key(0)), "gates": gates}, base)
    np.testing.assert_allclose(ours, answers(base.trained.network, cut, base), atol=1e-5)


@pytest.mark.parametrize("experts", [1, 3])
def test_factors_under_routers_begin_as_the_network_and_all_of_them_learn(small, experts):
    config, base = small
    config.uniform.factors = call("adapters.time_lora", rank=2, experts=experts, select=("q", "feed_forward/up"))
    config.uniform.routed.bias = 100.0
    experiment = dydit.with_factors(config.uniform, base)
    learned = experiment.begin(jax.random.key(0))
    assert set(learned) == set(dydit.LEARNED)
    ours = answers(experiment.network, {"params": base.value, **learned}, base)
    np.testing.assert_array_equal(ours, answers(base.trained.network, base.value, base))


def test_losses_in_tenths_of_t_have_the_mean_of_all(small):
    _, base = small
    tenths = dydit.held_out_loss(base, base.trained.network, 1)(base.value)
    objective = objectives.denoising(base.trained.network, base.trained.process, stratified(), train=False)
    batch = jax.tree.map(jnp.asarray, base.trained.held_out.take(range(len(base.trained.held_out))))
    whole = jax.jit(objective.loss)(base.value, (), batch, jax.random.key(1000))[0].mean()
    # Times are stratified, so there are as many of them in every tenth.
    np.testing.assert_allclose(tenths.mean(), whole, rtol=0.02)
    assert tenths.shape == (10,)


def test_the_published_settings(capsys):
    config = load("configs/recipes/dydit.py:paper")
    routed = build(config.routed, network=(network := build(config.model)))
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    made = jax.eval_shape(routed.init, jax.random.key(0), params, *inputs)
    shapes = {path: leaf.shape for path, leaf in models.by_path(made["routers"]).items()}
    assert shapes["blocks/block/attention/attention/attend/gate/kernel"] == (28, 1152, 15)
    assert float(objectives.budget_at(1100, config.budget.target)) == pytest.approx(0.5)
    main(["dydit:paper"])
    assert "GFLOP" in capsys.readouterr().out
