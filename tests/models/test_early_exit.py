"""Leaving early equals running everything and choosing; samples leave by themselves; estimators train nobody else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, objectives, processes, sampling, solvers, timesteps
from diffusion_jax.acceleration import at_depth, depth_table, exit_by_uncertainty, exit_depths, whole_depth
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from tests.denoisers import tiny
from tests.models.shared import changed, compiled, drawn_params, image

PROCESS = processes.rectified_flow()
NETWORKS = {
    "dit": (lambda: models.dit(width=16, depth=4, heads=2, conditions=(models.label(3),)), (8, 4, 4, 1)),
    "pixart": (lambda: models.pixart(patch=2, width=16, depth=3, heads=2), (2, 4, 4, 1)),
    "mlp": (lambda: models.mlp(width=16, depth=3, conditions=(models.label(3),)), (8, 5)),
}


def inputs(name):
    """(x, t, cond)"""
    rng, shape = np.random.default_rng(0), NETWORKS[name][1]
    batch = shape[0]
    told = {"label": np.arange(batch, dtype=np.int32) % 3}
    if name == "pixart":
        told = {"context": rng.standard_normal((batch, 2, 4)).astype(np.float32)}
    return rng.standard_normal(shape).astype(np.float32), np.linspace(10.0, 900.0, batch, dtype=np.float32), told


@functools.cache
def case(name="dit", heads="shared"):
    """(exits, params of network and exits, x, t, cond), with weights that are nowhere zero."""
    network = NETWORKS[name][0]()
    exits = models.early_exit(network, heads)
    x, t, cond = inputs(name)
    return exits, drawn_params(exits.network, x, t, cond), x, t, cond


@functools.cache
def program(name="dit", heads="shared"):
    """What all exits say, and the answers of leaving, of gathering and of stopping, of one batch in one program."""
    exits = case(name, heads)[0]

    def run(params, x, t, cond, threshold, depth):
        layers, _ = exits.network.apply(params, x, t, cond)
        left, gathered = (answer(params, x, t, cond, threshold) for answer in (exits.leave, exits.gather))
        return layers, left, gathered, exits.stop(params, x, t, cond, depth)

    return compiled(run)


def answers(params, x, t, cond, threshold=0.0, depth=None, name="dit", heads="shared"):
    depth = np.ones(len(x), np.int32) if depth is None else depth
    return program(name, heads)(params, x, t, cond, np.float32(threshold), depth)


def leave(*args):
    return answers(*args)[1]


def mixed_threshold(layers):
    """A threshold at which samples of the batch leave at different depths."""
    return np.median(layers.uncertainty.reshape(*layers.uncertainty.shape[:2], -1).mean(-1).min(axis=0))


@pytest.mark.parametrize("name, heads", [("dit", "shared"), ("dit", "own"), ("mlp", "shared"), ("pixart", "shared")])
def test_leaving_equals_gathering_and_ends_where_all_are_done(name, heads):
    exits, *given = case(name, heads)
    run = functools.partial(answers, *given, name=name, heads=heads)
    layers = run()[0]
    assert layers.output.shape == layers.uncertainty.shape == (exits.depth, *given[1].shape)
    assert layers.uncertainty.min() > 0 and layers.uncertainty.max() < 1
    threshold = mixed_threshold(layers)
    _, (found, extras), (wanted, reference), _ = run(threshold)
    np.testing.assert_array_equal(extras["exit_depth"], reference["exit_depth"])
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert extras["blocks"] == extras["exit_depth"].max()
    assert set(extras) == set(reference)
    if name != "pixart":
        assert len(set(extras["exit_depth"].tolist())) > 1
    # The table of the same depths gives the same, and so does its last block where nobody leaves.
    stopped, _ = run(threshold, extras["exit_depth"])[3]
    np.testing.assert_allclose(stopped, wanted, atol=2e-6)


def test_nobody_leaves_below_zero_and_everybody_at_one():
    _, params, x, t, cond = case()
    whole, extras = leave(params, x, t, cond, -1.0)
    network = NETWORKS["dit"][0]()
    np.testing.assert_array_equal(whole, jax.jit(network.apply)(params["params"], x, t, cond)[0])
    assert set(extras["exit_depth"].tolist()) == {4}
    np.testing.assert_array_equal(leave(params, x, t, cond, 0.0)[0], whole)
    first, extras = leave(params, x, t, cond, 1.0)
    shallow = models.dit(width=16, depth=1, heads=2, conditions=(models.label(3),))
    cut = {**params["params"], "blocks": jax.tree.map(lambda leaf: np.asarray(leaf)[:1], params["params"]["blocks"])}
    np.testing.assert_allclose(first, jax.jit(shallow.apply)(cut, x, t, cond)[0], atol=1e-6)
    assert extras["blocks"] == 1


def test_depth_never_grows_with_the_threshold():
    _, *given = case()
    depths = [leave(*given, threshold)[1]["exit_depth"] for threshold in np.linspace(0.0, 1.0, 9)]
    assert np.all(np.diff(np.stack(depths), axis=0) <= 0)


def test_a_sample_does_not_depend_on_its_neighbours():
    _, params, x, t, cond = case()
    threshold = mixed_threshold(answers(params, x, t, cond)[0])
    found, extras = leave(params, x, t, cond, threshold)
    order = np.array([5, 1, 7, 1, 0, 0, 0, 2])
    other, told = leave(params, x[order], t[order], {"label": cond["label"][order]}, threshold)
    np.testing.assert_array_equal(told["exit_depth"], extras["exit_depth"][order])
    np.testing.assert_array_equal(other, found[order])


def test_blocks_behind_the_last_exit_are_not_computed():
    exits, params, *given = case()
    broken = jax.tree.map(lambda leaf: changed(leaf, slice(2, None), np.nan), params["params"]["blocks"])
    broken = {**params, "params": {**params["params"], "blocks": broken}}
    for_all, depth = compiled(exits.stop), np.array([1, 2, 2, 1, 2, 2, 2, 1], np.int32)
    np.testing.assert_array_equal(for_all(broken, *given, 2)[0], for_all(params, *given, 2)[0])
    np.testing.assert_array_equal(*(answers(tree, *given, depth=depth)[3][0] for tree in (broken, params)))


def test_estimators_train_themselves_alone_and_targets_have_no_gradient():
    exits, params, x, t, cond = case()

    @compiled
    def gradients(params, x, t):
        said, pull = jax.vjp(lambda params: exits.network.apply(params, x, t, cond)[0], params)

        def through(uncertainty, layers):
            loss = objectives.exit_losses(uncertainty, layers)
            return jax.grad(lambda said: loss(PROCESS, said, x, x, x, t / 1000)[0].mean())(said)

        each = [through(*weights) for weights in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))]
        return jax.vmap(lambda one: pull(one)[0])(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))

    def touched(tree):
        return any(np.any(leaf != 0) for leaf in jax.tree.leaves(tree))

    found = gradients(params, x, t)
    plain, learned, both = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(3))
    assert not touched(plain["exits"]) and touched(learned["exits"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), learned["params"], plain["params"])
    # The layer-wise loss reaches the network, and not what weighs it.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), both["exits"], learned["exits"])
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (both["params"], plain["params"]))))


def test_any_objective_has_exits_and_its_network_is_run_once():
    exits, params, x, _, cond = case()
    batch, key = {"x0": x, "cond": cond, "index": jnp.arange(8)}, jax.random.key(4)
    ran = []

    def counting(params, x, t, cond=None, train=False, key=None):
        said, extras = exits.network.apply(params, x, t, cond)
        jax.debug.callback(lambda: ran.append(1))
        return said, extras

    counted = exits._replace(network=exits.network._replace(apply=counting))

    def own(network):
        return objectives.denoising(network, PROCESS, timesteps.stratified())

    def loss(weights):
        objective = objectives.with_exits(own, exits, *weights)
        state = objective.init(key, params, batch)
        return lambda params: objective.loss(params, state, batch, key)

    last = exits.network._replace(
        apply=lambda *args, **options: (exits.network.apply(*args, **options)[0].output[-1], {})
    )
    alone = own(last)

    @compiled
    def losses(params):
        mean = [jax.grad(lambda p, w=w: loss(w)(p)[0].mean())(params) for w in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))]
        return (
            [loss(w)(params) for w in ((0.0, 0.0), (1.0, 1.0))],
            mean,
            alone.loss(params, alone.init(key, params, batch), batch, key),
        )

    (plain, whole), gradients, wanted = losses(params)
    np.testing.assert_allclose(plain[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(plain[1].metrics["mse"], wanted[1].metrics["mse"], rtol=1e-5)
    np.testing.assert_array_equal(plain[1].per_example["t"], wanted[1].per_example["t"])
    assert np.all(whole[0] > plain[0])

    def touched(tree):
        return any(np.any(leaf != 0) for leaf in jax.tree.leaves(tree))

    none, estimated, both = gradients
    assert not touched(none["exits"]) and touched(estimated["exits"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), estimated["params"], none["params"])
    # What is lost behind early blocks reaches the network, and not what weighs it.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), both["exits"], estimated["exits"])
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (both["params"], none["params"]))))
    objective = objectives.with_exits(own, counted)
    jax.jit(objective.loss)(params, objective.init(key, params, batch), batch, key)
    jax.effects_barrier()
    assert len(ran) == 1
    silent = lambda network: own(network)._replace(  # noqa: E731
        loss=lambda *args: (lambda lost, aux: (lost, aux._replace(extras={})))(*own(network).loss(*args))
    )
    with pytest.raises(InvalidInput, match="hand on the network"):
        jax.eval_shape(objectives.with_exits(silent, exits).loss, params, (), batch, key)


def test_errors_of_exits_are_those_of_their_answers():
    exits, params, x, _, cond = case()
    key, times = jax.random.key(7), np.array([0.1, 0.8], np.float32)

    @compiled
    def measured(params, x):
        found = objectives.exit_errors(exits.network, PROCESS, params, {"x0": x, "cond": cond}, times, key)
        x_t, noise = PROCESS.corrupt(key, x, jnp.full(8, times[1]))
        said, _ = exits.network.apply(params, x_t, PROCESS.network_time(jnp.full(8, times[1])), cond)
        return found, said, PROCESS.target(x, noise, times[1])

    found, said, target = measured(params, x)
    assert found.square.shape == found.estimated.shape == found.actual.shape == (exits.depth, 2)
    np.testing.assert_allclose(found.square[:, 1], ((said.output - target) ** 2).mean(axis=(1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(found.estimated[:, 1], said.uncertainty.mean(axis=(1, 2, 3, 4)), rtol=1e-5)
    alpha = 1 - times[1]
    np.testing.assert_allclose(
        found.actual[:, 1], np.tanh(np.abs(alpha * (said.output - target))).mean(axis=(1, 2, 3, 4)), rtol=1e-4
    )


def test_the_entries_of_exits_are_weighed_like_those_of_the_readers_own_loss():
    x0, noise, t = image((2, 3, 5)), image((2, 3, 5), 2), np.array([0.2, 0.7], np.float32)

    @compiled
    def run(x0, noise, t):
        x_t, target = PROCESS.marginal(x0, noise, t), PROCESS.target(x0, noise, t)
        said = models.Layers(jnp.stack([target + 1.0, target + 2.0]), jnp.full((2, 2, 3, 5), 0.25))
        entries = objectives.regression(), objectives.regression(lambda process, t: 3.0 + t)
        each = [objectives.exit_losses(0.0, 1.0, entry)(PROCESS, said, x0, noise, x_t, t) for entry in entries]
        return [(weighted, plain) for weighted, _, plain, _ in each]

    (square, mse), (weighted, same) = run(x0, noise, t)
    np.testing.assert_allclose(square, 4.0 + 0.75, rtol=1e-5)
    np.testing.assert_allclose(weighted, (3.0 + t)[:, None, None] * square, rtol=1e-5)
    np.testing.assert_allclose(mse, 4.0, rtol=1e-5)
    np.testing.assert_array_equal(same, mse)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "velocity"])
def test_targets_are_in_units_of_epsilon(prediction):
    process = {
        "epsilon": lambda: processes.vp_linear(),
        "v": lambda: processes.vp_cosine(prediction="v"),
        "x0": lambda: processes.vp_cosine(prediction="x0"),
        "velocity": lambda: processes.rectified_flow(),
    }[prediction]()
    t, error = np.array([0.2, 0.5, 0.9], np.float32), np.linspace(-1.0, 1.0, 15, dtype=np.float32).reshape(3, 5)
    x0, noise = image((2, 3, 5))

    @compiled
    def run(x0, noise, t, error):
        x_t, target = process.marginal(x0, noise, t), process.target(x0, noise, t)
        found = objectives.uncertainty_target(process, jnp.stack([target, target + error]), target, x_t, t)
        sure = models.Layers(jnp.stack([target, target]), jnp.zeros((2, 3, 5)))
        return found, objectives.exit_losses()(process, sure, x0, noise, x_t, t)[0], process.alpha(t), process.sigma(t)

    found, loss, *coefficients = run(x0, noise, t, error)
    alpha, sigma = (coefficient[:, None] for coefficient in coefficients)
    scale = {"epsilon": 1.0, "v": alpha, "x0": alpha / sigma, "velocity": alpha}[prediction]
    assert not found[0].any()
    np.testing.assert_allclose(found[1], np.tanh(np.abs(scale * error)), atol=2e-5)
    assert not loss.any()


def run(denoiser, solver, params, mesh=None):
    sampler = sampling.make_sampler(denoiser, solver, shape=(4, 4, 1), mesh=mesh)
    return sampler(jax.random.key(0), params, timesteps.linspace(5), inputs("dit")[2], jnp.arange(8))


def test_runs_leave_alike_under_other_solvers_in_a_scan_on_a_mesh():
    exits, params, *_ = case()
    solver, threshold = solvers.dpm_solver(order=2), 0.45
    early = exit_by_uncertainty(exits, PROCESS, threshold)
    alone = run(early, solver, params)
    reference = run(exit_by_uncertainty(exits, PROCESS, threshold, gather=True), solver, params)
    np.testing.assert_allclose(alone.x, reference.x, atol=1e-5)
    assert 0.25 <= float(alone.cost.compute) / 5 < float(reference.cost.compute) / 5 == 1.0
    spread = run(early, solver, params, make_mesh(data=8))
    np.testing.assert_allclose(spread.x, alone.x, atol=1e-5)
    # A device with one sample waits for no other: less is computed in the mean.
    assert float(spread.cost.compute) < float(alone.cost.compute)


def test_a_run_of_the_whole_network_tells_its_estimates():
    exits, params, x, t, cond = case()

    @compiled
    def ask(params, x, cond):
        step = tiny.step_at(t / 1000)
        whole, early = whole_depth(exits, PROCESS), exit_by_uncertainty(exits, PROCESS, 0.45)
        return [one.apply(params, (), x, step, cond)[0] for one in (whole, early)]

    whole, early = ask(params, x, cond)
    np.testing.assert_array_equal(exit_depths(whole.extras["uncertainty"][None], 0.45)[0], early.extras["exit_depth"])
    last = early.extras["exit_depth"] == exits.depth
    np.testing.assert_allclose(whole.x0[last], early.x0[last], atol=1e-5)
    assert float(whole.cost.compute) == 1


def test_guidance_asks_for_both_answers_early():
    exits, params, x, _, cond = case()
    early = denoisers.guided(exit_by_uncertainty(exits, PROCESS, 0.45), 2.0, null={"label": 3})
    whole = denoisers.guided(exit_by_uncertainty(exits, PROCESS, 0.45, gather=True), 2.0, null={"label": 3})

    @compiled
    def ask(params, x, cond):
        step = tiny.step_at(0.5)
        return [one.apply(params, one.init(params, x, cond), x, step, cond)[0] for one in (early, whole)]

    found, wanted = ask(params, x, cond)
    np.testing.assert_allclose(found.x0, wanted.x0, atol=1e-5)
    assert found.extras["exit_depth"].shape == (8,)
    assert float(found.cost.evaluations) == 2 and float(found.cost.compute) <= 2


def test_a_table_of_depths_is_the_mean_of_recorded_ones_and_runs():
    exits, params, x, _, cond = case()
    early = exit_by_uncertainty(exits, PROCESS, 0.45)
    seen = denoisers.recorded(early, 5, lambda prediction, x, step: prediction.extras["exit_depth"])
    key, grid = jax.random.key(0), timesteps.linspace(5)
    recorded = sampling.sample(key, seen, params, solvers.ddim(), grid, shape=x.shape, cond=cond)
    depths = recorded.run.carry.values
    assert depths.shape == (5, 8)
    table = depth_table(depths)
    assert np.all(np.abs(table - depths.mean(axis=1)) < 1) and abs(int(table.sum()) - depths.mean(axis=1).sum()) <= 0.5
    # The recorded depths, as a table for each sample, repeat the run; nothing compiles for another table.
    again = jax.jit(
        lambda table: sampling.sample(
            key, at_depth(exits, PROCESS, table), params, solvers.ddim(), grid, shape=x.shape, cond=cond
        )
    )
    np.testing.assert_allclose(again(depths).x, recorded.x, atol=1e-5)
    shallow = again(jnp.broadcast_to(table[:, None], depths.shape))
    assert float(shallow.cost.compute) == pytest.approx(float(table.sum()) / 4)
    again(jnp.full_like(depths, 4))
    assert again._cache_size() == 1


def test_what_stands_around_a_network_changes_its_outputs_and_not_its_uncertainties():
    _, params, x, t, cond = case()

    def around(inner, *inputs):
        output, extras = inner(*inputs)
        return 2 * output, extras

    doubled = models.early_exit(models.wrapped(NETWORKS["dit"][0](), around))
    found, _ = compiled(doubled.network.apply)(params, x, t, cond)
    plain, *_ = answers(params, x, t, cond)
    np.testing.assert_allclose(found.output, 2 * plain.output, atol=1e-6)
    np.testing.assert_allclose(found.uncertainty, plain.uncertainty, atol=1e-6)


def test_mistakes_are_told():
    exits, *_ = case()
    with pytest.raises(InvalidInput, match="one stack of blocks"):
        models.early_exit(models.unet(channels=8, groups=4))
    with pytest.raises(InvalidInput, match="heads"):
        models.early_exit(models.mlp(), heads="many")
    with pytest.raises(InvalidInput, match=r"1 \.\. 4"):
        at_depth(exits, PROCESS, jnp.array([1, 5]))
    with pytest.raises(InvalidInput, match="ints by step"):
        at_depth(exits, PROCESS, jnp.array([1.0]))
    with pytest.raises(InvalidInput, match="negative"):
        objectives.exit_losses(layers=-1.0)
