"""Training to a budget: the mean over the batch is held, its limit falls, the complete model is trained at first."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import objectives
from diffusion_jax.errors import InvalidInput
from diffusion_jax.training.optimizers import below_norm, sgd
from diffusion_jax.typing import Aux, Objective

BATCH = {"x0": jnp.zeros((4, 2)), "share": jnp.array([0.2, 1.0, 0.4, 0.8])}


def constant(loss):
    """An objective with this loss, whose network executes what the batch says times the parameter."""

    def function(params, state, batch, key):
        extras = {"share": params * batch["share"]}
        return jnp.full((4,), loss) * params, Aux((), {"mse": jnp.float32(loss)}, {}, extras)

    return Objective(lambda key, params, batch: (), function)


def budgeted(**fields):
    settings = {"full_steps": 1, "warmup_steps": 2, "ratio": lambda extras: extras["share"], **fields}
    return objectives.budgeted(constant(3.0), 0.5, **settings)


def test_the_mean_is_held_and_the_complete_model_leaves_after_its_steps():
    objective = budgeted(complete=constant(10.0), complete_steps=2, weight=2.0)
    state, key, params = objective.init(jax.random.key(0), 1.0, BATCH), jax.random.key(1), jnp.float32(1.0)
    # Steps 0 and 1 have both losses; the limit is 1, 1, 0.75, 0.5; the batch executes 0.6 in mean.
    for complete, limit in ((10.0, 1.0), (10.0, 1.0), (0.0, 0.75), (0.0, 0.5)):
        losses, aux = objective.loss(params, state, BATCH, key)
        np.testing.assert_allclose(losses, np.full(4, 3.0 + complete + 2 * (0.6 - limit) ** 2), rtol=1e-5)
        assert float(aux.metrics["budget"]) == pytest.approx(limit)
        assert float(aux.metrics["ratio"]) == pytest.approx(0.6)
        state = aux.state


def test_the_budget_has_a_gradient_and_a_complete_model_that_left_has_none():
    objective = budgeted(complete=constant(10.0), complete_steps=2)
    late = objectives.Budgeted((), jnp.int32(5))
    slope = jax.grad(lambda p: objective.loss(p, late, BATCH, jax.random.key(0))[0].mean())(jnp.float32(1.0))
    # d/dp of 3 p + 2 (0.6 p - 0.5)^2.
    assert float(slope) == pytest.approx(3.0 + 4 * 0.1 * 0.6, rel=1e-4)


def test_steps_with_large_gradients_move_nothing():
    optimizer = below_norm(sgd(1.0, momentum=0.9), 2.0)
    params = jnp.zeros(2)
    state = optimizer.init(params)
    updates, moved = optimizer.update(jnp.array([1.0, 1.0]), state, params)
    np.testing.assert_array_equal(updates, [-1.0, -1.0])
    updates, kept = optimizer.update(jnp.array([2.0, 1.0]), moved, params)
    np.testing.assert_array_equal(updates, [0.0, 0.0])
    chex.assert_trees_all_equal(kept, moved)
    assert optimizer.learning_rate(0) == 1.0
    assert isinstance(below_norm(optax.sgd(1.0), 2.0), optax.GradientTransformation)


def test_bad_budgets_are_told():
    for fields, match in (({"target": 0.0}, "target"), ({"target": 0.5, "warmup_steps": -1}, "warmup_steps")):
        with pytest.raises(InvalidInput, match=match):
            objectives.budgeted(constant(1.0), fields.pop("target"), **fields)
    with pytest.raises(InvalidInput, match="norm"):
        below_norm(sgd(1.0), 0.0)
