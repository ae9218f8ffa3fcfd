"""The loop: samples that belong to their index, segments, sharded batches, one compilation, no host in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, processes, solvers
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import invert, make_sampler, sample
from tests.denoisers import tiny

FLOW = processes.rectified_flow()
MIXTURE = gaussian_mixture([[0.0, 1.0, 0.5], [1.0, -1.0, 0.0]], [0.5, 0.3], labels=[0, 1])
GRID = jnp.linspace(1.0, 0.0, 9)
KEY = jax.random.key(7)
DENOISER = analytic(FLOW)


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("solver", [solvers.ddim(1.0), solvers.unipc(3)], ids=["ddim", "unipc"])
def test_stopping_and_resuming_is_the_uninterrupted_run_bit_for_bit(solver):
    whole = sample(KEY, DENOISER, MIXTURE, solver, GRID, shape=(4, 3))
    first = sample(KEY, DENOISER, MIXTURE, solver, GRID, shape=(4, 3), stop=3)
    second = sample(KEY, DENOISER, MIXTURE, solver, GRID, resume=first.run, start=3)
    np.testing.assert_array_equal(second.x, whole.x)
    assert float(second.cost.evaluations) == 8


def test_a_run_may_change_solver_and_grid_in_between():
    first = sample(KEY, DENOISER, MIXTURE, solvers.ddim(), GRID, shape=(4, 3), stop=4)
    onward = jnp.linspace(float(GRID[4]), 0.0, 21)
    second = sample(KEY, DENOISER, MIXTURE, solvers.unipc(3), onward, resume=first.run._replace(state=None))
    alone = sample(KEY, DENOISER, MIXTURE, solvers.unipc(3), onward, x_init=first.x)
    np.testing.assert_array_equal(second.x, alone.x)
    assert float(second.cost.evaluations) == 24
    # The history of a multi-step method outlives a change of grid.
    early = sample(KEY, DENOISER, MIXTURE, solvers.dpm_solver_pp(2), GRID, shape=(4, 3), stop=4)
    kept = sample(KEY, DENOISER, MIXTURE, solvers.dpm_solver_pp(2), onward, resume=early.run, stop=1)
    fresh = sample(
        KEY, DENOISER, MIXTURE, solvers.dpm_solver_pp(2), onward, resume=early.run._replace(state=None), stop=1
    )
    assert np.abs(np.asarray(kept.x - fresh.x)).max() > 1e-5


def test_the_trace_holds_every_nth_state():
    every = sample(KEY, DENOISER, MIXTURE, solvers.ddim(), GRID, shape=(2, 3), save_every=1)
    third = sample(KEY, DENOISER, MIXTURE, solvers.ddim(), GRID, shape=(2, 3), save_every=3)
    assert every.trace.shape == (8, 2, 3) and third.trace.shape == (2, 2, 3)
    np.testing.assert_array_equal(third.trace, every.trace[2:6:3])
    np.testing.assert_array_equal(every.trace[-1], every.x)
    np.testing.assert_array_equal(third.x, every.x)


@pytest.mark.parametrize("solver", [solvers.ddpm(), solvers.heun()], ids=["ddpm", "heun"])
def test_sample_i_is_the_same_in_any_batch_and_on_any_mesh(solver):
    index = jnp.arange(16)
    cond = {"label": jnp.arange(16) % 2}
    options = {"shape": (3,), "save_every": 4}
    one = make_sampler(DENOISER, solver, **options)(KEY, MIXTURE, GRID, cond, index)
    eight = make_sampler(DENOISER, solver, mesh=mesh(), **options)(KEY, MIXTURE, GRID, cond, index)
    few = make_sampler(DENOISER, solver, **options)(KEY, MIXTURE, GRID, {"label": cond["label"][5:7]}, index[5:7])
    np.testing.assert_allclose(eight.x, one.x, atol=1e-6)
    np.testing.assert_allclose(eight.trace, one.trace, atol=1e-6)
    np.testing.assert_allclose(few.x, one.x[5:7], atol=1e-6)
    assert eight.trace.shape == (2, 16, 3)
    assert float(eight.cost.evaluations) == float(one.cost.evaluations)
    assert eight.x.sharding.spec[0] in ("data", ("data",))


def test_a_grid_with_a_batch_axis_is_split_with_the_batch():
    index = jnp.arange(8)
    grid = GRID[:, None] * jnp.linspace(0.5, 1.0, 8)
    start = jax.random.normal(jax.random.key(1), (8, 3))
    one = make_sampler(DENOISER, solvers.unipc(), shape=(3,))(KEY, MIXTURE, grid, None, index, start)
    default = jax.make_mesh((8,), ("data",))  # of explicit axes
    eight = make_sampler(DENOISER, solvers.unipc(), shape=(3,), mesh=default)(KEY, MIXTURE, grid, None, index, start)
    np.testing.assert_allclose(eight.x, one.x, atol=1e-6)


def test_plans_and_dicts_of_them_run_on_any_mesh_and_the_batch_is_told_by_what_has_one():
    joint = processes.JointProcess({"a": FLOW, "b": processes.vp_linear()})
    network = tiny.network()
    shapes = {"a": (4, 2), "b": (3,)}
    x_init = {name: jax.random.normal(jax.random.key(2), (8, *shape)) for name, shape in shapes.items()}
    params = network.init(KEY, x_init, None, None)
    arguments = (denoisers.denoiser(network, joint), solvers.joint({"a": solvers.ddim(1.0), "b": solvers.unipc(2)}))
    one, eight = (make_sampler(*arguments, shape=shapes, mesh=where) for where in (None, mesh()))
    cond = {"label": jnp.arange(8) % 5}
    plan = GRID[:, None, None] * jnp.array([0.0, 0.3, 0.7, 1.0])
    each_its_own = GRID[:, None, None] * jnp.linspace(0.5, 1.0, 32).reshape(8, 4)
    for grid in ({"a": plan, "b": GRID}, {"a": each_its_own, "b": GRID[:, None]}):
        expected = one(KEY, params, grid, cond, jnp.arange(8), x_init).x
        np.testing.assert_array_equal(one(KEY, params, grid, cond, x_init=x_init).x["a"], expected["a"])
        spread, whole = (run(KEY, params, grid, None, None, x_init).x for run in (eight, one))
        for name in shapes:
            np.testing.assert_allclose(spread[name], whole[name], rtol=1e-5, atol=1e-5)
    # Noise for as many samples as there are labels, or plans.
    drawn = one(KEY, params, GRID, cond, jnp.arange(8)).x["b"]
    np.testing.assert_array_equal(one(KEY, params, GRID, cond).x["b"], drawn)
    np.testing.assert_allclose(eight(KEY, params, GRID, cond).x["b"], drawn, rtol=1e-5, atol=1e-5)
    assert one(KEY, params, {"a": each_its_own, "b": GRID}).x["b"].shape == (8, 3)
    assert one(KEY, params, GRID, {"label": jnp.array([3])}).x["b"].shape == (1, 3)


def test_a_condition_of_length_1_is_one_for_all_samples():
    network = models.mlp(8, 1, conditions=(models.label(5),))
    params = network.init(KEY, jnp.zeros((1, 3)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)})
    params = jax.tree.map(lambda leaf: leaf + jnp.linspace(-0.1, 0.1, leaf.size).reshape(leaf.shape), params)
    for where in (None, mesh()):
        run = make_sampler(denoisers.denoiser(network, FLOW), solvers.ddim(), shape=(3,), mesh=where)
        single, each = (run(KEY, params, GRID, {"label": jnp.full(n, 3)}, jnp.arange(8)).x for n in (1, 8))
        np.testing.assert_allclose(single, each, rtol=1e-5, atol=1e-5)


def test_what_is_one_for_all_samples_is_named_and_never_guessed_from_its_length():
    def shifted(params, carry, x, step, cond):
        return DENOISER.apply(params._replace(means=params.means + cond["shift"]), carry, x, step, cond)

    wide = gaussian_mixture(np.eye(2, 8), [0.5, 0.3])
    moved, cond = DENOISER._replace(apply=shifted), {"shift": jnp.linspace(-1.0, 1.0, 8), "scalar": 1.0}
    one, eight, unnamed = (
        make_sampler(moved, solvers.ddim(), shape=(8,), mesh=where, shared=names)
        for where, names in ((None, ("shift",)), (mesh(), ("shift",)), (None, ()))
    )
    np.testing.assert_allclose(
        eight(KEY, wide, GRID, cond, jnp.arange(8)).x, one(KEY, wide, GRID, cond, jnp.arange(8)).x, atol=1e-6
    )
    with pytest.raises(InvalidInput, match=r"batch axis of cond\['shift'\] is 8, but the batch has 16.*shared="):
        unnamed(KEY, wide, GRID, cond, jnp.arange(16))
    with pytest.raises(InvalidInput, match="did you mean 'shift'"):
        make_sampler(moved, solvers.ddim(), shape=(8,), shared=["shfit"])(KEY, wide, GRID, cond, jnp.arange(8))
    # A grid whose second axis is the part of the batch that each device has is no plan for the batch.
    with pytest.raises(InvalidInput, match="batch axis of grid is 2, but the batch has 16"):
        eight(KEY, wide, jnp.stack([GRID, GRID], axis=1), cond, jnp.arange(16))


def test_new_values_do_not_compile_anew_and_nothing_calls_the_host():
    traces = []

    def counted(params, carry, x, step, cond):
        traces.append(1)
        return DENOISER.apply(params, carry, x, step, cond)

    sampler = make_sampler(DENOISER._replace(apply=counted), solvers.dpm_solver_pp(), shape=(3,))
    sampler(KEY, MIXTURE, GRID, None, jnp.arange(4))
    once = len(traces)
    other = MIXTURE._replace(means=MIXTURE.means + 1)
    sampler(jax.random.key(8), other, GRID**2, None, jnp.arange(4) + 100)
    assert len(traces) == once
    program = jax.make_jaxpr(lambda key: sample(key, DENOISER, MIXTURE, solvers.unipc(), GRID, shape=(4, 3)).x)(KEY)
    assert "callback" not in str(program)
    shown = jax.make_jaxpr(
        lambda key: sample(key, DENOISER, MIXTURE, solvers.unipc(), GRID, shape=(4, 3), progress=True).x
    )(KEY)
    assert "callback" in str(shown)


def test_inverting_then_sampling_returns():
    x_init = jnp.array([[0.1, 0.8, 0.4], [1.1, -0.9, 0.2]])
    grid = jnp.linspace(1.0, 0.02, 129)
    args = (KEY, DENOISER, MIXTURE, solvers.heun(), grid)
    noise = invert(*args, x_init=x_init).x
    assert np.abs(np.asarray(noise - x_init)).max() > 0.1
    grid_down = jnp.linspace(0.98, 0.02, 129)
    args = (KEY, DENOISER, MIXTURE, solvers.heun(), grid_down)
    back = sample(*args, x_init=invert(*args, x_init=x_init).x).x
    np.testing.assert_allclose(back, x_init, atol=5e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample(KEY, DENOISER, MIXTURE, solvers.ddim(), GRID[::-1], shape=(2, 3)), "grid must decrease"),
        (lambda: sample(KEY, DENOISER, MIXTURE, solvers.ddim(), GRID * 2, shape=(2, 3)), r"must lie in \[0, 1\]"),
        (lambda: sample(KEY, DENOISER, MIXTURE, solvers.ddim(), GRID), "none was given"),
        (lambda: sample(KEY, DENOISER, MIXTURE, solvers.ddim(), GRID, shape=(2, 3), stop=99), "range within 0 .. 8"),
        (lambda: sample(KEY, DENOISER, MIXTURE, solvers.ddim(), GRID, shape=(2, 3), save_every=0), "save_every is 0"),
        (
            lambda: sample(KEY, DENOISER, MIXTURE, solvers.ddim(), jnp.ones((9, 5)), shape=(2, 3)),
            "prefix of the data's shape",
        ),
        (lambda: make_sampler(DENOISER, solvers.ddim(), shape=(3,), mesh=mesh(), axis="dta"), "did you mean 'data'"),
        (
            lambda: make_sampler(DENOISER, solvers.ddim(), shape=(3,), mesh=mesh())(
                KEY, MIXTURE, GRID, None, jnp.arange(6)
            ),
            "divisible by the 8 devices",
        ),
        (lambda: make_sampler(DENOISER, solvers.ddim(), shape=(3,))(KEY, MIXTURE, GRID), "give index=jnp.arange"),
        (
            lambda: make_sampler(DENOISER, solvers.ddim(), shape=(3,))(
                KEY, MIXTURE, GRID, None, jnp.arange(6), jnp.ones((1, 3))
            ),
            "batch axis of x_init is 1, but the batch has 6",
        ),
    ],
)
def test_wrong_calls_are_told_in_one_sentence(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()


def test_a_rematerialised_run_has_the_gradient_of_a_plain_one_in_less_memory():
    network = models.mlp(width=256, depth=4)
    x = jax.random.normal(jax.random.key(0), (64, 2))
    params = network.init(jax.random.key(1), x, jnp.zeros(64), None)
    denoiser, grid = denoisers.denoiser(network, processes.rectified_flow()), jnp.linspace(1.0, 0.0, 11)

    def program(remat):
        def end(params):
            return jnp.square(sample(KEY, denoiser, params, solvers.ddim(), grid, x_init=x, remat=remat).x).mean()

        return jax.jit(jax.grad(end)).lower(params).compile()

    plain, again = program(False), program(True)
    for one, other in zip(jax.tree.leaves(plain(params)), jax.tree.leaves(again(params)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-7)
    assert again.memory_analysis().temp_size_in_bytes < 0.5 * plain.memory_analysis().temp_size_in_bytes
