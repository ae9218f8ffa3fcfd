"""Laws that hold for every transformation: the answer is a pair, samples are on their own, times may be vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, randomness
from diffusion_jax.denoisers import scales
from diffusion_jax.time_axes import expand
from tests.denoisers.tiny import network, step_at

NULL = {"label": 4}
PROCESS = processes.cosine("v")
X = randomness.normal(jax.random.key(0), (3, 4, 2))
LABEL = jnp.array([0, 1, 2])
PARAMS = network().init(jax.random.key(1), X, None, None)
TWO = {"main": PARAMS, "guide": jax.tree.map(lambda leaf: 0.7 * leaf, PARAMS)}
PLAIN = denoisers.denoiser(network(), PROCESS)


def energy(prediction, t, cond):
    return jnp.sum(prediction.x0**2, axis=(1, 2))


def log_prob(params, x, t, cond):
    return -jnp.sum((x - 1.0) ** 2, axis=(1, 2))


TRANSFORMATIONS = {
    "plain": (PLAIN, PARAMS),
    "guided": (denoisers.guided(PLAIN, 3.0, NULL), PARAMS),
    "interval": (denoisers.guided(PLAIN, denoisers.interval_scale(3.0, 0.1, 0.5), NULL), PARAMS),
    "rescaled": (denoisers.guided(PLAIN, 3.0, NULL, rescale=0.7), PARAMS),
    "projected": (denoisers.projected_guided(PLAIN, 3.0, NULL, threshold=0.5), PARAMS),
    "autoguided": (denoisers.autoguided(PLAIN, PLAIN, 2.0), TWO),
    "classifier": (denoisers.classifier_guided(PLAIN, log_prob, 0.3), {"main": PARAMS, "guide": None}),
    "energy": (denoisers.energy_guided(PLAIN, energy, 0.3), PARAMS),
    "answer energy": (denoisers.energy_guided(PLAIN, energy, 0.1, through=False), PARAMS),
    "clipped": (denoisers.clipped(PLAIN, -0.2, 0.2), PARAMS),
    "thresholded": (denoisers.thresholded(PLAIN, 0.8, floor=0.3), PARAMS),
    "dropped": (denoisers.scheduled_condition(PLAIN, denoisers.dropped_condition(NULL, 0.0, 0.5)), PARAMS),
    "switched": (denoisers.switched((PLAIN, denoisers.clipped(PLAIN))), (PARAMS, PARAMS)),
    "averaged": (denoisers.averaged((PLAIN, PLAIN)), (PARAMS, TWO["guide"])),
    "nested": (denoisers.thresholded(denoisers.guided(denoisers.energy_guided(PLAIN, energy, 0.1), 2.0, NULL)), PARAMS),
}
BROKEN_ON_PURPOSE = {"cfg++": (denoisers.cfg_plus_plus(PLAIN, 0.6, NULL), PARAMS)}


def answer(d, params, x, t, label):
    cond = {"label": label}
    return d.apply(params, d.init(params, x, cond), x, step_at(t), cond)[0]


@pytest.mark.parametrize("name", [*TRANSFORMATIONS, *BROKEN_ON_PURPOSE])
def test_every_transformation(name):
    d, params = (TRANSFORMATIONS | BROKEN_ON_PURPOSE)[name]
    per_token = jnp.array([[0.2, 0.4, 0.6, 0.8]] * 3)

    @jax.jit
    def ask_all(x):
        return {
            "scalar": answer(d, params, x, 0.4, LABEL),
            "equal": answer(d, params, x, jnp.full((3, 4), 0.4), LABEL),
            "tokens": answer(d, params, x, per_token, LABEL),
            "clean": answer(d, params, x, 0.0, LABEL),
            "noise": answer(d, params, x, 1.0, LABEL),
        }

    found = ask_all(X)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))

    # The hub identity, for scalar and vector times.
    if name in TRANSFORMATIONS:
        for key, t in (("scalar", 0.4), ("tokens", per_token), ("noise", 1.0)):
            alpha, sigma = expand(PROCESS.alpha(t), X), expand(PROCESS.sigma(t), X)
            rebuilt = alpha * found[key].x0 + sigma * found[key].eps
            np.testing.assert_allclose(rebuilt, X, rtol=1e-4, atol=2e-5, err_msg=key)

    # Equal entries of a vector t are the scalar t.
    np.testing.assert_allclose(found["equal"].x0, found["scalar"].x0, rtol=1e-5, atol=1e-6)

    # A batch of three is three batches of one, and a neighbour that changes is not seen.
    one = jax.jit(lambda x, label: answer(d, params, x, 0.4, label))
    singles = [one(X[i : i + 1], LABEL[i : i + 1]) for i in range(3)]
    for half in ("x0", "eps"):
        alone = jnp.concatenate([getattr(single, half) for single in singles])
        np.testing.assert_allclose(getattr(found["scalar"], half), alone, rtol=1e-5, atol=1e-5, err_msg=half)
    changed = ask_all(X.at[0].set(5.0))
    for key in ("scalar", "tokens"):
        np.testing.assert_array_equal(changed[key].x0[1:], found[key].x0[1:])


def at(scale, t, index=0, process=None):
    return scales.value_at(scale, step_at(t, index))


def test_scales_have_the_values_they_promise():
    t = jnp.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(at(denoisers.linear_scale(1.0, 5.0), t), [5, 4, 3, 1], rtol=1e-6)
    cosine = at(denoisers.cosine_scale(1.0, 5.0), t)
    np.testing.assert_allclose(cosine[jnp.array([0, 2, 3])], [5, 3, 1], rtol=1e-6)
    assert 4 < float(cosine[1]) < 5
    np.testing.assert_array_equal(at(denoisers.interval_scale(2.0, 0.25, 0.5), t), [1, 2, 2, 1])
    np.testing.assert_array_equal(at(denoisers.interval_scale([2.0, 7.0], 0.25, 0.5, 0.0), t, 1), [0, 7, 7, 0])
    by_snr = denoisers.interval_scale(2.0, -1.0, 1.0, unit="log_snr", process=PROCESS)
    inside = jnp.abs(PROCESS.log_snr(t)) <= 1.0
    np.testing.assert_array_equal(at(by_snr, t), jnp.where(inside, 2, 1))
    per_sample = denoisers.interval_scale(denoisers.sample_scale([2.0, 3.0]), 0.0, 0.5)
    np.testing.assert_array_equal(at(per_sample, jnp.array([[0.1, 0.9], [0.2, 0.3]])), [[2, 1], [3, 3]])
    assert at(jnp.array([2.0, 7.0]), 0.5, 9) == 7.0
