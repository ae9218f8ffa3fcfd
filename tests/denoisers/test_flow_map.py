"""The flow map is where the probability flow ends, at any noise of a sample's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers
from diffusion_jax.denoisers import analytic, flow_map, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
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
