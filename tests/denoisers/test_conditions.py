"""Laws of condition schedules, bounds and switches: who is asked what at which step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, randomness, sampling
from diffusion_jax.denoisers import (
    blended_condition,
    clipped,
    condition_by_step,
    dropped_condition,
    scheduled_condition,
    switched,
    switched_condition,
    thresholded,
)
from diffusion_jax.errors import InvalidInput
from diffusion_jax.solvers.ddim import ddim
from diffusion_jax.typing import Cost, Denoiser, Prediction
from tests.denoisers.tiny import ask, network, remembering, step_at

PROCESS = processes.rectified_flow("x0")
X = randomness.normal(jax.random.key(0), (3, 4, 2))
A, B = {"label": jnp.array([0, 1, 2])}, {"label": jnp.array([3, 3, 0])}
PARAMS = network().init(jax.random.key(1), X, None, None)
PLAIN = denoisers.denoiser(network(), PROCESS)


def echo(params, carry, x, step, cond):
    """Answers with what it is told."""
    return Prediction(cond["embedding"], cond["embedding"], {}, Cost(1.0, 1.0)), carry


ECHO = Denoiser(lambda params, x, cond: (), echo, PROCESS)


def told(schedule, cond, step):
    return ask(scheduled_condition(ECHO, schedule), (), X, step, cond).x0


def same(a, b):
    chex.assert_trees_all_equal(a, b)


def test_a_switch_asks_with_the_early_condition_above_its_time_and_with_the_late_one_from_there_on():
    d = scheduled_condition(PLAIN, switched_condition(0.5))
    cond = {"early": A, "late": B}
    same(ask(d, PARAMS, X, step_at(0.6), cond), ask(PLAIN, PARAMS, X, step_at(0.6), A))
    same(ask(d, PARAMS, X, step_at(0.5), cond), ask(PLAIN, PARAMS, X, step_at(0.5), B))
    mixed = {"label": jnp.array([0, 3, 2])}
    vector = step_at([0.6, 0.2, 0.9])
    same(ask(d, PARAMS, X, vector, cond), ask(PLAIN, PARAMS, X, vector, mixed))
    frames = step_at([[0.6, 0.1, 0.1, 0.1], [0.2, 0.5, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]])
    same(ask(d, PARAMS, X, frames, cond), ask(PLAIN, PARAMS, X, frames, mixed))


def test_a_blend_is_linear_in_its_weight():
    early, late = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2))
    cond = {"early": {"embedding": early}, "late": {"embedding": late}}
    for weight, expected in [
        (0.25, 0.75 * early + 0.25 * late),
        ([0.0, 1.0], late),
        (denoisers.linear_scale(0, 1), 0.5 * (early + late)),
    ]:
        np.testing.assert_allclose(told(blended_condition(weight), cond, step_at(0.5, index=3)), expected, rtol=1e-6)


def test_a_table_gives_each_step_its_entry():
    table = jnp.arange(18.0).reshape(3, 3, 2)
    for index, entry in [(0, 0), (2, 2), (7, 2)]:
        same(told(condition_by_step(), {"embedding": table}, step_at(0.5, index=index)), table[:, entry])


def test_a_condition_is_dropped_inside_of_the_interval_only():
    d = scheduled_condition(PLAIN, dropped_condition({"label": 4}, 0.3, 0.6))
    step = step_at([0.2, 0.3, 0.7])
    expected = {"label": jnp.array([0, 4, 2])}
    same(ask(d, PARAMS, X, step, A), ask(PLAIN, PARAMS, X, step, expected))


# Bounds


def large(params, carry, x, step, cond):
    return PROCESS.from_x0(params, x, step.t), carry


LARGE = Denoiser(lambda params, x, cond: (), large, PROCESS)


def test_clipping_respects_its_bounds_and_leaves_alone_what_is_within():
    x0 = jnp.linspace(-2, 2, X.size).reshape(X.shape)
    found, plain = ask(clipped(LARGE, -0.5, 1.0), x0, X, step_at(0.5)), ask(LARGE, x0, X, step_at(0.5))
    same(found.x0, jnp.clip(x0, -0.5, 1.0))
    within = (x0 >= -0.5) & (x0 <= 1.0)
    same(found.eps[within], plain.eps[within])
    np.testing.assert_allclose(0.5 * found.x0 + 0.5 * found.eps, X, rtol=1e-5, atol=1e-6)


def test_thresholds_are_percentiles_of_each_sample():
    x0 = jnp.stack([jnp.linspace(-scale, scale, 8).reshape(4, 2) for scale in (0.9, 4.0, 40.0)])
    found = ask(thresholded(LARGE, 1.0), x0, X, step_at(0.5)).x0
    same(found[0], x0[0])
    np.testing.assert_allclose(found[1:], x0[1:] / jnp.array([4.0, 40.0])[:, None, None], rtol=1e-5)
    half = ask(thresholded(LARGE, 0.5), x0, X, step_at(0.5)).x0
    assert float(jnp.abs(half).max()) <= 1.0
    assert int((jnp.abs(half[2]) == 1.0).sum()) == 4
    capped = ask(thresholded(LARGE, 1.0, ceiling=8.0), x0, X, step_at(0.5)).x0
    np.testing.assert_allclose(capped[2], jnp.clip(x0[2] / 8.0, -1, 1), rtol=1e-5)


def test_bounds_leave_log_probabilities_of_joint_data_alone():
    joint = processes.JointProcess({"image": PROCESS, "text": processes.absorbing(6)})
    x = {"image": X, "text": jnp.full((3, 4), 6)}
    params = network(6).init(jax.random.key(1), x, None, None)
    plain = denoisers.denoiser(network(6), joint)
    found, before = ask(clipped(plain, -0.1, 0.1), params, x, step_at(0.5)), ask(plain, params, x, step_at(0.5))
    same(found.x0["image"], jnp.clip(before.x0["image"], -0.1, 0.1))
    assert float(jnp.abs(before.x0["image"]).max()) > 0.2
    same(found.x0["text"], before.x0["text"])


# Switches


def counted(rows, name):
    return denoisers.denoiser(network(on_call=lambda n: rows.append(name)), PROCESS)


def test_a_switch_runs_one_denoiser_at_a_time():
    rows = []
    d = switched((counted(rows, "early"), counted(rows, "late")), (0.5,), compute=(0.25, 1.0))
    other = jax.tree.map(lambda leaf: 0.5 * leaf, PARAMS)
    grid = jnp.linspace(1.0, 0.0, 5)
    run = jax.jit(lambda: sampling.sample(jax.random.key(0), d, (PARAMS, other), ddim(), grid, shape=X.shape, cond=A))()
    jax.effects_barrier()
    assert sorted(rows) == ["early", "early", "late", "late"]
    assert (float(run.cost.evaluations), float(run.cost.compute)) == (4.0, 2.5)
    same(ask(d, (PARAMS, other), X, step_at(0.5), A).x0, ask(PLAIN, other, X, step_at(0.5), A).x0)


def test_switching_between_two_predictions_of_one_model_changes_nothing():
    vp = processes.cosine("v"), processes.cosine("epsilon")
    mixture = denoisers.gaussian_mixture([[-1.0, 0.0], [1.0, 0.5]], 0.6)
    pair = tuple(denoisers.analytic(process) for process in vp)
    grid, x = jnp.linspace(1.0, 0.0, 7), (5, 2)

    @jax.jit
    def run(table):
        d = switched(pair, lambda step: jnp.take(table, step.index))
        return sampling.sample(jax.random.key(0), d, (mixture, mixture), ddim(), grid, shape=x).x

    same(run(jnp.zeros(6, jnp.int32)), run(jnp.array([0, 1, 1, 0, 1, 0])))


def test_a_denoiser_that_takes_over_trusts_nothing_it_kept_from_an_earlier_turn():
    d = remembering(PLAIN)

    @jax.jit
    def run(table):
        s = switched((d, d), lambda step: table[step.index])
        carry, answers = s.init((PARAMS, PARAMS), X, A), []
        for index in range(4):
            prediction, carry = s.apply((PARAMS, PARAMS), carry, X + index, step_at(0.5, index), A)
            answers.append(prediction.x0)
        return answers

    fresh, kept = run(jnp.array([0, 1, 0, 0])), run(jnp.array([0, 0, 0, 0]))
    plain = [ask(PLAIN, PARAMS, X + index, step_at(0.5), A).x0 for index in range(4)]
    np.testing.assert_allclose(jnp.stack(fresh[:3]), jnp.stack(plain[:3]), rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(fresh[3] - plain[3]).max()) > 1e-3
    assert float(jnp.abs(kept[2] - plain[2]).max()) > 1e-3


def test_the_mean_of_two_is_a_pair_and_costs_both():
    other = jax.tree.map(lambda leaf: 0.5 * leaf, PARAMS)
    found = ask(denoisers.averaged((PLAIN, PLAIN), (0.25, 0.75)), (PARAMS, other), X, step_at(0.5), A)
    a, b = (ask(PLAIN, p, X, step_at(0.5), A) for p in (PARAMS, other))
    np.testing.assert_allclose(found.x0, 0.25 * a.x0 + 0.75 * b.x0, rtol=1e-5, atol=1e-6)
    assert float(found.cost.evaluations) == 2.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: clipped(PLAIN, 1.0, -1.0), "low must be below high"),
        (lambda: clipped(PLAIN._replace(process=processes.uniform(5))), "Uniform predicts log-probabilities"),
        (lambda: thresholded(PLAIN, 95.0), "percentile is 95.0"),
        (lambda: thresholded(PLAIN, ceiling=0.5), "ceiling is 0.5"),
        (lambda: dropped_condition({}), "null is {}"),
        (lambda: dropped_condition({"label": 4}, 0.9, 0.1), "low must not exceed high"),
        (lambda: ask(scheduled_condition(PLAIN, switched_condition(0.5)), PARAMS, X, step_at(0.5), A), "'early'"),
        (lambda: told(blended_condition(0.5), {"early": A, "late": B}, step_at(0.5)), "use switched_condition"),
        (lambda: told(condition_by_step(), {"embedding": jnp.ones(3)}, step_at(0.5)), r"\[B, S, ...\]"),
        (lambda: switched((PLAIN,)), "Two denoisers or more"),
        (lambda: switched((PLAIN, PLAIN), (0.2, 0.5)), "1 boundaries between 2"),
        (lambda: switched((PLAIN, PLAIN, PLAIN), (0.2, 0.5)), "falling"),
        (lambda: ask(switched((PLAIN, PLAIN)), PARAMS, X, step_at(0.5), A), "one entry each"),
        (lambda: denoisers.averaged((PLAIN, PLAIN), (1.0, 1.0)), "must sum to 1"),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()
