"""Randomness belongs to an example and not to its place in the batch, no two draws are one, and whoever should be told
a condition is told it: the student its own, the teacher its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, objectives, processes, solvers, timesteps
from diffusion_jax.randomness import normal
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Network

KEY = jax.random.key(0)
FLOW = processes.rectified_flow(time="t")
SIZE = 6
RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((4, 4)).astype(np.float32) for name in ("student", "teacher", "labels", "words")}


def network(own, told, entry):
    """One with dropout that reads `entry` of the condition and reports what it was given."""

    def apply(params, x, t, cond, train=False, key=None):
        said = jnp.tanh(x @ params[own] + expand(t, x)) + expand(jnp.asarray(params[told])[cond[entry], 0], x)
        drawn = jnp.zeros_like(x) if key is None else normal(key, x.shape)
        return said + 0.3 * drawn, {"drawn": drawn, "x": x, "scale": cond.get("guidance_scale", t)}

    return Network(lambda *_: WEIGHTS, apply)


STUDENT, OTHER = network("student", "labels", "label"), network("teacher", "words", "word")
TEACHER = denoisers.denoiser(OTHER, FLOW)


def guided(scale):
    return denoisers.guided(TEACHER, denoisers.sample_scale(scale), {"word": 3})


def plain():
    return objectives.denoising(STUDENT, FLOW)


SCALED = {"scales": (2.0, 3.0, 4.0), "ramp": objectives.tangent_ramp(1)}
POLICY = models.Chooser(lambda *_: WEIGHTS, lambda params, x: x @ params["student"], 4)
OBJECTIVES = {
    "continuous_consistency": lambda: objectives.continuous_consistency(
        STUDENT, FLOW, teacher=guided, teacher_params=WEIGHTS, **SCALED
    ),
    "degraded": lambda: objectives.degraded(plain(), objectives.perturbed(0.5)),
    "kernel_matching": lambda: objectives.kernel_matching(
        objectives.whole_runs(denoisers.denoiser(STUDENT, FLOW), solvers.ddim(), timesteps.linspace(2)),
        [objectives.raw_space(objectives.gaussian_kernel())],
    ),
    "leap_distillation": lambda: objectives.leap_distillation(STUDENT, FLOW, TEACHER, WEIGHTS, levels=4),
    "progressive": lambda: objectives.progressive(STUDENT, FLOW, timesteps.linspace(4), TEACHER, WEIGHTS),
    "self_enhanced": lambda: objectives.self_enhanced(plain(), TEACHER, warmup=0, gap=0.5),
    "time_policy": lambda: objectives.time_policy(
        POLICY, (0.2, 0.4, 0.6, 0.8), objectives.leap_reward(STUDENT, FLOW), WEIGHTS, draws=2
    ),
    "trajectory_backward": lambda: objectives.trajectory_backward(
        STUDENT, FLOW, guided, WEIGHTS, timesteps.linspace(2), **SCALED
    ),
}
TAUGHT = ("continuous_consistency", "leap_distillation", "progressive", "self_enhanced", "trajectory_backward")
BATCH: Any = {
    "x0": RNG.standard_normal((SIZE, 4)).astype(np.float32),
    "base": RNG.standard_normal((SIZE, 4)).astype(np.float32),
    "t": np.linspace(0.3, 0.6, SIZE).astype(np.float32),
    "cond": {name: np.arange(SIZE, dtype=np.int32) % 3 for name in ("label", "word")},
    "index": np.arange(10, 10 + SIZE, dtype=np.int32),
}


def given(name):
    ready = ("leap_distillation", "time_policy")
    return {key: jax.device_put(value) for key, value in BATCH.items() if key != "base" or name in ready}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_goes_with_its_example_and_hears_of_its_conditions(name):
    objective, batch, order = OBJECTIVES[name](), given(name), RNG.permutation(SIZE)
    state = objective.init(KEY, WEIGHTS, batch)
    if "count" in getattr(state, "_fields", ()):
        state = state._replace(count=jnp.int32(5))
    batch = jax.device_get(batch)
    batches = [batch, jax.tree.map(lambda leaf: leaf[order], batch)]
    for entry in ("label", "word"):
        batches.append({**batch, "cond": {**batch["cond"], entry: (batch["cond"][entry] + 1) % 3}})
    several = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    one = lambda batch: objective.loss(WEIGHTS, state, batch, KEY)[0]  # noqa: E731
    losses, permuted, label, word = jax.device_get(jax.jit(lambda several: jax.lax.map(one, several))(several))
    np.testing.assert_allclose(permuted, losses[order], rtol=1e-4, atol=1e-6)
    assert np.std(losses) > 1e-3 or name == "kernel_matching"
    told = np.abs(losses - label) > 1e-6, np.abs(losses - word) > 1e-6
    # A share of self_enhanced is the teacher's, and the policy draws what is good for both labels as well.
    assert told[0].all() if name != "time_policy" else told[0].any()
    assert (told[1].any() if name == "self_enhanced" else told[1].all()) == (name in TAUGHT)


@pytest.mark.parametrize("name", ["continuous_consistency", "progressive", "trajectory_backward"])
def test_no_two_draws_are_one_and_each_example_has_one_scale_of_guidance(name):
    """The noise of x_t and the dropout of each example, and in a run of each of its states, in two steps."""
    objective, batch = OBJECTIVES[name](), given(name)
    if name == "trajectory_backward":
        del batch["t"]
    state = objective.init(KEY, WEIGHTS, batch)

    @jax.jit
    def drawn(key, more):
        prepared = objective.prepare(state, {**batch, **more}, key)
        losses, aux = objective.loss(WEIGHTS, state, {**batch, **more}, key)
        extras, noise = aux.extras, aux.extras["x"]
        if "t" in batch:
            noise = (noise - (1 - batch["t"][:, None]) * batch["x0"]) / batch["t"][:, None]
        return losses, extras["drawn"], noise, extras["scale"], prepared.get("scale")

    one, other = (jax.device_get(drawn(jax.random.key(seed), {})) for seed in (0, 1))
    rows = np.concatenate([*one[1:3], *other[1:3]])
    assert (np.abs(rows[:, None] - rows[None]).max(axis=2) + np.eye(len(rows)) > 1e-3).all()
    if name != "progressive":
        # Told to the student, for all states of a run, and to the teacher.
        for _, seen, _, told, scale in (one, other):
            np.testing.assert_array_equal(told, np.repeat(scale, len(seen) // SIZE))
        assert {*one[4], *other[4]} == {2.0, 3.0, 4.0}
        low, high = (drawn(KEY, {"scale": np.full(SIZE, scale, np.float32)})[0] for scale in (2.0, 4.0))
        assert (np.abs(low - high) > 1e-6).all()
