"""MMD-DDM: the claims of the ring are those of its calibration, equivalent steps, memory, and the published setting."""

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.config import build, call, load
from diffusion_jax.recipes import mmd_ddm
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.study import Drawn, Tabulated
from diffusion_jax.recipes.verdicts import judge

FILE = "configs/recipes/mmd_ddm.py"
CALIBRATION = {
    **{"plain, 2": 0.535, "plain, 5": 0.229, "plain, 10": 0.084, "plain, 20": 0.05, "plain, 50": 0.035},
    **{"RBF, 2": 0.059, "cubic, 2": 0.109, "RBF, 5": 0.060, "Fourier, 5": 0.072, "tuned, 50": 0.12},
    **{"longer, 5": 0.229, "DPM-Solver++, 5": 0.1, "trailing, 5": 0.229},
}


def ring():
    """The figures of the method's prototype, and some in their middle where it has none."""
    figures = {name: {"distance": [value] * 3, "mmd2": [value**2] * 3} for name, value in CALIBRATION.items()}
    return Tabulated(figures, {})


def test_what_is_claimed_of_the_ring_holds_in_its_calibration():
    rows = mmd_ddm.ring_rows(ring(), load(FILE).ring)
    assert len(rows) == 10
    assert {row.title: judge(row).verdict for row in rows} == {row.title: "holds" for row in rows}


def test_points_of_the_ring_are_near_to_it_and_fewer_modes_are_not():
    config = load(FILE).ring
    measure = mmd_ddm.ring_measures(config)
    points = data.stacked_examples(build(config.base.data), np.arange(4000))["x0"]
    np.testing.assert_allclose(np.linalg.norm(points, axis=1).mean(), 1.0, atol=0.02)
    found, half = (measure(Drawn(x, None, None, 0, "")) for x in (points, points[points[:, 0] > 0]))
    assert found["distance"] < 0.05 < 5 * found["distance"] < half["distance"]
    assert abs(found["mmd2"]) < 1e-3 < half["mmd2"]


def test_equivalent_steps_are_those_of_the_curve():
    config, found = load(FILE).ring, ring()
    for name, steps in (("plain, 10", 10.0), ("plain, 50", 50.0), ("plain, 2", 2.0)):
        np.testing.assert_allclose(mmd_ddm.equivalent_steps(found, name, config), steps)
    assert 10 < mmd_ddm.equivalent_steps(found, "RBF, 5", config)[0] < 20
    # Nothing is claimed beyond what was run.
    found.figures["RBF, 5"]["distance"] = [0.01, 1.0, 0.084]
    np.testing.assert_allclose(mmd_ddm.equivalent_steps(found, "RBF, 5", config), [50, 2, 10])


def test_both_worlds_are_tuned_through_the_grid_that_is_sampled():
    config = load(FILE)
    for world in ("ring", "digits"):
        for name, entry in config[world].tuned.items():
            if name != "longer":
                trained = build(entry.objective.generate.grid)
                np.testing.assert_array_equal(trained, mmd_ddm.grid_of(int(name.split(", ")[1])))
        assert f"{config[world].headline}, {config[world].steps}" in config[world].tuned
    np.testing.assert_allclose(np.asarray(mmd_ddm.grid_of(5)), [0.801, 0.601, 0.401, 0.201, 0.001, 0.0], atol=1e-6)


def test_memory_is_that_of_compiled_steps():
    config = load(FILE).memory
    config.update({"shape": (8, 2), "steps": 4})
    config.model = call("models.mlp", width=16, depth=1)
    row, halved = mmd_ddm.memory_rows(config)
    assert 0 < np.asarray(row.ours) < 4 and row.against == 2.5
    assert halved.ours == row.ours < np.asarray(halved.against)


@pytest.mark.parametrize("shown", ["35.7 million"])
def test_the_published_setting_is_the_network_of_ddpm(capsys, shown):
    main(["mmd_ddm:paper"])
    assert shown in capsys.readouterr().out
    assert load(f"{FILE}:paper").kernel.degree == 3
