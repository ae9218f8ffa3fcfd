"""The judges: good enough to judge, cached, loadable, and clear about what they cannot load."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import data, metrics
from diffusion_jax.errors import InvalidInput
from diffusion_jax.metrics import features
from diffusion_jax.metrics.inception import abstract_variables, from_torch
from tests.metrics.conftest import STEPS


def test_the_digit_judge_knows_held_out_digits(judge):
    test = data.digits("test")
    accuracy = metrics.class_accuracy(judge.logits, test.x0, test.cond["label"])
    assert accuracy.mean >= 0.97
    np.testing.assert_allclose(accuracy.mean, judge.accuracy)
    assert judge.features(test.x0).shape == (395, 64)
    assert features.STEPS["digits"] > STEPS, "the default is to be better still"


def test_its_features_tell_real_digits_from_noisy_ones(judge):
    train, test = data.digits("train").x0, data.digits("test").x0
    real = judge.features(train)
    noisy = test + 0.5 * np.random.default_rng(0).standard_normal(test.shape).astype(np.float32)
    clean_distance = metrics.frechet_distance(real, judge.features(test))
    assert metrics.frechet_distance(real, judge.features(noisy)) > 3 * clean_distance


def test_the_cache_gives_the_same_network_and_a_damaged_one_is_replaced(judge, judge_cache, monkeypatch):
    (file,) = (judge_cache / "features").glob("digits-*.safetensors")
    images = data.digits("test").x0[:7]
    trained = []
    monkeypatch.setattr(features, "_train", lambda config: trained.append(config) or dataclasses.replace(judge))
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


def test_shapes_have_a_judge_of_the_same_kind(judge_cache):
    network = metrics.feature_network("shapes", size=24, features=8, steps=2)
    assert network.logits(np.zeros((3, 24, 24, 3))).shape == (3, 24)
    assert network.features(np.zeros((3, 24, 24, 3))).shape == (3, 8)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda judge: metrics.feature_network("digit"), "did you mean 'digits'"),
        (lambda judge: metrics.feature_network(steps=0), "steps"),
        (lambda judge: judge.features(np.zeros((2, 9, 9, 1))), "images.shape"),
        (lambda judge: judge.features(np.zeros((2, 8, 8))), "images.shape"),
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
    for file in (judge_cache / "features").glob("*.safetensors"):
        assert all(value.dtype == np.float32 for value in load_file(file).values())
