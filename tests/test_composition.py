"""The composition matrix: solvers x denoiser transformations x processes x time shapes, on one device and on eight.

Everything is tiny (two steps, eight samples). The whole product has thousands of entries; the tests take a covering
sample of it, the same each time: every solver, every transformation, every process and every time shape occurs, and so
does every pair of (transformation, time shape), (transformation, process) and (process, time shape) that can work.
`DIFFUSION_JAX_COMPOSITION=solvers` adds every pair that involves a solver. Pairs that cannot work are tried one by
one: each must say why in a sentence. Cases with tokens are in `test_composition_tokens`, those with a time for each
entry in `test_composition_entries`.
"""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, sampling, solvers
from diffusion_jax.errors import InvalidInput
from tests.denoisers.tiny import network
from tests.models.shared import now

BATCH, LENGTH, VOCABULARY = 8, 4, 6
NULL = {"label": 4}

SOLVERS = {
    "ddim": solvers.ddim(),
    "ddim eta 1": solvers.ddim(1.0),
    "ddpm small": solvers.ddpm("small"),
    "ddpm large": solvers.ddpm("large"),
    "euler": solvers.euler(),
    "euler ancestral": solvers.euler_ancestral(),
    "heun": solvers.heun(),
    "edm": solvers.edm(s_churn=5.0),
    "dpm 2": solvers.dpm_solver(2),
    "dpm 3 single": solvers.dpm_solver(3, method="singlestep"),
    "dpm++ 2": solvers.dpm_solver_pp(2),
    "dpm++ 3": solvers.dpm_solver_pp(3),
    "dpm++ 2 single": solvers.dpm_solver_pp(2, method="singlestep"),
    "dpm++ 2 sde": solvers.dpm_solver_pp(2, equation="sde"),
    "unipc": solvers.unipc(2),
    "deis": solvers.deis(2),
    "lms": solvers.lms(2),
    "plms": solvers.plms(2),
    "pndm": solvers.pndm(),
    "sa": solvers.sa_solver(),
    "flow euler": solvers.flow_euler(),
    "flow heun": solvers.flow_heun(),
    "flow midpoint": solvers.flow_midpoint(),
    "flow sde": solvers.flow_sde(0.5),
    "lcm": solvers.lcm(),
    "tcd": solvers.tcd(),
    "adaptive": solvers.adaptive(rtol=1e-5, atol=1e-5),
    "constrained": solvers.constrained(solvers.ddim(), lambda x: jax.tree.map(lambda leaf: jnp.clip(leaf, -9, 9), x)),
    "ancestral": solvers.ancestral(),
    "unmask": solvers.unmask(),
    "joint": solvers.joint({"image": solvers.ddim(), "text": solvers.ancestral()}),
}
DISCRETE_SOLVERS = {"ancestral", "unmask"}

# The network is fed t itself: fed 1000 t, it would amplify the rounding of times that a solver computes.
VP, FLOW = processes.cosine("v", time="t"), processes.rectified_flow(time="t")
TOKENS = processes.absorbing(VOCABULARY, time="t")
PROCESSES = {
    "vp": VP,
    "flow": FLOW,
    "edm": processes.edm(),
    "joint": processes.JointProcess({"a": VP, "b": FLOW}),
    "tokens": TOKENS,
    "mixed": processes.JointProcess({"image": FLOW, "text": TOKENS}),
}

TIMES = {"[]": (), "[B]": (BATCH,), "[B, N]": (BATCH, LENGTH)}


WITH_TOKENS = {"tokens", "mixed"}


def energy(prediction, t, cond):
    return 0.1 * sum(jnp.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(prediction.x0))


def log_prob(params, x, t, cond):
    return -energy(denoisers.base.Prediction(x), t, cond)


def transformations(null):
    """Every kind of transformation; `null` is the condition of the guides."""
    return {
        "plain": lambda d: d,
        "guided": lambda d: denoisers.guided(d, 2.0, null),
        "guided by step": lambda d: denoisers.guided(d, jnp.array([1.0, 3.0]), null),
        "guided in an interval": lambda d: denoisers.guided(d, denoisers.linear_scale(1, 3), null, interval=(0.4, 0.9)),
        "rescaled": lambda d: denoisers.guided(d, 2.0, null, rescale=0.7),
        "cfg++": lambda d: denoisers.cfg_plus_plus(d, 0.6, null),
        "projected": lambda d: denoisers.projected_guided(d, 3.0, null, threshold=1.0),
        "autoguided": lambda d: denoisers.autoguided(d, d, 2.0),
        "classifier": lambda d: denoisers.classifier_guided(d, log_prob, 0.1),
        "energy": lambda d: denoisers.energy_guided(d, energy, 0.1),
        "clipped": denoisers.clipped,
        "thresholded": denoisers.thresholded,
        "scheduled": lambda d: denoisers.scheduled_condition(d, denoisers.dropped_condition(null, 0.0, 0.6)),
        "switched": lambda d: denoisers.switched((d, d)),
        "nested": lambda d: denoisers.thresholded(
            denoisers.guided(d, jnp.array([[2.0], [1.0]]), null, interval=(0, 1))
        ),
    }


TRANSFORMATIONS = transformations(NULL)
TWO_NETWORKS = {"autoguided": "guide", "classifier": "guide"}
NEEDS_GAUSSIAN = {"rescaled", "cfg++", "projected", "classifier", "energy"}
BOUNDS = {"clipped", "thresholded", "nested"}


def reason(solver, transformation, process, time):
    """Why a combination cannot work: a part of the sentence that it must say; None when it can."""
    if process in WITH_TOKENS and transformation in NEEDS_GAUSSIAN:
        return "is discrete"
    if process == "tokens" and transformation in BOUNDS:
        return "predicts log-probabilities"
    if (solver in DISCRETE_SOLVERS) != (process == "tokens") or (solver == "joint") != (process == "mixed"):
        return "solver"
    return None


SIZES = {
    "adaptive": 4,
    **dict.fromkeys(("edm", "heun", "pndm", "sa"), 3),
    **dict.fromkeys(("unipc", "dpm 3 single", "flow heun", "dpm++ 2 single", "flow midpoint"), 2),
    **dict.fromkeys(("deis", "plms", "dpm++ 3", "dpm 2", "lcm", "tcd"), 1),
    **dict.fromkeys(("energy", "classifier", "rescaled", "cfg++", "thresholded", "guided in an interval"), 1),
    **dict.fromkeys(("projected", "nested", "autoguided"), 2),
    **dict.fromkeys(("joint", "mixed"), 3),
}
"""How large a program is with a part, roughly; 0 for most."""


def smallness(case):
    solver, *others = (SIZES.get(part, 0) for part in case)
    return -solver * sum(others), solver, -sum(others)


def covering_sample():
    """A greedy covering array: solvers are dealt in turn, so each occurs; required pairs decide the rest.

    Of cases that cover as much, large programs are avoided: the largest solvers take the smallest of what is left.
    """
    axes = [list(SOLVERS), list(TRANSFORMATIONS), list(PROCESSES), list(TIMES)]
    product = [case for case in itertools.product(*axes) if reason(*case) is None]
    wanted = {(0, 1), (0, 2), (0, 3)} if os.environ.get("DIFFUSION_JAX_COMPOSITION") == "solvers" else set()
    wanted |= {(1, 2), (1, 3)}

    def covers(case):
        solver, transformation, process, time = case
        kinds = (solver, transformation, process in WITH_TOKENS, time)
        pairs = {(i, j, kinds[i], kinds[j]) for i, j in wanted}
        return {(0, solver), (process, time)} | {pair for pair in pairs if pair[:2] != (1, 3) or time != "[]"}

    missing, chosen, turns = set().union(*map(covers, product)), [], dict.fromkeys(axes[0], 0)
    while missing:
        best = max(product, key=lambda case: (len(covers(case) & missing), -turns[case[0]], *smallness(case)))
        missing -= covers(best)
        turns[best[0]] += 1
        chosen.append(best)
    return chosen


def shapes(process):
    """Shapes of one sample."""
    image, text = (LENGTH, 2), (LENGTH,)
    dicts = {"joint": {"a": image, "b": image}, "tokens": text, "mixed": {"image": image, "text": text}}
    return dicts.get(process, image)


def data(process):
    def zeros(shape):
        return np.zeros((BATCH, *shape), np.float32 if len(shape) == 2 else np.int32)

    shape = shapes(process)
    return {name: zeros(size) for name, size in shape.items()} if isinstance(shape, dict) else zeros(shape)


def grid(process, time):
    """From 1 to 0 in two steps; entries of a vector time have a middle of their own."""
    middle = 0.5 + 0.2 * np.linspace(-1, 1, int(np.prod(TIMES[time]))).reshape(TIMES[time])
    one = np.stack([np.ones(TIMES[time]), middle, np.zeros(TIMES[time])]).astype(np.float32)
    shape = shapes(process)
    return dict.fromkeys(shape, one) if isinstance(shape, dict) else one


@functools.cache
def drawn(process):
    return now(lambda: network(VOCABULARY).init(jax.random.key(1), data(process), None, None))


LABELS, INDEX = np.arange(BATCH) % 4, np.arange(BATCH)


def parts(solver, transformation, process, time):
    d = TRANSFORMATIONS[transformation](denoisers.denoiser(network(VOCABULARY), PROCESSES[process]))
    params = drawn(process)
    if transformation in TWO_NETWORKS:
        params = {"main": params, "guide": params}
    if transformation == "switched":
        params = (params, params)
    return d, params, SOLVERS[solver], grid(process, time)


def run(case, mesh=None):
    d, params, solver, times = parts(*case)
    sampler = sampling.make_sampler(d, solver, shape=shapes(case[2]), mesh=mesh)
    found = sampler(jax.random.key(7), params, times, cond={"label": LABELS}, index=INDEX)
    return found.x, found.cost


def eight_devices():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def name_of(case):
    return "-".join(part.replace(" ", "_") for part in case)


def check_that_it_runs_is_finite_and_agrees(case):
    alone, cost = run(case)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(alone))
    assert float(cost.evaluations) >= 2

    spread, spread_cost = run(case, eight_devices())
    assert len(jax.tree.leaves(spread)[0].sharding.device_set) == 8
    # The adaptive solver chooses its steps for what a device holds, so it agrees to its own tolerance.
    tolerance = 1e-3 if case[0] == "adaptive" else 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), alone, spread)
    # With times of its own a device may skip what others need; then it pays less.
    if case[0] != "adaptive":
        assert float(spread_cost.evaluations) <= float(cost.evaluations)
        assert case[3] != "[]" or float(spread_cost.evaluations) == float(cost.evaluations)


def in_file(case):
    """Which file tries a case: they share the sample out by kind of data and of time."""
    return "tokens" if case[2] in WITH_TOKENS else "entries" if case[3] == "[B, N]" else "whole"


@pytest.mark.parametrize("case", [case for case in covering_sample() if in_file(case) == "whole"], ids=name_of)
def test_runs_is_finite_and_agrees_between_one_device_and_eight(case):
    check_that_it_runs_is_finite_and_agrees(case)


def impossible_pairs():
    cases = []
    for transformation in [*NEEDS_GAUSSIAN, *BOUNDS]:
        cases.append(("ancestral", transformation, "tokens", "[]"))
    cases += [("joint", transformation, "mixed", "[]") for transformation in NEEDS_GAUSSIAN]
    for solver in SOLVERS:
        process = "vp" if solver in DISCRETE_SOLVERS or solver == "joint" else "tokens"
        if solver != "constrained":
            cases.append((solver, "plain", process, "[]"))
    return sorted(case for case in cases if reason(*case))


@pytest.mark.parametrize("case", impossible_pairs(), ids=name_of)
def test_what_cannot_work_says_why_in_a_sentence(case):
    with pytest.raises(InvalidInput) as error:
        run(case)
    message = str(error.value)
    assert reason(*case) in message
    assert "\n" not in message and message.endswith(".")


def test_the_covering_sample_covers_what_it_says():
    chosen = covering_sample()
    axes = [list(SOLVERS), list(TRANSFORMATIONS), list(PROCESSES), list(TIMES)]
    for axis, names in enumerate(axes):
        assert {case[axis] for case in chosen} == set(names)
    assert {(case[1], case[3]) for case in chosen} >= set(itertools.product(TRANSFORMATIONS, ["[B]", "[B, N]"]))
    assert {(case[2], case[3]) for case in chosen} == set(itertools.product(PROCESSES, TIMES))


def test_a_grid_that_is_no_prefix_of_the_data_is_refused():
    bad = np.ones((3, LENGTH)) * np.array([1.0, 0.5, 0.0])[:, None]
    d, params, solver, _ = parts("ddim", "guided", "vp", "[]")
    sampler = sampling.make_sampler(d, solver, shape=shapes("vp"))
    with pytest.raises(InvalidInput, match="prefix"):
        sampler(jax.random.key(0), params, bad, cond={"label": LABELS}, index=INDEX)
