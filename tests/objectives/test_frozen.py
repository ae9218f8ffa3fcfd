"""Training of a part: only the part moves, and what is frozen is no part of what a run saves."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, data, distributed, models, objectives, processes, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from diffusion_jax.typing import Frozen, Objective
from tests.objectives import resumed


@cache
def case():
    network = models.dit("S/2", width=16, depth=2, heads=2, conditions=(models.label(3),))
    adapted = adapters.lora(network, rank=2)

    @jax.jit
    def drawn():
        x = jax.random.normal(jax.random.key(1), (8, 4, 4, 2))
        cond = {"label": jnp.arange(8) % 3}
        params = network.init(jax.random.key(0), x, jnp.zeros(8), cond)
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)
        return params, adapted.init(jax.random.key(2), params, x, jnp.zeros(8), cond), {"x0": x, "cond": cond}

    return objectives.denoising(adapted.network, processes.rectified_flow()), *drawn()


@cache
def losses_of_the_part():
    """Its losses, by a key that the tests share, beside frozen parameters."""
    objective, params, factors, batch = case()
    part = objectives.with_frozen(objective, {"params": params}, trained="lora")
    key = jax.random.key(3)
    return jax.device_get(jax.jit(part.loss)(factors, part.init(key, factors, batch), batch, key)[0])


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
    assert not {leaf.shape for leaf in jax.tree.leaves(state.objective_state)} - {()}, "counters at most"
    begun = by_path(jax.device_get(factors))
    moved = [np.abs(leaf - begun[path]).max() for path, leaf in by_path(jax.device_get(state.params)).items()]
    assert min(moved) > 0


def test_the_loss_is_that_of_the_whole():
    objective, params, factors, batch = case()
    key, whole = jax.random.key(3), {"params": params, "lora": factors}
    expected, _ = jax.jit(objective.loss)(whole, objective.init(key, whole, batch), batch, key)
    np.testing.assert_array_equal(losses_of_the_part(), expected)


def test_several_parts_learn_together():
    objective, params, factors, batch = case()
    part = objectives.with_frozen(objective, {"params": params}, trained=("lora",))
    key, learned = jax.random.key(3), {"lora": factors}
    losses, _ = jax.jit(part.loss)(learned, part.init(key, learned, batch), batch, key)
    np.testing.assert_array_equal(losses, losses_of_the_part())


def test_on_a_mesh_what_is_frozen_is_laid_out_too():
    objective, params, factors, batch = case()
    part = objectives.with_frozen(objective, {"params": params}, trained="lora")
    mesh, rules = distributed.make_mesh(data=2, fsdp=4), distributed.Rules(fsdp_min_size=0)
    optimizer = training.optimizers.adamw(1e-3)
    state = training.init_state(part, optimizer, lambda key: factors, batch, mesh=mesh, rules=rules)
    step = training.make_train_step(part, optimizer, mesh, rules)
    (frozen,) = step.frozen(state, batch).values()
    kernel = frozen["params"]["blocks"]["block"]["mlp"]["feed_forward"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    _, metrics = step(state, batch)
    assert not jax.tree.leaves(params)[0].is_deleted()
    alone = training.init_state(part, optimizer, lambda key: factors, batch)
    _, expected = training.make_train_step(part, optimizer)(alone, batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


def test_some_arrays_of_the_parameters_learn():
    """What is chosen has the gradient that it has among all, the rest none; together they are the parameters."""
    objective, params, factors, batch = case()
    rng = np.random.default_rng(0)
    whole = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape), {"params": params, "lora": factors})
    part = objectives.trained_part(objective, whole, lambda path: "attention" in path and path.startswith("params/"))
    key, trained = jax.random.key(3), part.init(jax.random.key(0))
    assert by_path(trained).keys() == {path for path in by_path(whole) if "attention" in path and path[:7] == "params/"}
    for path, leaf in by_path(part.whole(trained)).items():
        np.testing.assert_array_equal(leaf, by_path(whole)[path])

    def gradient(one, at):
        return by_path(jax.jit(jax.grad(lambda p: one.loss(p, one.init(key, p, batch), batch, key)[0].sum()))(at))

    found, expected = jax.device_get((gradient(part.objective, trained), gradient(objective, whole)))
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5 * largest)
        assert np.abs(leaf).max() > 0
    for chosen in ("nothing", ""):
        with pytest.raises(InvalidInput, match="chosen takes"):
            objectives.trained_part(objective, whole, lambda path, chosen=chosen: chosen in path)


def test_a_run_goes_on_beside_the_same_frozen_parameters_alone(tmp_path):
    """They are saved as fingerprints: the same ones give the run that never stopped, others are refused."""
    objective, params, factors, batch = case()
    optimizer = training.optimizers.adamw(1e-2)
    frozen = {"params": params}
    source = data.ArraySource(np.asarray(batch["x0"]), jax.device_get(batch["cond"]), "a")

    def run(steps, workdir, frozen=frozen):
        part = objectives.with_frozen(objective, frozen, trained="lora")
        return resumed.trained(part, source, factors, steps, workdir, batch_size=8, optimizer=optimizer)

    run(1, tmp_path / "cut")
    stored = sum(file.stat().st_size for file in (tmp_path / "cut" / "checkpoints").rglob("*") if file.is_file())
    assert stored < 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(factors)) + 2**16
    other = {"params": {**params, "positions": params.get("positions", jnp.zeros(1)) + 1}}
    with pytest.raises(InvalidInput, match=r"other frozen parameters.*params/positions"):
        run(2, tmp_path / "cut", other)
    went_on, expected = run(2, tmp_path / "cut"), run(2, None)
    for path, leaf in by_path(went_on.params).items():
        np.testing.assert_array_equal(leaf, by_path(expected.params)[path])


def test_a_frozen_tree_is_known_beforehand():
    doubled = Objective(lambda key, params, batch: Frozen(jax.tree.map(lambda leaf: 2 * leaf, params)), lambda *_: None)
    with pytest.raises(InvalidInput, match="computed by the objective's init"):
        training.frozen_trees(doubled, {"a": jnp.ones(2)}, {})


def test_the_trained_part_is_not_frozen():
    objective, params, factors, _ = case()
    with pytest.raises(InvalidInput, match="trained is 'lora'"):
        objectives.with_frozen(objective, {"params": params, "lora": factors}, trained="lora")
