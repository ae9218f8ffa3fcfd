"""Runs of schedulers that are read from their configs equal those of diffusers, in float64, at every step.

The cases are those of `benchmarks.parity_solvers`, which also prints them. What differs on purpose is below them, each
with our value, the peer's, and why. Needs the peers extra: `make test-peers`.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.peers

from benchmarks import parity_solvers  # noqa: E402  (it is there for those who have the peer)
from benchmarks.parity_solvers import CASES, KARRAS, LEADING, SD, Case  # noqa: E402
from diffusion_jax import solvers  # noqa: E402
from diffusion_jax.interop.schedulers import SCHEDULERS, read_scheduler, write_scheduler_config  # noqa: E402
from diffusion_jax.timesteps import from_indices  # noqa: E402
from tests.peers.figures import record  # noqa: E402

torch.set_num_threads(1)

SLOW_DIGITS = {"KDPM2: linspace", "KDPM2Ancestral: linspace"}
"""The peer finds these fractional levels in two ways: linear in sigma for its steps, in log(sigma) for the middles."""


@pytest.mark.parametrize("name", CASES)
def test_the_run_is_the_peers(name):
    error = parity_solvers.solver_error(CASES[name])
    record("solver", name, error)
    assert error <= (1e-5 if name in SLOW_DIGITS else 2e-9), error


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_defaults_of_the_class_are_ours(name):
    """A config with nothing but the class means the same run as one with every default written out."""
    written = dict(getattr(diffusers, name)().config)
    if name == "DPMSolverSinglestepScheduler":
        # It lowers its order at the end by itself when sigma ends at 0.
        written["lower_order_final"] = False
    bare, full = (read_scheduler(config) for config in ({"_class_name": name}, {**written, "_class_name": name}))
    assert bare.process == full.process
    np.testing.assert_array_equal(bare.grid(10), full.grid(10))


def difference(case, scheduler):
    """The largest difference of the peer's run from ours, with `scheduler` in place of the one that was read."""
    noise = np.random.default_rng(0).normal(size=parity_solvers.SHAPE)
    with jax.enable_x64(True):
        run, noises = parity_solvers.ours(case, noise, scheduler)
    return float(np.max(np.abs(run[-1] - parity_solvers.theirs(case, noise, noises)[-1])))


def without(case, **parts):
    """The scheduler of a case as it would be read if not for a quirk of the peer."""
    return parity_solvers.read(case)._replace(**parts)


QUIRKS = {
    # DDIM steps by T // S indices where its grid does not: x is then taken for noisier, or cleaner, than it is.
    "DDIM, constant stride": (Case("DDIMScheduler", {**SD, "clip_sample": False, "timestep_spacing": "trailing"}, 7),
                              {"solver": solvers.ddim()}),
    # The square's weight in third-order DPM-Solver++ is half of the parabola's integral.
    "DPM-Solver++, third order": (CASES["DPMSolverMultistep: dpmsolver pp 3"],
                                  {"solver": solvers.dpm_solver_pp(3, lower_order_final=15, euler_at_final=True)}),
    # DDPM adds the noise of the large variance in its last step too, unless that begins at index 0.
    "DDPM, noise at the end": (CASES["DDPM: fixed large trailing"], {"solver": solvers.ddpm("large")}),
    # PLMS combines outputs, which is another thing than combining eps when the output is v.
    "PNDM, combined outputs": (CASES["PNDM: v"], {"solver": solvers.plms(4, "heun")}),
    # Exponential and beta sigmas have the network fed an index that is cut off.
    "DPM-Solver++, cut-off index": (CASES["DPMSolverMultistep: exponential"], {"time": "index"}),
}  # fmt: skip


@pytest.mark.parametrize("quirk", QUIRKS)
def test_a_quirk_of_the_peer_is_an_option(quirk):
    """With the option the run is the peer's (one of the cases), without it is not: our default differs on purpose."""
    case, parts = QUIRKS[quirk]
    if "time" in parts:
        process = parity_solvers.read(case).process
        parts = {"process": type(process)(process.schedule, process.prediction, parts["time"])}
    assert difference(case, without(case, **parts)) > 1e-4


def test_karras_dpm_2_feeds_fractional_indices():
    """KDPM2 with Karras sigmas: the peer feeds its network rounded indices at the steps and exact ones at the middles.

    Here what a network is fed is a function of the time alone, so it is the exact index at both: half an index off at
    most, a difference of 2e-4 in the output of this model, which is far from the 1e-5 of the other cases.
    """
    case = Case("KDPM2DiscreteScheduler", {**SD, **KARRAS})
    error = difference(case, parity_solvers.read(case))
    assert 1e-5 < error < 0.1


def test_zero_length_last_step_of_leading_indices():
    """DDIM and PNDM with set_alpha_to_one=false and no offset step from index 0 to index 0: x stays as it is."""
    scheduler = read_scheduler({"_class_name": "DDIMScheduler", **SD, "set_alpha_to_one": False})
    grid = scheduler.grid(10)
    assert grid[-1] == grid[-2] == np.float32(1e-3)
    case = Case("DDIMScheduler", {**SD, "set_alpha_to_one": False, "clip_sample": False})
    assert difference(case, parity_solvers.read(case)) < 1e-9
    np.testing.assert_array_equal(from_indices([1], 1000, end=1e-3)[-1], grid[-1])


def test_the_config_is_written_for_the_peer(tmp_path):
    config = {"_class_name": "EulerDiscreteScheduler", **SD, **LEADING}
    write_scheduler_config(tmp_path / "scheduler", read_scheduler(config))
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert theirs.config.beta_end == 0.012 and theirs.config.timestep_spacing == "leading"
    theirs.save_pretrained(tmp_path / "again")
    ours = [read_scheduler(folder) for folder in (config, tmp_path, tmp_path / "again")]
    for other in ours[1:]:
        assert other.process == ours[0].process
        np.testing.assert_array_equal(other.grid(9), ours[0].grid(9))
