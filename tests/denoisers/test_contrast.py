"""Differences of named conditions are added up: guidance by picture and text, and what a correction adds to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes
from diffusion_jax.clock import single_step
from diffusion_jax.errors import InvalidInput
from tests.denoisers.tiny import network

FLOW = processes.rectified_flow()
X = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
COND = {"label": np.asarray([1, 2, 3], np.int32), "wrong": np.asarray([2, 2, 0], np.int32)}
NET = network()
PARAMS = NET.init(jax.random.key(0), X, np.zeros(3), None)
PLAIN = denoisers.denoiser(NET, FLOW)
NOTHING, OTHER = {"label": 0}, {"label": 4}
CONDITIONS = {"none": NOTHING, "image": OTHER, "text": None, "wrong": lambda c: {**c, "label": c["wrong"]}}
GUIDED = (("image", "none", 1.5), ("text", "image", 3.0))


def answer(made, cond):
    step = single_step(jnp.full(3, 0.6), jnp.full(3, 0.3))
    return made.apply(PARAMS, made.init(PARAMS, X, cond), jnp.asarray(X), step, cond)[0]


@pytest.fixture(scope="module")
def answers():
    def composed(*terms):
        return denoisers.composed(PLAIN, CONDITIONS, "none", (*GUIDED, *terms))

    @jax.jit
    def run(cond):
        made = {
            "guided": composed(),
            "no strength": composed(("text", "wrong", 0.0)),
            "corrected": composed(("text", "wrong", 2.0)),
            "by step": composed(("text", "wrong", jnp.asarray([2.0]))),
            "nested": denoisers.guided(
                denoisers.guided(PLAIN, 2.0, OTHER), 1.5, lambda c: {**c, "label": 0 * c["label"]}
            ),
        }
        label = cond["label"]
        labels = {"none": 0 * label, "image": 0 * label + 4, "text": label, "wrong": cond["wrong"]}
        alone = {name: answer(PLAIN, {"label": label}) for name, label in labels.items()}
        return {name: answer(one, cond) for name, one in made.items()}, alone

    return run(COND), run({**COND, "wrong": COND["label"]})


def test_each_term_adds_its_difference_and_is_evaluated_once(answers):
    found, alone = answers[0]
    for half in ("x0", "eps"):
        one = {name: getattr(prediction, half) for name, prediction in alone.items()}
        plain = one["none"] + 1.5 * (one["image"] - one["none"]) + 3.0 * (one["text"] - one["image"])
        np.testing.assert_allclose(getattr(found["guided"], half), plain, atol=1e-4)
        moved = plain + 2.0 * (one["text"] - one["wrong"])
        np.testing.assert_allclose(getattr(found["corrected"], half), moved, atol=1e-4)
        np.testing.assert_allclose(getattr(found["by step"], half), moved, atol=1e-4)
    asked = {name: float(prediction.cost.evaluations) for name, prediction in found.items()}
    assert (asked["guided"], asked["no strength"], asked["corrected"]) == (3, 3, 4)


def test_a_correction_of_no_strength_or_by_the_request_itself_is_plain_guidance(answers):
    for half in ("x0", "eps"):
        plain = getattr(answers[0][0]["guided"], half)
        np.testing.assert_array_equal(getattr(answers[0][0]["no strength"], half), plain)
        np.testing.assert_array_equal(getattr(answers[1][0]["corrected"], half), getattr(answers[1][0]["guided"], half))
        assert not np.allclose(getattr(answers[0][0]["corrected"], half), plain)


def test_names_and_terms_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInput, match="did you mean 'text'"):
        denoisers.composed(PLAIN, CONDITIONS, "none", [("txt", "image", 1.0)])
    with pytest.raises(InvalidInput, match="the scale of terms"):
        denoisers.composed(PLAIN, CONDITIONS, "none", [("text", "image", np.nan)])
    with pytest.raises(InvalidInput, match="two names and a scale"):
        denoisers.composed(PLAIN, CONDITIONS, "none", [("text", 1.0)])
