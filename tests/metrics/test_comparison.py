"""All distances of two sets at once, statistics files, and CLIP's score."""

import json
import sys

import numpy as np
import pytest

from diffusion_jax import metrics
from diffusion_jax.errors import InvalidInput
from diffusion_jax.metrics.comparison import OF_FEATURES, frechet_to
from diffusion_jax.metrics.frechet import moments_in_chunks
from diffusion_jax.metrics.statistics import gaussian


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    return rng.standard_normal((60, 5)), rng.standard_normal((80, 5)) * 1.2 + 0.3


def test_a_set_against_itself(sets):
    found = metrics.compare_features(sets[0], sets[0])
    assert abs(found.values["frechet_distance"]) < 1e-10
    assert [found.values[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    kernel = (sets[0] @ sets[0].T / 5 + 1) ** 3
    apart = kernel[~np.eye(60, dtype=bool)].mean()
    np.testing.assert_allclose(found.values["kernel_distance"], 2 * (apart - kernel.mean()), rtol=1e-9)
    assert found.values["kernel_distance"] < 0 and not found.not_measured and not found.warnings


def test_the_numbers_are_those_of_the_single_metrics(sets):
    ours, real = sets
    found = metrics.compare_features(ours, real, seed=3)
    assert found.values["frechet_distance"] == pytest.approx(metrics.frechet_distance(ours, real), rel=1e-12)
    assert found.values["kernel_distance"] == metrics.kernel_distance(real, ours, 50, 60, 3).mean
    assert {name: found.values[name] for name in metrics.Manifold._fields} == metrics.manifold(real, ours, 5)._asdict()
    assert found.settings["seed"] == 3 and found.settings["kernel_subset_size"] == 60


def test_of_mean_and_covariance_only_the_frechet_distance_is_measured(sets):
    ours, real = sets
    whole = metrics.compare_features(ours, real)
    told = metrics.compare_features(ours, gaussian(metrics.moments(real)), reference_count=80)
    assert told.values.keys() == {"frechet_distance"} and set(told.not_measured) == set(OF_FEATURES)
    assert told.values["frechet_distance"] == pytest.approx(whole.values["frechet_distance"], rel=1e-12)
    both = metrics.compare_features(ours, real[:20], gaussian_reference=gaussian(metrics.moments(real)))
    assert both.values["frechet_distance"] == pytest.approx(whole.values["frechet_distance"], rel=1e-12)
    assert both.values["precision"] == metrics.manifold(real[:20], ours, 5).precision


def test_small_sets_are_warned_of_with_their_numbers(sets):
    wide = np.random.default_rng(1).standard_normal((60, 60))
    (text, *_) = metrics.compare_features(wide, wide[:59] + 1).warnings
    assert "60 images and 59 reference images are too few for 60 features" in text and "kernel distance" in text
    (text,) = metrics.compare_features(sets[0], gaussian(metrics.moments(sets[1])), reference_count=5).warnings
    assert "5 reference images" in text and "60 images" not in text
    few = metrics.compare_features(sets[0][:3], sets[1])
    assert set(few.not_measured) == {"kernel_distance_standard_error", *metrics.Manifold._fields}
    with pytest.raises(InvalidInput, match="at least 2 images"):
        metrics.compare_features(sets[0][:1], sets[1])
    with pytest.raises(InvalidInput, match="different networks"):
        metrics.compare_features(sets[0], gaussian(metrics.moments(sets[1][:, :4])))


def test_moments_do_not_depend_on_the_chunks(sets, monkeypatch):
    monkeypatch.setattr("diffusion_jax.metrics.frechet.CHUNK", 7)
    found, expected = moments_in_chunks(sets[0].astype(np.float32)), metrics.moments(sets[0].astype(np.float32))
    assert found.count == 60
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-12)


def test_fewer_examples_than_features_need_no_covariance():
    wide, others = np.random.default_rng(2).standard_normal((2, 12, 30))
    of_moments = metrics.frechet_distance(metrics.moments(wide), metrics.moments(others))
    np.testing.assert_allclose(frechet_to(wide, others), of_moments, rtol=1e-10)
    np.testing.assert_allclose(frechet_to(wide, gaussian(metrics.moments(others))), of_moments, rtol=1e-10)
    assert frechet_to(wide, wide) < 1e-12


def test_neighbours_do_not_depend_on_the_blocks(sets, monkeypatch):
    ours, real = (np.round(one * 2) for one in sets)
    whole = metrics.manifold(real, ours), metrics.manifold(real, ours, closed=True)
    monkeypatch.setattr(sys.modules[metrics.Manifold.__module__], "BLOCK", 7)
    assert (metrics.manifold(real, ours), metrics.manifold(real, ours, closed=True)) == whole
    assert whole[0] != whole[1], "there are ties"


def test_statistics_are_written_in_the_layout_of_others_and_read_again(sets, tmp_path):
    first, second = (gaussian(metrics.moments(one)) for one in sets)
    file = tmp_path / "new" / "x.npz"
    metrics.write_statistics(file, metrics.Statistics(first, second, {"count": 60}))
    with np.load(file) as arrays:
        assert sorted(arrays.files) == ["made_by", "mu", "mu_s", "sigma", "sigma_s"]
        np.testing.assert_array_equal(arrays["mu"], sets[0].mean(0))
        np.testing.assert_allclose(arrays["sigma"], np.cov(sets[0], rowvar=False), rtol=1e-12)
        assert json.loads(str(arrays["made_by"])) == {"count": 60}
    found = metrics.read_statistics(file)
    np.testing.assert_array_equal(found.spatial.covariance, second.covariance)
    with pytest.raises(InvalidInput, match="exists"):
        metrics.write_statistics(file, metrics.Statistics(first))
    with pytest.raises(InvalidInput, match=r"end in \.npz"):
        metrics.write_statistics(tmp_path / "x.npy", metrics.Statistics(first))


def test_what_is_no_statistics_file_is_said(tmp_path):
    def stored(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return metrics.read_statistics(tmp_path / "x.npz")

    assert stored(arr_0=np.zeros((2, 4, 4, 3), np.uint8)) is None
    assert stored(mu=np.zeros(3), sigma=np.eye(3)).made_by == {}
    for match, arrays in {
        "no array 'sigma'": {"mu": np.zeros(3)},
        "finite numbers": {"mu": np.full(3, np.nan), "sigma": np.eye(3)},
        "are needed": {"mu": np.zeros(3), "sigma": np.eye(4)},
        "made_by": {"mu": np.zeros(3), "sigma": np.eye(3), "made_by": np.asarray("{")},
    }.items():
        with pytest.raises(InvalidInput, match=match):
            stored(**arrays)


def test_clip_scores_are_a_hundred_times_the_cosine_and_never_negative():
    images = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    texts = np.array([[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    np.testing.assert_allclose(metrics.clip_scores(images, texts), [100, 0, 100 / np.sqrt(2)], rtol=1e-12)
    with pytest.raises(InvalidInput, match="one text an image"):
        metrics.clip_scores(images, texts[:2])
    with pytest.raises(InvalidInput, match="no direction"):
        metrics.clip_scores(images, 0 * texts)
