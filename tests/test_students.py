"""Every method of distillation begins at its teacher, learns, and is sampled as its preset says."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from diffusion_jax import denoisers, distributed, models, objectives, processes, students, timesteps, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.students import METHODS, Teacher, student
from tests.models.shared import drawn_params

FLOW = processes.rectified_flow()
NETWORK = models.mlp(width=8, depth=1, conditions=(models.label(3),))
INDEX = np.arange(8, dtype=np.int32)
COND = {"label": INDEX % 3}
BATCH = {"x0": np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32), "cond": COND, "index": INDEX}
PARAMS = drawn_params(NETWORK, BATCH["x0"], np.zeros(8, np.float32), COND)
KEY = jax.random.key(0)
GUIDED = denoisers.guided(denoisers.denoiser(NETWORK, FLOW), 2.0, null={"label": 3})
TEACHER = Teacher(NETWORK, FLOW, PARAMS, GUIDED)
SPACES = (objectives.FeatureSpace(objectives.raw_features, objectives.gaussian_kernel()),)
SETTINGS = {"mean_flow": {"example": BATCH}, "shortcut": {"example": BATCH}, "kernel_matching": {"spaces": SPACES}}


@cache
def trained_and_sampled(method):
    """The student, where it begins, losses and slopes there; samples of four steps after an update, and their cost."""
    made = student(method, TEACHER, **SETTINGS.get(method, {}))
    begun = made.begin(KEY)
    frozen = training.frozen_trees(made.objective, begun, BATCH)

    @jax.jit
    def run(params, batch, frozen, grid):
        state = training.complete_state(made.objective.init(KEY, params, batch), frozen)

        def mean(params):
            losses, _ = made.objective.loss(params, state, batch, KEY)
            return losses.mean(), losses

        slopes, losses = jax.grad(mean, has_aux=True)(params)
        after = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, slopes)
        run = sample(KEY, made.denoiser, made.sampled(after), made.solver, grid, shape=(8, 2), cond=COND)
        return losses, slopes, run.x, run.cost.evaluations

    return made, begun, *run(begun, BATCH, frozen, made.grid(4))


@pytest.mark.parametrize("method", METHODS)
def test_a_student_learns_and_is_sampled(method):
    made, begun, _, slopes, x, evaluations = trained_and_sampled(method)
    for path, leaf in models.by_path(made.sampled(begun)).items():
        if "target_time" not in path:
            np.testing.assert_array_equal(leaf, models.by_path(PARAMS)[path])
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(made.sampled(slopes))) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert x.shape == (8, 2) and np.isfinite(x).all() and float(evaluations) == 4
    assert set(made.every or {}) <= set(begun)


SHARDED = ("progressive", "consistency", "mean_flow", "shortcut", "distribution_matching")
"""Those whose objectives have no test on several devices of their own."""


def test_eight_devices_give_the_losses_of_one():
    made = {method: trained_and_sampled(method) for method in SHARDED}

    @jax.jit
    def losses(begun, batch):
        found = {}
        for method, (one, *_) in made.items():
            state = one.objective.init(KEY, begun[method], batch)
            found[method] = one.objective.loss(begun[method], state, batch, KEY)[0]
        return found

    mesh = jax.sharding.NamedSharding(distributed.make_mesh(), jax.sharding.PartitionSpec("data"))
    shared = losses({method: begun for method, (_, begun, *_) in made.items()}, jax.device_put(BATCH, mesh))
    for method, (_, _, alone, *_) in made.items():
        assert np.std(alone) > 0
        np.testing.assert_allclose(shared[method], alone, rtol=1e-5, err_msg=method)


ASKING = ("progressive", "consistency", "continuous_consistency", "mean_flow", "shortcut", "distribution_matching")


def test_the_answers_of_the_teacher_as_it_is_guided_are_what_is_learned():
    """By those that learn from a teacher's answers; the others never ask."""
    other = TEACHER._replace(denoiser=denoisers.guided(denoisers.denoiser(NETWORK, FLOW), 4.0, null={"label": 3}))
    made = {
        method: [student(method, one, **SETTINGS.get(method, {})) for one in (TEACHER, other)] for method in METHODS
    }
    begun = {method: pair[0].begin(jax.random.key(0)) for method, pair in made.items()}
    batch = {**BATCH, "index": np.arange(len(BATCH["x0"]), dtype=np.int32)}

    @jax.jit
    def losses(begun, batch):
        key = jax.random.key(3)

        def loss(one, params):
            return one.objective.loss(params, one.objective.init(key, params, batch), batch, key)[0].sum()

        return {method: [loss(one, begun[method]) for one in pair] for method, pair in made.items()}

    differ = {method for method, (ours, theirs) in losses(begun, batch).items() if abs(float(ours - theirs)) > 1e-6}
    assert differ == set(ASKING)


def test_settings_reach_the_losses(monkeypatch):
    """What times are drawn, how fast r rises, and with how many steps a sampler is trained."""
    many = {"x0": np.zeros((200, 2), np.float32), "cond": {"label": np.zeros(200, np.int32)}}

    def times(method, **settings):
        objective = student(method, TEACHER, **settings).objective
        state = jax.eval_shape(lambda: objective.init(jax.random.key(0), PARAMS, many))
        return np.unique(np.round(objective.prepare(state, many, jax.random.key(0))["t"], 4)).tolist()

    assert times("progressive", steps=2) == [0.5, 1.0]
    assert times("consistency", discretisation=4) == [0.25, 0.5, 0.75, 1.0]
    assert student("distribution_matching", TEACHER, every=3).every == {"student": 3}
    heard = []

    def hearing(name, pick):
        own = getattr(objectives, name)
        monkeypatch.setattr(
            objectives, name, lambda *parts, **more: (heard.append(pick(parts, more)), own(*parts, **more))[1]
        )

    hearing("shrinking", lambda parts, more: more["every"])
    hearing("tangent_ramp", lambda parts, more: parts[0])
    hearing("few_step_answers", lambda parts, more: len(parts[1]) - 1)
    hearing("whole_runs", lambda parts, more: len(parts[2]) - 1)
    student("consistency_training", TEACHER, halvings=7)
    student("continuous_consistency", TEACHER, warmup=6)
    student("distribution_matching", TEACHER, steps=3)
    student("kernel_matching", TEACHER, spaces=SPACES, steps=2)
    assert heard == [7, 6, 3, 2]


def test_another_network_learns_from_a_teacher_that_stays():
    """Of every method: it begins with its own parameters, and what moves are those alone."""
    narrow = models.mlp(width=4, depth=1, conditions=(models.label(3),))
    expected = {
        path: leaf.shape for path, leaf in models.by_path(narrow.init(KEY, BATCH["x0"], INDEX * 0.0, COND)).items()
    }
    made = {
        method: student(method, TEACHER, network=narrow, **{"example": BATCH, **SETTINGS.get(method, {})})
        for method in METHODS
    }
    begun = {method: one.begin(KEY) for method, one in made.items()}
    frozen = {method: training.frozen_trees(one.objective, begun[method], BATCH) for method, one in made.items()}

    @jax.jit
    def slopes(begun, batch, frozen):
        def loss(method, params):
            objective = made[method].objective
            state = training.complete_state(objective.init(KEY, params, batch), frozen[method])
            return objective.loss(params, state, batch, KEY)[0].mean()

        return {method: jax.grad(partial(loss, method))(params) for method, params in begun.items()}

    found = slopes(begun, BATCH, frozen)
    for method, one in made.items():
        own = models.by_path(one.sampled(begun[method]))
        shapes = {path: leaf.shape for path, leaf in own.items() if "target_time" not in path}
        assert shapes == expected, method
        moving = one.sampled(found[method])
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(moving)) > 0, method
    fake = begun["distribution_matching"]["fake"]
    assert jax.tree.all(jax.tree.map(np.array_equal, fake, PARAMS)), "its score is the teacher's"
    with pytest.raises(InvalidInput, match="consistency needs example="):
        student("consistency", TEACHER, network=narrow)


def test_only_what_is_new_of_a_network_with_a_second_time_is_fresh():
    made = student("shortcut", TEACHER, example=BATCH)
    first, other = (models.by_path(made.begin(jax.random.key(seed))) for seed in (0, 1))
    differing = {path for path, leaf in first.items() if np.abs(leaf - other[path]).max() > 0}
    assert differing and all("target_time" in path for path in differing)
    assert set(first) - set(models.by_path(PARAMS)) >= differing


def test_what_a_method_does_not_know_is_told():
    with pytest.raises(InvalidInput, match="did you mean 'consistency'"):
        student("consistancy", TEACHER)
    with pytest.raises(InvalidInput, match=r"a setting of consistency .*'discretisation'"):
        student("consistency", TEACHER, discretization=10)
    with pytest.raises(InvalidInput, match="example="):
        student("mean_flow", TEACHER)
    with pytest.raises(InvalidInput, match=r"example=.*x0"):
        student("mean_flow", TEACHER, example={"x": 0})
    other = TEACHER._replace(process=processes.vp_linear())
    with pytest.raises(InvalidInput, match=r"reflow.*rectified_flow"):
        student("reflow", other)
    with pytest.raises(InvalidInput, match="told a target time already"):
        students.told_target_time(students.told_target_time(NETWORK))


def test_times_of_a_table_of_betas_are_its_indices():
    process = processes.vp_linear()
    np.testing.assert_allclose(students.grid_of(process)(4), timesteps.trailing(4, process.schedule.num_steps))
    np.testing.assert_allclose(students.grid_of(FLOW)(4), timesteps.linspace(4))
