"""The flow map is where the probability flow ends, at any noise of a sample's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers
from diffusion_jax.denoisers import analytic, denoiser, flow_map, gaussian_mixture, guided
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Network
from tests.denoisers import tiny

VP = processes.vp_linear()
KEY = jax.random.key(3)
MIXTURE = gaussian_mixture(jax.random.normal(KEY, (3, 6)), 0.3)
EXACT = analytic(VP)


def test_a_flow_map_ends_where_the_flow_does():
    x = jax.random.normal(jax.random.key(1), (4, 6))
    said = tiny.ask(flow_map(EXACT, 16), MIXTURE, x, tiny.step_at(0.7))
    grid = 0.7 * jnp.linspace(1.0, 0.0, 17)
    end = jax.jit(lambda x: sample(KEY, EXACT, MIXTURE, solvers.ddim(), grid, x_init=x).x)(x)
    np.testing.assert_allclose(said.x0, end, rtol=1e-4, atol=1e-5)
    assert said.cost.evaluations == 16
    np.testing.assert_allclose(VP.alpha(0.7) * said.x0 + VP.sigma(0.7) * said.eps, x, atol=1e-5)


def test_samples_have_times_of_their_own_and_clean_ones_stay():
    x, t = jax.random.normal(jax.random.key(1), (4, 6)), jnp.array([0.9, 0.4, 0.1, 0.0])
    many = flow_map(EXACT, 8)
    together = tiny.ask(many, MIXTURE, x, tiny.step_at(t)).x0
    alone = [tiny.ask(many, MIXTURE, x[i : i + 1], tiny.step_at(t[i])).x0[0] for i in (0, 1)]
    np.testing.assert_allclose(together[:2], np.stack(alone), atol=1e-4)
    np.testing.assert_allclose(together[3], x[3], atol=1e-6)


def test_what_has_no_flow_is_told():
    with pytest.raises(InvalidInput, match="at least one step"):
        flow_map(EXACT, 0)
    with pytest.raises(InvalidInput, match="needs Gaussian processes"):
        flow_map(EXACT._replace(process=processes.absorbing(4)))


@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.flow_euler()], ids=["ddim", "flow_euler"])
def test_a_network_of_two_times_is_told_where_each_step_ends(solver):
    """Exact mean velocities between any two times end at the same place in any number of steps, and in any frame."""
    mean, width = jnp.array([1.0, -2.0, 0.5]), 0.3

    def standardised(t):
        return (1 - t) * mean, jnp.sqrt((1 - t) ** 2 * width**2 + t**2)

    def apply(params, x, t, cond=None, train=False, key=None):
        t, s = (expand(time / process.network_time(1.0), x) for time in (t, cond["target_time"]))
        (m_t, std_t), (m_s, std_s) = standardised(t), standardised(s)
        return (x - (m_s + std_s * (x - m_t) / std_t)) / jnp.maximum(t - s, 1e-6), {}

    process = processes.rectified_flow()
    told = denoiser(Network(lambda key, x, t, cond: {}, apply), process, target_time=True)
    x = jax.random.normal(KEY, (2, 4, 3))
    label = {"label": jnp.zeros(2, int)}
    for one in (told, guided(told, 2.0, null={"label": 1})):
        for grid in (jnp.linspace(1.0, 0.0, n + 1) for n in (1, 2, 5)):
            end = sample(KEY, one, {}, solver, grid, x_init=x, cond=label)
            np.testing.assert_allclose(end.x, mean + width * x, atol=2e-5)
    frames = jnp.stack([jnp.ones(4), jnp.array([1.0, 0.7, 0.2, 0.0]), jnp.zeros(4)])[:, None]
    np.testing.assert_allclose(sample(KEY, told, {}, solver, frames, x_init=x).x, mean + width * x, atol=2e-5)
