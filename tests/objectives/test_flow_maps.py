"""Flow maps and consistency: the exact map of a Gaussian is the fixed point of each, and every parameter is alive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, objectives, processes, solvers, timesteps, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Network, TimestepDraw

KEY = jax.random.key(0)
FLOW = processes.rectified_flow()
MEAN, WIDTH = jnp.array([1.0, -0.5]), 0.4
BATCH = {"x0": MEAN + WIDTH * jax.random.normal(jax.random.key(1), (32, 2)), "index": jnp.arange(32)}


def exact():
    """The mean velocity of the flow of a Gaussian, of a parameter that is 0 where it is exact."""

    def apply(params, x, t, cond=None, train=False, key=None):
        t, s = (expand(time, x) / FLOW.network_time(1.0) for time in (t, (cond or {}).get("target_time", t)))
        m, n = (1 - t) * MEAN, (1 - s) * MEAN
        wide, narrow = ((1 - time) ** 2 * WIDTH**2 + time**2 for time in (t, s))
        velocity = ((t - (1 - t) * WIDTH**2) / wide) * (x - m) - MEAN
        far = t - s > 1e-3
        jump = (x - n - jnp.sqrt(narrow / wide) * (x - m)) / jnp.where(far, t - s, 1.0)
        return jnp.where(far, jump, velocity) + params["off"] * x, {}

    return Network(lambda *_: {"off": jnp.float32(0)}, apply)


EXACT, ZERO = exact(), {"off": jnp.float32(0)}
END = Network(EXACT.init, lambda params, x, t, *_, **__: EXACT.apply(params, x, t, {"target_time": jnp.zeros_like(t)}))
TEACHER = denoisers.denoiser(EXACT, FLOW, target_time=True)
OBJECTIVES = {
    "mean_flow": lambda network, **more: objectives.mean_flow(network, FLOW, instant_share=0.3, power=0.0, **more),
    "shortcut": lambda network, steps=8, **more: objectives.shortcut(network, FLOW, steps=steps, one_in=2, **more),
    "consistency": lambda network, **more: objectives.consistency(
        network, FLOW, objectives.neighbour(timesteps.linspace(8)), timesteps.on_grid(timesteps.linspace(8)), **more
    ),
}


def loss_of(objective):
    """The losses of parameters on a batch at the first state, compiled."""
    return jax.jit(lambda params, batch: objective.loss(params, objective.init(KEY, params, batch), batch, KEY))


def value_and_gradient(objective):
    def mean(params):
        losses, _ = objective.loss(params, jax.lax.stop_gradient(objective.init(KEY, params, BATCH)), BATCH, KEY)
        return losses.mean()

    return jax.jit(jax.value_and_grad(mean))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_exact_map_is_the_fixed_point(name):
    """Beside an exact teacher its loss is 0 (of shortcuts, but for their shortest halves, which are straight); any
    other has a gradient that leads back."""
    network = END if name == "consistency" else EXACT
    more = {"steps": 128} if name == "shortcut" else {}
    objective = OBJECTIVES[name](network, teacher=TEACHER, teacher_params=ZERO, **more)
    at = value_and_gradient(objective)
    loss, grads = at(ZERO)
    np.testing.assert_allclose(loss, 0.0, atol=1e-5)
    np.testing.assert_allclose(grads["off"], 0.0, atol=1e-2)
    for off in (0.3, -0.3):
        loss, grads = at({"off": np.float32(off)})
        assert loss > 1e-3 and grads["off"] * off > 0


def trained_network(target=True):
    conditions = (models.label(3), *((models.target_time(),) if target else ()))
    network = models.dit("S/2", width=16, depth=1, heads=2, conditions=conditions)
    return network


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_is_alive_and_no_teacher_is(name):
    network = trained_network(name != "consistency")
    x0 = np.random.default_rng(0).normal(size=(8, 4, 4, 2)).astype(np.float32)
    cond = {"label": np.arange(8, dtype=np.int32) % 3}
    told = {**cond, "target_time": np.ones(8, np.float32)} if name != "consistency" else cond

    @jax.jit
    def drawn(x0, told):
        params = network.init(KEY, x0, jnp.ones(8), told)
        return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), params)

    params = drawn(x0, told)
    plain = trained_network(False)
    teacher = denoisers.denoiser(plain, FLOW)
    taught = jax.jit(plain.init)(jax.random.key(5), x0, np.ones(8, np.float32), cond)
    objective = OBJECTIVES[name](network, teacher=teacher, teacher_params=taught)
    batch = {"x0": x0, "cond": cond, "index": jnp.arange(8)}
    state = jax.jit(objective.init)(KEY, params, batch)

    def mean(params, taught):
        whole = state._replace(teacher=state.teacher._replace(value=taught))
        return objective.loss(params, whole, batch, KEY)[0].mean()

    own, frozen = jax.jit(jax.grad(mean, argnums=(0, 1)))(params, taught)
    dead = [path for path, leaf in models.by_path(own).items() if np.abs(leaf).max() == 0]
    # The bias of keys shifts all scores of a query alike; the null class is not among the labels.
    assert all("/k/bias" in path for path in dead), dead
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(frozen)) == 0


@pytest.mark.parametrize("name", ["mean_flow", "shortcut", "consistency"])
def test_from_data_alone_one_step_learns_a_gaussian(name):
    """The parameters of an affine answer; one step from noise then has the data's mean and deviation."""
    two_times = name != "consistency"

    def features(t, s):
        return jnp.stack([jnp.ones_like(t), t, s, t * s, t**2, s**2], axis=-1)

    def apply(params, x, t, cond=None, train=False, key=None):
        t, s = (time / FLOW.network_time(1.0) for time in (t, (cond or {}).get("target_time", jnp.zeros_like(t))))
        return features(t, s) @ params["scale"] * x + features(t, s) @ params["shift"], {}

    network = Network(lambda *_: {}, apply)
    params = {"scale": jnp.zeros((6, 1)), "shift": jnp.zeros((6, 1))}
    objective = OBJECTIVES[name](network)
    optimizer = training.optimizers.adamw(2e-2)

    def batch(i):
        return {"x0": 1.0 + 0.5 * jax.random.normal(jax.random.key(i), (256, 1)), "index": jnp.arange(256)}

    state = training.init_state(objective, optimizer, lambda key: params, batch(0))
    step = training.make_train_step(objective, optimizer)
    for i in range(300):
        state, _ = step(state, batch(i))
    denoiser = denoisers.denoiser(network, FLOW, target_time=two_times)
    x = sample(KEY, denoiser, state.params, solvers.ddim(), jnp.array([1.0, 0.0]), shape=(4000, 1)).x
    assert abs(np.mean(x) - 1.0) < 0.2 and 0.3 < np.std(x) < 0.7


def test_an_average_as_target_moves_slowly_and_gaps_shrink():
    network = END
    earlier = objectives.shrinking(FLOW, ratio=2.0, every=2)
    t = jnp.array([0.2, 0.5, 0.9])
    ratio = (t / (1 - t))[None] * (1 - 2.0 ** -jnp.array([[1.0], [2.0], [3.0]]))
    found = jnp.stack([earlier(t, count) for count in (0, 2, 5)])
    np.testing.assert_allclose(found, ratio / (1 + ratio), rtol=1e-5)
    objective = objectives.consistency(network, FLOW, earlier, decay=0.9, distance=objectives.pseudo_huber())
    params = {"off": jnp.float32(1.0)}
    state = objective.init(KEY, {"off": jnp.float32(0.0)}, BATCH)
    _, aux = jax.jit(objective.loss)(params, state, BATCH, KEY)
    np.testing.assert_allclose(aux.state.target["off"], 0.1, rtol=1e-6)
    d = jax.random.normal(KEY, (5, 3, 2))
    size = jnp.sqrt(jnp.square(d).sum(axis=(1, 2)))
    np.testing.assert_allclose(objectives.pseudo_huber(0.3)(d), jnp.sqrt(size**2 + 0.09) - 0.3, rtol=1e-5)
    np.testing.assert_allclose(objectives.squared_distance(d), size**2 / 6, rtol=1e-5)
    neighbour = objectives.neighbour(jnp.array([1.0, 0.6, 0.3, 0.0]))
    np.testing.assert_allclose(neighbour(jnp.array([1.0, 0.6, 0.3, 0.5]), 0), [0.6, 0.3, 0.0, 0.3], atol=1e-6)


def test_the_gap_weight_is_finite_where_nothing_is_left_of_the_data():
    t, weight = jnp.array([0.5, 1.0, 1.0]), objectives.gap_weight(FLOW)
    np.testing.assert_allclose(weight(t, jnp.array([1 / 3, 0.9, 1.0])), [2.0, 0.0, 0.0], rtol=1e-5)


def test_the_shortest_jump_is_two_steps_along_the_velocity():
    """An answer for a jump of 1 / steps is never learned, so it is never asked for."""

    def apply(params, x, t, cond=None, train=False, key=None):
        jump = (t - cond["target_time"]) / FLOW.network_time(1.0)
        return params["off"] + expand(jnp.where(jnp.isclose(jump, 0.125, atol=1e-3), 1e3, 0.0), x) + 0.0 * x, {}

    objective = objectives.shortcut(Network(lambda *_: ZERO, apply), FLOW, steps=8, one_in=2)
    pinned = {"jump": jnp.where(jnp.arange(32) % 2 == 0, 0.25, 0.0), "t": jnp.full(32, 0.5), "t_weight": jnp.ones(32)}
    _, aux = loss_of(objective)(ZERO, {**BATCH, **pinned})
    np.testing.assert_allclose(aux.metrics["self_consistency"], 0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["mean_flow", "shortcut"])
def test_data_in_half_precision_are_taken(name):
    loss = loss_of(OBJECTIVES[name](EXACT))
    half = np.asarray(BATCH["x0"]).astype(jnp.bfloat16)
    losses, _ = loss(ZERO, {**BATCH, "x0": half})
    np.testing.assert_array_equal(losses, loss(ZERO, {**BATCH, "x0": half.astype(np.float32)})[0])


def test_wrong_calls_are_told():
    for call, told in (
        (lambda: objectives.mean_flow(EXACT, processes.vp_linear()), "rectified_flow"),
        (lambda: objectives.shortcut(EXACT, FLOW, steps=6), "power of two"),
        (lambda: objectives.consistency(EXACT, processes.vp_linear(prediction="x0"), lambda t, n: t), "gives back x"),
        (lambda: objectives.shrinking(FLOW, ratio=1.0), "a ratio above 1"),
        (lambda: objectives.pseudo_huber(-1.0), "c is -1.0"),
        (lambda: objectives.mean_flow(EXACT, FLOW, timesteps.importance()), "learns nothing from losses"),
    ):
        with pytest.raises(InvalidInput, match=told):
            call()


def weighing(found):
    """A draw of times of weight 3, whose state is the last losses that it was told."""

    def draw(state, key, shape):
        return jnp.full(shape, 0.5), jnp.full(shape, 3.0)

    return TimestepDraw(lambda: found, draw, lambda state, t, losses: losses)


@pytest.mark.parametrize("name", ["consistency", "imitation"])
def test_a_draw_that_learns_is_told_losses_without_its_own_weight(name):
    params, draw = {"off": jnp.float32(0.5)}, weighing(jnp.zeros(32))
    if name == "consistency":
        objective = objectives.consistency(END, FLOW, objectives.neighbour(timesteps.linspace(8)), draw)
    else:
        objective = objectives.imitation(END, FLOW, TEACHER, ZERO, draw)
    losses, aux = loss_of(objective)(params, BATCH)
    np.testing.assert_allclose(losses, 3 * aux.per_example["loss"], rtol=1e-6)
    np.testing.assert_array_equal(aux.state.draw, aux.per_example["loss"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_network_draws_belongs_to_the_example(name):
    """Its dropout does not depend on the others of the batch: half of it has the losses that it has in the whole."""

    def apply(params, x, t, cond=None, train=False, key=None):
        assert key.shape == x.shape[:1]
        return params["off"] * x + jax.vmap(lambda one: jax.random.normal(one, (2,)))(key), {}

    objective = OBJECTIVES[name](Network(EXACT.init, apply))
    params = {"off": jnp.float32(0.5)}
    whole = jax.jit(lambda batch: objective.prepare(objective.init(KEY, params, batch), batch, KEY))(BATCH)
    half = jax.jit(lambda batch: jax.tree.map(lambda leaf: leaf[16:], batch))(whole)
    loss = loss_of(objective)
    one, other = (loss(params, b)[0] for b in (whole, half))
    np.testing.assert_allclose(one[16:], other, rtol=1e-5)


def test_at_given_times_a_shortcut_learns_velocities_alone():
    """As validation asks: every example at the time that was given."""
    objective = OBJECTIVES["shortcut"](EXACT, teacher=TEACHER, teacher_params=ZERO)
    batch = {**BATCH, "t": jnp.full(32, 0.25), "t_weight": jnp.ones(32)}
    losses, aux = loss_of(objective)(ZERO, batch)
    np.testing.assert_array_equal(aux.per_example["t"], 0.25)
    np.testing.assert_allclose(losses, 0.0, atol=1e-6)
    assert aux.metrics["self_consistency"] == 0
