"""Imitation: nothing to learn from oneself, the teacher's answer in the network's own terms, and the slider's loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, models, objectives, processes, timesteps
from diffusion_jax.denoisers import analytic, contrasted, denoiser, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from diffusion_jax.typing import Frozen, Network
from tests.denoisers import tiny
from tests.models.drawn import drawn

VP = processes.vp_linear(prediction="v")
KEY = jax.random.key(5)
NETWORK = tiny.network()
BATCH = {"x0": jax.random.normal(jax.random.key(1), (8, 2, 2, 3)), "cond": {"label": jnp.arange(8) % 3}}
PARAMS = NETWORK.init(jax.random.key(0), BATCH["x0"], jnp.zeros(8), BATCH["cond"])
MIXTURE = gaussian_mixture(jax.random.normal(jax.random.key(2), (3, 2, 2, 3)), 0.4, labels=[0, 1, 2])
DRAW = timesteps.uniform(0.05, 0.95)


def losses(objective, params):
    state = objective.init(KEY, params, BATCH)
    return jax.jit(lambda params: objective.loss(params, state, BATCH, KEY))(params)


def exact(process):
    """A network that is the exact denoiser of the mixture, in the parameterisation of `process`."""

    def apply(params, x, t, cond, train=False, key=None):
        said, _ = analytic(process).apply(params, (), x, tiny.step_at(t), cond)
        return process.target(said.x0, said.eps, t), {}

    return Network(None, apply)


def test_there_is_nothing_to_learn_from_oneself():
    objective = objectives.imitation(NETWORK, VP, denoiser(NETWORK, VP), PARAMS, DRAW)
    loss, aux = losses(objective, PARAMS)
    np.testing.assert_allclose(loss, 0.0, atol=1e-8)
    np.testing.assert_array_equal(aux.metrics["mse"], loss.mean())
    state = objective.init(KEY, PARAMS, BATCH)

    @jax.jit
    @jax.grad
    def gradient(params, teacher):
        return objective.loss(params, state._replace(teacher=Frozen(teacher)), BATCH, KEY)[0].mean()

    other = jax.tree.map(lambda leaf: 1.1 * leaf, PARAMS)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient(PARAMS, PARAMS))) < 1e-5
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient(PARAMS, other))) > 1e-2


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_teacher_and_network_may_predict_different_things(prediction):
    process = processes.vp_linear(prediction=prediction, time="t")
    objective = objectives.imitation(exact(process), process, analytic(VP), MIXTURE, DRAW)
    np.testing.assert_allclose(losses(objective, MIXTURE)[0], 0.0, atol=1e-6)


def test_a_contrasted_teacher_gives_the_loss_of_a_slider():
    process, plus, minus, eta = processes.vp_linear(time="t"), {"label": 2}, {"label": 0}, 0.7
    network = exact(process)
    steered = contrasted(analytic(process), plus, minus, eta)
    loss, aux = losses(objectives.imitation(network, process, steered, MIXTURE, DRAW), MIXTURE)
    # The network is the unsteered teacher, so what is left is the steering itself.
    batch = objectives.imitation(network, process, steered, MIXTURE, DRAW).prepare(
        objectives.Imitated(MIXTURE, DRAW.init()), BATCH, KEY
    )
    np.testing.assert_array_equal(batch["t"], aux.per_example["t"])

    def eps(label, x, t):
        cond = {"label": jnp.full(8, label)}
        return analytic(process).apply(MIXTURE, (), x, tiny.step_at(t), cond)[0].eps

    x = jax.random.normal(KEY, BATCH["x0"].shape)
    said = tiny.ask(steered, MIXTURE, x, tiny.step_at(batch["t"]), BATCH["cond"])
    plain = tiny.ask(analytic(process), MIXTURE, x, tiny.step_at(batch["t"]), BATCH["cond"])
    direction = eps(2, x, batch["t"]) - eps(0, x, batch["t"])
    np.testing.assert_allclose(said.eps, plain.eps + eta * direction, rtol=1e-4, atol=1e-5)
    alpha, sigma = (f(batch["t"])[:, None, None, None] for f in (process.alpha, process.sigma))
    np.testing.assert_allclose(alpha * said.x0 + sigma * said.eps, x, atol=1e-4)
    assert said.cost.evaluations == 3
    assert float(loss.min()) > 0
    # It grows with the square of the strength.
    twice = contrasted(analytic(process), plus, minus, 2 * eta)
    doubled, _ = losses(objectives.imitation(network, process, twice, MIXTURE, DRAW), MIXTURE)
    np.testing.assert_allclose(doubled, 4 * loss, rtol=1e-3)


def test_weights_and_times():
    teacher = denoiser(NETWORK, VP)
    other = jax.tree.map(lambda leaf: 1.1 * leaf, PARAMS)
    plain = objectives.imitation(NETWORK, VP, teacher, other, timesteps.on_grid(jnp.array([1.0, 0.5, 0.0])))
    loss, aux = losses(plain, PARAMS)
    assert set(np.asarray(aux.per_example["t"]).tolist()) <= {1.0, 0.5}
    weighted = objectives.imitation(
        NETWORK, VP, teacher, other, timesteps.on_grid(jnp.array([1.0, 0.5, 0.0])), weight=lambda process, t: 3.0 * t
    )
    np.testing.assert_allclose(losses(weighted, PARAMS)[0], 3 * aux.per_example["t"] * loss, rtol=1e-5)


def test_a_teacher_with_a_memory_is_refused():
    objective = objectives.imitation(NETWORK, VP, tiny.remembering(denoiser(NETWORK, VP)), PARAMS)
    with pytest.raises(InvalidInput, match="remembers its last step"):
        objective.init(KEY, PARAMS, BATCH)


def test_a_slider_learns_beside_frozen_weights_and_nothing_where_nothing_is_steered():
    network = models.mlp(width=16, depth=2, conditions=(models.label(3),))
    adapted = adapters.lora(network, rank=2, select=("up", "down"))
    batch = {"x0": jax.random.normal(KEY, (8, 5)), "cond": BATCH["cond"]}
    params = drawn(models.param_shapes(network, (8, 5), batch["cond"]), 1)
    factors = adapted.init(KEY, params, batch["x0"], jnp.zeros(8), batch["cond"])

    @jax.jit
    def gradient(strength):
        steered = contrasted(denoiser(network, VP), {"label": 2}, {"label": 0}, strength)
        objective = objectives.slider(adapted.network, VP, steered, params, DRAW)
        state = objective.init(KEY, factors, batch)
        return jax.grad(lambda factors: objective.loss(factors, state, batch, KEY)[0].mean())(factors)

    still, moved = (by_path(gradient(strength)) for strength in (0.0, 1.0))
    assert set(moved) == set(by_path(factors))
    for path, leaf in moved.items():
        assert np.abs(still[path]).max() < 1e-6
        # B begins at zero, so A has no gradient yet.
        assert (np.abs(leaf).max() > 1e-6) == path.endswith("/b")
