"""The page on parts of one's own runs from top to bottom, and its parts do what it says."""

import numpy as np

from diffusion_jax import denoisers, models, solvers, timesteps
from diffusion_jax.sampling import sample
from tests.guides.running import run


def test_extend():
    # Gates begin at zero, so blocks would say nothing.
    loud = "params = jax.tree.map(lambda leaf: leaf + 0.1, network.init(key, x, t))"
    names = run("extend.md", {"width=32": "width=16", "int = 32": "int = 16", "params = network.init(key, x, t)": loud})
    plain, grid = names["plain"].x, names["grid"]
    assert float(names["faster"].cost.evaluations) == 4
    assert float(np.abs(names["faster"].x - plain).max()) > 1e-4
    np.testing.assert_array_equal(names["same"].x, names["faster"].x)
    assert names["sooner"].x.shape == plain.shape
    whole = names["network"].apply(names["params"], names["x"], names["t"])[0]
    np.testing.assert_allclose(names["tuned"], whole, atol=1e-6)
    assert names["narrower"].shape == whole.shape
    assert names["answer"].shape == (2, 8, 8, 1)
    null = models.empty_condition(names["told"].module.conditions, names["cond"])
    assert (null["label"] == 10).all() and not null["wind"].any()

    lifted = denoisers.denoiser(names["network"], names["process"])
    arguments = names["key"], lifted, names["params"]
    published = sample(*arguments, solvers.dpm_solver_pp(2), grid, **names["run"]).x
    np.testing.assert_allclose(names["accurate"].x, published, atol=1e-5)
    assert np.isfinite(names["calm"].x).all()
    guided = denoisers.guided(names["smoothed"](lifted), 2.0, null={"label": 0})
    told = sample(
        names["key"], guided, names["params"], solvers.ddim(), grid, cond={"label": np.array([1, 2])}, **names["run"]
    )
    assert told.x.shape == plain.shape
    # Twenty steps of a fifth of what is left.
    outcome = names["outcome"]
    assert outcome.success.all() and np.abs(outcome.states[:, -1]).max() < 0.5 * 0.8**20 + 1e-6
    np.testing.assert_allclose(names["stepped"].x, plain, atol=1e-6)
    once = timesteps.linspace(1)
    dark = sample(*arguments, solvers.ddim(), once, **names["run"]).x
    bright = names["brighter"](lifted), names["params"], solvers.ddim(), once
    np.testing.assert_allclose(sample(names["key"], *bright, **names["run"]).x, dark + 0.1, atol=1e-5)
    for other in names["others"].values():
        assert other.shape == plain.shape and np.isfinite(other).all()
    # Its velocity is x, so each of two steps halves what there is.
    np.testing.assert_allclose(names["others"]["pair"], 0.25 * names["x"], rtol=1e-5)
    assert int(names["state"].step) == 2
    # Stripes of -1 and 1, of which those of width 3 have six rows of one and two more of -1: a mean of -1 / 12.
    assert np.isclose(names["figures"]["contrast_held_out"], np.sqrt(1 - 1 / 144))
