"""What the theory of diversity distillation says, what is measured, and the published settings."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import processes, timesteps
from diffusion_jax.config import build, load
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.denoisers.analytic import sample_mixture
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.diversity_distillation import ink, stroke_area
from diffusion_jax.recipes.study import Drawn
from diffusion_jax.typing import Prediction, Step

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


def test_strokes_are_what_is_bright_and_ink_is_what_a_slider_adds():
    images = np.full((2, 4, 4, 1), -1.0)
    images[1, :2] = 0.5
    assert stroke_area(Drawn(images, None, None, 0, "base")) == 0.25
    dark, bright = ink(Prediction(jnp.asarray(images)), None, None)
    assert bright < dark == 0.0


def test_the_published_settings(capsys):
    config = load("configs/recipes/diversity_distillation.py:paper")
    grid, process = build(config.grid), build(config.process)
    np.testing.assert_allclose(grid, [1.0, 0.75, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(float(process.alpha(1.0)) ** 2, 0.0047, atol=1e-4)
    assert timesteps.spliced(grid, grid, 1).stop == 1
    # A grid of 20 steps reaches tau_1 in five.
    assert timesteps.spliced(timesteps.trailing(20, num_train_steps=1000), grid, 1).stop == 5
    main(["diversity_distillation:paper"])
    assert "million parameters" in capsys.readouterr().out
