"""Training of a part: only the part moves, and what is frozen is neither changed nor consumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, distributed, models, objectives, processes, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path


def case():
    network = models.dit("S/2", width=16, depth=2, heads=2, conditions=(models.label(3),))
    adapted = adapters.lora(network, rank=2)
    x = jax.random.normal(jax.random.key(1), (8, 4, 4, 2))
    cond = {"label": jnp.arange(8) % 3}
    params = network.init(jax.random.key(0), x, jnp.zeros(8), cond)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    factors = adapted.init(jax.random.key(2), params, x, jnp.zeros(8), cond)
    objective = objectives.denoising(adapted.network, processes.rectified_flow())
    return objective, params, factors, {"x0": x, "cond": cond}


def test_only_the_part_is_trained_and_the_rest_stays_bit_for_bit():
    objective, params, factors, batch = case()
    part = objectives.with_frozen(objective, {"params": params}, trained="lora")
    optimizer = training.optimizers.adamw(1e-2)
    state = training.init_state(part, optimizer, lambda key: factors, batch)
    assert by_path(state.params).keys() == by_path(factors).keys()
    step = training.make_train_step(part, optimizer)
    first = None
    for _ in range(20):
        state, metrics = step(state, batch)
        first = metrics["loss"] if first is None else first
    assert float(metrics["loss"]) < float(first)
    for path, leaf in by_path(params).items():
        np.testing.assert_array_equal(leaf, by_path(state.objective_state.params["params"])[path])
    moved = [float(jnp.abs(leaf - by_path(factors)[path]).max()) for path, leaf in by_path(state.params).items()]
    assert min(moved) > 0


def test_the_loss_is_that_of_the_whole():
    objective, params, factors, batch = case()
    part = objectives.with_frozen(objective, {"params": params}, trained="lora")
    key = jax.random.key(3)
    state = part.init(key, factors, batch)
    whole = {"params": params, "lora": factors}
    losses, _ = jax.jit(part.loss)(factors, state, batch, key)
    expected, _ = jax.jit(objective.loss)(whole, objective.init(key, whole, batch), batch, key)
    np.testing.assert_array_equal(losses, expected)


def test_several_parts_learn_together():
    objective, params, factors, batch = case()
    part = objectives.with_frozen(objective, {"params": params}, trained=("lora",))
    key, learned = jax.random.key(3), {"lora": factors}
    losses, _ = jax.jit(part.loss)(learned, part.init(key, learned, batch), batch, key)
    one = objectives.with_frozen(objective, {"params": params}, trained="lora")
    expected, _ = jax.jit(one.loss)(factors, one.init(key, factors, batch), batch, key)
    np.testing.assert_array_equal(losses, expected)


def test_on_a_mesh_what_is_frozen_is_laid_out_too():
    objective, params, factors, batch = case()
    part = objectives.with_frozen(objective, {"params": params}, trained="lora")
    mesh, rules = distributed.make_mesh(data=2, fsdp=4), distributed.Rules(fsdp_min_size=0)
    optimizer = training.optimizers.adamw(1e-3)
    state = training.init_state(part, optimizer, lambda key: factors, batch, mesh=mesh, rules=rules)
    kernel = state.objective_state.params["params"]["blocks"]["block"]["mlp"]["feed_forward"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    state, _ = training.make_train_step(part, optimizer, mesh, rules)(state, batch)
    assert not jax.tree.leaves(params)[0].is_deleted()


def test_the_trained_part_is_not_frozen():
    objective, params, factors, _ = case()
    with pytest.raises(InvalidInput, match="trained is 'lora'"):
        objectives.with_frozen(objective, {"params": params, "lora": factors}, trained="lora")
