"""What diversity distillation promises exactly: who answers in which step, at which noise, at which cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, models, processes, solvers, timesteps
from diffusion_jax.config import build, load
from diffusion_jax.denoisers import analytic, denoiser, gaussian_mixture, switched
from diffusion_jax.denoisers.analytic import sample_mixture
from diffusion_jax.models import by_path
from diffusion_jax.recipes.parts.few_steps import answers, flow_map, handed_over, relay, undecided
from diffusion_jax.recipes.parts.sliders import beside, stroke_area
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Prediction, Step
from tests import shipped

CONFIG = "configs/recipes/diversity_distillation.py"
VP = processes.vp_linear()
NETWORK = models.dit("S/2", width=16, depth=2, heads=2, num_classes=3)
DENOISER = denoiser(NETWORK, VP)
SHAPE = (4, 4, 1)
COND = {"label": jnp.array([0, 1, 2, 1])}
GRID = timesteps.from_array([0.7, 0.25, 0.12, 0.05, 0.0])
KEY = jax.random.key(3)
SOLVERS = {"lcm": solvers.lcm(), "ddim": solvers.ddim()}


def weights(seed):
    params = NETWORK.init(jax.random.key(0), jnp.zeros((4, *SHAPE)), jnp.zeros(4), COND)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


BASE, STUDENT = jax.jit(weights)(1), jax.jit(weights)(2)
RELAYS = {name: relay((DENOISER, DENOISER), solver, SHAPE, shipped.jit) for name, solver in SOLVERS.items()}


def plain(solver, params, grid=GRID):
    return np.asarray(
        shipped.jit(lambda params: sample(KEY, DENOISER, params, solver, grid, shape=(4, *SHAPE), cond=COND).x)(params)
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_none_and_all_steps_of_the_base_are_the_two_samplers(name):
    def run(k, params):
        return RELAYS[name](KEY, params, timesteps.spliced(GRID, GRID, k).which, GRID, 4, COND)

    both = {k: run(k, (BASE, STUDENT)) for k in range(5)}
    np.testing.assert_array_equal(both[0].x, plain(SOLVERS[name], STUDENT))
    np.testing.assert_array_equal(both[4].x, plain(SOLVERS[name], BASE))
    assert float(np.abs(both[1].x - both[0].x).max()) > 1e-3
    # A model that takes over from itself changes nothing, whatever the table: noise belongs to the step.
    for k in range(5):
        np.testing.assert_array_equal(run(k, (BASE, BASE)).x, both[4].x)
    for k, drawn in both.items():
        assert drawn.evaluations == 4, k
        # The same first step until the base makes one, the same last one as long as the student does.
        np.testing.assert_array_equal(drawn.predictions[0], both[4 if k else 0].predictions[0])
        np.testing.assert_allclose(drawn.predictions[-1], drawn.x, atol=1e-5)


def test_the_base_is_asked_k_times_and_the_student_in_the_other_steps():
    @jax.jit
    def asked(params, which):
        pair = switched((DENOISER, DENOISER), which, compute=(1.0, 100.0))
        return sample(KEY, pair, params, solvers.lcm(), GRID, shape=(4, *SHAPE), cond=COND).cost

    for k in range(5):
        cost = asked((BASE, STUDENT), timesteps.spliced(GRID, GRID, k).which)
        assert cost.evaluations == 4
        assert cost.compute == k + 100 * (4 - k)


def test_a_longer_grid_of_the_base_is_a_segment_of_its_own():
    long = timesteps.linspace(8)
    grid, which, stop = timesteps.spliced(long, GRID, 1)
    whole = RELAYS["lcm"](KEY, (BASE, STUDENT), which, grid, 4, COND)

    apart = handed_over((DENOISER, DENOISER), (solvers.lcm(), solvers.lcm()), SHAPE)
    parts = apart(KEY, (BASE, STUDENT), timesteps.Spliced(grid, which, stop), 4, COND)
    assert (stop, len(which), parts.evaluations) == (6, 9, 9)
    np.testing.assert_allclose(whole.x, parts.x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(whole.predictions, parts.predictions, rtol=1e-3, atol=1e-3)


def test_a_student_sees_noise_in_its_first_step_and_noised_data_in_the_others():
    def told(params, carry, x, step, cond):
        return Prediction((x, step.t), None), carry

    batch = {"x0": 100.0 * jnp.ones((4, *SHAPE)), "cond": COND, "index": jnp.arange(4)}
    assert jax.eval_shape(answers(DENOISER, GRID, first=0.5), BASE, batch, KEY).shape == (4, *SHAPE)
    generate = answers(DENOISER._replace(apply=told), GRID, first=0.5)
    x, t, alpha = jax.jit(lambda keys: (*jax.vmap(lambda key: generate(BASE, batch, key))(keys), VP.alpha(GRID)))(
        jax.random.split(KEY, 24)
    )
    levels = dict(zip(np.round(GRID, 3).tolist(), np.asarray(alpha)))
    times = np.round(t, 3).tolist()
    assert {round(one, 3) for one in times} == {0.7, 0.25, 0.12, 0.05}
    for one, time in zip(np.asarray(x), times):
        # The data are so large that their share of x says at which level they stand.
        share = 0.0 if time > 0.6 else levels[time]
        np.testing.assert_allclose(one.mean() / 100, share, atol=0.02)


def test_a_flow_map_ends_where_the_flow_does():
    mixture = gaussian_mixture(jax.random.normal(KEY, (3, 6)), 0.3)
    exact = analytic(VP)
    x = jax.random.normal(jax.random.key(1), (4, 6))
    step = Step(jnp.int32(0), jnp.float32(0.7), jnp.float32(0.0), jnp.int32(1))
    said, _ = jax.jit(lambda x: flow_map(exact, 16).apply(mixture, (), x, step, None))(x)
    grid = 0.7 * jnp.linspace(1.0, 0.0, 17)
    end = jax.jit(lambda x: sample(KEY, exact, mixture, solvers.ddim(), grid, x_init=x).x)(x)
    np.testing.assert_allclose(said.x0, end, rtol=1e-4, atol=1e-5)
    assert said.cost.evaluations == 16
    np.testing.assert_allclose(VP.alpha(0.7) * said.x0 + VP.sigma(0.7) * said.eps, x, atol=1e-5)


def test_regression_loses_variance_and_its_loss_grows_with_the_noise():
    # Var(E[x0 | x_t]) <= Var(x0), and an error of eps shows in x0 times A_t = sigma / alpha.
    mixture = gaussian_mixture(jax.random.normal(KEY, (4, 8)), 0.3)
    x0, _ = jax.jit(sample_mixture, static_argnums=2)(jax.random.key(4), mixture, 4000)
    times = jnp.linspace(0.02, 1.0, 12)

    def spread(t):
        x, _ = VP.corrupt(jax.random.key(5), x0, jnp.full(4000, t))
        step = Step(jnp.int32(0), t, t, jnp.int32(1))
        return jnp.var(analytic(VP).apply(mixture, (), x, step, None)[0].x0, axis=0).sum()

    kept = jax.jit(lambda times: jax.lax.map(spread, times))(times)
    kept = np.asarray(kept) / float(np.var(x0, axis=0).sum())
    assert (kept < 1).all()
    assert (np.diff(kept) < 0).all()
    assert kept[0] > 0.9 and kept[-1] < 0.01
    assert (np.diff(np.asarray(timesteps.noise_ratio(VP, times))) > 0).all()
    # About 15 at the last index of Stable Diffusion's schedule.
    np.testing.assert_allclose(timesteps.noise_ratio(processes.vp_scaled_linear(), 1.0), 14.6, atol=0.1)


def test_a_slider_is_the_same_beside_and_within_the_weights():
    adapted = adapters.lora(NETWORK, rank=4, alpha=1, select=("q", "feed_forward/down"))
    x, t = jax.random.normal(KEY, (4, *SHAPE)), jnp.full(4, 500.0)
    factors = jax.tree.map(lambda leaf: leaf + 0.1, adapted.init(KEY, BASE, x, t, COND))
    for path, leaf in by_path(beside(STUDENT, factors, 0.0)).items():
        np.testing.assert_array_equal(leaf, by_path(STUDENT)[path])
    for params in (BASE, STUDENT):
        there, back = beside(params, factors, 0.7), beside(beside(params, factors, 0.7), factors, -0.7)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, params)
        apart = adapters.attached(NETWORK, factors).apply
        outputs = apart({"params": params, "lora": adapters.transplanted(factors, params, 0.7)}, x, t, COND)[0]
        np.testing.assert_allclose(NETWORK.apply(there, x, t, COND)[0], outputs, atol=1e-4)


def test_what_is_measured():
    images = np.full((2, 4, 4, 1), -1.0)
    images[1, :2] = 0.5
    assert stroke_area(images).tolist() == [0.0, 0.5]
    drawn = RELAYS["ddim"](KEY, (BASE, STUDENT), np.zeros(4, np.int32), GRID, 4, COND)
    distances = undecided(drawn._replace(predictions=np.stack([drawn.x, 2 * drawn.x])))
    np.testing.assert_allclose(distances, [0.0, 1.0], atol=1e-6)


def test_the_published_settings():
    config = load(f"{CONFIG}:paper")
    grid = build(config.grid)
    np.testing.assert_allclose(grid, [1.0, 0.75, 0.5, 0.25, 0.0])
    process, network = build(config.base.process), build(config.base.model)
    np.testing.assert_allclose(float(process.alpha(1.0)) ** 2, 0.0047, atol=1e-4)
    assert timesteps.spliced(grid, grid, 1).stop == 1
    # A grid of 20 steps reaches tau_1 in five.
    assert timesteps.spliced(build(config.own.long), grid, 1).stop == 5
    lora = build(config.slider.lora, network=network)
    x, cond = jnp.zeros((1, 128, 128, 4)), {"context": jnp.zeros((1, 77, 2048))}
    params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), cond)
    factors = jax.eval_shape(lora.init, jax.random.key(0), params, x, jnp.zeros(1), cond)
    assert {leaf.shape[-1] for path, leaf in by_path(factors).items() if path.endswith("/a")} == {4}
    assert config.slider.lora.alpha == 1
