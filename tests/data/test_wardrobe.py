"""The wardrobe: its judge reads what its renderer draws, and an editor's input tells nothing of what was worn."""

import numpy as np
import pytest

from diffusion_jax.data import pipeline, try_on, wardrobe
from diffusion_jax.errors import InvalidInput

PERSONS, OUTFITS = try_on("test", length=200).draw(range(200))
IMAGES, PARSING = wardrobe.render(PERSONS, OUTFITS)


def test_what_is_drawn_is_read_exactly():
    reading = wardrobe.read(IMAGES, PARSING)
    for name, right in wardrobe.correct(reading, OUTFITS).items():
        assert np.nanmin(right) == 1, name
        assert (np.isnan(right) == ~OUTFITS.worn).all()
    assert reading.residual[OUTFITS.worn].max() < 1e-5


def test_the_judge_is_robust_to_noise_and_sees_swapped_clothes():
    noisy = IMAGES + np.random.default_rng(0).normal(0, 0.3, IMAGES.shape)
    assert np.nanmean(wardrobe.correct(wardrobe.read(noisy, PARSING), OUTFITS)["item"]) > 0.97
    other = wardrobe.exchanged(OUTFITS)
    dressed, parsing = wardrobe.render(PERSONS, other)
    assert np.nanmin(wardrobe.correct(wardrobe.read(dressed, parsing), other)["item"]) == 1
    # One look of 24 agrees by chance.
    assert np.nanmean(wardrobe.correct(wardrobe.read(IMAGES, parsing), other)["item"]) < 0.2


def test_every_item_is_seen_and_lies_under_the_mask():
    seen = np.stack([(2 + c == PARSING).sum((1, 2)) for c in range(5)], axis=1)
    assert (seen[OUTFITS.worn] >= 15).all() and not seen[~OUTFITS.worn].any()
    hidden = wardrobe.mask(PERSONS)
    assert hidden[PARSING >= 2].all() and 0.3 < hidden.mean() < 0.5


def test_the_input_of_an_editor_does_not_depend_on_the_clothes():
    other = wardrobe.exchanged(OUTFITS)
    own, swapped = (wardrobe.dressed_example(PERSONS, outfits) for outfits in (OUTFITS, other))
    np.testing.assert_array_equal(own["cond"]["concat"], swapped["cond"]["concat"])
    assert np.abs(own["x0"] - swapped["x0"]).max() > 0.5
    outside = own["cond"]["concat"][..., :1] == 0
    np.testing.assert_array_equal(own["x0"] * outside, own["cond"]["concat"][..., 1:] * outside)


def test_references_are_the_worn_items_in_their_cloth():
    cond = wardrobe.dressed_example(PERSONS, OUTFITS)["cond"]
    rows = np.arange(len(PARSING))
    for place in range(wardrobe.CAPACITY):
        item, present = cond["items"][:, place], cond["present"][:, place]
        assert OUTFITS.worn[rows, item][present].all()
        flat = cond["references"][:, place]
        assert not flat[~present].any()
        cloth = 2 * wardrobe.looks(OUTFITS.colour[rows, item], OUTFITS.texture[rows, item]) - 1
        same = np.abs(flat - cloth).max(-1) < 1e-6
        assert same[present].mean((1, 2)).min() > 0.08
    assert (cond["present"].sum(1) == OUTFITS.worn.sum(1)).all()
    assert {tuple(np.flatnonzero(worn)) for worn in OUTFITS.worn} == set(wardrobe.OUTFITS)


def test_tasks_have_one_input_and_the_answer_of_their_outfit():
    tasks = try_on("test", length=200).tasks(range(200))
    for which, outfits in (("paired", OUTFITS), ("unpaired", wardrobe.exchanged(OUTFITS))):
        task = tasks[which]
        np.testing.assert_array_equal(task.outfits.worn, outfits.worn)
        assert np.nanmin(wardrobe.correct(wardrobe.read(task.truth, task.parsing), outfits)["item"]) == 1
        np.testing.assert_array_equal(task.before, IMAGES)
    np.testing.assert_array_equal(tasks["paired"].cond["concat"], tasks["unpaired"].cond["concat"])


def test_references_may_be_more_or_fewer_than_there_are_items():
    cond = try_on("test", length=4).take(range(4))["cond"]
    five = wardrobe.repeated_references(cond, 5)
    assert five["references"].shape == (4, 5, 32, 32, 3) and five["present"].all()
    np.testing.assert_array_equal(five["items"][0], np.arange(5))
    np.testing.assert_array_equal(five["references"][:, 3], cond["references"][:, 0])
    assert wardrobe.repeated_references(cond, 1)["references"].shape[1] == 1


def test_a_source_is_a_function_of_its_indices():
    source = try_on(length=50)
    batch = next(iter(pipeline(source, 8, num_threads=0)))
    assert batch["x0"].shape == (8, 32, 32, 3) and batch["cond"]["references"].shape == (8, 3, 32, 32, 3)
    np.testing.assert_array_equal(source.take([7, 3])["x0"][1], source[3]["x0"])
    assert np.abs(source[0]["x0"] - try_on("test", length=50)[0]["x0"]).max() > 0.1
    with pytest.raises(IndexError):
        source.take([50])
    with pytest.raises(InvalidInput, match="length"):
        try_on(length=0)
    with pytest.raises(InvalidInput, match="images"):
        wardrobe.read(IMAGES[:, :16], PARSING)
