"""Arguments of another type, as a constructor is that nobody called, are told in one sentence by the field's name.

Tests check types before a function sees its arguments; users do not have that, so it is left out here.
"""

import inspect

import jax
import numpy as np
import pytest

from diffusion_jax import data, denoisers, models, objectives, processes, solvers, students, timesteps
from diffusion_jax.errors import InvalidInput

FLOW, NETWORK, EDGES = processes.rectified_flow(), models.mlp(width=8, depth=1), (0.0, 0.5, 1.0)
PLAIN, DENOISER, GRID = objectives.denoising(NETWORK, FLOW), denoisers.denoiser(NETWORK, FLOW), timesteps.linspace(2)
SPACE = objectives.raw_space(objectives.linear_kernel())
NOTHING = objectives.Discriminator(*(4 * (None,)))


def untyped(function):
    return inspect.unwrap(function)


def of_runs(**changed):
    return untyped(data.trajectories)(
        jax.random.key(0), DENOISER, {}, solvers.ddim(), GRID, **{"shape": (2,), **changed}
    )


WRONG = {
    "combiner": lambda: untyped(objectives.multitask)(PLAIN, EDGES, "projected"),
    "combiner, not called": lambda: untyped(objectives.multitask)(PLAIN, EDGES, objectives.projected),
    "every": lambda: untyped(objectives.bargained)(np.nan),
    "warmup": lambda: untyped(objectives.tangent_ramp)(np.nan),
    "times": lambda: untyped(objectives.task_affinity)(PLAIN, {}, {}, 0.5, None),
    "distance.shape": lambda: untyped(timesteps.interval_clusters)(3.0, 2),
    "loss, not called": lambda: untyped(objectives.adversarial)(PLAIN, DENOISER, NOTHING, {}, objectives.hinge),
    "discriminator": lambda: untyped(objectives.adversarial)(PLAIN, DENOISER, NETWORK, {}),
    "denoiser": lambda: untyped(objectives.self_enhanced)(PLAIN, NETWORK),
    "parts": lambda: untyped(objectives.one_after_another)(objectives.blurred()),
    "degrade": lambda: untyped(objectives.degraded)(PLAIN, "blurred"),
    "teacher": lambda: untyped(objectives.trajectory_backward)(NETWORK, FLOW, None, {}, GRID),
    "earlier": lambda: untyped(objectives.consistency)(NETWORK, FLOW, GRID),
    "bandwidths": lambda: untyped(objectives.gaussian_kernel)(1.0),
    "spaces[0]": lambda: untyped(objectives.kernel_matching)(None, SPACE),
    "spaces[0].kernel": lambda: untyped(objectives.kernel_matching)(None, [SPACE._replace(kernel="linear")]),
    "teacher, a network": lambda: untyped(students.student)("consistency", NETWORK),
    "keep": lambda: of_runs(keep=2),
    "collection": lambda: untyped(data.collect)(of_runs()),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_type_is_told(name):
    with pytest.raises(InvalidInput) as error:
        WRONG[name]()
    assert f"{name.partition(',')[0]} is " in str(error.value)
