"""States that a model made itself: what a perfect one changes, what an imperfect one is taught, and what learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, denoisers, distributed, models, objectives, processes, timesteps, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.typing import Network

PROCESS = processes.residual_diffusion(processes.vp_scaled_linear(time="1000t"), end=0.8)
RANDOM = np.random.default_rng(0)
X0, M = RANDOM.standard_normal((2, 8, 3), np.float32)
BATCH = {"x0": X0, "cond": {"endpoint": M}, "index": jnp.arange(8)}


def answering(wrong):
    """A network that answers with the truth of X0, plus parameters times `wrong`."""

    def apply(params, x, t, cond, train=False, key=None):
        at = t / 800.0
        seen, _ = PROCESS.given({"endpoint": M})
        y = x - PROCESS.endpoint_share(at)[:, None] * M
        noise = PROCESS.from_x0(cond["truth"], y, at).eps
        return seen.target(cond["truth"], noise, at) + wrong * params, {}

    return Network(lambda *_: jnp.ones(3), apply)


def made(network, **options):
    options = {"share": 1.0, "warmup": 0, "decay": 0.9, **options}
    return objectives.self_enhanced(
        objectives.denoising(network, PROCESS, timesteps.uniform(0.1, 0.9)),
        denoisers.denoiser(network, PROCESS),
        **options,
    )


def recorded(network):
    """The network, and what it was shown."""
    shown = {}

    def apply(params, x, t, cond, train=False, key=None):
        if train:
            shown.update(x=x, t=t)
        return network.apply(params, x, t, cond)

    return network._replace(apply=apply), shown


@functools.cache
def case():
    network = models.mlp(width=8, depth=1, conditions=())
    return network, network.init(jax.random.key(1), X0, jnp.ones(8), None)


def test_a_perfect_average_changes_neither_state_nor_target():
    batch = {**BATCH, "cond": {**BATCH["cond"], "truth": X0}, "t": jnp.linspace(0.1, 0.9, 8)}
    noise = RANDOM.standard_normal(X0.shape).astype(np.float32)
    network, shown = recorded(answering(0.0))
    objective = made(network)
    params, key = jnp.ones(3), jax.random.key(3)
    state = objective.init(key, params, batch)
    losses, aux = objective.loss(params, state, {**batch, "noise": noise}, key)
    y = PROCESS.marginal(X0, noise, batch["t"])
    np.testing.assert_allclose(shown["x"], PROCESS.given(batch["cond"])[0].network_input(y, batch["t"]), atol=2e-5)
    np.testing.assert_allclose(losses, 0.0, atol=1e-8)
    assert aux.metrics["self_generated"] == 1


def test_an_imperfect_average_is_steered_back_to_the_truth():
    """The state is one step of the average's, and the target leads from there to the true x0, not by the old noise."""
    wrong, t = 0.5, jnp.full(8, 0.5)
    batch = {**BATCH, "cond": {**BATCH["cond"], "truth": X0}, "t": t}
    network, shown = recorded(answering(wrong))
    params, key = jnp.ones(3), jax.random.key(3)
    objective = made(network, gap=0.3)
    losses, _ = objective.loss(params, objective.init(key, params, batch), batch, key)
    y = shown["x"] - PROCESS.endpoint_share(0.5) * M
    kept = PROCESS.from_x0(X0, y, t).eps
    seen, told = PROCESS.given(batch["cond"])
    said = network.apply(params, shown["x"], shown["t"], told)[0]
    np.testing.assert_allclose(losses, np.square(said - seen.target(X0, kept, t)).mean(1), rtol=1e-4)
    # Off the path of the data by what the average said wrongly, which is the same for all.
    assert np.abs(y - PROCESS.alpha(0.5) * X0 - PROCESS.sigma(0.5) * kept).max() < 1e-5
    np.testing.assert_allclose(losses, (wrong**2), rtol=1e-3)


def test_without_a_share_it_is_the_objective_itself_and_before_the_warmup_nothing_is_asked():
    network, params = case()
    plain = objectives.denoising(network, PROCESS, timesteps.uniform(0.1, 0.9))
    none, key = made(network, share=0.0), jax.random.key(4)
    found = jax.jit(none.loss)(params, none.init(key, params, BATCH), BATCH, key)[0]
    np.testing.assert_array_equal(found, jax.jit(plain.loss)(params, (), BATCH, key)[0])
    late = made(network, warmup=2)
    loss, state = jax.jit(late.loss), late.init(key, params, BATCH)
    shares = []
    for step in range(4):
        _, aux = loss(params, state, BATCH, jax.random.key(step))
        state = aux.state
        shares.append(float(aux.metrics["self_generated"]))
    assert shares == [0, 0, 1, 1] and int(state.count) == 4


def test_the_loss_is_alive_and_the_average_does_not_learn_by_it():
    network, params = case()
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    objective, key = made(network, decay=0.5), jax.random.key(5)
    state = objective.init(key, params, BATCH)

    def total(params, average):
        losses, aux = objective.loss(params, state._replace(average=average), BATCH, key)
        return losses.mean(), aux.state

    step = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (learned, average), after = step(params, state.average)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(learned))
    assert all(not np.abs(leaf).any() for leaf in jax.tree.leaves(average))
    moved = jax.tree.map(lambda leaf: leaf + 1.0, params)
    after = jax.jit(total)(moved, state.average)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 0.5, rtol=1e-5), after.average, params)


def test_only_what_learns_has_an_average():
    network, params = case()
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    adapted = adapters.lora(network, rank=2, select="up")
    factors = adapted.init(jax.random.key(2), params, X0, jnp.ones(8), None)
    part = objectives.with_frozen(
        objectives.denoising(adapted.network, PROCESS, timesteps.uniform(0.1, 0.9)), {"params": params}, "lora"
    )
    objective = objectives.self_enhanced(
        part,
        denoisers.denoiser(adapted.network, PROCESS),
        warmup=0,
        whole=lambda learned, state: {**state.frozen.value, "lora": learned},
    )
    state = objective.init(jax.random.key(3), factors, BATCH)
    assert jax.tree.structure(state.average) == jax.tree.structure(factors)
    gradient = jax.jit(jax.grad(lambda learned: objective.loss(learned, state, BATCH, jax.random.key(4))[0].mean()))(
        factors
    )
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 0


def test_a_run_goes_on_bit_for_bit_and_eight_devices_have_the_loss_of_one(tmp_path):
    network, params = case()
    objective, optimizer = made(network, share=0.5, warmup=1), training.optimizers.adamw(1e-3)
    losses = {}
    for name, mesh in (("one", distributed.make_mesh(devices=jax.devices()[:1])), ("all", distributed.make_mesh())):
        state = training.init_state(objective, optimizer, lambda key: params, BATCH, mesh=mesh)
        step = training.make_train_step(objective, optimizer, mesh=mesh)
        for _ in range(3):
            state, metrics = step(state, BATCH)
        losses[name] = float(metrics["loss"])
    np.testing.assert_allclose(losses["all"], losses["one"], rtol=1e-5)


def test_what_is_wrong_is_told():
    network, _ = case()
    for options in ({"share": 2.0}, {"gap": 0.0}, {"decay": 1.0}, {"warmup": -1}):
        with pytest.raises(InvalidInput, match="share, gap"):
            made(network, **options)
    objective = objectives.denoising(network, PROCESS)._replace(prepare=None)
    with pytest.raises(InvalidInput, match="prepare"):
        objectives.self_enhanced(objective, denoisers.denoiser(network, PROCESS))
