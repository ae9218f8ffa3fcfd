"""What the theory of diversity distillation says, what is measured, and the published settings."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import processes, timesteps
from diffusion_jax.config import build, load
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.denoisers.analytic import sample_mixture
from diffusion_jax.models import by_path
from diffusion_jax.recipes.parts.sliders import stroke_area
from diffusion_jax.typing import Step

CONFIG = "configs/recipes/diversity_distillation.py"
VP = processes.vp_linear()
KEY = jax.random.key(3)


def test_regression_loses_variance_and_its_loss_grows_with_the_noise():
    # Var(E[x0 | x_t]) <= Var(x0), and an error of eps shows in x0 times A_t = sigma / alpha.
    mixture = gaussian_mixture(jax.random.normal(KEY, (4, 8)), 0.3)
    x0, _ = jax.jit(sample_mixture, static_argnums=2)(jax.random.key(4), mixture, 4000)
    times = jnp.linspace(0.02, 1.0, 12)

    def spread(t):
        x, _ = VP.corrupt(jax.random.key(5), x0, jnp.full(4000, t))
        step = Step(jnp.int32(0), t, t, jnp.int32(1))
        return jnp.var(analytic(VP).apply(mixture, (), x, step, None)[0].x0, axis=0).sum()

    kept = jax.jit(lambda times: jax.lax.map(spread, times))(times)
    kept = np.asarray(kept) / float(np.var(x0, axis=0).sum())
    assert (kept < 1).all()
    assert (np.diff(kept) < 0).all()
    assert kept[0] > 0.9 and kept[-1] < 0.01
    assert (np.diff(np.asarray(timesteps.noise_ratio(VP, times))) > 0).all()
    # About 15 at the last index of Stable Diffusion's schedule.
    np.testing.assert_allclose(timesteps.noise_ratio(processes.vp_scaled_linear(), 1.0), 14.6, atol=0.1)


def test_what_is_measured():
    images = np.full((2, 4, 4, 1), -1.0)
    images[1, :2] = 0.5
    assert stroke_area(images).tolist() == [0.0, 0.5]


def test_the_published_settings():
    config = load(f"{CONFIG}:paper")
    grid = build(config.grid)
    np.testing.assert_allclose(grid, [1.0, 0.75, 0.5, 0.25, 0.0])
    process, network = build(config.base.process), build(config.base.model)
    np.testing.assert_allclose(float(process.alpha(1.0)) ** 2, 0.0047, atol=1e-4)
    assert timesteps.spliced(grid, grid, 1).stop == 1
    # A grid of 20 steps reaches tau_1 in five.
    assert timesteps.spliced(build(config.own.long), grid, 1).stop == 5
    lora = build(config.slider.lora, network=network)
    x, cond = jnp.zeros((1, 128, 128, 4)), {"context": jnp.zeros((1, 77, 2048))}
    params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), cond)
    factors = jax.eval_shape(lora.init, jax.random.key(0), params, x, jnp.zeros(1), cond)
    assert {leaf.shape[-1] for path, leaf in by_path(factors).items() if path.endswith("/a")} == {4}
    assert config.slider.lora.alpha == 1
