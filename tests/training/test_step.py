"""The step is the update written by hand, for every accumulation; it skips what is not finite, and compiles once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import distributed, timesteps, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.training import ema, optimizers
from diffusion_jax.typing import Aux, Objective

from .problems import Batches, equal, init_params, make_objective

TRACKS = {"fixed": ema.fixed(0.9), "power": ema.power(0.1)}


def run(steps=5, batches=None, objective=None, optimizer=None, mesh=None, rules=None, **settings):
    """The states' final one and the metrics of each step."""
    objective = objective or make_objective()
    optimizer = optimizer or optimizers.adamw(1e-2)
    batches = iter(batches or Batches())
    first = next(iter(Batches()))
    state = training.init_state(objective, optimizer, init_params, first, ema=TRACKS, mesh=mesh, rules=rules)
    step = training.make_train_step(objective, optimizer, mesh, rules, ema=TRACKS, **settings)
    history = []
    for _ in range(steps):
        state, metrics = step(state, distributed.shard_batch(next(batches), mesh))
        history.append(jax.device_get(metrics))
    return state, history, step


@pytest.fixture(scope="module")
def plain():
    return run()


def test_one_step_is_the_update_written_by_hand():
    # loss = mean over examples of (w x)^2 with x = 1, 2: gradient 2 w mean(x^2) = 5 w.
    objective = Objective(
        lambda key, params, batch: (),
        lambda params, state, batch, key: (
            jnp.square(params["w"] * batch["x0"]),
            Aux(state, {"seen": jnp.max(batch["x0"])}, {}),
        ),
    )
    batch = {"x0": jnp.asarray([1.0, 2.0])}
    optimizer = optimizers.sgd(0.1)
    for clip, gradient in ((None, 10.0), (1.0, 1.0)):
        state = training.init_state(objective, optimizer, lambda key: {"w": jnp.float32(2.0)}, batch, ema=TRACKS)
        step = training.make_train_step(objective, optimizer, ema=TRACKS, clip_norm=clip)
        state, metrics = step(state, batch)
        expected = 2.0 - 0.1 * gradient
        np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)
        np.testing.assert_allclose(state.ema["fixed"]["w"], 0.9 * 2 + 0.1 * expected, rtol=1e-6)
        np.testing.assert_allclose(state.ema["power"]["w"], expected, rtol=1e-6)
        found = {name: float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate", "seen", "update_norm")}
        assert found == pytest.approx(
            {"loss": 10.0, "grad_norm": 10.0, "learning_rate": 0.1, "seen": 2.0, "update_norm": 0.1 * gradient}
        )
        assert int(state.step) == 1 and int(state.skipped) == 0


def test_repeated_calls_compile_once(plain):
    state, _, step = plain
    assert step.programs() == 1
    step(state, distributed.shard_batch(next(iter(Batches())), None))
    assert step.programs() == 1


def test_the_state_is_consumed_but_on_cpus_and_never_copied(plain, monkeypatch):
    state, _, step = plain
    batch = distributed.shard_batch(next(iter(Batches())), None)
    copied = r"= f32\S* copy\(%state"
    assert not re.search(copied, step.lower(state, batch).compile().as_text())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    consuming = training.make_train_step(make_objective(), optimizers.adamw(1e-2), ema=TRACKS)
    monkeypatch.undo()
    assert not re.search(copied, consuming.lower(state, batch).compile().as_text())
    copy = jax.tree.map(jnp.copy, state)
    consuming(copy, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy.params) + jax.tree.leaves(copy.ema))


def test_accumulation_is_the_whole_batch(plain):
    state, history, _ = plain
    cut, cut_history, _ = run(accumulate=4)
    np.testing.assert_allclose([m["loss"] for m in cut_history], [m["loss"] for m in history], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cut.params, state.params)
    mesh = distributed.make_mesh(data=4, fsdp=2)
    _, spread, _ = run(accumulate=2, mesh=mesh, rules=distributed.Rules(fsdp_min_size=1))
    np.testing.assert_allclose([m["loss"] for m in spread], [m["loss"] for m in history], rtol=1e-5)


def test_the_seed_and_the_step_are_all_the_randomness(plain):
    state, history, _ = plain
    again, _, _ = run()
    assert equal(again, state)
    assert run(steps=1, seed=1)[1][0]["loss"] != history[0]["loss"]


def test_a_seed_is_that_of_the_key_and_all_seeds_are_one_program():
    objective = Objective(
        lambda key, params, batch: (),
        lambda params, state, batch, key: (params["w"] * batch["x0"], Aux(state, {"bits": jax.random.bits(key)}, {})),
    )
    optimizer, batch = optimizers.sgd(0.1), {"x0": np.ones(1, np.float32)}
    state = training.init_state(objective, optimizer, lambda key: {"w": jnp.float32(2.0)}, batch)
    programs = set()
    for seed in (0, 7, -5, 2**32 - 1, 2**40 + 5):
        step = training.make_train_step(objective, optimizer, seed=seed)
        assert int(step(state, batch)[1]["bits"]) == int(jax.random.bits(jax.random.fold_in(jax.random.key(seed), 0)))
        programs.add(step.lower(state, batch).as_text())
    assert len(programs) == 1


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted():
    learning = make_objective(timesteps.importance(num_buckets=2, history=2))
    good, _, _ = run(steps=3, objective=learning)
    bad, history, _ = run(steps=5, objective=learning, batches=Batches(poison=(3, 4)))
    assert equal(
        good._replace(step=0, skipped=0, skipped_in_a_row=0), bad._replace(step=0, skipped=0, skipped_in_a_row=0)
    )
    assert (int(bad.step), int(bad.skipped), int(bad.skipped_in_a_row)) == (5, 2, 2)
    assert not np.isfinite(history[3]["loss"])
    after, _, _ = run(steps=6, batches=Batches(poison=(3, 4)))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (2, 0)


@pytest.mark.parametrize(
    ("optimizer", "tracks", "gradient", "good"),
    [(optax.sgd(float("inf")), TRACKS, 1.0, 0), (optax.sgd(3e38), TRACKS, 1.0, 0)],
    ids=["the rate", "the norm of the parameters"],
)
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(optimizer, tracks, gradient, good):
    """Loss and gradient are finite in all of them; what begins as infinite does not count."""
    objective = Objective(
        lambda key, params, batch: {"best": jnp.float32(jnp.inf)},
        lambda params, state, batch, key: (params["w"] * batch["x0"], Aux(state, {}, {})),
    )
    batch = {"x0": jnp.full(1, gradient)}
    state = training.init_state(objective, optimizer, lambda key: {"w": jnp.float32(2.0)}, batch, ema=tracks)
    step = training.make_train_step(objective, optimizer, ema=tracks)
    for _ in range(good):
        state, _ = step(state, batch)
        assert int(state.skipped) == 0
    after, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    counters = {"step": 0, "skipped": 0, "skipped_in_a_row": 0}
    assert equal(after._replace(**counters), state._replace(**counters))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 1)


def test_objectives_keep_their_state_and_any_optax_optimiser_fits():
    objective = make_objective(timesteps.importance(num_buckets=2, history=4))
    state, _, _ = run(steps=3, objective=objective, optimizer=optax.adam(1e-3), accumulate=2)
    assert int(state.objective_state.count.sum()) == 3 * 16


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": 3}, r"batch_size is 16.*multiple of 3"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
    ],
)
def test_mistakes_are_named(settings, words):
    with pytest.raises(InvalidInput, match=words):
        run(steps=1, **settings)
