"""The world of shapes: what is generated is read back exactly, captions are true, and untrue ones are caught."""

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import scenes
from diffusion_jax.data.scenes import Kind, Object
from diffusion_jax.errors import InvalidInput


@pytest.fixture(scope="module")
def source():
    return data.shapes(length=500)


def test_the_verifier_reads_every_scene_back_exactly(source):
    for i in range(len(source)):
        assert scenes.read(source[i]["x0"]) == (source.scene(i), 0)


def test_presences_are_those_of_the_pictures(source):
    within = scenes.with_presences(data.shapes(length=30))
    kinds = [(colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES]
    for i in range(30):
        there = {(thing.kind.colour, thing.kind.shape) for thing in scenes.read(within.x0[i]).scene}
        assert within.cond["present"][i].tolist() == [float(kind in there) for kind in kinds]
        np.testing.assert_array_equal(within.x0[i], source[i]["x0"])


@pytest.mark.parametrize(("size", "max_objects"), [(24, 2), (48, 4), (64, 4)])
def test_other_sizes_are_read_back_too(size, max_objects):
    source = data.shapes("test", length=40, size=size, max_objects=max_objects, seed=5)
    for i in range(40):
        assert scenes.read(source[i]["x0"]) == (source.scene(i), 0)


def test_every_caption_is_true_of_its_scene_and_is_tokenised_without_loss(source):
    related = 0
    for i in range(len(source)):
        caption = source.caption(i)
        result = scenes.verify(source[i]["x0"], caption)
        related += not np.isnan(result["relation"])
        assert result["all"] == result["count"] == result["attributes"] == 1.0
        assert result["relation"] != 0.0
        cond = source[i]["cond"]
        assert source.tokenizer.decode(cond["tokens"]) == caption
        assert cond["tokens_mask"].sum() == len(caption.split())
        assert (cond["tokens"] != 0).tolist() == cond["tokens_mask"].tolist()
    assert related > 25


def test_reading_survives_a_soft_and_noisy_image(source):
    rng = np.random.default_rng(0)
    kept = 0
    for i in range(100):
        image = 0.8 * source[i]["x0"] + 0.2 * rng.standard_normal((32, 32, 3))
        found, _ = scenes.read(image)
        kept += [o.kind for o in found] == [o.kind for o in source.scene(i)]
    assert kept >= 97


def test_untrue_captions_are_caught():
    red, blue = Kind("small", "red", "circle"), Kind("large", "blue", "square")
    image = scenes.render((Object(red, 6, 8), Object(blue, 22, 9)))
    assert scenes.verify(image, "a small red circle left of a large blue square")["all"] == 1
    reversed_ = scenes.verify(image, "a small red circle right of a large blue square")
    assert reversed_["relation"] == 0 and reversed_["all"] == 0 and reversed_["attributes"] == 1
    colour = scenes.verify(image, "a small green circle and a large blue square")
    assert colour["attributes"] == 0.5 and colour["count"] == 1 and colour["all"] == 0
    number = scenes.verify(image, "two small red circles and a large blue square")
    assert number["count"] == 0 and number["all"] == 0
    size = scenes.verify(image, "a large red circle and a large blue square")
    assert size["attributes"] == 0.5 and size["all"] == 0
    missing = scenes.verify(image, "a small red circle")
    assert missing["attributes"] == 1 and missing["all"] == 0
    assert scenes.verify(np.full((32, 32, 3), -1.0), "a small red circle")["attributes"] == 0


def test_a_blob_that_is_no_shape_is_not_read_as_one():
    image = np.full((32, 32, 3), -1.0, np.float32)
    image[4:7, 2:30] = (1, -1, -1)
    assert scenes.read(image) == ((), 1)


def test_parsing_inverts_describing(source):
    for i in range(200):
        scene = source.scene(i)
        groups = scenes.parse(scenes.describe(scene)).groups
        assert sorted(kind for count, kind in groups for _ in range(count)) == sorted(o.kind for o in scene)


def test_no_scene_of_one_split_is_in_the_other():
    train, test = data.shapes("train", length=1500), data.shapes("test", length=400)
    assert not {train.scene(i) for i in range(1500)} & {test.scene(i) for i in range(400)}


def test_a_scene_depends_on_its_index_and_seed_alone():
    long, short = data.shapes(length=1000), data.shapes(length=20)
    assert [long.scene(i) for i in range(20)] == [short.scene(i) for i in range(20)]
    assert [long.scene(i) for i in range(20)] != [data.shapes(length=20, seed=1).scene(i) for i in range(20)]


@pytest.mark.parametrize("caption", ["", "a red circle", "a small red dog", "five small red circles", "red above blue"])
def test_text_that_is_no_caption_is_refused(caption):
    with pytest.raises(InvalidInput, match="caption"):
        scenes.parse(caption)


def test_scenes_go_through_the_pipeline(source):
    batch = next(data.pipeline(source, 8))
    assert batch["x0"].shape == (8, 32, 32, 3) and batch["cond"]["tokens"].shape == (8, 15)
    assert batch["cond"]["tokens"].dtype == np.int32 and batch["cond"]["tokens_mask"].dtype == bool
