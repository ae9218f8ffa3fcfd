"""Discrete solvers against a known chain: two correlated tokens whose exact conditional distributions are tabulated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Cost, Denoiser, Prediction

JOINT = np.array([[0.4, 0.1], [0.05, 0.45]])
NUM = 8192
ABSORBING, UNIFORM = processes.absorbing(2), processes.uniform(2)


def exact_denoiser(process):
    """p(x0_i | x_t) of the two-token distribution JOINT, by summing over all four clean sequences."""
    clean = jnp.array([[a, b] for a in range(2) for b in range(2)])
    prior = jnp.log(jnp.asarray(JOINT.reshape(-1)))

    def apply(params, carry, x, step, cond):
        alpha = process.alpha(step.t)
        same = x[:, None, :] == clean[None]
        if process is ABSORBING:
            likelihood = jnp.where(process.is_masked(x)[:, None, :], 1.0, jnp.where(same, 1.0, 0.0))
        else:
            likelihood = alpha * same + (1 - alpha) / 2
        weight = jax.nn.softmax(prior + jnp.log(likelihood + 1e-30).sum(-1), axis=1)
        one_hot = jax.nn.one_hot(clean, 2)
        x0 = jnp.log(jnp.einsum("bk,kiv->biv", weight, one_hot) + 1e-12)
        return Prediction(x0, None, {}, Cost(jnp.float32(1), jnp.float32(1))), carry

    return Denoiser(lambda params, x, cond: (), apply, process)


def frequencies(process, solver, steps):
    grid = jnp.linspace(1.0, 0.0, steps + 1)
    run = jax.jit(lambda key: sample(key, exact_denoiser(process), None, solver, grid, shape=(NUM, 2)))
    found = run(jax.random.key(1))
    x = np.asarray(found.x)
    assert x.max() < 2
    assert float(found.cost.evaluations) == steps
    return np.histogram2d(x[:, 0], x[:, 1], bins=2)[0] / NUM


@pytest.mark.parametrize("process", [ABSORBING, UNIFORM], ids=["absorbing", "uniform"])
def test_ancestral_recovers_the_distribution(process):
    """Within four standard errors, besides what 64 steps leave of the independence within a step."""
    np.testing.assert_allclose(frequencies(process, solvers.ancestral(), 64), JOINT, atol=0.03)


def test_ancestral_in_one_step_has_the_marginals_but_not_the_correlation():
    found = frequencies(ABSORBING, solvers.ancestral(), 1)
    independent = np.outer(JOINT.sum(1), JOINT.sum(0))
    np.testing.assert_allclose(found, independent, atol=0.025)


@pytest.mark.parametrize("confidence", ["random", "margin", "entropy"])
def test_unmasking_one_token_a_step_recovers_the_distribution(confidence):
    np.testing.assert_allclose(frequencies(ABSORBING, solvers.unmask(confidence), 2), JOINT, atol=0.025)


def test_preferring_likely_candidates_sharpens():
    """Keeping the candidate that came out likelier favours the likelier sequences: the price of that order."""
    assert frequencies(ABSORBING, solvers.unmask("probability"), 2).max() > JOINT.max() + 0.1


def test_unmasking_keeps_the_schedule_and_takes_the_most_confident():
    process = processes.absorbing(5)
    sharp = jnp.array([0.1, 3.0, 1.0, 2.0, 0.5, 4.0, 0.2, 2.5])

    def apply(params, carry, x, step, cond):
        logits = sharp[None, :, None] * jax.nn.one_hot(jnp.full(x.shape, 3), 5)
        return process.predict(logits, x, step.t), carry

    denoiser = Denoiser(lambda params, x, cond: (), apply, process)
    run = sample(
        jax.random.key(0),
        denoiser,
        None,
        solvers.unmask(temperature=0.0),
        jnp.linspace(1.0, 0.0, 5),
        shape=(2, 8),
        save_every=1,
    )
    masked = np.asarray(process.is_masked(run.trace))
    assert (masked.sum(axis=-1) == np.array([[6, 6], [4, 4], [2, 2], [0, 0]])).all()
    order = np.argsort(-np.asarray(sharp))
    for step in range(4):
        assert set(np.flatnonzero(~masked[step, 0])) == set(order[: 2 * (step + 1)])
    assert (np.asarray(run.x) == 3).all()


def test_tokens_whose_time_ends_first_are_revealed_first():
    """A block-by-block grid: each block is whole when its own time is 0, and untouched before its time moves."""
    process = processes.absorbing(5)
    grid = jnp.array([[1.0, 1.0], [0.5, 1.0], [0.0, 1.0], [0.0, 0.5], [0.0, 0.0]])
    grid = jnp.repeat(grid, 2, axis=1)[:, None, :]

    def apply(params, carry, x, step, cond):
        return process.predict(jnp.zeros((*x.shape, 5)), x, step.t), carry

    for solver in (solvers.unmask(), solvers.ancestral()):
        denoiser = Denoiser(lambda params, x, cond: (), apply, process)
        run = sample(jax.random.key(0), denoiser, None, solver, grid, shape=(3, 4), save_every=1)
        masked = np.asarray(process.is_masked(run.trace))
        assert masked[1, :, 2:].all()
        assert not masked[1, :, :2].any()
        assert not masked[-1].any()
        np.testing.assert_array_equal(run.trace[1, :, :2], run.x[:, :2])


def test_joint_gives_each_modality_its_solver():
    process = processes.JointProcess({"image": processes.rectified_flow(), "text": ABSORBING})
    mixture = gaussian_mixture([[0.0, 1.0]], 0.5)
    image, text = analytic(processes.rectified_flow()), exact_denoiser(ABSORBING)

    def apply(params, carry, x, step, cond):
        a, _ = image.apply(mixture, (), x["image"], step, None)
        b, _ = text.apply(None, (), x["text"], step, None)
        return Prediction({"image": a.x0, "text": b.x0}, {"image": a.eps, "text": None}, {}, a.cost), carry

    both = Denoiser(lambda params, x, cond: (), apply, process)
    grid, shape = jnp.linspace(1.0, 0.0, 5), {"image": (4, 2), "text": (4, 2)}
    solver = solvers.joint({"image": solvers.unipc(), "text": solvers.ancestral()})
    run = sample(jax.random.key(0), both, None, solver, grid, shape=shape)
    assert float(run.cost.evaluations) == 4
    assert not np.asarray(ABSORBING.is_masked(run.x["text"])).any()
    start = sample(jax.random.key(0), both, None, solver, grid, shape=shape, stop=0).x["image"]
    alone = sample(jax.random.key(0), image, mixture, solvers.unipc(), grid, x_init=start).x
    np.testing.assert_allclose(run.x["image"], alone, atol=1e-6)
    twice = solvers.joint({"image": solvers.heun(), "text": solvers.ancestral()})
    with pytest.raises(InvalidInput, match="more than once"):
        sample(jax.random.key(0), both, None, twice, grid, shape=shape)
    with pytest.raises(InvalidInput, match="one solver per modality"):
        sample(jax.random.key(0), both, None, solvers.joint({"image": solvers.ddim()}), grid, shape=shape)
