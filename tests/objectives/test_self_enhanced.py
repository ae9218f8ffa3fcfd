"""States that a model made itself: what a perfect one changes, what an imperfect one is taught, and what learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, denoisers, distributed, objectives, processes, timesteps, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.typing import Aux, Network, Objective

PROCESS = processes.residual_diffusion(processes.vp_scaled_linear(time="1000t"), end=0.8)
RANDOM = np.random.default_rng(0)
KEY = jax.random.key(0)
X0, M = RANDOM.standard_normal((2, 8, 3), np.float32)
BATCH = {"x0": X0, "cond": {"endpoint": M}, "index": np.arange(8)}
PARAMS = {"scale": np.array([0.7], np.float32), "bias": np.array([0.1, -0.2, 0.3], np.float32)}


def linear(params, x, t, cond, train=False, key=None):
    return params["scale"] * x + params["bias"], {}


def knowing(params, x, t, cond, train=False, key=None):
    """The truth, and the parameters added to it; what was seen is told."""
    at = t / 800.0
    seen, _ = PROCESS.given({"endpoint": M})
    y = x - PROCESS.endpoint_share(at)[:, None] * M
    return seen.target(X0, PROCESS.from_x0(X0, y, at).eps, at) + params, {"y": y}


def made(apply=linear, **options):
    network = Network(lambda *_: (), apply)
    options = {"share": 1.0, "warmup": 0, "decay": 0.9, **options}
    plain = objectives.denoising(network, PROCESS, timesteps.uniform(0.1, 0.9))
    return objectives.self_enhanced(plain, denoisers.denoiser(network, PROCESS), **options)


def lost(objective, params, state, batch, number=3):
    return jax.jit(objective.loss)(params, state, jax.tree.map(jnp.asarray, batch), jax.random.key(number))


@pytest.fixture(scope="module")
def known():
    """`(params, noise, t) -> (losses, aux)` of `knowing`, one program."""
    objective = made(knowing, gap=0.3)

    @jax.jit
    def loss(params, noise, t):
        batch = {**jax.tree.map(jnp.asarray, BATCH), "t": t, "noise": noise}
        return objective.loss(params, objective.init(jax.random.key(0), params, batch), batch, jax.random.key(3))

    return loss


NOISE = np.float32(RANDOM.normal(size=X0.shape))


def test_a_perfect_average_changes_neither_state_nor_target(known):
    t = np.linspace(0.1, 0.9, 8, dtype=np.float32)
    losses, aux = known(np.zeros(3, np.float32), NOISE, t)
    np.testing.assert_allclose(aux.extras["y"], PROCESS.marginal(X0, NOISE, t), atol=2e-5)
    np.testing.assert_allclose(losses, 0.0, atol=1e-8)
    assert aux.metrics["self_generated"] == 1


def test_an_imperfect_average_is_steered_back_to_the_truth(known):
    """The state is one step of the average's, and the target leads from there to the true x0, not by the old noise."""
    losses, aux = known(np.array([0.5, 0.5, 0.5], np.float32), NOISE, np.full(8, 0.5, np.float32))
    assert np.abs(aux.extras["y"] - PROCESS.marginal(X0, NOISE, 0.5)).min() > 1e-3, "off the path of the data"
    # `knowing` is wrong by its parameters from wherever it is asked: had the old noise been the target, by more.
    np.testing.assert_allclose(losses, 0.25, rtol=1e-3)


def test_without_a_share_it_is_the_objective_itself_and_before_the_warmup_nothing_is_asked():
    none, plain = (
        made(share=0.0),
        objectives.denoising(Network(lambda *_: (), linear), PROCESS, timesteps.uniform(0.1, 0.9)),
    )
    found = lost(none, PARAMS, none.init(jax.random.key(0), PARAMS, BATCH), BATCH)[0]
    np.testing.assert_array_equal(found, lost(plain, PARAMS, (), BATCH)[0])
    late = made(warmup=2)
    loss, state = jax.jit(late.loss), late.init(jax.random.key(0), PARAMS, BATCH)
    shares = []
    for step in range(4):
        _, aux = loss(PARAMS, state, jax.tree.map(jnp.asarray, BATCH), jax.random.key(step))
        state = aux.state
        shares.append(float(aux.metrics["self_generated"]))
    assert shares == [0, 0, 1, 1] and int(state.count) == 4


def test_the_loss_is_alive_and_the_average_does_not_learn_by_it():
    objective = made(decay=0.75)
    state = objective.init(jax.random.key(0), PARAMS, BATCH)

    def total(params, average):
        batch = jax.tree.map(jnp.asarray, BATCH)
        losses, aux = objective.loss(params, state._replace(average=average), batch, jax.random.key(5))
        return losses.mean(), aux.state

    moved = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    (learned, average), after = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(moved, state.average)
    assert all(np.abs(leaf).min() > 0 for leaf in jax.tree.leaves(learned))
    assert not any(np.abs(leaf).any() for leaf in jax.tree.leaves(average))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 0.25, rtol=1e-5), after.average, PARAMS)


def test_steps_are_uniform_up_to_the_gap_and_a_share_of_the_examples_makes_one():
    """Of x0 = 0 without noise, a network that says x0 = t leads from t' to the state t' - t, at t."""
    flow, count, gap = processes.rectified_flow(prediction="x0", time="t"), 4000, 0.2
    seen = Network(lambda *_: (), lambda params, x, t, cond, train=False, key=None: (0 * x + t[:, None], {}))

    def loss(params, state, batch, key):
        return batch["noise"][:, 0], Aux(state, {}, {})

    noise = Objective(lambda *_: (), loss, lambda state, batch, key: batch)
    objective = objectives.self_enhanced(noise, denoisers.denoiser(seen, flow), share=0.3, gap=gap, warmup=0)
    t = np.where(np.arange(count) % 2, 0.5, 0.95).astype(np.float32)
    batch = {"x0": np.zeros((count, 1), np.float32), "t": t, "index": jnp.arange(count)}
    batch["noise"] = batch["x0"]
    found, aux = jax.jit(lambda: objective.loss((), objective.init(KEY, (), batch), batch, KEY))()
    chosen = np.asarray(found) != 0
    assert abs(chosen.mean() - 0.3) < 0.03
    np.testing.assert_allclose(aux.metrics["self_generated"], chosen.mean(), rtol=1e-5)
    share = (np.asarray(found) * t / np.minimum(gap, 1 - t))[chosen]
    assert share.min() > 0 and share.max() < 1 + 1e-5
    # The mean and the deviation of U(0, 1): which are chosen has nothing to do with how far they go.
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.std() - 12**-0.5) < 0.02


def test_only_what_learns_has_an_average_and_what_is_frozen_has_no_gradient():
    network = Network(lambda *_: (), linear)
    plain = objectives.denoising(network, PROCESS, timesteps.uniform(0.1, 0.9))
    part = objectives.with_frozen(plain, {"scale": PARAMS["scale"]}, "bias")
    denoiser = denoisers.denoiser(network, PROCESS)
    objective = objectives.self_enhanced(
        part, denoiser, warmup=0, whole=lambda learned, state: {**state.frozen.value, "bias": learned}
    )
    state = objective.init(jax.random.key(3), PARAMS["bias"], BATCH)
    assert state.average.shape == (3,)

    def total(learned, frozen):
        inner = state.inner._replace(frozen=state.inner.frozen._replace(value=frozen))
        batch = jax.tree.map(jnp.asarray, BATCH)
        return objective.loss(learned, state._replace(inner=inner), batch, jax.random.key(4))[0].mean()

    learned, frozen = jax.jit(jax.grad(total, argnums=(0, 1)))(PARAMS["bias"], state.inner.frozen.value)
    assert np.abs(learned).min() > 0 and not np.abs(frozen["scale"]).any()


def test_eight_devices_have_the_loss_of_one_and_a_run_goes_on_bit_for_bit(tmp_path):
    objective, optimizer = made(share=0.5, warmup=1), training.optimizers.adamw(1e-2)

    def run(steps, folder=None, devices=1):
        mesh, quiet = distributed.make_mesh(devices=jax.devices()[:devices]), {"progress": False, "log_to": ()}
        batches = data.pipeline(data.ArraySource(X0, {"endpoint": M}), 8)
        begin = lambda key: jax.tree.map(jnp.asarray, PARAMS)  # noqa: E731
        return training.train(
            objective, optimizer, batches, init_params=begin, steps=steps, workdir=folder, mesh=mesh, **quiet
        )

    whole, wide = run(4), run(4, devices=8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), wide.params, whole.params)
    run(2, str(tmp_path))
    resumed = run(4, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.objective_state, whole.objective_state)


def test_what_is_wrong_is_told():
    for options in ({"share": 2.0}, {"gap": 0.0}, {"decay": 1.0}, {"warmup": -1}):
        with pytest.raises(InvalidInput, match="share, gap"):
            made(**options)
    with pytest.raises(InvalidInput, match="base"):
        made().init(jax.random.key(0), PARAMS, {**BATCH, "base": X0})
    network = Network(lambda *_: (), linear)
    objective = objectives.denoising(network, PROCESS)._replace(prepare=None)
    with pytest.raises(InvalidInput, match="prepare"):
        objectives.self_enhanced(objective, denoisers.denoiser(network, PROCESS))
