"""The tutorial: its solver and its Python, on a run that was stored but not trained."""

from pathlib import Path

import jax
import numpy as np

from diffusion_jax import config, denoisers, experiment, processes, timesteps, training
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.sampling import sample
from tests.guides.running import run

CONFIG = Path(__file__).parents[2] / "configs" / "digits_dit.py"
FLOW = processes.rectified_flow()


def test_first_day(tmp_path, monkeypatch):
    tiny = apply_overrides(config.load(str(CONFIG)), ["model.width=8", "model.depth=1", "model.heads=1"])
    monkeypatch.chdir(tmp_path)
    stored = experiment.prepare(tiny)
    training.save_params("out/digits", stored.init_params(jax.random.key(0)), stored.config)
    names = run("first_day.md", {', ema="average"': "", "linspace(10)": "linspace(2)"})
    assert names["out"].x.shape == (10, 8, 8, 1) and Path("out/digits.png").is_file()

    # It keeps the distribution: a Gaussian is drawn as one, with an error that falls with the steps.
    world = denoisers.gaussian_mixture(np.zeros((1, 2), np.float32), 1.0)
    churned = names["churned_ddim"](2.0)
    drawn = sample(jax.random.key(0), denoisers.analytic(FLOW), world, churned, timesteps.linspace(64), shape=(4000, 2))
    np.testing.assert_allclose(drawn.x.std(), 1.0, atol=0.03)
