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
FACTORISED = gaussian_mixture([[0.3, 0.3, 0.3]], 0.4)


def run(solver, grid, *, process=FLOW, mixture=MIXTURE, x_init=None, batch=2):
    shape = (batch, *mixture.means.shape[1:])
    return sample(jax.random.key(3), analytic(process), mixture, solver, grid, shape=shape, x_init=x_init)


@functools.cache
def compiled(name):
    return jax.jit(lambda grid: run(ALL[name], grid))


@pytest.mark.parametrize("name", ALL)
def test_pauses_are_identities_and_vector_times_reproduce_the_scalar_run(name):
    """One compiled run per solver, over a grid [S + 1, B]; rectified flow, so alpha(1) = 0 and sigma(0) = 0 are met."""
    moving = jnp.array([1.0, 0.8, 0.55, 0.3, 0.1, 0.0])
    plain = jnp.concatenate([moving, jnp.zeros(2)])
    paused = jnp.array([1.0, 1.0, 0.8, 0.55, 0.55, 0.3, 0.1, 0.0])
    both = compiled(name)(jnp.stack([plain, paused], axis=1))
    assert np.isfinite(np.asarray(both.x)).all()
    frozen = compiled(name)(jnp.full((8, 2), 0.5))
    start = FLOW.prior(
        jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(3), i), 0))(jnp.arange(2)), (2, 3)
    )
    np.testing.assert_array_equal(frozen.x, start)
    alone = compiled(name)(jnp.stack([plain, plain], axis=1))
    # Sample 0 does not notice that its neighbour pauses.
    np.testing.assert_array_equal(both.x[0], alone.x[0])
    deterministic = not any(word in name for word in ("ddpm", "eta", "sde", "sa_", "edm", "lcm", "tcd"))
    if deterministic:
        # A pause changes nothing for the one that pauses either (up to the order of additions: none here).
        np.testing.assert_allclose(both.x[1], alone.x[1], atol=2e-6)


@pytest.mark.parametrize("name", ["ddim", "ddpm small", "unipc", "dpm_solver", "sa_solver", "heun", "flow_heun"])
def test_equal_entries_of_a_vector_time_are_the_scalar_run_bit_for_bit(name):
    scalar = jnp.array([1.0, 0.8, 0.55, 0.3, 0.1, 0.0, 0.0, 0.0])
    vector = jnp.broadcast_to(scalar[:, None], (8, 2))
    np.testing.assert_array_equal(jax.jit(lambda grid: run(ALL[name], grid))(scalar).x, compiled(name)(vector).x)


STAIRCASES = (
    *("dpm_solver_pp", "dpm_solver", "unipc", "deis t", "lms", "plms", "pndm"),
    *("dpm_solver restarting", "dpm_solver_pp short runs", "plms output", "unipc eps"),
)


@pytest.mark.parametrize("name", STAIRCASES)
def test_a_staircase_is_each_coordinate_alone(name):
    """Coordinates of a factorised Gaussian that start, pause and end at different steps see their own history only."""
    own = jnp.array([0.95, 0.8, 0.6, 0.35, 0.15, 0.0])
    length, delays = 10, (0, 2, 4)
    columns = []
    for delay in delays:
        column = [own[0]] * delay + list(own)
        columns.append(jnp.array((column + [own[-1]] * length)[:length]))
    # The second coordinate also pauses half-way, and ends one step later.
    columns[1] = jnp.concatenate([columns[1][:5], columns[1][4:-1]])
    staircase = jnp.broadcast_to(jnp.stack(columns, axis=-1)[:, None, :], (length, 2, 3))
    alone = jnp.concatenate([own, jnp.zeros(length - len(own))])
    alone = jnp.broadcast_to(alone[:, None, None], staircase.shape)
    call = jax.jit(lambda grid: run(ALL[name], grid, mixture=FACTORISED).x)
    np.testing.assert_allclose(call(staircase), call(alone), atol=2e-6)


GRID = jnp.array([1.0, 0.7, 0.4, 0.1, 0.0])


SAME = {
    "ddim(eta=1) is ddpm": (solvers.ddim(1.0), solvers.ddpm("small")),
    "ddim(eta=1) is the sde of order 1": (solvers.ddim(1.0), solvers.dpm_solver_pp(1, equation="sde")),
    "dpm_solver_pp(1) is ddim": (solvers.dpm_solver_pp(1), solvers.ddim()),
    "dpm_solver(1) is ddim": (solvers.dpm_solver(1, "singlestep"), solvers.ddim()),
    "deis(1) is ddim": (solvers.deis(1), solvers.ddim()),
    "restarting after every step is ddim": (solvers.dpm_solver_pp(1, "restarting"), solvers.ddim()),
    "no run of 4 steps is shorter than 4": (solvers.lms(3, 4), solvers.lms(3, False)),
    "a run of 4 steps is shorter than 5": (solvers.lms(3, 5), solvers.lms(3, True)),
    "without its corrector unipc(1) is ddim": (solvers.unipc(1, disable_corrector=(0, 1, 2)), solvers.ddim()),
    "midpoint and heun differ": (solvers.dpm_solver_pp(2, solver_type="heun"), solvers.dpm_solver_pp(2)),
    "flow_euler is ddim": (solvers.flow_euler(), solvers.ddim()),
    "tcd(0) is ddim": (solvers.tcd(0.0), solvers.ddim()),
    "tcd(1) is lcm": (solvers.tcd(1.0), solvers.lcm()),
    "edm without churn is heun": (solvers.edm(s_churn=0.0), solvers.heun()),
    "b1 and b2 differ": (solvers.unipc(2, "b1"), solvers.unipc(2, "b2")),
}


@pytest.mark.parametrize("name", SAME)
def test_limiting_cases_agree(name):
    one, other = (np.asarray(jax.jit(lambda grid, s=s: run(s, grid).x)(GRID)) for s in SAME[name])
    assert np.allclose(one, other, atol=2e-5) != ("differ" in name)


@pytest.mark.parametrize("name", ["heun", "flow_heun", "dpm_solver_pp", "unipc", "lms"])
def test_one_step_to_zero_is_the_prediction_of_x0(name):
    x = jnp.array([[0.3, -0.5, 1.0], [2.0, 0.1, 0.0]])
    step = run(ALL[name], jnp.array([0.6, 0.0]), x_init=x).x
    np.testing.assert_allclose(step, run(solvers.ddim(), jnp.array([0.6, 0.0]), x_init=x).x, atol=1e-6)


EVALUATIONS = {
    "ddim": 6,
    "ddpm small": 6,
    "unipc": 6,
    "dpm_solver": 6,
    "lms": 6,
    "plms": 6,
    "heun": 1 + 2 * 4 + 1,  # from alpha = 0 and to sigma = 0 there is no second evaluation
    "flow_heun": 2 * 5 + 1,
    "flow_midpoint": 2 * 6,
    "dpm_solver singlestep": 1 + 2 * 4 + 1,
    "dpm_solver_pp singlestep": 1 + 3 * 4 + 1,
    "pndm": 3 * 4 + 3,
    "plms output": 1 + 6,
    "kdpm2": 1 + 2 * 4 + 1,
    "dpm_solver restarting": 6,
    "lcm": 6,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_cost_counts_the_evaluations_that_ran(name):
    grid = jnp.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0])
    assert float(jax.jit(lambda grid: run(ALL[name], grid).cost.evaluations)(grid)) == EVALUATIONS[name]


def test_strided_steps_go_by_the_number_of_steps():
    """Nothing changes on a grid whose gaps are T // S indices; elsewhere a step goes T // S down, or to the end."""
    process = processes.vp_linear()

    def end(solver, indices, stop=0.0):
        grid = timesteps.from_indices(indices, 1000, stop)
        return np.asarray(run(solver, grid, process=process, x_init=jnp.ones((1, 3))).x)

    equal = [750, 500, 250, 0]
    np.testing.assert_array_equal(end(solvers.strided(solvers.ddim()), equal), end(solvers.ddim(), equal))
    one = end(solvers.strided(solvers.ddim()), [900], 0.5)
    np.testing.assert_array_equal(one, end(solvers.ddim(), [900], 0.5))
    two = sample(
        jax.random.key(0), analytic(process), MIXTURE, solvers.strided(solvers.ddim()),
        timesteps.from_indices([900, 300]), x_init=jnp.ones((1, 3)), stop=1,
    ).x  # fmt: skip
    np.testing.assert_array_equal(two, end(solvers.ddim(), [900], 0.401))


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


def test_joint_data_is_each_modality_alone():
    """A dict of independent modalities, each with its own grid, against the same modality by itself."""
    both = processes.JointProcess({"a": FLOW, "b": processes.gvp()})
    means = {"a": MIXTURE.means[:1], "b": MIXTURE.means[1:]}
    joint = gaussian_mixture(means, {"a": 0.5, "b": 0.3})
    grids = {"a": jnp.array([0.9, 0.5, 0.2, 0.0]), "b": jnp.array([0.8, 0.8, 0.3, 0.0])}
    x = {"a": jnp.ones((2, 3)), "b": -jnp.ones((2, 3))}
    for name in ("unipc", "heun"):
        found = jax.jit(
            lambda x, name=name: sample(jax.random.key(0), analytic(both), joint, ALL[name], grids, x_init=x).x
        )(x)
        for part, std in (("a", 0.5), ("b", 0.3)):
            alone = run(
                ALL[name],
                grids[part],
                process=both.processes[part],
                mixture=gaussian_mixture(means[part], std),
                x_init=x[part],
            )
            np.testing.assert_allclose(found[part], alone.x, atol=1e-5)


def test_gradients_through_a_run_with_pauses_are_finite():
    grid = jnp.array([[1.0, 0.9], [0.6, 0.9], [0.0, 0.4], [0.0, 0.0]])
    for name in ("unipc", "dpm_solver singlestep", "lms"):
        slope = jax.jit(jax.grad(lambda x, name=name: run(ALL[name], grid, x_init=x).x.sum()))(jnp.ones((2, 3)))
        assert np.isfinite(np.asarray(slope)).all(), name


def test_float64_data_stays_float64():
    with enable_x64(True):
        x = jnp.ones((2, 3), jnp.float64)
        assert run(solvers.unipc(), jnp.linspace(0.9, 0.1, 4), x_init=x).x.dtype == jnp.float64


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
