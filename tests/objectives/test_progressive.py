"""A student of half the steps ends where its teacher does; pairs of noise and samples are trained on as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, objectives, processes, solvers, timesteps
from diffusion_jax.clock import single_step
from diffusion_jax.denoisers import analytic, denoiser, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.time_axes import expand, fill
from diffusion_jax.typing import Network

KEY = jax.random.key(0)
X = 0.5 * jax.random.normal(KEY, (16, 3)) + 1.0
BATCH = {"x0": X, "index": jnp.arange(16)}
MIXTURE = gaussian_mixture(jax.random.normal(jax.random.key(1), (2, 3)), 0.4)


def student_of(process, grid):
    """The network that answers as equation (1) says, of a parameter that is 0 where it is that."""
    exact = analytic(process)

    def apply(params, x, t, cond=None, train=False, key=None):
        t = t / process.network_time(1.0)
        at = jnp.argmin(jnp.abs(grid[:-1:2] - t[:, None]), axis=1) * 2
        # A discrete process tells indices: the time itself is that of the grid.
        t, x_s = grid[at], x
        for first in (at, at + 1):
            said, _ = exact.apply(MIXTURE, (), x_s, single_step(grid[first]), None)
            x_s = process.marginal(said.x0, said.eps, grid[first + 1])
        ratio = process.sigma(grid[at + 2]) / process.sigma(t)
        x0 = (x_s - expand(ratio, x) * x) / expand(process.alpha(grid[at + 2]) - ratio * process.alpha(t), x)
        said = process.from_x0(x0, x, t)
        return process.target(said.x0, said.eps, t) + params["off"], {}

    return Network(lambda *_: {"off": jnp.float32(0)}, apply)


@pytest.mark.parametrize("name", ["flow", "v"])
def test_one_step_of_the_student_is_two_of_the_teacher(name):
    process = processes.rectified_flow() if name == "flow" else processes.vp_cosine(prediction="v")
    grid = jnp.linspace(1.0, 0.0, 9)
    network, exact, zero = student_of(process, grid), analytic(process), {"off": jnp.float32(0)}
    objective = objectives.progressive(network, process, grid, exact, MIXTURE)
    state = objective.init(KEY, zero, BATCH)

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        return objective.loss(params, state, BATCH, KEY)[0].mean()

    value, grads = mean(zero)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    value, grads = mean({"off": jnp.float32(0.5)})
    np.testing.assert_allclose((value, grads["off"]), (0.25, 1.0), rtol=1e-2)
    start = jax.random.normal(jax.random.key(2), (8, 3))
    teacher = sample(KEY, exact, MIXTURE, solvers.ddim(), grid, x_init=start).x
    student = sample(KEY, denoiser(network, process), zero, solvers.ddim(), grid[::2], x_init=start).x
    np.testing.assert_allclose(student, teacher, atol=1e-4)


def test_the_teacher_does_not_learn_and_every_parameter_of_the_student_does():
    process, network = processes.rectified_flow(), models.mlp(width=8, depth=1)
    params = jax.tree.map(lambda leaf: leaf + 0.1, network.init(KEY, X, jnp.ones(16), None))
    objective = objectives.progressive(network, process, jnp.linspace(1, 0, 5), denoiser(network, process), params)
    state = objective.init(KEY, params, BATCH)

    def mean(own, taught):
        return objective.loss(own, state._replace(teacher=state.teacher._replace(value=taught)), BATCH, KEY)[0].mean()

    own, taught = jax.jit(jax.grad(mean, argnums=(0, 1)))(params, params)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(own)) > 0
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(taught)) == 0


def test_noise_that_belongs_to_an_example_is_not_drawn():
    """Reflow: pairs of the noise that a run began with and of what it ended in."""
    network = Network(lambda *_: {}, lambda params, x, t, cond=None, train=False, key=None: (x, {}))
    process = processes.rectified_flow()
    noise = jax.random.normal(jax.random.key(3), X.shape)
    objective = objectives.denoising(network, process, timesteps.uniform())
    batch = objective.prepare((), {**BATCH, "noise": noise}, KEY)
    losses, _ = objective.loss({}, (), batch, KEY)
    t = fill(batch["t"], X)[:, None]
    np.testing.assert_allclose(losses, jnp.square((1 - t) * X + t * noise - (noise - X)).mean(axis=1), rtol=1e-5)
    with pytest.raises(InvalidInput, match="'noise'"):
        objective.loss({}, (), {**batch, "noise": noise[:, :2]}, KEY)


@pytest.mark.parametrize(
    ("grid", "told"), [(jnp.linspace(1, 0, 4), "even number of steps"), (jnp.array([1.0, 1.0, 0.0]), "pauses")]
)
def test_wrong_grids_are_told(grid, told):
    process = processes.rectified_flow()
    with pytest.raises(InvalidInput, match=told):
        objectives.progressive(student_of(process, jnp.linspace(1, 0, 3)), process, grid, analytic(process), MIXTURE)


def test_times_that_a_batch_brings_along_become_those_of_the_student():
    """As in validation, whose times are the middles of bins; a time of 0 has no step of its own."""
    process, grid = processes.rectified_flow(), jnp.linspace(1.0, 0.0, 9)
    objective = objectives.progressive(student_of(process, grid), process, grid, analytic(process), MIXTURE)
    params = {"off": jnp.float32(0.5)}
    state = objective.init(KEY, params, BATCH)
    losses, aux = objective.loss(params, state, {**BATCH, "t": jnp.linspace(0.0, 1.0, 16)}, KEY)
    np.testing.assert_allclose(losses, 0.25, rtol=1e-2)
    made = objectives.progressive(
        student_of(process, grid), process, grid, analytic(process), MIXTURE, weight=lambda process, t: 1.0 + t
    )
    weighted, told = made.loss(params, state, {**BATCH, "t": jnp.linspace(0.0, 1.0, 16)}, KEY)
    np.testing.assert_allclose(weighted, losses * (1.0 + aux.per_example["t"]), rtol=1e-5)
    np.testing.assert_allclose(told.per_example["loss"], weighted, rtol=1e-6)
    assert set(np.asarray(aux.per_example["t"]).tolist()) == {0.25, 0.5, 0.75, 1.0}
