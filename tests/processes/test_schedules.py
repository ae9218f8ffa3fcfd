"""Laws of schedules: exact ends, the family's identity, inverse log-SNR, and tables exact against float64 products."""

import math
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import enable_x64

from diffusion_jax import processes
from diffusion_jax.errors import InvalidInput
from diffusion_jax.processes import (
    EDM,
    Cosine,
    DiscreteVP,
    GaussianProcess,
    KeepCosine,
    KeepGeometric,
    KeepPolynomial,
    Linear,
    LinearVP,
    Shifted,
    VarianceExploding,
    betas,
    zero_terminal_snr_betas,
)

SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "linear_vp": LinearVP(),
    "ve": VarianceExploding(),
    "edm": EDM(),
    "discrete": DiscreteVP(betas("linear", 1000)),
    "discrete_sigma": DiscreteVP(betas("linear", 1000), "sigma"),
    "discrete_log_sigma": DiscreteVP(betas("scaled_linear", 50, beta_end=0.3), "log_sigma"),
    "discrete_7": DiscreteVP(betas("cosine", 7)),
    "zero_terminal": DiscreteVP(zero_terminal_snr_betas(betas("scaled_linear", 100))),
    "shifted_flow": Shifted(Linear(), -2 * math.log(3)),
    "shifted_vp": Shifted(Cosine(), 2 * math.log(64 / 256)),
    "shifted_ve": Shifted(EDM(), 1.0),
}
KEEPS = {
    "keep_linear": KeepPolynomial(),
    "keep_power": KeepPolynomial(power=2, eps=1e-3),
    "keep_cosine": KeepCosine(),
    "keep_geometric": KeepGeometric(),
}
TIMES = np.concatenate([[0.0], np.geomspace(1e-6, 0.1, 20), np.linspace(0.11, 1.0, 60)]).astype(np.float32)


def coefficients(schedule):
    """`t -> (alpha, sigma)`, compiled."""
    return jax.jit(lambda t: (schedule.alpha(t), schedule.sigma(t)))


@pytest.mark.parametrize("name", SCHEDULES | KEEPS)
def test_clean_at_zero_and_falling_log_snr(name):
    schedule = (SCHEDULES | KEEPS)[name]
    alpha, sigma = coefficients(schedule)(TIMES[0])
    assert float(alpha) == 1.0 and float(sigma) == 0.0
    log_snr = np.asarray(jax.jit(schedule.log_snr)(TIMES))
    assert log_snr[0] == math.inf
    assert (np.diff(log_snr) < 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_is_that_of_alpha_and_sigma_and_the_family_holds(name):
    schedule = SCHEDULES[name]
    with jax.enable_x64(True):
        t = TIMES[1:-1].astype(np.float64)
        alpha, sigma, log_snr = jax.jit(lambda t: (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)))(t)
        assert alpha.dtype == sigma.dtype == jnp.float64
        alpha, sigma = np.asarray(alpha), np.asarray(sigma)
        np.testing.assert_allclose(log_snr, 2 * np.log(alpha / sigma), atol=1e-9)
        identity = {"vp": alpha**2 + sigma**2, "flow": alpha + sigma, "ve": alpha}[schedule.family]
        np.testing.assert_allclose(identity, 1.0, rtol=1e-14)


@pytest.mark.parametrize("name", SCHEDULES | KEEPS)
@pytest.mark.parametrize("double", [False, True])
def test_inverse_log_snr_inverts(name, double):
    schedule = (SCHEDULES | KEEPS)[name]
    with jax.enable_x64(double):
        t = TIMES.astype(np.float64 if double else np.float32)
        back = jax.jit(lambda t: schedule.inverse_log_snr(schedule.log_snr(t)))(t)
        # A log-SNR of size l is rounded by about 1e-7 l, which moves t by a share of itself.
        np.testing.assert_allclose(back, t, rtol=1e-9 if double else 2e-5, atol=1e-12 if double else 3e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_single_precision_is_relatively_accurate_at_both_ends(name):
    schedule = SCHEDULES[name]
    single = [np.asarray(found, np.float64) for found in coefficients(schedule)(TIMES)]
    with jax.enable_x64(True):
        double = jax.device_get(coefficients(schedule)(TIMES.astype(np.float64)))
    for a, b in zip(single, double, strict=True):
        # sigma = 50 * 5000^t carries t's rounding times log(5000).
        np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-7 * (b.max() if name == "zero_terminal" else 0) + 1e-30)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000, 1337])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_tables_are_the_products_at_every_node(kind, num_steps):
    table = np.asarray(betas(kind, num_steps))
    assert table.shape == (num_steps,)
    schedule = DiscreteVP(tuple(table.tolist()))
    product = np.cumprod(1.0 - table)
    nodes = (np.arange(num_steps) + 1) / num_steps
    with jax.enable_x64(True):
        alpha, sigma = jax.device_get(coefficients(schedule)(nodes))
    np.testing.assert_allclose(alpha**2, product, rtol=1e-12)
    np.testing.assert_allclose(sigma**2, 1 - product, rtol=1e-11)
    alpha, sigma, position = jax.jit(lambda t: (schedule.alpha(t), schedule.sigma(t), schedule.position(t)))(
        nodes.astype(np.float32)
    )
    # Correctly rounded square roots: float32 times hit their node, not a point beside it.
    np.testing.assert_allclose(alpha, np.sqrt(product), rtol=1.5e-7)
    np.testing.assert_allclose(sigma, np.sqrt(1 - product), rtol=1.5e-7)
    np.testing.assert_array_equal(position, np.arange(num_steps) + 1)


def test_interpolations_agree_at_nodes_and_are_linear_in_between():
    table = betas("scaled_linear", 50)
    for interpolation, coordinate in (("sigma", lambda ratio: ratio), ("log_sigma", np.log)):
        schedule, plain = DiscreteVP(table, interpolation), DiscreteVP(table)
        nodes = np.arange(1, 51, dtype=np.float32) / 50
        t = np.array([0.41, 0.42, 0.415, 0.01], np.float32)
        found = jax.device_get(coefficients(schedule)(np.concatenate([nodes, t])))
        for ours, at_nodes in zip(found, coefficients(plain)(nodes), strict=True):
            np.testing.assert_allclose(ours[:50], at_nodes, rtol=1e-6)
        alpha, sigma = (values[50:] for values in found)
        low, high, middle = coordinate(sigma[:3] / alpha[:3])
        # 0.41 and 0.42 lie in one segment, which ends at the node 0.42.
        assert middle == pytest.approx(0.5 * (low + high), rel=1e-5)
        np.testing.assert_allclose(schedule.noise_ratios[1] * 0.5, sigma[3] / alpha[3], rtol=1e-5)


def test_a_terminal_alpha_bar_is_kept():
    schedule = DiscreteVP(zero_terminal_snr_betas(betas("scaled_linear", 100), 2.0**-24))
    assert schedule.tables[0][-1] == pytest.approx(2.0**-24, rel=1e-6)


def test_tables_have_the_published_ends():
    last = {kind: float(np.prod(1 - np.asarray(betas(kind)))) for kind in ("linear", "scaled_linear", "cosine")}
    assert last["linear"] == pytest.approx(4.0358e-05, rel=1e-3)
    assert last["scaled_linear"] == pytest.approx(0.0047, rel=1e-2)
    assert betas("cosine")[-1] == 0.999


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step():
    before = betas("scaled_linear", 1000)
    after = zero_terminal_snr_betas(before)
    assert after[-1] == 1.0
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    schedule = DiscreteVP(after)
    assert float(schedule.alpha(1.0)) == 0.0 and float(schedule.sigma(1.0)) == 1.0
    # sqrt(alpha_bar) is an affine image of what it was.
    roots = [np.sqrt(DiscreteVP(b).tables[0][1:]) for b in (before, after)]
    slope = np.diff(roots[1]) / np.diff(roots[0])
    np.testing.assert_allclose(slope, slope[0], rtol=1e-8)


@settings(deadline=None, max_examples=30)
@given(s=st.floats(0.1, 10.0), t=st.floats(0.0, 1.0, width=32))
def test_shifted_linear_is_the_flow_shift(s, t):
    shifted = Shifted(Linear(), -2 * math.log(s))
    np.testing.assert_allclose(shifted.sigma(t), s * t / (1 + (s - 1) * t), rtol=2e-6, atol=1e-30)


def test_rates_are_derivatives():
    t, h = np.array([0.0504, 0.3003, 0.7113, 0.9506]), 1e-6

    @jax.jit
    def both(t):
        """Of every schedule: rates, and differences by which to know them."""
        out = {}
        for name, schedule in SCHEDULES.items():
            slopes = [(f(t + h) - f(t - h)) / (2 * h) for f in (schedule.alpha, schedule.sigma)]
            out[name] = GaussianProcess(schedule).rates(t), slopes
        return out

    with jax.enable_x64(True):
        for name, (rates, slopes) in both(t).items():
            for rate, slope in zip(rates, slopes, strict=True):
                np.testing.assert_allclose(rate, slope, rtol=1e-4, atol=1e-7, err_msg=name)


def test_schedules_and_processes_are_hashable_and_equal_by_value():
    for name, schedule in (SCHEDULES | KEEPS).items():
        assert hash(schedule) == hash(schedule), name
    assert processes.vp_linear() == processes.vp_linear() and len({processes.vp_linear(), processes.vp_linear()}) == 1
    assert processes.vp_linear() != processes.vp_linear(num_steps=999)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: betas("linaer"), "did you mean 'linear'"),
        (lambda: betas("linear", 0), "num_steps is 0"),
        (lambda: betas("linear", 10, beta_end=1.5), "beta_end"),
        (lambda: DiscreteVP(()), "at least one beta"),
        (lambda: DiscreteVP((0.1, 1.0, 0.2)), r"betas\[1\]"),
        (lambda: DiscreteVP((0.1, 0.2), "log sigma"), "did you mean 'log_sigma'"),
        (lambda: DiscreteVP((0.1, 1.0), "sigma"), "needs 'variance'"),
        (lambda: zero_terminal_snr_betas((0.1, 0.2), 1.0), "terminal is 1.0"),
        (lambda: LinearVP(beta_max=0.01), "beta_max"),
        (lambda: VarianceExploding(sigma_max=-1), "sigma_max"),
        (lambda: EDM(float("nan")), "sigma_max"),
        (lambda: Shifted(object(), 1.0), "family"),
        (lambda: Shifted(Linear(), math.inf), "log_snr_shift"),
        (lambda: KeepPolynomial(eps=1), "eps"),
    ],
)
def test_wrong_values_are_named(make, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidInput, match=words):
            make()


def test_schedules_have_finite_derivatives_and_inside_they_are_differences():
    """Also where alpha or sigma is 0 and the log-SNR infinite; of the rates too, which flow solvers differentiate."""
    # Between the nodes of all tables.
    inside, size = np.array([0.0637, 0.3143, 0.5591, 0.8137]), 1e-6

    def weighted(schedule, t):
        process = GaussianProcess(schedule)
        told = process.alpha(t), process.sigma(t), process.log_snr(t), *process.rates(t)
        return sum(weight * value for weight, value in zip((1.0, -2.0, 0.3, 0.7, 0.2), told, strict=True))

    @jax.jit
    def program(t):
        pulled = [jax.vjp(partial(weighted, schedule), t) for schedule in SCHEDULES.values()]
        return [(value, pull(jnp.ones_like(t))[0]) for value, pull in pulled]

    with enable_x64(True):
        rows = [np.concatenate([t, [0.0, 1.0]]) for t in (inside, inside + size, inside - size)]
        found = jax.device_get([program(row) for row in rows])
    for name, (_, slope), (there, _), (back, _) in zip(SCHEDULES, *found, strict=True):
        assert np.isfinite(slope).all(), name
        expected = (there[:-2] - back[:-2]) / (2 * size)
        np.testing.assert_allclose(slope[:-2], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_predictions_have_finite_derivatives_at_the_ends():
    """What every parameterisation makes of a network's output, and the other way round, where it is singular too."""
    x = np.array([0.3, -0.5])

    @jax.jit
    def slopes(t):
        def told(process, t):
            pair = process.predict(0.7 * process.network_input(x, t), x, t)
            others = (getattr(process, name)(pair, t) for name in ("output", "velocity", "score", "v"))
            return jnp.sum(pair.x0 + 0.5 * pair.eps + 0.1 * sum(others))

        return [
            jax.grad(partial(told, GaussianProcess(SCHEDULES[name], prediction)))(t)
            for name in ("zero_terminal", "linear")
            for prediction in processes.PARAMETERIZATIONS
        ]

    assert all(np.isfinite(slope).all() for slope in slopes(np.array([0.0, 1.0])))
