"""The arms of TBCM differ in where pairs come from alone; a student begins as its teacher; the published settings."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import denoisers, models
from diffusion_jax.clock import single_step
from diffusion_jax.config import build, load
from diffusion_jax.recipes import tbcm
from diffusion_jax.recipes.published import published_size
from tests.models.shared import compiled

FILE = "configs/recipes/tbcm.py"


def test_arms_have_the_same_network_updates_and_pairs():
    config = load(FILE)
    for world in (config.ring, config.digits):
        arms = world.students.to_dict()
        pairs = {
            name: arm["train"]["batch_size"] * (len(build(arm["objective"]["grid"])) - 1 if name == "TBCM" else 1)
            for name, arm in arms.items()
        }
        assert len(set(pairs.values())) == 1
        same = ("model", "process", "optimizer")
        assert all(arm[entry] == arms["TBCM"][entry] for arm in arms.values() for entry in same)
        assert len({arm["train"]["steps"] for arm in arms.values()}) == 1
        assert len({str(arm["objective"]["ramp"]) for arm in arms.values()}) == 1
    # What TBCM would read if it read anything is not the ring.
    assert config.ring.students.TBCM.data == config.ring.students["sCM, other data"].data
    assert config.ring.students.TBCM.data != config.ring.students.sCM.data == config.ring.students.sCM.mixture


def test_a_student_of_the_ring_begins_as_its_teacher_and_the_ring_has_the_deviation_of_the_circle():
    config = load(f"{FILE}:smoke").ring.students.TBCM
    experiment = tbcm.ring_student(config)
    params = experiment.init_params(jax.random.key(0))
    density = build(config.mixture).density
    np.testing.assert_allclose(np.sqrt(np.diag(density.covariance)), 0.5, rtol=1e-6)
    exact = denoisers.analytic(experiment.process)
    mixture = denoisers.gaussian_mixture(density.means, covariances=density.covariances)
    student = denoisers.denoiser(experiment.network, experiment.process)
    x, t = np.random.default_rng(0).standard_normal((8, 2)), jnp.linspace(0.1, 1.0, 8)

    @compiled
    def both():
        return student.apply(params, (), x, single_step(t), None)[0].x0, exact.apply(
            mixture, (), x, single_step(t), None
        )[0].x0

    np.testing.assert_allclose(*both(), atol=1e-4)


def test_a_student_that_is_told_more_has_zeros_there():
    fresh = {"a": {"kernel": np.ones(2), "guidance": {"kernel": np.ones(3)}}, "b": np.ones(1)}
    known = {"a": {"kernel": np.full(2, 5.0)}, "b": np.full(1, 7.0)}
    found = models.by_path(tbcm.extended(fresh, known))
    expected = {"a/kernel": [5, 5], "a/guidance/kernel": [0, 0, 0], "b": [7]}
    assert {path: np.asarray(leaf).tolist() for path, leaf in found.items()} == expected


def test_the_published_settings_are_of_sixteen_evaluations_and_calm_down():
    config = load(f"{FILE}:paper")
    millions = float(published_size(config).split("network: ")[1].split()[0].replace(",", ""))
    assert 500 < millions < 700
    assert len(build(config.objective.grid)) == 16 and config.objective.scales == (4.0, 4.5, 5.0)
    ramp = build(config.objective.ramp)
    np.testing.assert_allclose(ramp(np.array([0, 2000, 4000, 15_000, 16_000, 20_000])), [0, 0.5, 1, 1, 0.875, 0.75])
