"""What is put around an objective keeps it: its loss and gradient, its state, its draw of times, what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, objectives, processes
from diffusion_jax.typing import Aux, Network, Objective

KEY = jax.random.key(0)
FLOW = processes.rectified_flow(time="t")
X = np.random.default_rng(0).standard_normal((4, 2, 1, 1, 1)).astype(np.float32)
BATCH = {"x0": X, "base": X, "states": np.stack([X, X], axis=1), "index": jnp.arange(4)}
NETWORK = Network(lambda *_: {}, lambda params, x, t, cond=None, train=False, key=None: (params["p"] * x, {}))
DENOISER = denoisers.denoiser(NETWORK, FLOW)
EDGES = (0.0, 0.5, 1.0)


def _prepare(state, batch, key):
    """Times that tell whose state it was."""
    return {"t": jnp.full(4, 0.1) * state["seen"], "t_weight": jnp.ones(4), "index": jnp.arange(4), **batch}


def _loss(params, state, batch, key):
    t = _prepare(state, batch, key)["t"]
    losses = 7.0 * params["p"] * jax.random.uniform(key, (4,))
    return losses, Aux({"seen": state["seen"] + 1}, {"own": jnp.float32(5)}, {"loss": losses, "t": t}, {"told": t})


INNER = Objective(lambda key, params, batch: {"seen": jnp.float32(3)}, _loss, _prepare)
JUDGE = objectives.Discriminator(
    lambda *_: {"h": jnp.ones(())},
    lambda params, x, level, cond=None: 0 * x.reshape(len(x), 1, -1),
    lambda heads, features, level: 0 * features[..., 0],
    jnp.array([1.0, 0.0]),
)
POLICY = models.Chooser(lambda *_: {}, lambda params, x: jnp.zeros((len(x), 2)) + params["q"], 2)
OWN, PAIR = {"p": jnp.float32(2)}, {"p": jnp.float32(2), "q": jnp.zeros(2)}
AROUND = {
    "adversarial": (
        lambda: objectives.adversarial(INNER, DENOISER, JUDGE, {}, objectives.hinge()),
        {"student": OWN, "heads": {"h": jnp.ones(())}},
    ),
    "conditioned_on_ends": (lambda: objectives.conditioned_on_ends(INNER), OWN),
    "degraded": (lambda: objectives.degraded(INNER, objectives.perturbed()), OWN),
    "multitask": (lambda: objectives.multitask(INNER, EDGES, objectives.projected()), OWN),
    "on_trajectories": (lambda: objectives.on_trajectories(INNER, FLOW, [1.0, 0.0]), OWN),
    "self_enhanced": (lambda: objectives.self_enhanced(INNER, DENOISER, warmup=0), OWN),
    "uncertainty_weighted": (lambda: objectives.uncertainty_weighted(INNER, EDGES), OWN),
    "with_time_policy": (
        lambda: objectives.with_time_policy(INNER, objectives.time_policy(POLICY, (0.2, 0.8), lambda *_: jnp.zeros(4))),
        {"student": OWN, "policy": PAIR},
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_the_inner_objective_keeps_its_loss_its_state_and_what_it_tells(name):
    make, params = AROUND[name]
    objective = make()
    batch = {key: value for key, value in BATCH.items() if key != "base" or name not in ("self_enhanced",)}

    @jax.jit
    def run(params):
        state = objective.init(KEY, params, batch)
        value = jax.value_and_grad(lambda params: objective.loss(params, state, batch, KEY)[0].mean())
        return objective.prepare(state, batch, KEY), objective.loss(params, state, batch, KEY)[1], value(params)[1]

    prepared, aux, grads = run(params)
    inner = aux.state if name in ("conditioned_on_ends", "degraded", "on_trajectories") else aux.state.inner
    assert float(inner["seen"]) == 4.0 and float(aux.metrics["own"]) == 5.0
    if name != "on_trajectories":
        np.testing.assert_allclose(prepared["t"], 0.3, rtol=1e-6)
        np.testing.assert_allclose(aux.extras["told"], 0.3, rtol=1e-6)
    # With s = 0 the uncertainty of the one interval of two that has examples halves it, and there are two.
    expected = 7.0 * np.asarray(jax.random.uniform(KEY, (4,))).mean() * (0.25 if name == "uncertainty_weighted" else 1)
    own = grads.get("student", grads)
    np.testing.assert_allclose(own["p"], expected, rtol=1e-5)
    np.testing.assert_array_equal(aux.per_example["loss"].shape, (4,))
    if name == "uncertainty_weighted":
        # The interval without examples has nothing to learn from.
        moved = np.asarray(aux.state.log_variances)
        assert moved[0] != 0 and moved[1] == 0
