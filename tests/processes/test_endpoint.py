"""Processes with a known second endpoint: what they are in closed form, that solvers and losses are the usual ones, and
that published settings are what their authors wrote."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, objectives, processes, sampling, solvers, timesteps
from diffusion_jax.errors import InvalidInput
from diffusion_jax.processes import residual_diffusion
from diffusion_jax.typing import Network

RANDOM = np.random.default_rng(0)
X0, M, NOISE = RANDOM.standard_normal((3, 4, 3, 3, 2), np.float32)
COND = {"endpoint": M, "control": M}
SCALED, VP = processes.vp_scaled_linear(time="1000t"), processes.vp_linear(time="1000t")
HALF = float(VP.inverse_log_snr(float(np.log(1 / 3))))
CASES = {
    "shadows": residual_diffusion(SCALED),
    "shadows, early end": residual_diffusion(SCALED, end=0.6),
    "rddm": residual_diffusion(processes.edm(0.7, time="t"), "residual", share="decreasing"),
    "resfusion": residual_diffusion(VP, share="odds", end=HALF),
    "v": residual_diffusion(processes.cosine(), "v"),
}


def knowing(process):
    """The network that knows x0, and answers as one of this process should."""

    def apply(params, x, t, cond, train=False, key=None):
        at = t[0] / (1000.0 * process.end)
        seen, _ = process.given({"endpoint": cond["control"]})
        y = x - process.endpoint_share(at) * cond["control"]
        noise = process.from_x0(params, y, at).eps
        return seen.target(params, noise, at), {}

    return Network(lambda *_: (), apply)


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_the_published_one_and_answers_give_the_pair_back(name):
    process = CASES[name]
    t = np.array([0.01, 0.3, 0.7, 0.97], np.float32)

    @jax.jit
    def program(x0, m, noise, t):
        (seen, left), y = process.given({"endpoint": m}), process.marginal(x0, noise, t)
        assert left is None
        whole, b, s = process.schedule.whole(t), process.endpoint_share(t), process.sigma(t)
        a, b, s = (value[:, None, None, None] for value in (whole, b, s))
        state, target = seen.network_input(y, t), seen.target(x0, noise, t)
        pair = seen.predict(target, y, t)
        return state, a * x0 + b * (m - x0) + s * noise, target, (state - a * x0) / s, pair, seen.output(pair, t)

    state, expected, target, general, pair, again = program(X0, M, NOISE, t)
    np.testing.assert_allclose(state, expected, atol=2e-6)
    np.testing.assert_allclose(again, target, atol=2e-5)
    if process.prediction == "residual_noise":
        np.testing.assert_allclose(target[1:], general[1:], atol=2e-5)
        np.testing.assert_allclose(pair.x0, X0, atol=2e-5)
        np.testing.assert_allclose(pair.eps[1:], NOISE[1:], atol=2e-5)
    ends = jax.jit(lambda t: (process.alpha(t), process.endpoint_share(t), process.sigma(t)))(
        np.array([0, 1], np.float32)
    )
    assert ends[0].tolist() == [1, 0] and ends[1][0] == 0 and ends[2][0] == 0
    np.testing.assert_array_equal(ends[1][1], process.schedule.whole(1.0))


def test_with_odds_the_endpoint_grows_as_the_data_fades_and_levels_are_found_again_with_their_slope():
    process, t = CASES["resfusion"], np.array([0.1, 0.4, 0.8], np.float32)

    @jax.jit
    def run(t):
        levels = process.log_snr(t)
        back, slopes = jax.jvp(process.inverse_log_snr, (levels,), (jnp.ones_like(t),))
        _, rates = jax.jvp(process.log_snr, (back,), (jnp.ones_like(t),))
        return process.endpoint_share(t), 1 - process.schedule.whole(t), back, slopes * rates

    share, faded, back, product = run(t)
    np.testing.assert_allclose(share, faded, atol=1e-5)
    np.testing.assert_allclose(back, t, atol=1e-4)
    np.testing.assert_allclose(product, 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", ["shadows", "resfusion"])
def test_a_perfect_answer_leads_from_the_endpoint_and_noise_to_the_data_along_its_states(name):
    process, most = CASES[name], 13
    denoiser = denoisers.denoiser(knowing(process), process)

    @jax.jit
    def run(x0, cond, start, grid):
        begin = {"x_init": start, "cond": cond, "save_every": 1}
        made = sampling.sample(jax.random.key(0), denoiser, x0, solvers.ddim(), grid, **begin).trace
        first = process.given(cond)[0].network_input(start, 1.0)
        states = jax.vmap(lambda t: process.marginal(x0, NOISE, t))(grid[1:])
        return made, states, first, process.schedule.whole(1.0)

    level = np.float32(process.sigma(1.0))
    for steps in (1, 4, most):
        grid = timesteps.padded(timesteps.linspace(steps), most)
        made, states, first, whole = run(X0, COND, level * NOISE, grid)
        # What a run begins with knows nothing of x0, and is the prior's.
        np.testing.assert_allclose(first, whole * M + level * NOISE, atol=1e-6)
        np.testing.assert_allclose(made[-1], X0, atol=6e-6)
        np.testing.assert_allclose(made, states, atol=2e-5)


def linear():
    """A network of three numbers."""

    def apply(params, x, t, cond, train=False, key=None):
        assert cond is None, "the endpoint is not the network's"
        return params[0] * x + params[1] * t[:, None, None, None] / 1000 + params[2], {}

    return Network(lambda *_: (), apply), np.array([0.7, 0.2, 0.1], np.float32)


def test_without_a_share_of_the_endpoint_it_is_the_ordinary_process_bit_for_bit():
    network, params = linear()
    batch = {"x0": X0, "t": jnp.linspace(0.1, 0.9, 4)}
    found = []
    for process, cond in ((residual_diffusion(SCALED, share="none"), {"endpoint": M}), (SCALED, None)):
        objective, denoiser = objectives.denoising(network, process), denoisers.denoiser(network, process)

        @jax.jit
        def program(params, cond, objective=objective, denoiser=denoiser):
            key = jax.random.key(2)
            run = (key, denoiser, params, solvers.ddim(0.5), timesteps.linspace(4))
            loss = objective.loss(params, (), {**batch, "cond": cond}, key)[0]
            return loss, sampling.sample(*run, shape=X0.shape, cond=cond).x

        found.append(program(params, cond))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_training_is_that_of_noise_around_what_the_data_has_turned_into():
    """That of the ordinary process with `base` in the place of x0 as what is noised; x0 itself where that is m."""
    network, params = linear()
    process, t = CASES["shadows"], jnp.linspace(0.1, 0.9, 4)

    @jax.jit
    def program(params, x0, m):
        gamma = (process.endpoint_share(t) / SCALED.alpha(t))[:, None, None, None]
        batches = {"cond": {"endpoint": m}}, {"base": x0 + gamma * (m - x0)}
        losses = [
            objectives.denoising(network, one).loss(params, (), {"x0": x0, "t": t, **told}, jax.random.key(2))[0]
            for one, told in zip((process, SCALED), batches, strict=True)
        ]
        return losses, process.given({"endpoint": m})[0].target(x0, NOISE, t)

    for m in (M, X0):
        losses, target = program(params, X0, m)
        np.testing.assert_allclose(*losses, rtol=2e-5)
    np.testing.assert_array_equal(target, NOISE)


def test_a_step_is_that_of_residual_denoising_diffusion():
    """Liu et al. 2024: I_s = I_t - (alpha_t - alpha_s) I_res - (beta_t - beta_s) eps, of cumulative alpha and beta."""
    process, r, t, s = CASES["rddm"], M - X0, 0.7, 0.4
    alpha, beta = (lambda t: t * (2 - t)), (lambda t: 0.7 * t)
    state = X0 + alpha(t) * r + beta(t) * NOISE
    # An imperfect answer, of the residual.
    said = r + 0.3 * NOISE[::-1]
    eps = (state - M + (1 - alpha(t)) * said) / beta(t)
    expected = state - (alpha(t) - alpha(s)) * said - (beta(t) - beta(s)) * eps

    @jax.jit
    def step(said, y):
        seen, _ = process.given(COND)
        pair = seen.predict(said, y, t)
        return seen.network_input(process.marginal(pair.x0, pair.eps, s), s)

    np.testing.assert_allclose(step(said, np.float32(state - alpha(t) * M)), expected, atol=1e-5)


def test_the_share_of_the_residual_in_the_noise_is_bounded_and_the_network_is_told_the_times_of_its_prior():
    process = CASES["shadows"]
    t = np.arange(1, 1001, dtype=np.float32) / 1000
    priors = [processes.vp_scaled_linear(time=time) for time in ("index", "1000t")]

    @jax.jit
    def program(t):
        share = process.endpoint_share(t) / process.sigma(t)
        told = [(residual_diffusion(prior).network_time(t), prior.network_time(t)) for prior in priors]
        told.append((CASES["shadows, early end"].network_time(t), SCALED.network_time(0.6 * t)))
        ends = process.inverse_log_snr(jnp.array([-jnp.inf, jnp.inf]))
        return SCALED.alpha(t), SCALED.sigma(t), share, told, process.inverse_log_snr(process.log_snr(t)), ends

    a, s, share, told, again, ends = jax.device_get(program(t))
    a, s = np.asarray(a, np.float64), np.asarray(s, np.float64)
    np.testing.assert_allclose(share, a * (1 - a) / (1 - a[-1]) / s, atol=1e-4)
    assert abs(share.max() - 0.322) < 1e-3
    for ours, theirs in told:
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(again[100:], t[100:], atol=1e-5)
    assert ends.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["shadows", "rddm"])
def test_values_and_derivatives_are_finite_at_both_ends(name):
    process = CASES[name]

    def values(t):
        seen, _ = process.given(COND)
        y = process.marginal(X0, NOISE, t)
        pair = seen.predict(seen.network_input(y, t), y, t)
        numbers = process.alpha(t), process.sigma(t), process.endpoint_share(t), seen.target(X0, NOISE, t), pair.x0
        return sum(jnp.sum(number) for number in (*numbers, pair.eps, process.inverse_log_snr(t - 0.5)))

    found = jax.jit(jax.vmap(jax.value_and_grad(values)))(np.array([0, 1e-3, 0.5, 1], np.float32))
    assert all(np.isfinite(part).all() for part in found)


def test_entries_have_times_of_their_own_and_clean_ones_stay():
    process = CASES["shadows"]
    state = jax.jit(lambda t: process.given(COND)[0].network_input(process.marginal(X0, NOISE, t), t))
    found = np.asarray(state(np.array([[0] * 3, [0.5] * 3, [1] * 3, [0] * 3], np.float32)))
    np.testing.assert_array_equal(found[[0, 3]], X0[[0, 3]])
    np.testing.assert_allclose(found[1], state(np.float32(0.5))[1], atol=1e-6)


def test_what_is_wrong_is_told():
    wrong: dict[str, Any] = {"end": 0.0, "share": "half", "prediction": "edm"}
    for field, value in wrong.items():
        with pytest.raises(InvalidInput, match=field):
            residual_diffusion(SCALED, **{field: value})
    with pytest.raises(InvalidInput, match="process"):
        residual_diffusion(CASES["rddm"])
    with pytest.raises(InvalidInput, match="decreasing"):
        residual_diffusion(processes.edm())
    with pytest.raises(InvalidInput, match="alpha of the process is 0"):
        residual_diffusion(processes.rectified_flow())
    with pytest.raises(InvalidInput, match="nobody gave"):
        CASES["shadows"].network_input(X0, 0.5)
    with pytest.raises(InvalidInput, match="endpoint"):
        CASES["shadows"].given({"label": 1})
    with pytest.raises(InvalidInput, match="shape"):
        CASES["shadows"].given({"endpoint": M[:2]})[0].network_input(X0, 0.5)
