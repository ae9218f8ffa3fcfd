"""Runs of schedulers that are read from their configs are those of diffusers, in float32 and float64, at each step.

The cases are those of `benchmarks.parity_cases`, which `benchmarks.parity` also prints. What differs on purpose is
below them, each with our value, the peer's, and why. Needs the peers extra: `make test-peers`.
"""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.peers

from benchmarks import parity_solvers  # noqa: E402  (it is there for those who have the peer)
from benchmarks.parity_cases import CASES, FEW_CASES, IMAGE_CASES, KARRAS, LEADING, SD, Case  # noqa: E402
from diffusion_jax import solvers  # noqa: E402
from diffusion_jax.errors import InvalidInput  # noqa: E402
from diffusion_jax.interop.schedulers import SCHEDULERS, UNREAD, read_scheduler, write_scheduler_config  # noqa: E402
from diffusion_jax.timesteps import from_indices  # noqa: E402
from tests.peers.figures import record  # noqa: E402

torch.set_num_threads(1)

LOGARITHMIC = ("KDPM2: linspace", "KDPM2Ancestral: linspace", "DPMSolverSDE: linspace", "Euler: own sigmas")
"""The peer finds these levels in two ways: linear in sigma for its steps, in log(sigma) for the middles; or it tells
the index that is linear in log(sigma) of one linear in sigma. Here what is told is a function of the time."""

FEW_LOGARITHMIC = ("KDPM2", "DPMSolverSDE")
TOLERANCE = {"float64": 2e-9, "float32": 2e-5}
"""In float32 the peer rounds its table of betas, which is worth 3e-5 of the smallest noise level."""

LARGE = {
    "Euler: zero terminal SNR": 1e-4,
    "EulerAncestral: zero terminal SNR": 1e-4,
    "DPMSolverMultistep: karras cosine betas": 5e-3,
}
"""sigma / alpha is 4000 at the start, or 20,000 where 1 - 0.999 is rounded: float32 is worth as much. Of it alone."""


def check(kind, name, case, dtype, loose=False):
    error, told = parity_solvers.solver_error(case, dtype)
    record(kind, name, error, dtype)
    tolerance = LARGE.get(name, TOLERANCE[dtype]) if dtype == "float32" else TOLERANCE[dtype]
    assert error <= (1e-4 if loose else tolerance), error
    # Whole numbers, which some of the peer's schedulers make of what is none, are the same; others to rounding.
    assert told <= (5e-3 if loose else 0.0 if case_is_whole(case) else 2e-3 if dtype == "float32" else 1e-9), told


def case_is_whole(case):
    return parity_solvers.read(case).process.time in ("nearest_index", "floor_index", "floor_1000t")


@pytest.mark.parametrize("dtype", parity_solvers.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_run_is_the_peers(name, dtype):
    check("solver", name, CASES[name], dtype, name.startswith(LOGARITHMIC))


@pytest.mark.parametrize("dtype", parity_solvers.DTYPES)
@pytest.mark.parametrize("name", IMAGE_CASES)
def test_a_run_that_begins_in_the_middle_is_the_peers(name, dtype):
    """As image to image does: what is lowered, left out or warmed up follows the whole grid."""
    check("image to image", name, IMAGE_CASES[name], dtype)


@pytest.mark.parametrize("dtype", parity_solvers.DTYPES)
@pytest.mark.parametrize("name", FEW_CASES)
def test_a_run_of_few_steps_is_the_peers(name, dtype):
    check("few steps", name, FEW_CASES[name], dtype, name.startswith(FEW_LOGARITHMIC))


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_defaults_of_the_class_are_ours(name):
    """A config with nothing but the class means the same run as one with every default written out."""
    written = dict(getattr(parity_solvers.peer_module(name), name)().config)
    if name == "DPMSolverSinglestepScheduler":
        # It lowers its order at the end by itself when sigma ends at 0.
        written["lower_order_final"] = False
    bare, full = (read_scheduler(config) for config in ({"_class_name": name}, {**written, "_class_name": name}))
    assert bare.process == full.process
    np.testing.assert_array_equal(bare.grid(10), full.grid(10))


def difference(case, scheduler):
    """The largest difference of the peer's run from ours, with `scheduler` in place of the one that was read."""
    run, expected = parity_solvers.trajectories(case, "float64", scheduler)
    return float(np.max(np.abs(run.outputs[-1] - expected.outputs[-1])))


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
    # LMS takes the outputs of steps that a run from the middle of its grid did not make for 0.
    "LMS, missing outputs": (IMAGE_CASES["LMS, from 6 of 12"], {"solver": solvers.lms()}),
    # PLMS takes a run from the middle of its grid to begin one step earlier, and leaves out the next one.
    "PNDM, from the second step": (
        IMAGE_CASES["PNDM, from 1 of 10"],
        {"solver": solvers.strided(solvers.plms(4, "heun"))},
    ),
    "PNDM, one step earlier": (IMAGE_CASES["PNDM, from 5 of 10"], {"begun": lambda grid, first: grid}),
    # PLMS combines outputs, which is another thing than combining eps when the output is v.
    "PNDM, combined outputs": (CASES["PNDM: v"], {"solver": solvers.strided(solvers.plms(4, "heun"))}),
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


def test_every_class_of_the_peer_is_read_or_refused_by_name():
    folder = Path(diffusers.schedulers.__file__).parent
    sources = "".join(path.read_text() for path in folder.rglob("*.py"))
    names = set(re.findall(r"^class (\w+Scheduler)\(", sources, re.M))
    assert names == {*SCHEDULERS, *UNREAD}


IRRELEVANT = {
    # use_flow_sigmas is refused.
    "flow_shift": ("SASolver",),
    "timestep_spacing": ("LCM", "TCD"),
    "steps_offset": ("LCM", "TCD"),
    "set_alpha_to_one": ("TCD",),
    "clip_sample": ("TCD", "CogVideoX"),
    "clip_sample_range": ("TCD", "CogVideoX"),
    "thresholding": ("TCD",),
    "dynamic_thresholding_ratio": ("TCD",),
    "sample_max_value": ("TCD", "CogVideoX"),
    "timestep_scaling": ("TCD",),
}
"""Fields that the peer itself does not use, by the beginnings of the classes."""

OF_FLOWS = ("flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
"""Fields that count with use_flow_sigmas alone, where that is an option."""


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_field_of_a_class_is_read_refused_or_irrelevant(name):
    """Whatever the peer's class can be told is asked for by our reader, with a wrong type refused in one sentence."""
    peer = getattr(parity_solvers.peer_module(name), name)
    known = [p for p in inspect.signature(peer.__init__).parameters if p not in ("self", "kwargs")]
    for field in known:
        if name.startswith(IRRELEVANT.get(field, ("no class",))):
            continue
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if field in OF_FLOWS else {}
        with pytest.raises(InvalidInput, match=field):
            read_scheduler({"_class_name": name, **flow, field: {"no": "value"}})
