"""Laws of discrete processes: the posterior is Bayes' rule by enumeration, corruption has its rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes
from diffusion_jax.errors import InvalidInput
from diffusion_jax.processes import LOG_ZERO

V = 4
PROCESSES = {
    "absorbing": processes.absorbing(V, "cosine"),
    "absorbing_inside": processes.absorbing(V, "linear", mask_id=2),
    "uniform": processes.uniform(V, "geometric"),
}


def transition(process, t):
    """q(x_t | x_0) over all states, `[states, states]`: from the definition, one state at a time."""
    keep, size = float(process.alpha(t)), process.num_states
    lost_to = np.full(size, 1 / size) if isinstance(process, processes.Uniform) else np.eye(size)[process.mask_id]
    return keep * np.eye(size) + (1 - keep) * lost_to


def clean_log_probs(process, seed):
    logits = jax.random.normal(jax.random.key(seed), (V,))
    if isinstance(process, processes.Absorbing) and process.mask_id < V:
        logits = logits.at[process.mask_id].set(LOG_ZERO)
    return jax.nn.log_softmax(logits)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("t", "t_next"), [(0.8, 0.3), (1.0, 0.5), (0.4, 0.0), (1.0, 0.0)])
def test_posterior_is_bayes_rule_by_enumeration(name, t, t_next):
    process = PROCESSES[name]
    size = process.num_states
    to_next, to_t = transition(process, t_next), transition(process, t)
    # The chain between: from t_next to t a token is kept with probability alpha(t) / alpha(t_next).
    ratio = float(process.alpha(t)) / float(process.alpha(t_next))
    lost_to = to_t[0] - float(process.alpha(t)) * np.eye(size)[0]
    between = ratio * np.eye(size) + (1 - ratio) * lost_to / lost_to.sum()
    x0 = np.asarray(clean_log_probs(process, 0))
    absorbing = isinstance(process, processes.Absorbing)
    for state in range(size):
        if absorbing and state != process.mask_id:
            continue
        expected = np.zeros(size)
        for token in range(V):
            if to_t[token, state] > 0:
                expected += np.exp(x0[token]) * to_next[token] * between[:, state] / to_t[token, state]
        got = process.posterior(x0[None, None], jnp.full((1, 1), state), jnp.array([t]), t_next)
        assert got.shape == (1, 1, size)
        np.testing.assert_allclose(np.exp(got[0, 0]), expected, atol=2e-6)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_a_step_of_zero_length_keeps_every_token(name, t):
    process = PROCESSES[name]
    x_t = jnp.arange(process.num_states)[None]
    x0 = jnp.broadcast_to(clean_log_probs(process, 1), (*x_t.shape, V))
    got = np.exp(process.posterior(x0, x_t, t, t))
    np.testing.assert_array_equal(got[0], np.eye(process.num_states))


@pytest.mark.parametrize("name", PROCESSES)
def test_corrupt_follows_the_transition(name):
    process = PROCESSES[name]
    t = jnp.array([0.0, 0.3, 0.6, 1.0])
    x0 = jnp.full((4, 20_000), 1)
    x_t, noise = jax.jit(process.corrupt)(jax.random.key(0), x0, t)
    for row, time in enumerate(t):
        rates = np.bincount(np.asarray(x_t[row]), minlength=process.num_states) / x_t.shape[1]
        np.testing.assert_allclose(rates, transition(process, time)[1], atol=0.015)
    np.testing.assert_array_equal(x_t[0], x0[0])
    np.testing.assert_array_equal(process.marginal(x0, noise, t), x_t)


def test_absorbing_prior_and_growing_masks():
    process = PROCESSES["absorbing"]
    np.testing.assert_array_equal(process.prior(jax.random.key(0), (2, 3)), np.full((2, 3), V))
    x0 = jnp.zeros((1, 500), jnp.int32)
    masks = [process.corrupt(jax.random.key(1), x0, t)[1] for t in (0.2, 0.5, 0.9)]
    assert (masks[0] <= masks[1]).all() and (masks[1] <= masks[2]).all() and masks[0].sum() < masks[2].sum()


@pytest.mark.parametrize("name", ["absorbing", "absorbing_inside"])
def test_predictions_never_mask_and_copy_what_is_visible(name):
    process = PROCESSES[name]
    x_t = jnp.array([[0, 1, process.mask_id, process.mask_id]])
    logits = 5 * jax.random.normal(jax.random.key(0), (1, 4, process.num_states))
    x0 = np.exp(process.predict(logits, x_t, 0.5).x0)
    assert x0.shape == (1, 4, V)
    np.testing.assert_allclose(x0.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(x0[0, 0], np.eye(V)[0])
    np.testing.assert_array_equal(x0[0, 1], np.eye(V)[1])
    if process.mask_id < V:
        assert (x0[0, 2:, process.mask_id] == 0).all()


def test_the_mean_of_the_nelbo_of_a_uniform_guess_is_its_entropy():
    """With predictions that ignore x_t the bound is tight: log V nats a token, for every keep schedule."""
    t = (jnp.arange(200_000) + 0.5) / 200_000
    for schedule in ("linear", "cosine", processes.KeepPolynomial(power=2)):
        process = processes.absorbing(V, schedule)
        bound = jnp.mean(process.nelbo_weight(t) * process.sigma(t)) * np.log(V)
        np.testing.assert_allclose(bound, np.log(V), rtol=1e-4)
        assert float(process.nelbo_weight(0.0)) == 0.0


def test_per_token_times():
    process = PROCESSES["absorbing"]
    x0 = jnp.zeros((2, 3), jnp.int32)
    t = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    x_t, _ = process.corrupt(jax.random.key(0), x0, t)
    np.testing.assert_array_equal(process.is_masked(x_t), t == 1.0)
    x0_log = jnp.broadcast_to(clean_log_probs(process, 0), (2, 3, V))
    whole = process.posterior(x0_log, x_t, t, 0.5 * t)
    for i, j in np.ndindex(2, 3):
        part = process.posterior(x0_log[i, j], x_t[i, j], t[i, j], 0.5 * t[i, j])
        np.testing.assert_allclose(whole[i, j], part, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: processes.absorbing(1), "vocab_size"),
        (lambda: processes.absorbing(V, "cosin"), "did you mean 'cosine'"),
        (lambda: processes.absorbing(V, mask_id=9), "mask_id"),
        (lambda: processes.uniform(V, time="index"), "time"),
        (lambda: PROCESSES["uniform"].corrupt(jax.random.key(0), jnp.ones((2, 3)), 0.5), "integer tokens"),
        (lambda: PROCESSES["uniform"].predict(jnp.ones((2, 3, 7)), jnp.ones((2, 3), int), 0.5), "logits"),
    ],
)
def test_wrong_values_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()
