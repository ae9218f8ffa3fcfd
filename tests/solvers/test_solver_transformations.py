"""Solver transformations: what they leave alone, what they hold, and inpainting against the exact conditional."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample

FLOW = processes.rectified_flow()
MIXTURE = gaussian_mixture([[0.0, 1.0], [1.0, -1.0]], 0.3)
GRID = jnp.linspace(1.0, 0.0, 9)


def run(solver, **options):
    options = {"shape": (4, 2), **options}
    return jax.jit(lambda key: sample(key, analytic(FLOW), MIXTURE, solver, GRID, **options))(jax.random.key(2))


@pytest.mark.parametrize("solver", [solvers.ddim(1.0), solvers.unipc()], ids=["ddim", "unipc"])
def test_wrapping_with_identities_changes_nothing(solver):
    same = solvers.with_hooks(solver, before=lambda p, x, s, k: x, after=lambda p, x, s, k: x)
    np.testing.assert_array_equal(run(same).x, run(solver).x)


@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.unipc(), solvers.ddpm()], ids=["ddim", "unipc", "ddpm"])
def test_inpainting_holds_the_known_region(solver):
    known, mask = jnp.array([0.9, 7.0]) * jnp.ones((4, 1)), jnp.array([True, False]) & jnp.ones((4, 1), bool)
    x = run(solvers.inpainted(solver, known, mask)).x
    np.testing.assert_array_equal(x[:, 0], known[:, 0])
    assert np.isfinite(np.asarray(x)).all()
    nothing = run(solvers.inpainted(solver, known, jnp.zeros((4, 2), bool))).x
    np.testing.assert_array_equal(nothing, run(solver).x)


def test_an_entry_is_known_until_the_time_has_fallen_to_its_release():
    known, noise = jnp.full((1, 5), 7.0), jnp.linspace(-1.0, 1.0, 5)[None]
    release = jnp.array([[0.0, 0.25, 0.3, 1.0, 0.9]])
    mixture = gaussian_mixture([[0.0] * 5], 0.3)

    def trace(solver):
        args = (jax.random.key(0), analytic(FLOW), mixture, solver, GRID)
        return jax.jit(lambda: sample(*args, x_init=noise, save_every=1).trace)()

    found = np.asarray(trace(solvers.released(solvers.ddim(), known, release, noise=noise, before=False)))[:, 0]
    free = np.asarray(trace(solvers.ddim()))[:, 0]
    for t, x in zip(np.asarray(GRID)[1:], found, strict=True):
        held = (t > np.asarray(release[0])) | (np.asarray(release[0]) == 0)
        np.testing.assert_allclose(x[held], ((1 - t) * known + t * noise)[0, held], atol=1e-6)
        assert (np.abs(x[~held] - ((1 - t) * known + t * noise)[0, ~held]) > 1e-3).all()
    np.testing.assert_array_equal(found[:, 3], free[:, 3])
    assert found[-1, 0] == 7.0


def test_repainting_finds_the_exact_conditional():
    """Given one coordinate of a correlated Gaussian, the other has a known mean; repeating comes closer to it."""
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]])
    mixture = gaussian_mixture([[0.0, 0.0]], covariances=covariance[None])
    known, mask = jnp.full((512, 2), 1.5), jnp.array([[True, False]]) & jnp.ones((512, 1), bool)
    grid = jnp.linspace(1.0, 0.0, 25)

    def mean(solver):
        args = (analytic(FLOW), mixture, solver, grid)
        return float(jax.jit(lambda key: sample(key, *args, shape=(512, 2)).x)(jax.random.key(0))[:, 1].mean())

    exact = 0.9 * 1.5
    replaced = mean(solvers.inpainted(solvers.ddpm(), known, mask))
    repainted = mean(solvers.repainted(solvers.ddpm(), known, mask, repeats=8))
    assert abs(repainted - exact) < 0.12
    assert abs(repainted - exact) < abs(replaced - exact)


def test_repainting_costs_its_repeats_and_refuses_histories():
    known, mask = jnp.zeros((4, 2)), jnp.zeros((4, 2), bool)
    assert float(run(solvers.repainted(solvers.ddim(), known, mask, repeats=3)).cost.evaluations) == 24
    np.testing.assert_allclose(
        run(solvers.repainted(solvers.ddim(), known, mask, repeats=1)).x, run(solvers.ddim()).x, atol=1e-6
    )
    with pytest.raises(InvalidInput, match="without history"):
        run(solvers.repainted(solvers.unipc(), known, mask))


def test_constraints_hold_at_the_end():
    x = run(solvers.constrained(solvers.dpm_solver_pp(), lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True))).x
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1.0, atol=1e-6)


def test_optimising_the_latent_lowers_the_energy_and_zero_iterations_change_nothing():
    def energy(x, step):
        return jnp.square(x[:, 0] - 1.0)

    plain = run(solvers.ddim()).x
    moved = run(solvers.optimised(solvers.ddim(), energy, learning_rate=0.2, iterations=3)).x
    assert (np.square(moved[:, 0] - 1.0)).mean() < 0.5 * np.square(plain[:, 0] - 1.0).mean()
    np.testing.assert_array_equal(run(solvers.optimised(solvers.ddim(), energy, iterations=0)).x, plain)
    never = solvers.optimised(solvers.ddim(), energy, iterations=3, interval=(0.01, 0.02))
    np.testing.assert_array_equal(run(never).x, plain)
