"""The published settings of UniDiffuser, built without their arrays; what the arms of the small run are trained on."""

import jax
import numpy as np
import pytest

from diffusion_jax import denoisers, models
from diffusion_jax.config import build, call, load
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes import unidiffuser
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.parts.paired_latents import latent_rows
from diffusion_jax.recipes.study import Study
from diffusion_jax.stages import stage_key
from tests.models.drawn import drawn

FILE = "configs/recipes/unidiffuser.py"


def test_published_settings(capsys):
    main(["unidiffuser:paper"])
    millions = float(capsys.readouterr().out.split("network: ")[1].split()[0].replace(",", ""))
    assert millions == pytest.approx(950, rel=0.01)
    config = load(f"{FILE}:paper")
    network, process = build(config.model), build(config.process)
    shapes = {name: (1, *shape) for name, shape in config.inputs.x0.to_dict().items()}
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


@pytest.fixture(scope="module")
def small():
    """The experiment of the smoke run, parameters that are nowhere zero, and questions."""
    config = load(f"{FILE}:smoke")
    experiment = prepare(config.networks.unidiffuser)
    params = drawn(models.param_shapes(experiment.network, {n: (1, *shape) for n, shape in experiment.shape.items()}))
    return config, experiment, params, unidiffuser.questions(experiment.held_out, 4)[0]


def test_replacement_keeps_what_is_given(small):
    """The smoke run has none."""
    config, experiment, params, known = small
    plain = denoisers.denoiser(experiment.network, experiment.process)
    made = unidiffuser.replacing(plain, config.steps)(params, jax.random.key(0), "image | text", known)
    np.testing.assert_allclose(made["text"], known["text"], atol=1e-5)
    assert np.isfinite(made["image"]).all() and np.abs(made["image"] - known["image"]).max() > 0.1


def test_losses_are_of_what_is_generated(small):
    """Without the head of the texts only the loss of a text changes."""
    _, experiment, params, _ = small
    silent = {**params, "head_text": jax.tree.map(np.zeros_like, params["head_text"])}
    loss, key = unidiffuser.conditional_loss(experiment), jax.random.key(1)
    assert loss(params, key, "image | text") == loss(silent, key, "image | text") > 0
    assert loss(params, key, "text | image") != loss(silent, key, "text | image")


def test_guidance_leaves_what_is_given_and_moves_what_is_drawn(small):
    """The smoke run has none."""
    config, experiment, params, known = small
    plain, key = denoisers.denoiser(experiment.network, experiment.process), jax.random.key(0)
    ways = plain, denoisers.jointly_guided(plain, 3.0)
    one, other = (unidiffuser.asker(d, experiment, config.steps)(params, key, "image | text", known) for d in ways)
    assert np.abs(one["image"] - other["image"]).max() > 1e-3
    np.testing.assert_array_equal(other["text"], known["text"])


def test_both_sides_of_a_claim_were_measured():
    found = {"agreement: together": [0.7], "agreement: apart": [0.2]}
    found |= {f"{task}: {arm}": [0.9] for task in unidiffuser.CONDITIONALS for arm in ("ours", "own", "(r, 0)")}
    assert len(unidiffuser.rows_of(found)) == 5
    found |= {f"image | text: {arm}": [0.9] for arm in ("replaced", "guided")} | {"text | image: replaced": [0.1]}
    found |= {f"diversity, image | text: {arm}": [9.0] for arm in ("ours", "guided")} | {"leak": [0.01]}
    found |= {f"loss, {task}: {name}": [0.25] for task in unidiffuser.CONDITIONALS for name in ("ours", "own")}
    rows = unidiffuser.rows_of(found)
    assert len({row.title for row in rows}) == len(rows) == 11
    assert [row.ours for row in rows if row.figure == "sum of their losses"] == [[0.5]]


@pytest.mark.usefixtures("one_device")
def test_latents_come_from_all_three_encoders_and_keys_say_so(tmp_path):
    """The smoke run has none."""
    config = load(FILE)
    config.update({"steps": 2, "count": 10})
    for entry in config.latent.values():
        entry.optimizer, entry.ema = call("training.optimizers.sgd"), {}
        entry.train.update({"steps": 2, "batch_size": 8})
    config.latent.joint.model.update({"width": 16, "depth": 1, "scan": False, "skips": False})
    s = Study(config, (0, 1), tmp_path, True, {})
    found = {f"{task}: ours": [0.5, 0.5] for task in unidiffuser.CONDITIONALS}
    judge = lambda images: np.eye(10)[np.arange(len(images)) % 10]  # noqa: E731
    rows = latent_rows(s, found, judge)
    assert len(rows) == 3 and rows[1].ours == [1.0, 1.0] and (tmp_path / "latents.png").stat().st_size > 0
    image, pairs, captions, joint = s.ledger.values()
    assert joint.trained.shape == {"image": (4, 4, 4), "vector": (16,), "text": (6, 8)}
    for name in ("text", "vector"):
        assert joint.trained.source.x0[name].std() == pytest.approx(1.0, abs=1e-4)
    other = image._replace(key="other")
    keys = {
        stage_key(config.latent.joint, *parents) for parents in ((image, pairs, captions), (other, pairs, captions))
    }
    assert len(keys) == 2
