"""The judges: good enough to judge, of any world, cached under their data, loadable, and clear about what they cannot
load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import data, metrics, objectives
from diffusion_jax.data import ArraySource
from diffusion_jax.errors import InvalidInput
from diffusion_jax.metrics import judges
from diffusion_jax.metrics.inception import abstract_variables, from_torch
from tests.metrics.conftest import STEPS


def corners(count, seed, presences=False):
    """A world of a reader's own, 6 x 4 pixels in two channels: noise, and a bright corner that says the class, or any
    of the four."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, -0.5, (count, 6, 4, 2)).astype(np.float32)
    present = np.eye(4)[rng.integers(0, 4, count)] if not presences else rng.integers(0, 2, (count, 4))
    for corner, (rows, columns) in enumerate([(0, 0), (0, 2), (4, 0), (4, 2)]):
        images[present[:, corner] > 0, rows : rows + 2, columns : columns + 2] = 1.0
    cond = {"corners": present.astype(np.float32)} if presences else {"corner": present.argmax(1)}
    return ArraySource(images, cond, "corners")


def points(count, seed):
    """Another one, of vectors: on which side of a line they lie."""
    x = np.random.default_rng(seed).uniform(-1, 1, (count, 3)).astype(np.float32)
    return ArraySource(x, {"side": (x @ np.array([1.0, -2.0, 0.5]) > 0).astype(np.int32)})


def test_the_digit_judge_knows_held_out_digits(judge):
    test = data.digits("test")
    accuracy = metrics.class_accuracy(judge.logits, test.x0, test.cond["label"])
    assert accuracy.mean >= 0.97
    np.testing.assert_allclose(accuracy.mean, judge.accuracy)
    assert judge.features(test.x0).shape == (395, 64)
    assert judges.STEPS["digits"] > STEPS, "the default is to be better still"


def test_as_a_space_of_features_it_is_the_same_network(judge):
    x, kernel = data.digits("test").x0[:8], objectives.linear_kernel()
    space = metrics.judge_space(judge, kernel, 0.5)
    np.testing.assert_allclose(space.features(space.params, x), judge.features(x), rtol=1e-4, atol=1e-4)
    assert space.kernel is kernel and space.weight == 0.5


def test_pooled_features_are_maxima(judge_cache):
    """A thing that stands there twice, too far apart for one position to see both, has the features of one thing."""
    rng = np.random.default_rng(0)
    world = ArraySource(
        rng.uniform(-1, 1, (96, 32, 32, 1)).astype(np.float32), {"there": rng.integers(0, 2, (96, 2)) * 1.0}, "there"
    )
    judge = metrics.trained_judge(world, world, target="there", features=16, steps=1)
    once = np.full((1, 32, 32, 1), -1.0, np.float32)
    once[:, 8:10, 8:10] = 1.0
    twice = once.copy()
    twice[:, 24:26, 24:26] = 1.0
    empty = judge.features(np.full_like(once, -1.0))
    assert np.abs(judge.features(once) - empty).max() > 1e-3
    np.testing.assert_allclose(judge.features(twice), judge.features(once), atol=1e-6)


def test_its_features_tell_real_digits_from_noisy_ones(judge):
    train, test = data.digits("train").x0, data.digits("test")
    noisy = test.x0 + 0.5 * np.random.default_rng(0).standard_normal(test.x0.shape).astype(np.float32)
    clean = metrics.judged(judge, train)
    assert np.isnan(clean.accuracy)
    assert metrics.judged(judge, noisy).distance > 3 * clean.distance
    held_out = metrics.judged(judge, test.x0, test.cond["label"])
    assert held_out == (judge.accuracy, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize(
    ("world", "target", "labels", "steps", "wrong"),
    [
        (corners, "corner", 4, 60, lambda cond: (cond + 1) % 4),
        (lambda count, seed: corners(count, seed, presences=True), "corners", 4, 60, lambda cond: 1 - cond),
        (points, "side", 2, 300, lambda cond: 1 - cond),
    ],
    ids=["classes", "presences", "vectors"],
)
def test_any_labelled_world_has_a_judge(judge_cache, world, target, labels, steps, wrong):
    # What is present has a place here, and features that keep it.
    settings = {"target": target, "features": 16, "steps": steps, "pooled": False}
    judge = metrics.trained_judge(world(300, 0), world(100, 1), **settings)
    test = world(100, 1)
    assert judge.accuracy > 0.9
    assert judge.logits(test.x0).shape == (100, labels) and judge.features(test.x0).shape == (100, 16)
    np.testing.assert_allclose(judge.held_out, judge.features(test.x0), atol=1e-6)
    asked = test.cond[target]
    assert metrics.judged(judge, test.x0, asked).accuracy == judge.accuracy
    assert metrics.judged(judge, test.x0, wrong(asked)).accuracy < 0.1
    half_dark = np.where(np.arange(100).reshape(-1, *[1] * (test.x0.ndim - 1)) < 50, -1.0, test.x0)
    assert metrics.judged(judge, half_dark).distance > 1e-2


def test_pooled_features_do_not_know_where_a_thing_stands(judge_cache):
    images = np.full((2, 16, 16, 1), -1.0, np.float32)
    images[0, 5:7, 5:7] = images[1, 9:11, 9:11] = 1.0
    rng = np.random.default_rng(0)
    world = ArraySource(rng.uniform(-1, 1, (96, 16, 16, 1)).astype(np.float32), {"label": rng.integers(0, 2, 96)})
    for pooled in (True, False):
        features = metrics.trained_judge(world, world, steps=1, features=8, pooled=pooled).features(images)
        assert np.allclose(features[0], features[1], atol=1e-5) == pooled


def test_the_cache_gives_the_same_network_and_a_damaged_one_is_replaced(judge, judge_cache, monkeypatch):
    (file,) = (judge_cache / "judges").glob("digits-*.safetensors")
    images = data.digits("test").x0[:7]
    trained = []
    monkeypatch.setattr(judges, "_train", lambda *settings: trained.append(settings) or judge.params)
    again = metrics.feature_network(steps=STEPS)
    np.testing.assert_array_equal(again.logits(images), judge.logits(images))
    assert again.accuracy == judge.accuracy and not trained
    metrics.feature_network(steps=STEPS, seed=1)
    assert len(trained) == 1
    for content in (file.read_bytes()[:1000], b"junk"):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="trained again"):
            metrics.feature_network(steps=STEPS)
        np.testing.assert_array_equal(metrics.feature_network(steps=STEPS).logits(images), judge.logits(images))
    assert len(trained) == 3


def test_other_data_or_settings_are_another_judge_and_other_held_out_data_are_not(judge_cache, monkeypatch):
    trained = []
    monkeypatch.setattr(judges, "_train", lambda settings, *_: trained.append(settings) or judges._init(settings))
    world, other = points(120, 0), points(120, 3)

    def ask(source, held_out=other, **settings):
        before = len(trained)
        metrics.trained_judge(source, held_out, **{"target": "side", "steps": 5, **settings})
        return len(trained) > before

    assert ask(world) and not ask(world)
    assert not ask(dataclasses.replace(world, name="arrays")) and not ask(world, held_out=points(50, 9))
    moved = dataclasses.replace(world, x0=world.x0 + 1e-3)
    turned = dataclasses.replace(world, cond={"side": 1 - world.cond["side"]})
    for changed in ((moved, {}), (turned, {}), (world, {"features": 8}), (world, {"steps": 6}), (world, {"seed": 1})):
        assert ask(changed[0], **changed[1])


def test_shapes_have_a_judge_of_the_same_kind(judge_cache):
    network = metrics.feature_network("shapes", size=24, features=8, steps=2)
    assert not network.exclusive
    assert network.logits(np.zeros((3, 24, 24, 3))).shape == (3, 24)
    assert network.features(np.zeros((3, 24, 24, 3))).shape == (3, 8)


def test_a_set_of_any_world_is_measured_by_its_judge(judge_cache):
    real, held_out = corners(300, 0), corners(100, 1)
    judge = metrics.trained_judge(real, held_out, target="corner", features=16, steps=60, pooled=False)
    measure = metrics.image_set(judge)
    same = measure({"x": held_out.x0, "cond.corner": held_out.cond["corner"]}, real, held_out)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1
    assert same["class_accuracy"] == same["classifier_held_out_accuracy"] == judge.accuracy
    assert "class_accuracy" not in measure({"x": held_out.x0}, real, held_out)


def test_bytes_are_scaled_and_other_ranges_refused(judge):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    signed = pixels.astype(np.float32) / 127.5 - 1
    for values in (pixels, jnp.asarray(pixels), pixels.astype(np.uint16) * 257, signed.astype(np.float64)):
        np.testing.assert_allclose(judge.features(values), judge.features(signed), atol=1e-5)
        np.testing.assert_allclose(judge.logits(values), judge.logits(signed), atol=1e-5)
    for wrong, part in (
        (pixels / 255.0, "images lie in"),
        (pixels.astype(np.float32), "images lie in"),
        (pixels.astype(np.int32), "signed integers are tokens"),
        (pixels + 1j, "pixels are unsigned"),
        (signed[:0], "images.shape"),
    ):
        for ask in (judge.features, judge.logits, lambda x: metrics.judged(judge, x)):
            with pytest.raises(InvalidInput, match=part):
                ask(wrong)
    with pytest.raises(InvalidInput, match="a label is 10"):
        metrics.judged(judge, signed, [0, 1, 2, 10])


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda judge: metrics.feature_network("digit"), "did you mean 'digits'"),
        (lambda judge: metrics.feature_network(steps=0), "steps"),
        (lambda judge: judge.features(np.zeros((2, 9, 9, 1))), "images.shape"),
        (lambda judge: judge.features(np.zeros((2, 8, 8))), "images.shape"),
        (lambda judge: metrics.judged(judge, np.zeros((2, 8, 8, 1)), [0]), "labels.shape"),
        (lambda judge: metrics.trained_judge(points(96, 0), points(9, 0)), "target is 'label'"),
        (lambda judge: metrics.trained_judge(points(95, 0), points(9, 0), target="side"), "at least 96"),
        (lambda judge: metrics.trained_judge(points(96, 0), corners(9, 0), target="side"), "target is 'side'"),
        (
            lambda judge: metrics.trained_judge(
                points(96, 0), ArraySource(np.zeros((9, 4)), {"side": np.zeros(9, int)}), target="side"
            ),
            "held-out",
        ),
        (
            lambda judge: metrics.trained_judge(
                *[ArraySource(np.zeros((96, 3)), {"side": np.full(96, 0.5)})] * 2, target="side"
            ),
            "zeros and ones",
        ),
        (
            lambda judge: metrics.trained_judge(*[ArraySource(np.zeros((96, 5, 3)), {"label": np.zeros(96, int)})] * 2),
            "images",
        ),
    ],
)
def test_wrong_input_is_named(judge, call, part):
    with pytest.raises(InvalidInput, match=part):
        call(judge)


def torch_names(classifier):
    """Arrays of zeros under torch's names and shapes, and the number of learned parameters."""
    out, count = {}, 0
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(classifier))
    for path, leaf in leaves:
        collection, *parts = [entry.key for entry in path]
        kind = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        shape = leaf.shape[::-1] if len(leaf.shape) != 4 else (leaf.shape[3], leaf.shape[2], *leaf.shape[:2])
        out[".".join([*parts[:-1], kind[parts[-1]]])] = np.zeros(shape, np.float32)
        count += leaf.size if collection == "params" else 0
    return out, count


def test_inception_has_the_names_shapes_and_parameters_of_pytorch_fid():
    tensors, count = torch_names(True)
    assert 23.8e6 < count < 23.9e6
    assert 21.7e6 < torch_names(False)[1] < 21.8e6
    assert sum(name.endswith("conv.weight") for name in tensors) == 94
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3_2a.bn.running_var": (384,),
        "fc.weight": (1008, 2048),
    }.items():
        assert tensors[name].shape == shape


def test_inception_loads_a_local_file_and_runs(tmp_path):
    tensors, _ = torch_names(False)
    for name in tensors:
        if name.endswith(("bn.weight", "running_var")):
            tensors[name][:] = 1
        if name.endswith("bn.bias"):
            tensors[name][:] = 0.25
    save_file(tensors, tmp_path / "weights.safetensors")
    network = metrics.inception(str(tmp_path / "weights.safetensors"))
    # Every convolution is zero, so each unit answers with the bias of its normalisation.
    out = network.features(np.zeros((1, 32, 32, 3)))
    assert out.shape == (1, 2048)
    np.testing.assert_allclose(out, 0.25, rtol=1e-6)
    with pytest.raises(InvalidInput, match="no classifier"):
        network.logits(np.zeros((1, 32, 32, 3)))
    with pytest.raises(InvalidInput, match="colour images"):
        network.features(np.zeros((1, 32, 32, 1)))
    with pytest.raises(InvalidInput, match="colour images"):
        network.features(np.zeros((0, 32, 32, 3)))
    with pytest.raises(InvalidInput, match="images lie in"):
        network.features(np.ones((1, 32, 32, 3)))


def test_what_is_not_inception_is_said(tmp_path):
    tensors, _ = torch_names(False)
    with pytest.raises(InvalidInput, match="do not exist"):
        metrics.inception(str(tmp_path / "no.safetensors"))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        metrics.inception(str(tmp_path / "junk.safetensors"))
    name = "Mixed_6c.branch7x7_1.conv.weight"
    with pytest.raises(InvalidInput, match=f"lack {name!r}"):
        from_torch({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(InvalidInput, match=f"shape of {name!r}"):
        from_torch({**tensors, name: tensors[name][:5]})


def test_a_written_judge_is_plain_safetensors(judge, judge_cache):
    for file in (judge_cache / "judges").glob("*.safetensors"):
        assert all(value.dtype == np.float32 for value in load_file(file).values())
