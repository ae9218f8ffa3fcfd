"""Continuous-time consistency: the exact map of a Gaussian has no tangent, derivatives are those of differences, and
each term teaches what it should."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, denoisers, distributed, models, objectives, processes, timesteps
from diffusion_jax.clock import single_step
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives.batches import example_keys
from diffusion_jax.objectives.continuous_consistency import FlowPairs, tangent_loss
from diffusion_jax.randomness import normal, split
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Network
from tests.models.shared import compiled, drawn_params, image
from tests.objectives.resumed import trained

KEY = jax.random.key(0)
WIDTH = 0.8
PROCESSES = {
    "trig_flow": processes.trig_flow(0.5, time="t"),
    "flow": processes.rectified_flow(time="t"),
    "v": processes.vp_linear(prediction="v", time="t"),
    "epsilon": processes.cosine(prediction="epsilon", time="t"),
    "edm": processes.edm(time="t"),
}
TIMES = np.linspace(0.05, 0.95, 8).astype(np.float32)
X0, NOISE = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
FLOW = PROCESSES["flow"]


def exact(process):
    """The network that answers with the end of the flow of N(0, WIDTH^2), of a parameter that is 0 where it does."""

    def apply(params, x, t, cond=None, train=False, key=None):
        x = x / expand(process.network_input(jnp.ones_like(t), t), x)
        said = process.from_x0(expand(WIDTH / jnp.hypot(process.sigma(t), WIDTH * process.alpha(t)), x) * x, x, t)
        return process.target(said.x0, said.eps, t) + params["off"] * x, {}

    return Network(lambda *_: {"off": jnp.float32(0)}, apply)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_map_of_a_gaussian_has_no_tangent(name):
    """On a circle for data of any deviation; on that of their own, F is -tan(a / 2) y and the flow stands still."""
    process = PROCESSES[name]
    mixture = denoisers.gaussian_mixture(np.zeros((1, 3)), WIDTH)
    teacher = denoisers.on_process(denoisers.analytic(processes.vp_linear()), process)

    @jax.jit
    def tangents(deviation, off):
        found = tangent_loss("", exact(process), process, 0.5, None, 0.1, False)
        circle = found.circle._replace(deviation=deviation)
        x_t = process.marginal(WIDTH * X0, NOISE, TIMES)
        said, _ = teacher.apply(mixture, (), x_t, single_step(TIMES), None)
        y, flow = x_t / expand(circle.length(TIMES), x_t), circle.velocity(said.x0, said.eps, TIMES)
        pairs = FlowPairs(y, flow, jnp.asarray(TIMES), None, None)
        student, g, _ = found._replace(circle=circle).tangent({"off": off}, pairs, 1.0)
        return student, g, y, flow, circle.angle(TIMES)

    assert np.abs(tangents(0.5, 0.3)[1]).max() > 1e-2
    for deviation in (0.5, WIDTH):
        student, g, y, flow, angle = jax.device_get(tangents(deviation, 0.0))
        np.testing.assert_allclose(g, 0.0, atol=2e-5)
    np.testing.assert_allclose(flow, 0.0, atol=2e-5)
    np.testing.assert_allclose(student, -np.tan(angle / 2)[:, None] * y, rtol=1e-3, atol=1e-5)


def test_the_circle_is_trig_flow():
    """Equation (1) in its published form; a linear flow's velocity becomes F as its authors convert it, and back."""
    process, s = PROCESSES["trig_flow"], 0.5
    angle = np.pi / 2 * TIMES
    published = np.cos(angle)[:, None] * X0 + np.sin(angle)[:, None] * s * NOISE
    circle = objectives.Circle(process, s)

    @compiled
    def read():
        told = process.network_input(process.marginal(X0, NOISE, TIMES), TIMES), process.target(X0, NOISE, TIMES)
        return *told, circle.angle(TIMES), circle.time(angle), circle.time_rate(TIMES)

    output = np.cos(angle)[:, None] * NOISE - np.sin(angle)[:, None] * X0 / s
    for found, expected in zip(read(), (published / s, output, angle, TIMES, 2 / np.pi), strict=True):
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-4, atol=1e-5)
    # Data of unit deviation, and whatever the teacher answers.
    unit = processes.trig_flow(1.0)
    network = Network(lambda *_: {}, lambda params, x, t, *_, **__: (jnp.sin(3 * x) + t[:, None], {}))
    x_t = np.cos(angle)[:, None] * X0 + np.sin(angle)[:, None] * NOISE
    teacher = denoisers.on_process(denoisers.denoiser(network, FLOW), unit)
    said = compiled(lambda: teacher.apply({}, (), x_t, single_step(TIMES), None)[0])()
    found = objectives.Circle(unit, 1.0).velocity(said.x0, said.eps, TIMES)
    u = np.sin(angle) / (np.sin(angle) + np.cos(angle))
    root = np.hypot(u, 1 - u)[:, None]
    u, v = u[:, None], np.sin(3 * x_t * root) + u[:, None]
    np.testing.assert_allclose(found, ((1 - 2 * u) * x_t * root + (1 - 2 * u + 2 * u**2) * v) / root, atol=1e-4)
    np.testing.assert_allclose(said.eps - said.x0, v, atol=1e-4)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_the_derivative_is_that_of_differences_along_the_flow(kind):
    if kind == "dit":
        network = models.dit("S/2", width=16, depth=2, heads=2)
    else:
        network = models.unet("digits", channels=8, multipliers=(1,), attention=(1,), groups=2)
    x, t = image((2, 4, 4, 1)), jnp.array([0.3, 0.7])
    params = drawn_params(network, x, t)
    found = tangent_loss("", network, processes.trig_flow(0.5, time="t"), None, None, 0.1, False)

    @jax.jit
    def at(angle, y, flow):
        pairs = FlowPairs(y, flow, found.circle.time(angle), None, None)
        student, g, _ = found.tangent(params, pairs, 1.0)
        still = found.tangent(params, pairs, 0.0)[1]
        both = expand(jnp.cos(angle) * jnp.sin(angle), y)
        return student, (still - g) / found.circle.deviation - both * y, both

    angle, flow, h = np.pi / 2 * np.asarray(t), image((2, 4, 4, 1), 2), 1e-2
    _, change, both = at(angle, x, flow)
    above, below = (at(angle + d, x + d * flow, flow)[0] for d in (h, -h))
    expected = np.asarray(both * (above - below) / (2 * h))
    np.testing.assert_allclose(change, expected, atol=1e-2 * np.abs(expected).max())


def test_at_no_time_every_student_answers_with_x():
    for process in PROCESSES.values():
        network = Network(lambda *_: {}, lambda params, x, t, *_, **__: (jnp.cos(x), {}))
        said, _ = denoisers.denoiser(network, process).apply({}, (), X0, single_step(jnp.zeros(8)), None)
        np.testing.assert_array_equal(said.x0, X0)


def value_and_gradient(objective, params, batch, count=0):
    state = objective.init(KEY, params, batch)._replace(count=jnp.int32(count))

    def mean(params, taught):
        losses, aux = objective.loss(params, state._replace(teacher=state.teacher._replace(value=taught)), batch, KEY)
        return losses.mean(), aux

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True, allow_int=True))(params, state.teacher.value)


def test_without_its_derivative_the_loss_leads_to_the_flow_alone():
    """At r = 0 a student that is its teacher does not move; with r it does, unless it is consistent."""
    network = exact(FLOW)
    teacher = denoisers.denoiser(network, FLOW)
    zero = {"off": jnp.float32(0.1)}
    objective = objectives.continuous_consistency(
        network, FLOW, teacher=teacher, teacher_params=zero, ramp=objectives.tangent_ramp(10)
    )
    batch = {"x0": WIDTH * X0, "index": jnp.arange(8)}
    (_, aux), (grads, taught) = value_and_gradient(objective, zero, batch)
    assert float(taught["off"]) == 0
    np.testing.assert_allclose((aux.metrics["tangent"], grads["off"]), 0.0, atol=1e-5)
    assert float(aux.metrics["r"]) == 0
    (_, aux), (grads, _) = value_and_gradient(objective, zero, batch, count=5)
    assert float(aux.metrics["tangent"]) > 1e-2 and float(grads["off"]) != 0
    np.testing.assert_allclose(aux.metrics["r"], 0.5)
    # Downhill is towards the exact map, also with data in the place of the teacher.
    plain = objectives.continuous_consistency(network, FLOW, ramp=objectives.tangent_ramp(1))
    many = {"x0": WIDTH * jax.random.normal(KEY, (4096, 3)), "index": jnp.arange(4096)}
    for off in (0.5, -0.5):
        _, (grads, _) = value_and_gradient(plain, {"off": jnp.float32(off)}, many, count=5)
        assert float(grads["off"]) * off > 0


def test_the_gradient_is_the_weighted_and_normalised_tangent_against_the_change_of_the_answer():
    """Equation (4) by hand: 2 / D alpha / sigma (F - goal) dF with F - goal = -g / (|g| + c), times the draw's weight.

    F of the exact network and its change by the parameter, which is linear, are told by `tangent` itself."""
    network, constant = exact(FLOW), 0.3
    objective = objectives.continuous_consistency(network, FLOW, ramp=objectives.tangent_ramp(1), constant=constant)
    off = {"off": jnp.float32(0.4)}
    given = {"x0": X0, "t": TIMES, "t_weight": np.linspace(0.5, 2.0, 8).astype(np.float32)}
    given = {**jax.device_put(given), "index": jnp.arange(8)}
    (loss, aux), (grads, _) = value_and_gradient(objective, off, given, count=5)
    parts = tangent_loss("", network, FLOW, 0.5, None, constant, False)

    @compiled
    def told():
        noise = normal(split(example_keys(KEY, given["index"]), 2)[0], X0.shape)
        x_t = FLOW.marginal(X0, noise, TIMES)
        y, flow = x_t / expand(parts.circle.length(TIMES), x_t), parts.circle.velocity(X0, noise, TIMES)
        pairs = FlowPairs(y, flow, jnp.asarray(TIMES), None, None)
        first, g, _ = parts.tangent(off, pairs, 1.0)
        return first, g, parts.tangent({"off": off["off"] + 1}, pairs, 1.0)[0]

    first, g, second = told()
    short = g / (np.linalg.norm(g, axis=1, keepdims=True) + constant)
    weight = (1 - TIMES) / TIMES
    np.testing.assert_allclose(aux.per_example["loss"], weight * np.square(short).mean(axis=1), rtol=1e-4)
    weight = weight * given["t_weight"]
    np.testing.assert_allclose(loss, (weight * np.square(short).mean(axis=1)).mean(), rtol=1e-4)
    slope = (weight[:, None] * -2 * short * (second - first)).mean()
    np.testing.assert_allclose(grads["off"], slope, rtol=1e-3)


def test_times_are_drawn_as_published_and_a_run_goes_on_bit_for_bit(tmp_path):
    """With the state of a draw that learns, and the number of losses, by which r rises."""
    network, many = exact(FLOW), {"x0": np.zeros((4000, 3), np.float32)}
    plain = objectives.continuous_consistency(network, FLOW)
    t = np.asarray(plain.prepare(plain.init(KEY, {}, many), many, KEY)["t"], np.float64)
    ratio = np.log(t / (1 - t))
    assert abs(ratio.mean() + 1) < 0.1 and abs(ratio.std() - 1.4) < 0.1
    draw = timesteps.importance(num_buckets=2, history=1)
    objective = objectives.continuous_consistency(network, FLOW, draw, ramp=objectives.tangent_ramp(4))
    source, mesh = data.ArraySource(X0), distributed.make_mesh(devices=1)
    run = partial(trained, objective, source, {"off": jnp.float32(0.3)}, batch_size=8, mesh=mesh)
    whole = run(3)
    run(1, tmp_path)
    resumed = run(3, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, *((s.params, s.objective_state) for s in (resumed, whole)))
    assert int(whole.objective_state.count) == 3
    fresh = draw.init()
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(whole.objective_state.draw), jax.tree.leaves(fresh)))


def test_r_rises_and_calms_down():
    ramp = objectives.tangent_ramp(4, calm_from=10, calm_steps=5, final=0.75)
    counts = np.array([0, 2, 4, 9, 10, 12, 15, 99])
    np.testing.assert_allclose(ramp(counts), [0, 0.5, 1, 1, 1, 0.9, 0.75, 0.75], rtol=1e-6)


def test_the_logarithm_of_the_variance_learns_through_its_own_term():
    """Its gradient is 1 - exp(-l) times the loss, and it divides that of the network."""
    network = models.mlp(width=8, depth=1)
    objective = {
        learned: objectives.continuous_consistency(network, FLOW, timesteps.uniform(0.2, 0.8), log_variance=learned)
        for learned in (False, True)
    }
    params = drawn_params(network, X0, TIMES)
    batch = {"x0": X0, "index": jnp.arange(8)}
    (plain, _), (own, _) = value_and_gradient(objective[False], params, batch, count=500)
    both = {"params": params, "log_variance": jnp.zeros(3).at[0].set(0.7)}
    (loss, aux), (grads, _) = value_and_gradient(objective[True], both, batch, count=500)
    np.testing.assert_allclose(loss, np.exp(-0.7) * plain + 0.7, rtol=1e-5)
    weighted, angle = aux.per_example["loss"], objectives.Circle(FLOW, 0.5).angle(aux.per_example["t"])
    expected = ((1 - np.exp(-0.7) * weighted) * np.cos(2 * np.arange(3)[:, None] * angle)).mean(axis=1)
    np.testing.assert_allclose(grads["log_variance"], expected, rtol=1e-4, atol=1e-5)
    for path, leaf in models.by_path(grads["params"]).items():
        np.testing.assert_allclose(leaf, np.exp(-0.7) * models.by_path(own)[path], rtol=1e-3, atol=1e-5)


def test_dropout_is_the_same_in_the_answer_and_in_its_derivative():
    """Both come from one call: the network is told one key, whose noise the derivative has too."""
    asked = []

    def apply(params, x, t, cond=None, train=False, key=None):
        asked.append(train)
        return params["off"] * x * jax.vmap(lambda one: jax.random.normal(one, (3,)))(key), {}

    objective = objectives.continuous_consistency(Network(exact(FLOW).init, apply), FLOW)
    params, batch = {"off": jnp.float32(0.5)}, {"x0": X0, "index": jnp.arange(8)}
    jax.eval_shape(lambda: objective.loss(params, objective.init(KEY, params, batch), batch, KEY))
    assert asked == [True]


def test_wrong_calls_are_told():
    network, rounded = exact(FLOW), processes.vp_linear(prediction="v", time="nearest_index")
    x0 = dataclasses.replace(FLOW, prediction="x0")
    teacher = denoisers.denoiser(network, FLOW)
    for call, told in (
        (lambda: objectives.continuous_consistency(network, x0), "gives back x at t = 0"),
        (lambda: objectives.continuous_consistency(network, rounded), "must not be rounded"),
        (lambda: objectives.continuous_consistency(network, FLOW, sigma_data=0), "sigma_data is 0"),
        (lambda: objectives.continuous_consistency(network, FLOW, teacher=teacher, scales=(2.0,)), "scales go with"),
        (lambda: objectives.continuous_consistency(network, FLOW, teacher=lambda scale: teacher), "scales go with"),
        (lambda: objectives.tangent_ramp(0), "at least one loss"),
        (lambda: objectives.tangent_ramp(final=2), r"\[0, 1\]"),
        (lambda: processes.trig_flow(0.0), "sigma_data is 0"),
    ):
        with pytest.raises(InvalidInput, match=told):
            call()
    objective = objectives.continuous_consistency(network, FLOW, log_variance=True)
    with pytest.raises(InvalidInput, match='"log_variance": zeros'):
        objective.init(KEY, {"off": jnp.float32(0)}, {"x0": X0})
