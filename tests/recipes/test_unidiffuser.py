"""The published settings of UniDiffuser, built without their arrays; what the arms of the small run are trained on."""

import jax
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.config import build, load
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes import unidiffuser
from diffusion_jax.recipes.parts.paired_samples import TASKS, pair_sampler
from tests.models.drawn import drawn

FILE = "configs/recipes/unidiffuser.py"


def test_published_settings():
    config = load(f"{FILE}:paper").joint
    network, process = build(config.model), build(config.process)
    shapes = {"image": (1, 64, 64, 4), "vector": (1, 512), "text": (1, 77, 64)}
    assert models.count_params(models.param_shapes(network, shapes)) == pytest.approx(0.95e9, rel=0.01)
    assert float(process.alpha(1.0)["text"]) == pytest.approx(0.068, abs=5e-4)
    objective = build(config.objective, network=network, process=process)
    x0 = {name: jax.ShapeDtypeStruct((2, *shape[1:]), np.float32) for name, shape in shapes.items()}
    params, key = models.param_shapes(network, shapes), jax.random.key(0)
    loss, _ = jax.eval_shape(
        lambda params, x0: objective.loss(params, {"image": (), "text": ()}, {"x0": x0}, key), params, x0
    )
    assert loss.shape == (2,)
    times = {name: np.zeros((4096, 1), np.float32) for name in shapes}
    t = objective.prepare({"image": (), "text": ()}, {"x0": times}, key)["t"]
    np.testing.assert_array_equal(t["vector"], t["image"])
    steps = np.unique(np.round(1000 * np.concatenate([t["image"], t["text"]]), 3))
    assert steps.min() == 0 and steps.max() == 1000
    assert abs(np.corrcoef(t["image"], t["text"])[0, 1]) < 0.06


def test_each_arm_trains_its_own_times():
    networks = load(FILE).networks
    seen = {}
    for name in networks:
        experiment = prepare(networks[name])
        batch = {"x0": experiment.example(64)["x0"]}
        state = experiment.objective.init(jax.random.key(0), None, batch)
        seen[name] = experiment.objective.prepare(state, batch, jax.random.key(0))
    assert not np.allclose(seen["unidiffuser"]["t"]["image"], seen["unidiffuser"]["t"]["text"])
    assert seen["together"]["t"].shape == (64,)
    for name, given in (("image_given_text", "text"), ("text_given_image", "image")):
        assert not seen[name]["t"][given].any() and not seen[name]["t_weight"][given].any()
        assert np.unique(seen[name]["t"]["image" if given == "text" else "text"]).size == 64


def test_replacement_keeps_what_is_given_and_losses_are_of_what_is_generated():
    """The smoke run has neither."""
    config = load(f"{FILE}:smoke")
    experiment = prepare(config.networks.unidiffuser)
    params = drawn(models.param_shapes(experiment.network, {n: (1, *shape) for n, shape in experiment.shape.items()}))
    known, _ = unidiffuser.questions(experiment.held_out, 4)
    made = pair_sampler(experiment, config.steps).replaced(params, jax.random.key(0), known, "text")
    np.testing.assert_allclose(made["text"], known["text"], atol=1e-5)
    assert np.isfinite(made["image"]).all() and np.abs(made["image"] - known["image"]).max() > 0.1
    # Without the head of the texts only the loss of a text changes.
    silent = {**params, "head_text": jax.tree.map(np.zeros_like, params["head_text"])}
    losses = unidiffuser.losses(experiment, {"ours": params, "silent": silent}, jax.random.key(1))
    assert all(0 < loss < np.inf for loss in losses.values()) and len(losses) == 4
    assert losses["image | text", "ours"] == losses["image | text", "silent"]
    assert losses["text | image", "ours"] != losses["text | image", "silent"]


def test_guidance_is_a_number_of_the_one_program():
    """The smoke run has none."""
    config = load(f"{FILE}:smoke")
    experiment = prepare(config.networks.unidiffuser)
    params = drawn(models.param_shapes(experiment.network, {n: (1, *shape) for n, shape in experiment.shape.items()}))
    known, _ = unidiffuser.questions(experiment.held_out, 4)
    made, key = pair_sampler(experiment, config.steps), jax.random.key(0)
    plain, guided = (made.draw(params, key, TASKS["image | text"], known, scale) for scale in (1.0, 3.0))
    assert np.abs(plain["image"] - guided["image"]).max() > 1e-3
    np.testing.assert_array_equal(guided["text"], known["text"])


def test_variants_are_named():
    with pytest.raises(InvalidInput, match="variant is 'big'"):
        load(f"{FILE}:big")
