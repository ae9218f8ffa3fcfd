"""What is exact: identities between solvers, zero-length steps, vector times, histories per entry, and costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import enable_x64

from diffusion_jax import processes, solvers, timesteps
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Cost, Denoiser

ALL = {
    "ddpm small": solvers.ddpm(),
    "ddpm large": solvers.ddpm("large"),
    "ddim": solvers.ddim(),
    "ddim eta": solvers.ddim(0.5),
    "dpm_solver": solvers.dpm_solver(3),
    "dpm_solver singlestep": solvers.dpm_solver(2, "singlestep"),
    "dpm_solver_pp": solvers.dpm_solver_pp(2),
    "dpm_solver_pp sde": solvers.dpm_solver_pp(2, equation="sde"),
    "dpm_solver_pp singlestep": solvers.dpm_solver_pp(3, "singlestep"),
    "dpm_solver_pp singlestep sde": solvers.dpm_solver_pp(2, "singlestep", "sde"),
    "unipc": solvers.unipc(3),
    "sa_solver": solvers.sa_solver(3, 3),
    "deis": solvers.deis(3),
    "deis t": solvers.deis(4, "t"),
    "lms": solvers.lms(),
    "plms": solvers.plms(),
    "pndm": solvers.pndm(),
    "heun": solvers.heun(),
    "edm": solvers.edm(),
    "flow_euler": solvers.flow_euler(),
    "flow_heun": solvers.flow_heun(),
    "flow_midpoint": solvers.flow_midpoint(),
    "flow_sde": solvers.flow_sde(),
    "lcm": solvers.lcm(),
    "tcd": solvers.tcd(),
    "tcd indices": solvers.tcd(0.3, 1000),
    "kdpm2": solvers.kdpm2(),
    "kdpm2 ancestral eta": solvers.kdpm2(ancestral=True),
    "dpm_solver restarting": solvers.dpm_solver(3, "restarting"),
    "dpm_solver_pp restarting": solvers.dpm_solver_pp(2, "restarting"),
    "dpm_solver_pp short runs": solvers.dpm_solver_pp(3, lower_order_final=15, euler_at_final=True),
    "plms output": solvers.plms(start="heun", combined="output"),
    "unipc eps": solvers.unipc(2, prediction="eps"),
}
FLOW = processes.rectified_flow()
MIXTURE = gaussian_mixture([[0.0, 1.0, 0.5], [1.0, -1.0, 0.0]], [0.5, 0.3])
STEPS = 9
"""Of every grid here, so that a solver is one program."""


def smooth():
    """A denoiser of a few operations, each coordinate by itself."""

    def apply(params, carry, x, step, cond):
        t = jnp.broadcast_to(expand(step.t, x), x.shape)
        x0 = jnp.tanh(1.5 * x + 0.5 * t) - 0.2 * t
        return FLOW.from_x0(x0, x, t)._replace(cost=Cost(jnp.float32(1), jnp.float32(1))), carry

    return Denoiser(lambda params, x, cond: (), apply, FLOW)


def run(solver, grid, *, process=FLOW, mixture=MIXTURE, x_init=None, batch=2):
    shape = (batch, *mixture.means.shape[1:])
    return sample(jax.random.key(3), analytic(process), mixture, solver, grid, shape=shape, x_init=x_init)


@functools.cache
def compiled(solver):
    """`grid [STEPS + 1, ...] -> (x [2, 3], evaluations)`, a program for each shape of grid."""

    @jax.jit
    def program(grid):
        made = sample(jax.random.key(3), smooth(), None, solver, grid, shape=(2, 3))
        return made.x, made.cost.evaluations

    return lambda grid: jax.device_get(program(grid))


def ended(times):
    """A grid of `STEPS` steps that stays where `times` end."""
    return np.pad(np.array(times, np.float32), (0, STEPS + 1 - len(times)), mode="edge")


def each(*columns):
    """A time for each coordinate, `[STEPS + 1, 2, 3]`: the columns are of the two samples, or of three coordinates."""
    stacked = np.stack(columns, axis=-1)
    stacked = stacked[:, :, None] if len(columns) == 2 else stacked[:, None]
    return np.ascontiguousarray(np.broadcast_to(stacked, (STEPS + 1, 2, 3)))


MOVING = [1.0, 0.8, 0.55, 0.3, 0.1, 0.0]


@functools.cache
def prior():
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(3), i), 0))
    return jax.device_get(jax.jit(lambda: FLOW.prior(keys(jnp.arange(2)), (2, 3)))())


@pytest.mark.parametrize("name", ALL)
def test_pauses_are_identities_and_vector_times_reproduce_the_scalar_run(name):
    """Rectified flow, so alpha(1) = 0 and sigma(0) = 0 are met."""
    made = compiled(ALL[name])
    plain, paused = ended(MOVING), ended([1.0, 1.0, 0.8, 0.55, 0.55, 0.3, 0.1, 0.0])
    both, _ = made(each(plain, paused))
    assert np.isfinite(both).all()
    np.testing.assert_array_equal(made(np.full((STEPS + 1, 2, 3), 0.5, np.float32))[0], prior())
    alone, _ = made(each(plain, plain))
    # Sample 0 does not notice that its neighbour pauses.
    np.testing.assert_array_equal(both[0], alone[0])
    deterministic = not any(word in name for word in ("ddpm", "eta", "sde", "sa_", "edm", "lcm", "tcd"))
    if deterministic:
        # A pause changes nothing for the one that pauses either (up to the order of additions: none here).
        np.testing.assert_allclose(both[1], alone[1], atol=2e-6)


STAIRCASES = (
    *("dpm_solver_pp", "dpm_solver", "unipc", "deis t", "lms", "plms", "pndm"),
    *("dpm_solver restarting", "dpm_solver_pp short runs", "plms output", "unipc eps"),
)


@pytest.mark.parametrize("name", STAIRCASES)
def test_a_staircase_is_each_coordinate_alone(name):
    """Coordinates that start, pause and end at different steps see their own history only."""
    own = [0.95, 0.8, 0.6, 0.35, 0.15, 0.0]
    columns = [ended([own[0]] * delay + own) for delay in (0, 2, 4)]
    # The second coordinate also pauses half-way, and ends one step later.
    columns[1] = np.concatenate([columns[1][:5], columns[1][4:-1]])
    made = compiled(ALL[name])
    np.testing.assert_allclose(made(each(*columns))[0], made(each(*[ended(own)] * 3))[0], atol=2e-6)


GRID = np.array([1.0, 0.9, 0.8, 0.7, 0.55, 0.4, 0.25, 0.1, 0.05, 0.0], np.float32)

EVALUATIONS = {
    "ddim": STEPS,
    "ddpm small": STEPS,
    "unipc": STEPS,
    "dpm_solver": STEPS,
    "lms": STEPS,
    "plms": STEPS,
    "heun": 1 + 2 * (STEPS - 2) + 1,  # from alpha = 0 and to sigma = 0 there is no second evaluation
    "flow_heun": 2 * (STEPS - 1) + 1,
    "flow_midpoint": 2 * STEPS,
    "dpm_solver singlestep": 1 + 2 * (STEPS - 2) + 1,
    "dpm_solver_pp singlestep": 1 + 3 * (STEPS - 2) + 1,
    "pndm": 3 * 4 + STEPS - 3,
    "plms output": 1 + STEPS,
    "kdpm2": 1 + 2 * (STEPS - 2) + 1,
    "dpm_solver restarting": STEPS,
    "lcm": STEPS,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_cost_counts_the_evaluations_that_ran(name):
    assert compiled(ALL[name])(each(GRID, GRID))[1] == EVALUATIONS[name]


def test_strided_steps_go_by_the_number_of_steps():
    """Nothing changes on a grid whose gaps are T // S indices; elsewhere a step goes T // S down, or to the end."""
    process = processes.vp_linear()
    mixture, x = jax.device_get(MIXTURE), np.ones((1, 3), np.float32)
    strided, plain = solvers.strided(solvers.ddim()), solvers.ddim()

    @jax.jit
    def ends():
        def end(solver, indices, stop=0.0):
            return run(
                solver, timesteps.from_indices(indices, 1000, stop), process=process, mixture=mixture, x_init=x
            ).x

        equal = [750, 500, 250, 0]
        two = sample(
            jax.random.key(0), analytic(process), mixture, strided, timesteps.from_indices([900, 300]),
            x_init=x, stop=1,
        ).x  # fmt: skip
        return (
            (end(strided, equal), end(plain, equal)),
            (end(strided, [900], 0.5), end(plain, [900], 0.5)),
            (two, end(plain, [900], 0.401)),
        )

    for one, other in ends():
        np.testing.assert_array_equal(one, other)


def test_adaptive_counts_every_evaluation():
    calls = []
    inner = analytic(FLOW)

    def counted(params, carry, x, step, cond):
        jax.debug.callback(lambda: calls.append(1))
        return inner.apply(params, carry, x, step, cond)

    grid = jnp.array([1.0, 0.0])
    args = (jax.random.key(0), inner._replace(apply=counted), MIXTURE, solvers.adaptive(1e-3, 1e-3), grid)
    cost = jax.jit(lambda: sample(*args, shape=(2, 3)).cost)()
    jax.effects_barrier()
    # One call more: the one whose only use is to learn the cost, which is not compiled unless it has side effects.
    assert len(calls) - 1 == float(cost.evaluations)


@pytest.mark.parametrize("name", ["unipc", "heun"])
def test_joint_data_is_each_modality_alone(name):
    """A dict of independent modalities, each with its own grid, against the same modality by itself."""
    both = processes.JointProcess({"a": FLOW, "b": processes.gvp()})
    stds, grids = {"a": 0.5, "b": 0.3}, {"a": np.array([0.9, 0.5, 0.2, 0.0]), "b": np.array([0.8, 0.8, 0.3, 0.0])}
    x = {"a": np.ones((2, 3), np.float32), "b": -np.ones((2, 3), np.float32)}

    @jax.jit
    def together_and_alone(x):
        means = {"a": MIXTURE.means[:1], "b": MIXTURE.means[1:]}
        joint = gaussian_mixture(means, stds)
        found = sample(jax.random.key(0), analytic(both), joint, ALL[name], grids, x_init=x).x
        alone = {
            part: run(
                ALL[name],
                grids[part],
                process=both.processes[part],
                mixture=gaussian_mixture(means[part], stds[part]),
                x_init=x[part],
            ).x
            for part in x
        }
        return found, alone

    found, alone = together_and_alone(x)
    for part in x:
        np.testing.assert_allclose(found[part], alone[part], atol=1e-5)


def test_gradients_through_a_run_with_pauses_are_finite():
    grid = np.array([[1.0, 0.9], [0.6, 0.9], [0.0, 0.4], [0.0, 0.0]], np.float32)
    for name in ("unipc", "dpm_solver singlestep", "lms"):

        def end(x, name=name):
            return sample(jax.random.key(3), smooth(), None, ALL[name], grid, x_init=x).x.sum()

        assert np.isfinite(jax.jit(jax.grad(end))(np.ones((2, 3), np.float32))).all(), name


def test_float64_data_stays_float64():
    with enable_x64(True):
        x = jax.ShapeDtypeStruct((2, 3), np.float64)
        grid = np.linspace(0.9, 0.1, 4)
        made = jax.eval_shape(lambda x: sample(jax.random.key(3), smooth(), None, solvers.unipc(), grid, x_init=x).x, x)
        assert made.dtype == np.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solvers.ddpm("smal"), "did you mean 'small'"),
        (lambda: solvers.ddim(1.5), "eta is 1.5"),
        (lambda: solvers.dpm_solver(4), "order is 4"),
        (lambda: solvers.dpm_solver(2, "singelstep"), "did you mean 'singlestep'"),
        (lambda: solvers.dpm_solver_pp(3, "singlestep", "sde"), "use method='multistep'"),
        (lambda: solvers.unipc(2, "b3"), "variant is 'b3'"),
        (lambda: solvers.deis(2, "logrho"), "did you mean 'log_rho'"),
        (lambda: solvers.dpm_solver_pp(2, solver_type="heum"), "did you mean 'heun'"),
        (lambda: solvers.dpm_solver_pp(3, third_order="diffuser"), "did you mean 'diffusers'"),
        (lambda: solvers.plms(start="heum"), "did you mean 'heun'"),
        (lambda: solvers.pndm("outputs"), "did you mean 'output'"),
        (lambda: solvers.unipc(prediction="x"), "prediction is 'x'"),
        (lambda: solvers.sa_solver(variant="b3"), "variant is 'b3'"),
        (lambda: solvers.edm(s_tmin=2.0, s_tmax=1.0), "s_tmax is 1.0"),
        (lambda: solvers.tcd(2.0), "gamma is 2.0"),
        (lambda: solvers.adaptive(rtol=0.0), "rtol is 0.0"),
        (lambda: solvers.sa_solver(2, 1), "corrector_order is 1"),
        (lambda: solvers.flow_sde(diffusion="sigmas"), "did you mean 'sigma'"),
        (lambda: solvers.ddim().init(processes.absorbing(4), jnp.zeros((1, 2)), GRID), "needs a Gaussian process"),
        (lambda: solvers.ancestral().init(FLOW, jnp.zeros((1, 2)), GRID), "needs a discrete process"),
        (lambda: solvers.unmask().init(processes.uniform(4), jnp.zeros((1, 2)), GRID), "an absorbing process"),
        (lambda: solvers.unmask("probabilty"), "did you mean 'probability'"),
    ],
)
def test_wrong_values_are_told_in_one_sentence(call, message):
    with pytest.raises(InvalidInput, match=message.replace("(", r"\(")):
        call()
