"""Clips to train on, chunks of the teacher, measures as functions of time, and the published size."""

import functools

import jax
import numpy as np
import pytest

from diffusion_jax import data, denoisers
from diffusion_jax.config import build, load
from diffusion_jax.data import portrait
from diffusion_jax.models import LatentSpace
from diffusion_jax.recipes import live_avatar
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.timesteps import linspace
from tests.models.shared import drawn_params


@pytest.fixture(scope="module")
def teacher():
    return live_avatar.on_clips(load("configs/recipes/live_avatar.py:smoke").teacher)


def test_a_clip_has_the_portrait_or_a_frame_of_long_before(teacher):
    whole = build(teacher.config.data)
    count, frames = len(whole), teacher.config.frames
    assert len(teacher.source) == 2 * count and teacher.shape == (frames, 1, 1, 8)
    late = teacher.source[count + 3]
    np.testing.assert_array_equal(late["x0"], whole.x0[3, -frames:])
    np.testing.assert_array_equal(late["cond"]["reference"], whole.x0[3, 0])
    np.testing.assert_array_equal(late["cond"]["audio"], whole.cond["audio"][3, -frames:])
    still = whole.space.encode(whole.cond["reference"][3])
    np.testing.assert_allclose(teacher.source[3]["cond"]["reference"], still, atol=1e-5)


def test_chunks_of_the_teacher_know_nothing_of_each_other(teacher):
    example = teacher.example(2)
    params = drawn_params(teacher.network, example["x0"], np.zeros(2, np.float32), example["cond"])
    chunks = {"denoiser": denoisers.denoiser(teacher.network, teacher.process), "grid": linspace(2), "frames": 8}
    run = jax.jit(functools.partial(live_avatar.chunked, **chunks))
    audio = np.random.default_rng(0).standard_normal((2, 24, 16)).astype(np.float32)
    told = {"audio": audio, "reference": example["cond"]["reference"]}
    x = run(jax.random.key(0), params, told)
    changed = {**told, "audio": audio + (np.arange(24) // 8 == 1)[:, None]}
    other = run(jax.random.key(0), params, changed)
    same = np.abs(x - other).max((0, 2, 3, 4)).reshape(3, 8).max(1)
    assert x.shape == (2, 24, 1, 1, 8) and same[0] == same[2] == 0 < same[1]


def test_measures_are_of_windows():
    config = load("configs/recipes/live_avatar.py:smoke")
    config.update({"streams": 2, "length": 8, "window": 16})
    pixels = LatentSpace(lambda x: x, lambda x: x)
    people = live_avatar.crowd(config, pixels, 1)
    source = data.talking_faces("test", length=4, size=16, frames=64)
    clips = source.take([2, 3])["x0"]
    true = live_avatar.over_time(config, pixels, clips, people)
    assert {len(values) for values in true.values()} == {2} and (true["sync"] > 0.99).all()
    assert max(true[name].max() for name in ("colour", "shape", "flicker", "residual")) < 0.01
    darker = np.where(np.arange(64)[:, None, None, None] < 32, clips, 0.8 * clips - 0.2)
    colour = live_avatar.over_time(config, pixels, darker, people)["colour"]
    assert colour[0] < 0.01 and colour[1] > 0.1
    np.testing.assert_allclose(people.told["lit"]["reference"].min(), -0.4, atol=1e-6)
    np.testing.assert_allclose(people.told["own"]["audio"], portrait.log_mel(people.voices))


def test_the_published_setting_is_of_the_published_size(capsys):
    config = load("configs/recipes/live_avatar.py:paper")
    np.testing.assert_allclose(build(config.grid), [1.0, 0.9, 0.75, 0.5, 0.0], atol=1e-6)
    assert (config.model.block, config.model.window, config.lora.rank, config.lora.alpha) == (3, 3, 128, 64)
    main(["live_avatar:paper"])
    millions = float(capsys.readouterr().out.split("network: ")[1].split()[0].replace(",", ""))
    # Wan's 14 billion, and here a modulation and an audio attention of each block's own.
    assert 14_000 < millions < 32_000
