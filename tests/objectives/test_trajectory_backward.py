"""Consistency on the teacher's own runs: routes are ordered and stratified, states are those of a sample, nothing of
the data is read, and a run is the same on eight devices and when it goes on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, denoisers, distributed, models, objectives, processes, solvers, timesteps, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Network
from tests.models.shared import compiled, drawn_params, image
from tests.objectives.resumed import trained

KEY = jax.random.key(0)
FLOW = processes.rectified_flow(time="t")
GRID = timesteps.shift(timesteps.linspace(4), 2.5)
MIXTURE = denoisers.gaussian_mixture(np.random.default_rng(0).standard_normal((2, 3)), 0.3)
TEACHER = denoisers.analytic(FLOW)
BATCH = {"x0": np.full((16, 3), np.nan, np.float32), "index": jnp.arange(16)}


def _apply(params, x, t, cond=None, train=False, key=None):
    return jnp.tanh(x @ params["a"] + t[:, None]) @ params["b"], {}


NETWORK = Network(lambda *_: {}, _apply)
PARAMS = {name: np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32) for name in "ab"}


def made(**more):
    return objectives.trajectory_backward(NETWORK, FLOW, TEACHER, MIXTURE, GRID, **more)


def test_a_route_is_one_time_in_each_interval_in_order():
    knots = np.array([1.5, 1.2, 0.5, 0.0], np.float32)
    routes = np.asarray(jax.vmap(timesteps.stratified_route, in_axes=(0, None))(jax.random.split(KEY, 400), knots))
    assert routes.shape == (400, 5) and (routes[:, 0] == 1.5).all() and (routes[:, -1] == 0).all()
    assert (routes[:, 1:-1] <= knots[:-1]).all() and (routes[:, 1:-1] >= knots[1:]).all()
    np.testing.assert_allclose(routes[:, 1:-1].mean(axis=0), (knots[1:] + knots[:-1]) / 2, atol=0.05)
    # In training the knots are angles of the grid, one route for the batch.
    objective = made()
    state = objective.init(KEY, PARAMS, BATCH)
    route, other = compiled(lambda: [objective.prepare(state, BATCH, key)["route"] for key in jax.random.split(KEY)])()
    assert (route[0, 1:-1] != other[0, 1:-1]).all(), "each step has one of its own"
    assert (route == route[0]).all() and (np.diff(route[0]) < 0).all()
    assert (route[0, 1:-1] <= np.asarray(GRID)[:-1]).all() and (route[0, 1:-1] >= np.asarray(GRID)[1:]).all()


def test_a_trajectory_is_an_ordinary_sample_and_its_steps_are_rotations():
    circle = objectives.Circle(FLOW, 0.5)
    grid = jnp.array([1.0, 0.7, 0.65, 0.2, 0.0])
    index = jnp.arange(8)

    @compiled
    def both():
        run = objectives.teacher_trajectory(TEACHER, MIXTURE, circle, KEY, grid, (8, 3), None, index)
        plain = sample(KEY, TEACHER, MIXTURE, solvers.ddim(), grid, shape=(8, 3), index=index)
        return run, plain.x, circle.angle(grid)

    (y, flow, x0), plain, angle = both()
    np.testing.assert_array_equal(x0, plain)
    turned = (angle[:-1] - angle[1:])[:, None, None]
    stepped = np.cos(turned) * y - np.sin(turned) * flow
    np.testing.assert_allclose(stepped[:-1], y[1:], atol=1e-5)
    np.testing.assert_allclose(stepped[-1], x0 / 0.5, atol=1e-5)
    # Two steps at one velocity are one.
    first, second = 0.3, 0.5
    middle = np.cos(first) * y - np.sin(first) * flow, np.sin(first) * y + np.cos(first) * flow
    twice = np.cos(second) * middle[0] - np.sin(second) * middle[1]
    np.testing.assert_allclose(twice, np.cos(0.8) * y - np.sin(0.8) * flow, atol=1e-5)


def test_nothing_is_read_of_the_data_and_the_pairs_are_those_of_the_run():
    """x0 is NaN here. With a student that is its teacher the tangents at r = 0 are 0, at the times of the route."""
    own = denoisers.denoiser(NETWORK, FLOW)
    objective = objectives.trajectory_backward(NETWORK, FLOW, own, PARAMS, GRID)
    state = objective.init(KEY, PARAMS, BATCH)
    route = compiled(lambda: objective.prepare(state, BATCH, KEY)["route"])()
    losses, aux = compiled(lambda route: objective.loss(PARAMS, state, {**BATCH, "route": route}, KEY))(route)
    np.testing.assert_allclose(losses, 0.0, atol=1e-6)
    np.testing.assert_allclose(aux.per_example["t"], route[:, 1:-1], atol=1e-6)
    np.testing.assert_allclose(aux.metrics["tangent"], 0.0, atol=1e-4)
    assert aux.metrics["kept"] == 1
    # In validation examples bring their times.
    told = {**BATCH, "t": np.linspace(0.1, 0.9, 16).astype(np.float32)}
    program = compiled(lambda key: objective.loss(PARAMS, state._replace(count=jnp.int32(500)), told, key))
    (losses, aux), (other, _) = (program(jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_allclose(aux.per_example["t"][:, 0], told["t"], atol=1e-5)
    assert losses.shape == (16,) and (losses > 0).all()
    # The route is the same, so what differs is the noise that runs begin with.
    assert (np.abs(losses - other) > 1e-6).all()


def test_degenerate_endpoints_are_left_out():
    keep = objectives.away_from(np.zeros(3), threshold=4.0)
    for distance, share in ((0.0, 0.0), (1.0, 0.25), (2.5, 1.0)):
        kept = keep(jnp.full((2000, 3), distance), jax.random.split(KEY, 2000))
        np.testing.assert_allclose(kept.mean(), share, atol=0.04)
    objective = made(keep=lambda x0, keys: (jnp.arange(len(x0)) < 4).astype(jnp.float32))
    losses, aux = compiled(lambda: objective.loss(PARAMS, objective.init(KEY, PARAMS, BATCH), BATCH, KEY))()
    assert (losses[:4] > 0).all() and (losses[4:] == 0).all() and aux.metrics["kept"] == 0.25
    np.testing.assert_allclose(losses, aux.per_example["loss"], rtol=1e-6)
    # Asked is where a run ended, here a point, and not where it began.
    point = denoisers.gaussian_mixture(np.full((1, 3), 5.0), 0.0)
    objective = objectives.trajectory_backward(
        NETWORK, FLOW, TEACHER, point, GRID, keep=lambda x0, _: jnp.exp(-jnp.abs(x0 - 5).max(1))
    )
    _, aux = compiled(lambda: objective.loss(PARAMS, objective.init(KEY, PARAMS, BATCH), BATCH, KEY))()
    np.testing.assert_allclose(aux.metrics["kept"], 1.0, rtol=1e-3)


def test_every_parameter_of_the_student_is_alive_and_none_of_the_teacher():
    """Of one that is told its class and the scale of its teacher's guidance."""
    plain = models.mlp(8, 1, conditions=(models.label(3),), scan=False)
    network = models.mlp(8, 1, conditions=(models.label(3), models.guidance_scale(8)), scan=False)
    cond = {"label": np.arange(4, dtype=np.int32) % 3}
    x, t = image((4, 3)), np.ones(4, np.float32)
    taught = drawn_params(plain, x, t, cond)
    params = {
        "params": drawn_params(network, x, t, {**cond, "guidance_scale": np.ones(4, np.float32)}),
        "log_variance": np.full(3, 0.1, np.float32),
    }
    inner = denoisers.denoiser(plain, processes.cosine())
    objective = objectives.trajectory_backward(
        network,
        processes.trig_flow(),
        lambda scale: denoisers.guided(inner, denoisers.sample_scale(scale), {"label": 3}),
        taught,
        timesteps.linspace(3),
        scales=(2.0, 3.0, 4.0),
        log_variance=True,
    )
    batch = {"x0": np.zeros_like(x), "cond": cond, "index": jnp.arange(4)}
    state = objective.init(KEY, params, batch)._replace(count=jnp.int32(500))

    def mean(params, taught):
        whole = state._replace(teacher=state.teacher._replace(value=taught))
        return objective.loss(params, whole, batch, KEY)[0].mean()

    @compiled
    def slopes(params, taught):
        return *jax.grad(mean, argnums=(0, 1))(params, taught), objective.prepare(state, batch, KEY)["scale"]

    own, frozen, scale = slopes(params, taught)
    assert set(scale.tolist()) <= {2.0, 3.0, 4.0} and len(set(scale.tolist())) > 1
    dead = [path for path, leaf in models.by_path(own).items() if np.abs(leaf).max() == 0]
    assert not dead
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(frozen)) == 0


def test_eight_devices_are_one_and_a_run_goes_on_bit_for_bit(tmp_path):
    objective, optimizer = made(log_variance=True), training.optimizers.adamw(1e-2)
    params = {"params": PARAMS, "log_variance": np.zeros(4, np.float32)}
    source = data.ArraySource(np.zeros((16, 3), np.float32), {}, "a")
    run = partial(trained, objective, source, params, batch_size=16, optimizer=optimizer)
    whole = run(3)
    run(1, tmp_path)
    for again, tolerance in ((run(3, tmp_path), 0), (run(3, mesh=distributed.make_mesh(data=8)), 1e-4)):
        assert int(again.objective_state.count) == 3
        for path, leaf in models.by_path(jax.device_get(again.params)).items():
            np.testing.assert_allclose(leaf, models.by_path(whole.params)[path], rtol=tolerance, atol=tolerance)
    assert np.abs(whole.params["params"]["a"] - PARAMS["a"]).max() > 1e-3


def test_wrong_calls_are_told():
    for call, told in (
        (lambda: objectives.trajectory_backward(NETWORK, FLOW, TEACHER, MIXTURE, [1.0, 0.5, 0.5, 0.0]), "pause"),
        (lambda: objectives.trajectory_backward(NETWORK, FLOW, TEACHER, MIXTURE, [1.0, 0.5]), "fall to 0"),
        (lambda: made(scales=(2.0,)), "scales go with"),
        (lambda: objectives.away_from(np.zeros(3), 0.0), "threshold is 0.0"),
    ):
        with pytest.raises(InvalidInput, match=told):
            call()
