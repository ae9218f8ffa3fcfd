"""VideoScene: coarse and true clips are of the same cameras, students are told what the teacher was, stages share."""

import jax
import numpy as np
import pytest

from diffusion_jax import data, objectives
from diffusion_jax.config import load
from diffusion_jax.data.splat_scenes import FAR, NEAR
from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes import videoscene
from diffusion_jax.recipes.__main__ import main

FILE = "configs/recipes/videoscene.py"


def test_scenes_are_functions_of_their_number_and_of_nothing_else():
    source = data.splat_scenes(length=4, frames=3, size=8)
    whole, one = source.filmed(range(4)), source.filmed([2])
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(one)):
        np.testing.assert_allclose(ours[2], theirs[0], atol=1e-5)
    assert source[2]["x0"].shape == source.shape and source[2]["cond"]["rotation"].shape == (3, 3, 3)
    other = data.splat_scenes("test", length=4, frames=3, size=8).filmed([2])
    assert np.abs(other.clip.colour - one.clip.colour).max() > 0.1

    seen = whole.clip.opacity > 0.5
    assert seen.any() and NEAR < whole.clip.depth[seen].min() < whole.clip.depth[seen].max() < FAR
    np.testing.assert_allclose(whole.clip.colour[~(whole.clip.opacity > 1e-3)], -1.0, atol=5e-3)
    with pytest.raises(InvalidInput, match="frames"):
        data.splat_scenes(frames=1)


def test_cameras_are_told_as_the_first_of_a_clip_sees_them():
    filmed = data.splat_scenes(length=4, frames=3, size=8).filmed(range(4))
    told = videoscene.camera_channels(filmed.cameras)
    assert told.shape == (4, 3, 1, 1, 12)
    np.testing.assert_allclose(told[:, 0, 0, 0], np.tile([1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], (4, 1)), atol=1e-5)
    assert np.abs(told[:, 2] - told[:, 0]).max() > 0.1


def test_the_students_differ_in_what_is_claimed_alone():
    config = load(FILE)
    leap, plain, teacher = (config[name].to_dict() for name in ("leap", "plain", "teacher"))
    for name in ("policy", "times", "choosing", "until", "optimizer"):
        leap.pop(name), plain.pop(name, None)
    assert leap["objective"].pop("latest") == max(config.leap.times) and plain["objective"].pop("latest") == 1.0
    assert leap == plain
    for name in ("model", "process", "data", "components"):
        assert leap[name] == teacher[name]


def test_the_bandit_learns_in_theory_what_is_best():
    config = load(FILE).bandit
    u, d = np.asarray(config.noise), np.asarray(config.qualities)[:, None]
    curve = objectives.expected_leap_error(u, d)
    np.testing.assert_array_equal(u[curve.argmin(1)], np.maximum(0, 2 * d[:, 0] - 1))
    assert curve.mean(0).min() - curve.min(1).mean() > 0.05


def test_the_bandit_which_the_smoke_run_leaves_out_can_be_traced():
    config = load(FILE)
    shares = jax.eval_shape(lambda key: videoscene.bandit(config.bandit.to_dict(), key), jax.random.key(0))
    assert [one.shape for one in shares] == [(), (), ()]


def test_the_published_setting_has_the_layers_of_cogvideox(capsys):
    main(["videoscene:paper"])
    assert 7000 < float(capsys.readouterr().out.split("network: ")[1].split()[0].replace(",", "")) < 7500
