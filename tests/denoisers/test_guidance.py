"""Laws of guidance: its limits, its linearity, what it costs, and that memories of the two branches never mix."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, randomness, sampling
from diffusion_jax.denoisers import autoguided, cfg_plus_plus, guided, interval_scale, projected_guided
from diffusion_jax.errors import InvalidInput
from diffusion_jax.solvers.ddim import ddim
from diffusion_jax.time_axes import expand
from tests.denoisers.tiny import ask, network, remembering, step_at

NULL = {"label": 4}
PROCESS = processes.rectified_flow()
X = randomness.normal(jax.random.key(0), (3, 4, 2))
COND = {"label": jnp.array([0, 1, 2])}
PARAMS = network().init(jax.random.key(1), X, None, None)
PLAIN = denoisers.denoiser(network(), PROCESS)
STEP = step_at(0.6)
VECTOR_STEP = step_at([0.3, 0.6, 0.9])

CONDITIONAL = ask(PLAIN, PARAMS, X, STEP, COND)
NULLED = ask(PLAIN, PARAMS, X, STEP, {"label": jnp.full(3, 4)})


def pair(prediction):
    return prediction.x0, prediction.eps


def same(a, b):
    chex.assert_trees_all_equal(a, b)


def close(a, b, tolerance=2e-6):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize(
    "scale",
    [1.0, 1, jnp.float32(1.0), jnp.ones(4), jnp.ones((1, 3)), lambda step: jnp.ones(3), denoisers.linear_scale(1, 1)],
    ids=["float", "int", "array", "by step", "per sample", "function", "linear"],
)
def test_scale_one_is_the_conditional_model_bit_for_bit_at_one_evaluation(scale):
    found = ask(guided(PLAIN, scale, NULL), PARAMS, X, STEP, COND)
    same(found, CONDITIONAL)


def test_a_plain_one_compiles_to_the_conditional_model_itself():
    assert guided(PLAIN, 1.0, NULL) is PLAIN


@pytest.mark.parametrize("scale", [0.0, jnp.float32(0.0)], ids=["static", "traced"])
def test_scale_zero_is_the_null_model(scale):
    found = ask(guided(PLAIN, scale, NULL), PARAMS, X, STEP, COND)
    close(pair(found), pair(NULLED))
    assert float(found.cost.evaluations) == 2


def test_the_answer_is_on_the_line_through_both_models_and_each_sample_may_have_its_scale():
    scales = jnp.array([0.5, 1.0, 4.0])
    found = ask(guided(PLAIN, scales[None], NULL), PARAMS, X, VECTOR_STEP, COND)
    c, u = ask(PLAIN, PARAMS, X, VECTOR_STEP, COND), ask(PLAIN, PARAMS, X, VECTOR_STEP, {"label": jnp.full(3, 4)})
    for got, high, low in zip(pair(found), pair(c), pair(u)):
        for i, scale in enumerate(scales):
            close(got[i], low[i] + scale * (high[i] - low[i]), 1e-5)
    close(found.x0[1], c.x0[1])


def test_guidance_is_that_of_the_network_output_whatever_it_predicts():
    for prediction in ("x0", "velocity"):
        process = processes.cosine(prediction)
        plain = denoisers.denoiser(network(), process)
        found = ask(guided(plain, 3.0, NULL), PARAMS, X, STEP, COND)
        t = jnp.full(3, 0.6)
        outputs = [
            network().apply(PARAMS, X, process.network_time(t), {"label": label})[0]
            for label in (COND["label"], jnp.full(3, 4))
        ]
        expected = process.predict(outputs[1] + 3.0 * (outputs[0] - outputs[1]), X, t)
        close(pair(found), pair(expected), 1e-5)


def test_extras_are_those_of_the_conditional_branch():
    found = ask(guided(PLAIN, 3.0, NULL), PARAMS, X, STEP, COND)
    close(found.extras, CONDITIONAL.extras)


def test_entries_that_null_does_not_name_are_shared_and_a_function_may_choose_them():
    cond = {**COND, "unnamed": jnp.arange(3.0)}
    seen = []

    def apply(params, x, t, cond, train=False, key=None):
        seen.append(cond)
        return x + cond["unnamed"][:, None, None] + cond["label"][:, None, None], {}

    d = denoisers.denoiser(network()._replace(apply=apply), processes.cosine("x0"))
    found = guided(d, 2.0, NULL).apply((), denoisers.branches.SteeredCarry((), (), ()), X, STEP, cond)[0]
    np.testing.assert_array_equal(seen[-1]["unnamed"], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(seen[-1]["label"], [0, 4, 1, 4, 2, 4])
    other = guided(d, 2.0, lambda c: {**c, "label": jnp.full(3, 4)})
    close(found.x0, other.apply((), denoisers.branches.SteeredCarry((), (), ()), X, STEP, cond)[0].x0)


def test_the_guided_score_of_a_mixture_is_the_known_one():
    mixture = denoisers.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], 0.5, labels=[0, 1, 1])
    process = processes.cosine()
    x, label, t = randomness.normal(jax.random.key(3), (5, 2)), jnp.array([0, 1, 0, 1, 1]), 0.4
    d = guided(denoisers.analytic(process), 2.5, {"label": 9})

    def log_tilted(x):
        given = denoisers.posterior(mixture, process, x, t, label).log_density
        return jnp.sum(2.5 * given - 1.5 * denoisers.log_density(mixture, process, x, t))

    found = ask(d, mixture, x, step_at(t), {"label": label})
    close(process.score(found, jnp.float32(t)), jax.grad(log_tilted)(x), 1e-4)


# What it costs


def run_cost(d, grid, cond=COND, params=PARAMS):
    run = jax.jit(lambda: sampling.sample(jax.random.key(2), d, params, ddim(), grid, shape=X.shape, cond=cond))()
    return float(run.cost.evaluations), float(run.cost.compute), run.x


GRID = jnp.linspace(1.0, 0.0, 6)


@pytest.mark.parametrize(
    ("make", "evaluations"),
    [
        (lambda: guided(PLAIN, 3.0, NULL), 10),
        (lambda: guided(PLAIN, 3.0, NULL, interval=(0.3, 0.7)), 7),
        (lambda: guided(PLAIN, interval_scale(3.0, 0.3, 0.7), NULL), 7),
        (lambda: guided(PLAIN, jnp.array([1.0, 3.0, 1.0, 1.0, 2.0]), NULL), 7),
        (lambda: guided(PLAIN, 3.0, NULL, interval=(-1.0, 1.0), interval_unit="log_snr"), 7),
        (lambda: cfg_plus_plus(PLAIN, 0.6, NULL, interval=(0.3, 0.7)), 7),
        (lambda: projected_guided(PLAIN, 3.0, NULL, interval=(0.3, 0.7)), 7),
        (lambda: guided(guided(PLAIN, 3.0, NULL), 2.0, NULL), 20),
        (lambda: guided(PLAIN, denoisers.sample_scale([1.0, 1.0, 2.0]), NULL), 10),
    ],
)
def test_a_run_counts_what_ran(make, evaluations):
    assert run_cost(make(), GRID)[:2] == (evaluations, evaluations)


def test_outside_of_the_interval_the_network_does_not_run_and_the_answer_is_the_conditional_one():
    rows = []
    d = guided(
        denoisers.denoiser(network(on_call=lambda n: rows.append(int(n))), PROCESS), 3.0, NULL, interval=(0.7, 0.9)
    )
    grid = jnp.linspace(1.0, 0.0, 6)

    def run(grid):
        return sampling.sample(jax.random.key(2), d, PARAMS, ddim(), grid, shape=X.shape, cond=COND).x

    compiled = jax.jit(run).lower(grid).compile()
    compiled(grid)
    jax.effects_barrier()
    assert sorted(rows) == [3, 3, 3, 3, 6]
    assert " conditional(" in compiled.as_text()

    outside = guided(PLAIN, 3.0, NULL, interval=(0.01, 0.02))
    same(ask(outside, PARAMS, X, STEP, COND), CONDITIONAL)
    # Whole runs are compiled with other fusions around the same network: equal to round-off.
    close(run_cost(outside, GRID)[2], run_cost(PLAIN, GRID)[2], 1e-5)


def test_with_a_time_per_sample_only_those_inside_of_the_interval_are_guided():
    found = ask(guided(PLAIN, 3.0, NULL, interval=(0.5, 0.7)), PARAMS, X, VECTOR_STEP, COND)
    everywhere = ask(guided(PLAIN, 3.0, NULL), PARAMS, X, VECTOR_STEP, COND)
    conditional = ask(PLAIN, PARAMS, X, VECTOR_STEP, COND)
    close(found.x0[1], everywhere.x0[1])
    close(found.eps[0::2], conditional.eps[0::2])
    assert float(jnp.abs(found.x0[1] - conditional.x0[1]).max()) > 1e-2


def test_changing_the_scale_does_not_recompile():
    traces = []

    @jax.jit
    def run(scale):
        traces.append(1)
        return sampling.sample(
            jax.random.key(2), guided(PLAIN, scale, NULL), PARAMS, ddim(), GRID, shape=X.shape, cond=COND
        ).x

    results = [run(jnp.full(5, value)) for value in (1.0, 2.0, 3.0)]
    assert len(traces) == 1
    close(results[0], run_cost(PLAIN, GRID)[2], 1e-5)
    assert float(jnp.abs(results[2] - results[1]).max()) > 1e-2


# Memories


def walk(d, times, cond, x=X, params=PARAMS):
    """The answers at several steps, one carry through all."""

    @jax.jit
    def run(x):
        carry, answers = d.init(params, x, cond), []
        for index, t in enumerate(times):
            prediction, carry = d.apply(params, carry, x + 0.1 * index, step_at(t, index), cond)
            answers.append(prediction.x0)
        return answers, carry

    return run(x)


def test_the_two_branches_remember_for_themselves():
    d = remembering(PLAIN)
    guided_answers, carry = walk(guided(d, 3.0, NULL), (0.9, 0.6, 0.3), COND)
    c, u = walk(d, (0.9, 0.6, 0.3), COND)[0], walk(d, (0.9, 0.6, 0.3), {"label": jnp.full(3, 4)})[0]
    close(guided_answers, [b + 3.0 * (a - b) for a, b in zip(c, u)], 1e-5)
    assert carry.inner["last"].shape[0] == 6
    assert carry.inner["stacked"].shape[1] == 6


def test_a_memory_continues_outside_of_the_interval_and_starts_afresh_inside():
    d = remembering(PLAIN)
    times = (0.9, 0.85, 0.5, 0.45, 0.2, 0.1)
    answers = walk(guided(d, 3.0, NULL, interval=(0.4, 0.6)), times, COND)[0]
    close(answers[:2], walk(d, times, COND)[0][:2])
    fresh = walk(guided(d, 3.0, NULL), times[2:4], COND, X + 0.2)[0]
    close(answers[2:4], fresh, 1e-5)
    conditional = walk(d, times[2:], COND, X + 0.2)[0]
    close(answers[4:], conditional[2:], 1e-5)


def test_nested_guidance_keeps_four_memories():
    d = guided(guided(remembering(PLAIN), 2.0, NULL), 3.0, {"label": 3})
    _, carry = walk(d, (0.9, 0.6), COND)
    assert carry.inner.inner["last"].shape[0] == 12


# The family


def test_rescale_zero_is_off_and_rescale_one_restores_the_deviation():
    plain = ask(guided(PLAIN, 4.0, NULL), PARAMS, X, STEP, COND)
    same(pair(ask(guided(PLAIN, 4.0, NULL, rescale=0.0), PARAMS, X, STEP, COND)), pair(plain))
    restored = ask(guided(PLAIN, 4.0, NULL, rescale=1.0), PARAMS, X, STEP, COND)
    t = jnp.float32(0.6)
    deviation = [jnp.std(PROCESS.v(p, t), axis=(1, 2)) for p in (restored, CONDITIONAL, plain)]
    close(deviation[0], deviation[1], 1e-5)
    assert float(jnp.abs(deviation[2] - deviation[1]).min()) > 1e-2


def test_projected_guidance_without_its_three_devices_is_guidance():
    found = ask(projected_guided(PLAIN, 4.0, NULL, eta=1.0, momentum=0.0), PARAMS, X, VECTOR_STEP, COND)
    close(pair(found), pair(ask(guided(PLAIN, 4.0, NULL), PARAMS, X, VECTOR_STEP, COND)), 1e-5)


def test_projected_guidance_moves_orthogonally_and_within_its_threshold():
    found = ask(projected_guided(PLAIN, 4.0, NULL, eta=0.0, momentum=0.0, threshold=0.1), PARAMS, X, STEP, COND)
    move = (found.x0 - CONDITIONAL.x0) / 3.0
    inner = jnp.sum(move * CONDITIONAL.x0, axis=(1, 2))
    norm = jnp.sqrt(jnp.sum(move**2, axis=(1, 2)))
    np.testing.assert_allclose(inner, 0.0, atol=1e-5)
    assert (norm <= 0.1 + 1e-6).all() and (norm > 1e-3).all()


def test_projected_guidance_remembers_the_difference_with_its_momentum():
    answers = walk(projected_guided(PLAIN, 2.0, NULL, eta=1.0, momentum=-0.5), (0.9, 0.6), COND)[0]
    none = walk(projected_guided(PLAIN, 2.0, NULL, eta=1.0, momentum=0.0), (0.9, 0.6), COND)[0]
    conditional = walk(PLAIN, (0.9, 0.6), COND)[0]
    close(answers[0], none[0])
    close(answers[1], none[1] - 0.5 * (none[0] - conditional[0]), 1e-5)


def test_cfg_plus_plus_takes_x0_on_the_line_and_eps_from_the_null():
    found = ask(cfg_plus_plus(PLAIN, 0.6, NULL), PARAMS, X, STEP, COND)
    close(found.x0, 0.4 * NULLED.x0 + 0.6 * CONDITIONAL.x0, 1e-5)
    close(found.eps, NULLED.eps)
    gap = expand(PROCESS.alpha(0.6), X) * found.x0 + expand(PROCESS.sigma(0.6), X) * found.eps - X
    close(gap, 0.4 * 0.6 * (CONDITIONAL.x0 - NULLED.x0), 1e-5)


def test_autoguidance_extrapolates_from_the_worse_network_and_skips_it_where_it_can():
    worse = jax.tree.map(lambda leaf: 0.7 * leaf, PARAMS)
    params = {"main": PARAMS, "guide": worse}
    other = ask(PLAIN, worse, X, STEP, COND)
    found = ask(autoguided(PLAIN, PLAIN, 2.0, guide_compute=0.25), params, X, STEP, COND)
    close(pair(found), jax.tree.map(lambda m, g: g + 2.0 * (m - g), pair(CONDITIONAL), pair(other)), 1e-5)
    assert (float(found.cost.evaluations), float(found.cost.compute)) == (2.0, 1.25)
    same(ask(autoguided(PLAIN, PLAIN, 1.0), params, X, STEP, COND), CONDITIONAL)
    skipped = ask(autoguided(PLAIN, PLAIN, 2.0, interval=(0.0, 0.1)), params, X, STEP, COND)
    same(skipped, CONDITIONAL)
    nulled = ask(autoguided(PLAIN, PLAIN, 3.0, NULL), {"main": PARAMS, "guide": PARAMS}, X, STEP, COND)
    close(pair(nulled), pair(ask(guided(PLAIN, 3.0, NULL), PARAMS, X, STEP, COND)), 1e-5)


# Discrete and joint data


def test_guided_log_probabilities_are_normalised_and_powers_of_the_ratio():
    process = processes.absorbing(6)
    tokens = jnp.array([[0, 6, 6, 2], [6, 6, 6, 6], [6, 1, 6, 6]])
    plain = denoisers.denoiser(network(6), process)
    params = network(6).init(jax.random.key(1), tokens, None, None)
    found = ask(guided(plain, jnp.float32(3.0), NULL), params, tokens, STEP, COND).x0
    np.testing.assert_allclose(jax.nn.logsumexp(found, axis=-1), 0.0, atol=1e-5)
    c = ask(plain, params, tokens, STEP, COND).x0[1]
    u = ask(plain, params, tokens, STEP, {"label": jnp.full(3, 4)}).x0[1]
    excess = (found[1] - (u + 3.0 * (c - u)))[:, :6]
    np.testing.assert_allclose(excess, excess[:, :1] * np.ones(6), atol=1e-5)
    assert float(jnp.abs(c - u).max()) > 0.1
    np.testing.assert_array_equal(found[0].argmax(-1)[jnp.array([0, 3])], [0, 2])
    same(ask(guided(plain, jnp.float32(1.0), NULL), params, tokens, STEP, COND).x0[1], c)


def test_joint_data_may_have_a_scale_for_each_modality():
    process = processes.JointProcess({"image": PROCESS, "text": processes.absorbing(6)})
    x = {"image": X, "text": jnp.full((3, 4), 6)}
    params = network(6).init(jax.random.key(1), x, None, None)
    plain = denoisers.denoiser(network(6), process)
    step = step_at({"image": 0.6, "text": 0.3})
    scale = {"image": jnp.float32(1.0), "text": jnp.float32(3.0)}
    found, c = ask(guided(plain, scale, NULL), params, x, step, COND), ask(plain, params, x, step, COND)
    close(found.x0["image"], c.x0["image"])
    np.testing.assert_allclose(jax.nn.logsumexp(found.x0["text"], axis=-1), 0.0, atol=1e-5)
    assert float(jnp.abs(found.x0["text"] - c.x0["text"]).max()) > 0.1
    ramp = ask(guided(plain, denoisers.linear_scale(1.0, 3.0), NULL, interval=(0.5, 1.0)), params, x, step, COND)
    close(ramp.x0["text"], c.x0["text"])


# Mistakes


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: guided(PLAIN, 3.0), "null is None"),
        (lambda: guided(PLAIN, "3", NULL), "scale is '3'"),
        (lambda: guided(PLAIN, 3.0, NULL, rescale=2.0), "rescale is 2.0"),
        (lambda: guided(PLAIN, 3.0, NULL, interval=(0.8, 0.2)), "low must not exceed high"),
        (lambda: guided(PLAIN, 3.0, NULL, interval_unit="logsnr"), "did you mean 'log_snr'"),
        (lambda: projected_guided(PLAIN, 3.0, NULL, threshold=-1.0), "threshold is -1.0"),
        (lambda: autoguided(PLAIN, PLAIN, guide_compute=0.0), "guide_compute is 0.0"),
        (
            lambda: cfg_plus_plus(denoisers.denoiser(network(6), processes.absorbing(6)), 0.5, NULL),
            "Absorbing is discrete",
        ),
        (lambda: ask(guided(PLAIN, 3.0, NULL), PARAMS, X, STEP, None), "needs a condition"),
        (lambda: ask(guided(PLAIN, 3.0, {"labels": 4}), PARAMS, X, STEP, COND), "did you mean 'label'"),
        (lambda: ask(guided(PLAIN, 3.0, {"label": jnp.zeros(2)}), PARAMS, X, STEP, COND), "must broadcast to"),
        (lambda: ask(autoguided(PLAIN, PLAIN, 2.0), PARAMS, X, STEP, COND), "params={'main'"),
        (lambda: ask(guided(PLAIN, jnp.ones((4, 2)) * 2, NULL), PARAMS, X, STEP, COND), "prefix"),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()
