"""Students of few steps: for each method by name what learns, by which loss, from where, and how it is sampled.

A teacher is a trained network on its process, as its answers are taken: guided or not, by its best solver or plainly.
`student("consistency", teacher)` puts the parts of the library together as the method was published:

    name                     what is learned                                        data needed    sampled by
    progressive              two steps of the teacher in one (Salimans & Ho 2022)   yes            ddim
    consistency              the end of the teacher's flow from neighbouring times  yes            lcm
                             (Song et al. 2023; guided: Luo et al. 2023, LCM)
    consistency_training     the same from the data's own pairs (Geng et al. 2024)  yes            lcm
    continuous_consistency   the same at times infinitely close                     yes            lcm
                             (Lu & Song 2024, sCM)
    reflow                   straight paths from noise to the teacher's samples     its runs       flow_euler
                             (Liu et al. 2022)
    mean_flow                the mean velocity between two times (Geng et al. 2025) yes            ddim
    shortcut                 jumps that equal their two halves (Frans et al. 2024)  yes            ddim
    distribution_matching    the teacher's distribution, by the difference of two   yes            lcm
                             scores (Yin et al. 2024, DMD2 without its GAN)
    kernel_matching          the data's distribution, by MMD through the whole run  yes            ddim
                             (Aiello et al. 2023, MMD-DDM)

Train `objective` from `begin` like any other: `experiment.prepare(config, network=, objective=, begin=)`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import models, objectives, solvers, timesteps
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import InvalidInput, invalid, need, unknown
from diffusion_jax.models import by_path
from diffusion_jax.objectives import FeatureSpace
from diffusion_jax.processes import with_condition
from diffusion_jax.typing import Batch, Denoiser, Grid, Network, Objective, Params, Process, Solver


class Teacher(NamedTuple):
    """A trained network. denoiser: how its answers are taken: plainly, or guided. A student repeats guided answers, and
    needs no guidance of its own."""

    network: Network
    process: Process
    params: Params
    denoiser: Denoiser


class Student(NamedTuple):
    """network: that learns. objective: its loss, on batches of the data (of the teacher's runs for reflow).

    begin: key -> the parameters that training begins with. denoiser, solver: how it is sampled, in any number of steps
        (progressive, distribution_matching, kernel_matching: in the number that it was trained for).
    grid: number of steps -> its times. sampled: what was trained -> the parameters of `denoiser`.
    every: `{"student": k}` where the parameters have parts that move in turns: `training.optimizers.alternating`.
    """

    network: Network
    objective: Objective
    begin: Callable[[Any], Params]
    denoiser: Denoiser
    solver: Solver
    grid: Callable[[int], Grid]
    sampled: Callable[[Params], Params] = lambda params: params
    every: Mapping[str, int] | None = None


class Learner(NamedTuple):
    """The network that learns, before a method changes it. params: that it begins with; fresh ones when None, for data
    such as `example`."""

    network: Network
    params: Params | None
    example: Batch


def student(
    method: str, teacher: Teacher, *, network: Network | None = None, example: Batch | None = None, **settings: Any
) -> Student:
    """The student of `teacher` by a method of the table above, which begins as its copy.

    network: another one than the teacher's, a smaller one say, with the same data and conditions. It begins with its
        own `init`, and the teacher stays what it is; so does the second network of distribution_matching.
    example: a batch of data, by whose shapes parameters are made that the teacher does not have: with `network`, and
        for mean_flow and shortcut, whose network is told a second time.
    settings: `steps`, of the student, for distribution_matching and progressive (4 unless given) and kernel_matching;
        `discretisation`, the teacher's steps whose neighbours are compared, of consistency (50); `halvings`,
        after how many losses the gap of consistency_training halves (500); `warmup` of continuous_consistency (500);
        `spaces` of kernel_matching; `every`, the losses of the fake for one of the student (5).
    Raises InvalidInput for a method that is not in the table, for settings that it does not have, where an example is
    needed, and for a process that a method is not defined on (reflow, mean_flow and shortcut:
    `processes.rectified_flow()` alone).
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    need("teacher", teacher, Teacher, "Teacher(network, process, params, denoiser) is needed")
    make = METHODS[method]
    takes = [name for name in inspect.signature(make).parameters if name not in ("teacher", "learner")]
    for name in settings:
        if name not in takes:
            raise unknown(f"a setting of {method}", name, takes or ("none",))
    if network is None:
        return make(teacher, Learner(teacher.network, teacher.params, example or {}), **settings)
    need("network", network, Network, "one such as models.dit(...) makes is needed")
    _need_example(method, example or {})
    return make(teacher, Learner(network, None, example or {}), **settings)


def _need_example(method, example):
    if "x0" not in example:
        told = 'a batch of the data with "x0" (and "cond"): its network has new parameters'
        raise InvalidInput(f"{method} needs example=, {told}.")


def grid_of(process: Process) -> Callable[[int], Grid]:
    """Number of steps -> times of a run, which begins at pure noise; of a table of betas they are indices."""
    table = getattr(getattr(process, "schedule", None), "num_steps", None)
    return timesteps.linspace if table is None else lambda steps: timesteps.trailing(steps, table)


def _plain(teacher: Teacher, learner: Learner, objective: Objective, solver: Solver, **more: Any) -> Student:
    own = denoiser(learner.network, teacher.process)

    def begin(key):
        if learner.params is not None:
            return learner.params
        x, cond = jnp.asarray(learner.example["x0"]), learner.example.get("cond")
        return learner.network.init(key, x, jnp.zeros(len(x)), with_condition(teacher.process, cond)[1])

    return Student(learner.network, objective, begin, own, solver, grid_of(teacher.process), **more)


def _progressive(teacher, learner, steps=4):
    grid = grid_of(teacher.process)(2 * steps)
    loss = objectives.progressive(learner.network, teacher.process, grid, teacher.denoiser, teacher.params)
    return _plain(teacher, learner, loss, solvers.ddim())


def _consistency(teacher, learner, discretisation=50):
    grid = grid_of(teacher.process)(discretisation)
    loss = objectives.consistency(
        learner.network, teacher.process, objectives.neighbour(grid), timesteps.on_grid(grid),
        teacher=teacher.denoiser, teacher_params=teacher.params, distance=objectives.pseudo_huber(),
    )  # fmt: skip
    return _plain(teacher, learner, loss, solvers.lcm())


def _consistency_training(teacher, learner, halvings=500):
    earlier = objectives.shrinking(teacher.process, every=halvings)
    loss = objectives.consistency(learner.network, teacher.process, earlier, distance=objectives.pseudo_huber())
    return _plain(teacher, learner, loss, solvers.lcm())


def _continuous_consistency(teacher, learner, warmup=500):
    loss = objectives.continuous_consistency(
        learner.network, teacher.process, teacher=teacher.denoiser, teacher_params=teacher.params,
        ramp=objectives.tangent_ramp(warmup),
    )  # fmt: skip
    return _plain(teacher, learner, loss, solvers.lcm())


def _reflow(teacher, learner):
    _need_flow("reflow", teacher.process)
    return _plain(teacher, learner, objectives.denoising(learner.network, teacher.process), solvers.flow_euler())


def _distribution_matching(teacher, learner, steps=4, every=5):
    own = denoiser(learner.network, teacher.process)
    generate = objectives.few_step_answers(own, grid_of(teacher.process)(steps))
    loss = objectives.distribution_matching(generate, teacher.denoiser, teacher.params, teacher.network, every=every)
    turns = {"sampled": lambda params: params["student"], "every": {"student": every}}
    made = _plain(teacher, learner, loss, solvers.lcm(), **turns)
    return made._replace(begin=lambda key: {"student": made.begin(key), "fake": teacher.params})


def _kernel_matching(teacher, learner, spaces: tuple[FeatureSpace, ...] = (), steps=4):
    own, grid = denoiser(learner.network, teacher.process), grid_of(teacher.process)(steps)
    return _plain(
        teacher,
        learner,
        objectives.kernel_matching(objectives.whole_runs(own, solvers.ddim(), grid), spaces),
        solvers.ddim(),
    )


def _jumping(what, **settings):
    def make(teacher, learner):
        _need_flow(what.__name__, teacher.process)
        _need_example(what.__name__, learner.example)
        network, example = told_target_time(learner.network), learner.example
        loss = what(network, teacher.process, teacher=teacher.denoiser, teacher_params=teacher.params, **settings)
        own = denoiser(network, teacher.process, target_time=True)

        def begin(key):
            x, t = jnp.asarray(example["x0"]), jnp.zeros(len(example["x0"]))
            fresh = network.init(key, x, t, {**(example.get("cond") or {}), "target_time": t})
            return fresh if learner.params is None else carried_over(fresh, learner.params)

        return Student(network, loss, begin, own, solvers.ddim(), grid_of(teacher.process))

    return make


def told_target_time(network: Network) -> Network:
    """The network with `models.target_time()` among its conditions; see there. Its other parameters stay as they are.

    Raises InvalidInput for a network whose module has no conditions, or that has such a condition already.
    """
    conditions = getattr(network.module, "conditions", None)
    if network.inside is None or not network.inside.bare or conditions is None:
        raise InvalidInput("told_target_time needs a network of the library whose module has `conditions`, unwrapped.")
    told = models.target_time()
    if told in conditions:
        raise invalid("conditions", conditions, "the network is told a target time already")
    return models.network(network.module.clone(conditions=(*conditions, told)), network.anatomy)


def carried_over(fresh: Params, params: Params) -> Params:
    """`fresh`, with the values of `params` wherever that has an array of the same path and shape."""
    known = by_path(params)

    def value(path, leaf):
        old = known.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if old is None or jnp.shape(old) != jnp.shape(leaf) else old

    return jax.tree_util.tree_map_with_path(value, fresh)


def _need_flow(what, process):
    if process.prediction != "velocity":
        raise invalid(f"the prediction of a process for {what}", process.prediction, "rectified_flow() is needed")


METHODS: dict[str, Callable[..., Student]] = {
    "progressive": _progressive,
    "consistency": _consistency,
    "consistency_training": _consistency_training,
    "continuous_consistency": _continuous_consistency,
    "reflow": _reflow,
    # The velocity itself is known already, so most examples are jumps, and jumps begin at pure noise.
    "mean_flow": _jumping(objectives.mean_flow, instant_share=0.25, draw=timesteps.uniform()),
    "shortcut": _jumping(objectives.shortcut),
    "distribution_matching": _distribution_matching,
    "kernel_matching": _kernel_matching,
}
"""The methods by name: functions of a teacher and what learns, whose other arguments are the settings of each."""
