"""The world of referring expressions: masks are exact, words mean what they say, and a judge names what is wrong."""

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import referring
from diffusion_jax.errors import InvalidInput


@pytest.fixture(scope="module")
def source():
    return data.referring_scenes(length=300)


def test_a_request_refers_to_what_was_meant_and_its_mask_is_what_is_seen_of_it(source):
    several = 0
    asked = [i for i, request in enumerate(source.requests) if request != "depth"]
    for i in asked:
        scene, meant = source.scenes[i], source.meant[i]
        found = referring.referents(source.requests[i].removeprefix("segment "), scene)
        assert meant in found
        several += len(found) > 1
        np.testing.assert_array_equal(source.x0[i, ..., 0] > 0, scene.masks[meant])
        # Every pixel of a thing has its colour and its depth, and belongs to no other thing.
        assert scene.masks.sum(axis=0).max() == 1
        thing = scene.things[meant]
        assert len(np.unique(source.cond["concat"][i][scene.masks[meant]], axis=0)) == 1
        np.testing.assert_allclose(scene.disparity[scene.masks[meant]], thing.disparity, rtol=1e-6)
    assert 0.15 < several / len(asked) < 0.35


def test_requests_are_tokenised_without_loss_and_depth_is_that_of_what_is_seen(source):
    for i in range(50):
        assert source.tokenizer.decode(source.cond["tokens"][i]) == source.requests[i]
        if source.requests[i] == "depth":
            np.testing.assert_allclose(source.x0[i, ..., 0], 2 * source.scenes[i].disparity - 1, atol=1e-6)
    assert {request == "depth" for request in source.requests} == {True, False}


def test_nearer_things_hide_those_behind_them():
    far, near = referring.Thing("red", "circle", 6, 6, 3, 0.5), referring.Thing("blue", "square", 8, 6, 2, 0.9)
    scene = referring.render((far, near), 16)
    assert scene.masks[1].sum() == 25 and not (scene.masks[0] & scene.masks[1]).any()
    assert scene.masks[0].sum() < referring.silhouette(far, 16).sum()
    assert referring.referents("the circle left of the blue square", scene) == [0]
    assert referring.referents("the circle right of the blue square", scene) == []
    assert referring.expressions(scene, 0) == ["the circle", "the circle left of the blue square", "the red circle"]
    assert referring.wrongly_marked(scene.masks[1], scene, 0) == "the blue square"
    assert referring.wrongly_marked(scene.masks[0], scene, 0) is None
    assert referring.wrongly_marked(scene.masks[1] & False, scene, 0) is None


def test_splits_and_seeds_are_worlds_of_their_own_and_examples_do_not_depend_on_how_many_there_are(source):
    fewer = data.referring_scenes(length=20)
    assert data.referring_scenes(length=20, tasks=["segment", "depth"]) is fewer
    np.testing.assert_array_equal(fewer.x0, source.x0[:20])
    for other in (data.referring_scenes("test", 20), data.referring_scenes(length=20, seed=1)):
        assert not np.array_equal(other.cond["concat"], fewer.cond["concat"])


def test_real_disparities_are_those_of_the_stereo_pair():
    train, test = (data.stereo_patches(split) for split in ("train", "test"))
    for patches in (train, test):
        assert patches.x0.min() == -1 and patches.x0.max() == 1 and len(patches) > 100
        assert np.isfinite(patches.disparity).all() and patches.disparity.min() > 5
        flat = patches.disparity.reshape(len(patches), -1)
        together = [
            np.corrcoef(a, b)[0, 1] for a, b in zip(flat[::97], patches.x0.reshape(flat.shape)[::97], strict=True)
        ]
        assert min(together) > 0.9
    mixed = data.referring_scenes(length=60, tasks=("depth",), real=0.5)
    assert 0.3 < np.mean([scene is None for scene in mixed.scenes]) < 0.7


def test_what_this_world_does_not_have_is_refused():
    with pytest.raises(InvalidInput, match="did you mean 'depth'"):
        data.referring_scenes(tasks=("dept",))
    with pytest.raises(InvalidInput, match="shares between 0 and 1"):
        data.referring_scenes(ambiguous=1.5)
    scene = referring.render((referring.Thing("red", "circle", 6, 6, 3, 0.5),), 16)
    with pytest.raises(InvalidInput, match="'the circle'"):
        referring.referents("a red circle", scene)


def test_a_smooth_function_is_the_same_for_both_splits_and_follows_from_its_condition():
    train, test = data.smooth_function(length=5000), data.smooth_function("test", length=200)
    np.testing.assert_allclose(train.x0.std(axis=0), 1.0, atol=0.1)
    np.testing.assert_array_equal(data.smooth_function(length=100).x0, train.x0[:100])
    # The nearest of many neighbours answers better than the mean does.
    away = np.square(test.cond["pooled"][:, None] - train.cond["pooled"]).sum(axis=-1)
    assert np.square(train.x0[away.argmin(axis=1)] - test.x0).mean() < 0.6 * np.square(test.x0).mean()
