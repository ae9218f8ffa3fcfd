"""Shadows on pictures: physics, splits, and that an example is the same wherever it is asked for."""

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import shadows
from diffusion_jax.errors import InvalidInput


def test_an_example_depends_on_its_number_alone_and_splits_share_neither_occluders_nor_pictures():
    few, many, test = (
        data.shadow_pairs(length=4, size=16),
        data.shadow_pairs(length=9, size=16),
        data.shadow_pairs("test", 9, 16),
    )
    for name in ("x0", "visibility", "attenuation"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:4])
    np.testing.assert_array_equal(few.cond["picture"], many.cond["picture"][:4])
    assert {*many.outline} <= {"polygon", "bar"} and {*test.outline} <= {"star", "leaves"}
    assert not {x.tobytes() for x in many.x0} & {x.tobytes() for x in test.x0}


def test_lit_pixels_stay_shadows_are_darker_and_bluer_and_the_rest_lies_between():
    source = data.shadow_pairs("test", 12)
    rows = np.arange(12)
    x, y, masks = source.x0, source.cond["picture"], source.regions(rows)
    np.testing.assert_array_equal(sum(masks.values()), np.ones_like(source.visibility))
    lit = np.broadcast_to(source.visibility == 1, x.shape)
    np.testing.assert_allclose(y[lit], x[lit], atol=1e-6)
    assert (y <= x + 1e-6).all() and y.min() >= -1
    light = (((y + 1) / 2) ** 2.2 / np.maximum(((x + 1) / 2) ** 2.2, 1e-9))[np.broadcast_to(x > -0.8, x.shape)]
    dark = np.broadcast_to(source.attenuation[:, None, None], x.shape)[np.broadcast_to(x > -0.8, x.shape)]
    assert (light > dark - 1e-3).all(), "no pixel has less than the light of the sky"
    assert (source.attenuation[:, 2] >= source.attenuation[:, 0]).all()
    covered = 1 - source.visibility.mean((1, 2, 3))
    assert covered.min() >= 0.15 and covered.max() <= 0.6


def test_the_penumbra_widens_with_the_distance_of_the_occluder():
    def edge(height):
        seen = shadows.visibility(np.full((64, 64), height), lambda points: points[..., 0] < 0.5)
        return int(((seen > 0) & (seen < 1)).any(axis=(0, 2)).sum())

    near, far = edge(4.0), edge(16.0)
    # 2 h tan(rho) of 64 pixels a side.
    assert near == pytest.approx(2 * 4 * 0.0047 * 64, abs=1) and far == pytest.approx(2 * 16 * 0.0047 * 64, abs=2)


def test_the_truth_has_no_shadow_left_and_a_gain_cannot_remove_one():
    source = data.shadow_pairs("test", 12)
    masks, picture = source.regions(np.arange(12)), source.cond["picture"]
    assert shadows.light_error(source.x0, source.x0, masks["shadow"]) == 0
    bright = shadows.with_shadow(source.x0, np.float32(0.0), np.float32(0.7))
    lit = shadows.light_error(bright, source.x0, masks["shadow"])
    assert 0.2 < lit < -np.log(0.7) + 0.01 < shadows.light_error(picture, source.x0, masks["shadow"])
    some = masks["shadow"] * (np.arange(12) < 3)[:, None, None, None]
    few = shadows.light_error(picture[:3], source.x0[:3], some[:3])
    assert shadows.light_error(picture, source.x0, some) == pytest.approx(few), "others have no such pixels"
    dark = np.where(np.arange(3) == 1, -1.0, picture)
    assert (shadows.best_gain(dark, source.x0)[..., 1] == -1).all()
    # One light for all is what a gain removes.
    np.testing.assert_allclose(shadows.best_gain(bright, source.x0), source.x0, atol=1e-3)
    error = np.square(shadows.best_gain(picture, source.x0) - source.x0).mean((1, 2, 3))
    assert (error < np.square(picture - source.x0).mean((1, 2, 3))).mean() > 0.7 and error.min() > 1e-4


def test_what_is_wrong_is_told():
    with pytest.raises(InvalidInput, match="length"):
        data.shadow_pairs(length=0)
    with pytest.raises(InvalidInput, match="split"):
        data.shadow_pairs("validation")
