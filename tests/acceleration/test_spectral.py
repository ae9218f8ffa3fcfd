"""SeaCache: a filter that follows the noise, changes that add up to a decision, and the denoiser where it is asked."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, solvers
from diffusion_jax.acceleration import on_schedule, sea_cached, taylor
from diffusion_jax.acceleration.outputs import cached_outputs
from diffusion_jax.acceleration.spectral import signal
from diffusion_jax.costs import carry_bytes
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample
from tests import shipped
from tests.denoisers.tiny import network
from tests.models.drawn import drawn

FLOW = processes.rectified_flow()
X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4, 2), np.float32))
COND = {"label": jnp.asarray(np.arange(8) % 5)}
PARAMS = drawn(jax.eval_shape(network().init, jax.random.key(1), X, None, None))
GRID = jnp.asarray(np.linspace(1.0, 0.0, 13, dtype=np.float32))


def run(denoiser, grid=GRID, x=X, params=PARAMS, save_every=None):
    @shipped.jit
    def whole(params, x):
        key, solver = jax.random.key(2), solvers.flow_euler()
        return sample(key, denoiser, params, solver, grid, x_init=x, cond=COND, save_every=save_every)

    return whole(params, x)


def plain(on_call=None):
    return denoisers.denoiser(network(on_call=on_call), FLOW)


def wave(frequency, axis):
    """Pictures `[1, 16, 16, 1]` of one frequency."""
    line = jnp.cos(2 * jnp.pi * frequency * jnp.arange(16) / 16)
    return jnp.broadcast_to(line[:, None] if axis == 0 else line[None, :], (16, 16))[None, ..., None]


@pytest.mark.parametrize("exponent", [2.0, 3.0])
def test_the_filter_is_the_best_linear_estimate_of_a_picture(exponent):
    for t in (0.3, 0.7):
        alpha, sigma = 1 - t, t
        gains = {}
        for frequency in (0, 1, 4, 8):
            x = wave(frequency, frequency % 2)
            filtered = signal(x, FLOW, jnp.float32(t), exponent)
            gains[frequency] = float(filtered[0, 0, 0, 0])
            np.testing.assert_allclose(filtered, gains[frequency] * x, atol=1e-4)
            # Of the power of a picture and of noise: alpha S / (alpha^2 S + sigma^2), against that of a constant.
            power = (16 / frequency) ** exponent if frequency else np.inf
            best = alpha / (alpha**2 + sigma**2 / power)
            assert gains[frequency] / gains[0] == pytest.approx(best * alpha, rel=1e-3)
        assert gains[0] > gains[1] > gains[4] > gains[8] > 0


def test_clean_data_pass_as_they_are_and_of_noise_the_coarsest_is_left():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, 8, 3)), jnp.float32)
    np.testing.assert_allclose(signal(x, FLOW, jnp.zeros(2)), x, atol=1e-5)
    noisy = signal(x, FLOW, jnp.float32(1.0))
    np.testing.assert_allclose(noisy, jnp.broadcast_to(64 * x.mean((1, 2), keepdims=True), x.shape), atol=3e-2)
    # Each sample at its own level, that of its noisiest entry; vectors have no frequencies.
    apart = signal(x, FLOW, jnp.stack([jnp.zeros(8), jnp.linspace(0.0, 1.0, 8)]))
    np.testing.assert_allclose(apart[0], x[0], atol=1e-5)
    np.testing.assert_allclose(apart[1], noisy[1], atol=1e-5)
    np.testing.assert_array_equal(signal(x[:, 0, 0], FLOW, jnp.float32(0.5)), x[:, 0, 0])


def test_with_a_threshold_of_0_it_is_the_denoiser_bit_for_bit_and_without_bound_it_asks_at_the_ends():
    always, expected = run(sea_cached(plain(), 0.0)), run(plain())
    np.testing.assert_array_equal(always.x, expected.x)
    assert float(always.cost.evaluations) == 12
    calls = []
    never = run(sea_cached(plain(on_call=lambda rows: calls.append(int(rows))), jnp.inf))
    jax.effects_barrier()
    assert calls == [8, 8] and float(never.cost.evaluations) == 2


@pytest.mark.parametrize("threshold", [0.15, 0.4])
def test_changes_of_the_filtered_input_add_up_until_it_is_asked(threshold):
    found = run(sea_cached(plain(), threshold), save_every=1)
    xs = [X, *np.asarray(found.trace)[:-1]]
    seen = [np.asarray(signal(jnp.asarray(x), FLOW, t)) for x, t in zip(xs, GRID[:-1])]
    asked, change = [True], 0.0
    for old, new in itertools.pairwise(seen):
        change += np.abs(new - old).mean() / np.abs(old).mean()
        asked.append(bool(change >= threshold))
        change = 0.0 if asked[-1] else change
    asked[-1] = True
    assert 3 < sum(asked) < 12
    assert float(found.cost.evaluations) == sum(asked)
    same = run(cached_outputs(plain(), on_schedule(asked)))
    np.testing.assert_allclose(found.x, same.x, atol=1e-6)
    forecast = run(sea_cached(plain(), threshold, forecaster=taylor(1)))
    assert float(jnp.abs(forecast.x - found.x).max()) > 1e-4


def test_joint_data_are_decided_by_the_entry_that_moves_most_and_a_mesh_changes_nothing():
    joint = processes.JointProcess({"a": FLOW, "b": FLOW})
    x = {"a": X, "b": X[:, 0]}
    params = drawn(jax.eval_shape(network().init, jax.random.key(3), x, None, None), seed=3)
    frozen = {"a": GRID, "b": jnp.zeros_like(GRID)}
    inner = denoisers.denoiser(network(), joint)
    both = run(sea_cached(inner, 0.3), grid=frozen, x=x, params=params)
    assert 2 < float(both.cost.evaluations) < 12
    index, shape = jnp.arange(8), (4, 2)
    one, eight = (
        make_sampler(sea_cached(plain(), 0.3, axis=axis), solvers.flow_euler(), shape=shape, mesh=mesh)(
            jax.random.key(0), PARAMS, GRID, COND, index
        )
        for mesh, axis in ((None, None), (make_mesh(data=8), "data"))
    )
    np.testing.assert_allclose(one.x, eight.x, atol=1e-5)
    assert float(one.cost.evaluations) == float(eight.cost.evaluations) < 12


def test_it_holds_an_output_and_a_filtered_input_and_as_many_more_as_the_forecast_needs():
    one, two = (carry_bytes(sea_cached(plain(), 0.3, forecaster=rule), PARAMS, X, COND) for rule in (None, taylor(1)))
    assert 2 * X.nbytes <= one < 2.5 * X.nbytes and 3 * X.nbytes <= two < 3.5 * X.nbytes


def test_guidance_goes_around_it_and_within():
    for made in (
        denoisers.guided(sea_cached(plain(), 0.3), 2.0, {"label": 4}),
        sea_cached(denoisers.guided(plain(), 2.0, {"label": 4}), 0.3),
    ):
        found = run(made)
        assert bool(jnp.isfinite(found.x).all()) and 4 < float(found.cost.evaluations) < 24


def test_what_cannot_be_is_refused():
    with pytest.raises(InvalidInput, match="threshold"):
        sea_cached(plain(), -0.1)
    with pytest.raises(InvalidInput, match="exponent"):
        sea_cached(plain(), 0.1, exponent=0.0)
    with pytest.raises(InvalidInput, match="discrete"):
        sea_cached(denoisers.denoiser(network(4), processes.absorbing(4)), 0.1)
