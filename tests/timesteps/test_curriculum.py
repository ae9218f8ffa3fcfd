"""A curriculum: what is drawn in each stage, when the next begins, and that training, meshes and tasks know of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import distributed, objectives, processes, timesteps, training
from diffusion_jax.config import load
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import prepare
from diffusion_jax.objectives.multitask import Combiner
from diffusion_jax.timesteps.curriculum import Pacing, paced
from diffusion_jax.training import optimizers
from tests import shipped
from tests.training.problems import Batches, equal, init_params, make_objective

KEY = jax.random.key(0)
EDM = processes.edm()


def sigma_over_alpha(t):
    return np.asarray(timesteps.noise_ratio(EDM, jnp.asarray(t)), np.float64)


BASES = {
    "uniform": (timesteps.uniform(), lambda t: t),
    "logit_normal": (timesteps.logit_normal(0.5, 1.2), lambda t: stats.norm.cdf((np.log(t / (1 - t)) - 0.5) / 1.2)),
    "log_normal": (timesteps.log_normal(EDM), lambda t: stats.norm.cdf((np.log(sigma_over_alpha(t)) + 1.2) / 1.2)),
    "mode": (timesteps.mode(0.8), None),
}
"""Distributions and their cumulative functions; `mode` falls as its number rises and has none in closed form."""


@pytest.mark.parametrize("given", [True, False], ids=["edges", "number"])
@pytest.mark.parametrize("name", BASES)
def test_the_support_grows_from_noise_and_ends_as_the_base_bit_for_bit(name, given):
    base, cumulative = BASES[name]
    whole = np.asarray(shipped.jit(lambda: base.draw((), KEY, (4000,))[0])())
    # In the tail of a distribution float32 has few numbers: edges lie where times are drawn.
    edges = np.array([0.0, *np.quantile(whole, [0.25, 0.5, 0.75]), 1.0])
    draw = timesteps.curriculum(edges if given else 4, base)
    drawn = shipped.jit(lambda stage: draw.draw(draw.init()._replace(stage=stage), KEY, (4000,))[0])
    # Quantiles of a sample have its error.
    error = 1e-7 if given else 0.02
    for stage in range(1, 5):
        t, low = np.asarray(drawn(jnp.int32(stage))), edges[4 - stage]
        assert low - error <= t.min() <= max(low, whole.min()) + 0.02 and t.max() >= whole.max() - 1e-3
        if cumulative is not None:
            first = 1 - stage / 4 if not given or stage == 4 else cumulative(low)
            inside = stats.kstest(t, lambda t, first=first: (cumulative(t) - first) / (1 - first))
            assert inside.pvalue > 0.01, stage
    np.testing.assert_array_equal(t, whole)
    backwards = timesteps.curriculum(edges if given else 4, base, easy_first=False)
    assert backwards.draw(backwards.init(), KEY, (4000,))[0].max() <= edges[1] + error


@jax.jit
def scripted(losses, patience, smoothing, longest=2**30):
    """Pacings after each of the losses, in four stages."""

    def one(state, loss):
        state = paced(state, loss, 4, patience, smoothing, longest)
        return state, state

    return jax.lax.scan(one, timesteps.curriculum(4).init(), losses)[1]


def stages(losses, patience=3, smoothing=0.99, longest=2**30):
    losses = np.resize(np.asarray(losses, np.float32), 200)
    found = scripted(losses, np.int32(patience), np.float32(smoothing), np.int32(longest))
    for leaf in found:
        assert np.isfinite(leaf).all()
    return np.asarray(found.stage)


def test_a_stage_ends_where_the_loss_settles():
    """The first loss is the best; so many that are no better end a stage, and the next begins anew."""
    for patience, smoothing in ((3, 0.99), (3, 0.0), (11, 0.9)):
        found = stages(np.ones(200), patience, smoothing)
        np.testing.assert_array_equal(found, np.minimum(1 + np.arange(1, 201) // (patience + 1), 4))
    falling = np.linspace(2, 1, 200)
    for smoothing in (0.0, 0.9, 0.99):
        np.testing.assert_array_equal(stages(falling, smoothing=smoothing), 1)
    np.testing.assert_array_equal(stages(np.ones(200), patience=2**31 - 1), 1)


def test_stages_of_equal_length_do_not_look_at_the_loss():
    for losses in (np.ones(200), np.linspace(2, 1, 200), np.sin(np.arange(200))):
        np.testing.assert_array_equal(
            stages(losses, patience=2**31 - 1, longest=7), np.minimum(1 + np.arange(1, 201) // 7, 4)
        )
    # With patience it is a bound.
    np.testing.assert_array_equal(stages(np.ones(200), 3, longest=7), stages(np.ones(200), 3))
    # The mean of the batch is what settles, smoothed as asked for.
    paces = timesteps.curriculum(4, patience=5, smoothing=0.5)
    state = paces.init()
    for loss in (jnp.array([1.0, 3.0]), jnp.array([0.0, 8.0])):
        expected, state = paced(state, loss.mean(), 4, 5, 0.5), paces.update(state, jnp.ones(2), loss)
        assert equal(state, expected)
    draw = timesteps.curriculum(4, patience=None, longest=2)
    state = draw.update(draw.update(draw.init(), jnp.ones(2), jnp.ones(2)), jnp.ones(2), jnp.zeros(2))
    assert int(state.stage) == 2


def test_a_harder_interval_whose_loss_still_falls_is_not_left():
    """It raises the loss, after which a mean over stages would climb for long; nor does a lucky first loss count."""
    easy, hard = np.full(21, 1.0), np.linspace(5.0, 2.0, 179)
    np.testing.assert_array_equal(stages(np.concatenate([easy, hard]), 20, 0.95)[21:], 2)
    noisy = np.linspace(2.0, 1.0, 200) * np.where(np.arange(200) == 0, 0.3, 1.0)
    np.testing.assert_array_equal(stages(noisy, 40, 0.95), 1)


def test_losses_that_are_not_finite_change_nothing():
    state = paced(timesteps.curriculum(3).init(), jnp.float32(1.0), 3, 3)
    for broken in (jnp.nan, jnp.inf):
        assert equal(paced(state, broken, 3, 3), state)


def trained(draw, steps=6, mesh=None, **settings):
    """The state after some steps, and stage and loss of each."""
    objective, found = make_objective(draw), []

    def keep(state, writer):
        found.append(int(getattr(state.objective_state, "stage", 0)))

    state = training.train(
        objective, optimizers.sgd(0.05), Batches(), init_params=init_params, steps=steps, log_every=steps,
        progress=False, callbacks=[training.Callback(1, keep)], mesh=mesh, log_to=("jsonl",), **settings,
    )  # fmt: skip
    return state, found


def test_one_interval_is_ordinary_training_bit_for_bit():
    one = distributed.make_mesh(devices=1)
    plain, _ = trained(timesteps.uniform(), mesh=one)
    single, stage = trained(timesteps.curriculum(1), mesh=one)
    assert equal(single.params, plain.params) and stage == [1] * 6


def test_a_run_goes_on_in_the_stage_where_it_was_and_devices_advance_together(tmp_path):
    draw = timesteps.curriculum(6, patience=1, smoothing=0.0)
    straight, found = trained(draw, 12, workdir=str(tmp_path / "straight"), checkpoint_every=100)
    assert 1 < found[5] <= found[-1] <= 6
    trained(draw, 6, workdir=str(tmp_path / "cut"))
    resumed, later = trained(draw, 12, workdir=str(tmp_path / "cut"))
    assert later == found[6:] and equal(resumed, straight)
    # The others ran on eight devices.
    alone, single = trained(draw, 12, mesh=distributed.make_mesh(devices=1))
    assert single == found
    np.testing.assert_allclose(alone.objective_state.best, straight.objective_state.best, rtol=1e-5)


def test_tasks_are_those_of_the_stage():
    """With gradients combined by interval, what is left out is no task, and the others are drawn equally often."""
    edges = (0.0, 0.1, 0.4, 0.5, 1.0)
    draw = timesteps.curriculum(edges, timesteps.by_cluster(edges), patience=5)
    t = shipped.jit(lambda stage: draw.draw(draw.init()._replace(stage=stage), KEY, (1200,))[0])
    for stage in range(1, 5):
        counts = np.bincount(np.asarray(timesteps.cluster_of(edges, t(jnp.int32(stage)))), minlength=4)
        np.testing.assert_allclose(counts, [0] * (4 - stage) + [1200 / stage] * stage, atol=40)
        assert (counts[: 4 - stage] == 0).all()
    summed = Combiner(lambda gram, key: jnp.ones(len(gram)))
    inner, batch = make_objective(draw), {**next(iter(Batches())), "index": jnp.arange(16)}
    params = init_params(KEY)

    @jax.jit
    def found(stage):
        whole = objectives.multitask(inner, edges, summed)
        state = whole.init(KEY, params, batch)
        drawn = whole.prepare(state._replace(inner=state.inner._replace(stage=stage)), batch, KEY)
        part = objectives.multitask(inner, edges[2:], summed)
        (loss, grads, _), other = whole.gradient(params, state, drawn, KEY), part.gradient(params, state, drawn, KEY)
        return (loss, grads), other[:2], drawn["t"]

    ours, theirs, t = found(jnp.int32(2))
    assert t.min() > 0.4 and float(jnp.abs(ours[1]["up"]["kernel"]).max()) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_one_override_of_a_config_is_enough():
    written = "objective.draw=timesteps.curriculum(edges=5, base=timesteps.logit_normal(), patience=None, longest=50)"
    run = prepare(apply_overrides(load("configs/toy2d.py"), [written]))
    batch = run.example(4)
    state = jax.eval_shape(lambda key: run.objective.init(key, run.init_params(key), batch), KEY)
    assert isinstance(state, Pacing)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: timesteps.curriculum((0.1, 1.0)), "edges from 0 to 1"),
        (lambda: timesteps.curriculum(0), "edges is 0"),
        (lambda: timesteps.curriculum((0.0, 1.0), timesteps.importance()), "quantile function"),
        (lambda: timesteps.curriculum((0.0, 1.0), patience=0), "patience is 0"),
        (lambda: timesteps.curriculum(2, patience=None), "one of them must end the stages"),
        (lambda: timesteps.curriculum(2, longest=0), "longest is 0"),
        (lambda: timesteps.curriculum(2, smoothing=1.0), "smoothing is 1.0"),
    ],
)
def test_wrong_calls_are_told(call, told):
    with pytest.raises(InvalidInput, match=told):
        call()
