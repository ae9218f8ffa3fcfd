"""One program for all tasks of joint data: what is given comes back, what is drawn is the right distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, timesteps
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_role_sampler, sample
from diffusion_jax.solvers import ddim

FLOW = processes.rectified_flow()
PROCESS = processes.JointProcess({"x": FLOW, "y": FLOW})
KEY, GRID, SIZE = jax.random.key(0), timesteps.linspace(30), 400
SHAPE = {"x": (1,), "y": (2,)}
# x and the first of y are correlated, 0.8; the second is y's own.
WORLD = gaussian_mixture(
    {"x": np.array([[0.5]]), "y": np.array([[-0.5, 0.0]])},
    covariances=np.array([[[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 0.25]]]),
)
ALL = jnp.arange(SIZE)


@pytest.fixture(scope="module")
def asked():
    """The sampler, and how often its denoiser was traced."""
    exact, traces = analytic(PROCESS), []

    def apply(*args):
        traces.append(1)
        return exact.apply(*args)

    return make_role_sampler(exact._replace(apply=apply), ddim(), GRID, shape=SHAPE), traces


@pytest.fixture(scope="module")
def drawn(asked):
    ask, traces = asked
    given = np.full((SIZE, 2), 1.0, np.float32)
    out = {
        "joint": ask(KEY, WORLD, {"x": "generate", "y": "generate"}, index=ALL),
        "x | y": ask(KEY, WORLD, {"x": "generate", "y": "given"}, {"y": given}),
        "x": ask(KEY, WORLD, {"x": "generate", "y": "ignored"}, index=ALL),
    }
    first = len(traces)
    mixed = ask(KEY, WORLD, {"x": "generate", "y": ["given", "ignored"] * (SIZE // 2)}, {"y": given})
    named = ask(KEY, WORLD, {"x": "generate", "y": "x"}, index=ALL)
    return {name: jax.device_get(one.x) for name, one in {**out, "mixed": mixed, "named": named}.items()}, given, first


def test_each_task_is_its_distribution(drawn):
    out, given, _ = drawn
    joint = np.concatenate([out["joint"]["x"], out["joint"]["y"]], axis=1)
    np.testing.assert_allclose(np.cov(joint.T), [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0.25]], atol=0.2)
    # E[x | y] = 0.5 + 0.8 (1 + 0.5), with 1 - 0.8 ** 2 left of the variance.
    conditional, marginal = out["x | y"]["x"], out["x"]["x"]
    assert abs(conditional.mean() - 1.7) < 0.1 and abs(conditional.std() - 0.6) < 0.1
    assert abs(marginal.mean() - 0.5) < 0.15 and abs(marginal.std() - 1.0) < 0.1
    assert out["x | y"]["y"].tobytes() == given.tobytes()


def test_tasks_mix_within_a_batch_and_compile_nothing(asked, drawn):
    out, _, first = drawn
    np.testing.assert_allclose(out["mixed"]["x"][::2], out["x | y"]["x"][::2], atol=1e-5)
    np.testing.assert_allclose(out["mixed"]["x"][1::2], out["x"]["x"][1::2], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, out["named"], out["joint"])
    assert len(asked[1]) == first


def test_it_is_sample_with_the_same_plan(drawn):
    out, given, _ = drawn
    plan = timesteps.roles(GRID, {"x": "generate", "y": "given"})
    known = {"x": np.zeros((8, 1), np.float32), "y": given[:8]}

    @jax.jit
    def run():
        start = timesteps.noised_start(KEY, PROCESS, plan, known)
        return sample(KEY, analytic(PROCESS), WORLD, ddim(), plan, x_init=start).x

    np.testing.assert_allclose(run()["x"], out["x | y"]["x"][:8], atol=1e-5)


def test_what_cannot_be_asked_is_told(asked):
    ask, _ = asked
    both = {"x": "generate", "y": "given"}
    for call, match in [
        (lambda: ask(KEY, WORLD, {"x": "generate"}, index=ALL), "has 'y' too"),
        (lambda: ask(KEY, WORLD, {**both, "z": "given"}), "name in roles"),
        (lambda: ask(KEY, WORLD, both, {"w": np.zeros((2, 1))}), "name in known"),
        (lambda: ask(KEY, WORLD, both, index=ALL), r"roles\['y'\] is 'given', but known has no 'y'"),
        (lambda: ask(KEY, WORLD, {"x": "generate", "y": "ignored"}), "index"),
        (lambda: ask(KEY, WORLD, {"x": "given", "y": "generate"}, {"x": np.zeros((2, 1))}, index=ALL), "batch"),
    ]:
        with pytest.raises(InvalidInput, match=match):
            call()
