"""Data sets of pairs (x, y)."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.errors import InvalidInput

BYTES = [(np.full((4, 6, 3), 255 * (i % 2), np.uint8), i % 2) for i in range(4)]


class Named(list):
    classes = ("cat", "dog")


def test_pairs_are_the_arrays_that_they_hold():
    same = data.arrays(x0=np.stack([x for x, _ in BYTES]), label=np.array([y for _, y in BYTES]))
    source = data.from_pairs(Named(BYTES))
    assert source.class_names == ("cat", "dog") and source.num_classes == 2
    for mine, theirs in zip(data.pipeline(source, 2, epochs=1), data.pipeline(same, 2, epochs=1), strict=True):
        np.testing.assert_array_equal(mine["x0"], theirs["x0"])
        np.testing.assert_array_equal(mine["cond"]["label"], theirs["cond"]["label"])


def test_images_tensors_and_arrays_of_one_picture_are_one_example():
    picture = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    first = np.moveaxis(picture, -1, 0) / np.float32(255)
    (image,), (pixels,) = ([(x, None)] for x in (Image.fromarray(picture), picture))
    made = [
        data.from_pairs([image]),
        data.from_pairs([pixels]),
        data.from_pairs([(jnp.asarray(first), None)], value_range=(0, 1), channels_first=True),
    ]
    for source in made:
        assert set(source[0]) == {"x0"}
        np.testing.assert_allclose(source[0]["x0"], picture / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "dataset, options, message",
    [
        ([], {}, "holds no example"),
        ([np.zeros(3)], {}, "a pair"),
        ([(np.zeros((3, 8, 8), np.uint8), 0)], {}, "channels_first=True"),
        ([(np.zeros(3, np.float32), 2)], {"num_classes": 2}, "the 2 classes are 0 to 1"),
        ([(np.zeros(3, np.float32), np.eye(3)[0])], {}, "argmax"),
        ([(np.full((4, 4, 3), 200.0, np.float32), 0)], {}, "value_range"),
        ([(object(), 0)], {}, "x of item 0"),
    ],
)
def test_what_is_no_pair_of_data_and_condition_is_refused_by_name(dataset, options, message):
    with pytest.raises(InvalidInput, match=message):
        data.from_pairs(dataset, **options)


def test_a_pipeline_of_pairs_says_how_they_are_read():
    with pytest.raises(InvalidInput, match=r"data\.from_pairs"):
        next(data.pipeline(BYTES, 2, num_threads=0))
