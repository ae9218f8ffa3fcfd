"""FVDM: tasks are which frames stand at zero, arms differ in p alone, long clips go on; the published setting is
Latte's."""

import jax
import numpy as np
import pytest

from diffusion_jax import timesteps
from diffusion_jax.config import load
from diffusion_jax.models import video_dit
from diffusion_jax.recipes import fvdm
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.study import Study, table
from tests.models.shared import compiled, drawn_params

FILE = "configs/recipes/fvdm.py"


@pytest.mark.parametrize("task", fvdm.TASKS)
def test_a_task_is_which_frames_stand_at_zero(task):
    grid = timesteps.linspace(4)
    times = np.asarray(timesteps.frames(grid, fvdm.FRAMES, fvdm.TASKS[task]))
    assert times.shape == (5, 1, 8)
    given = np.zeros(8, bool)
    given[list(fvdm.TASKS[task])] = True
    assert (times[:, :, given] == 0).all()
    np.testing.assert_array_equal(times[:, 0, ~given], np.repeat(np.asarray(grid)[:, None], (~given).sum(), axis=1))


def test_blending_keeps_the_ends():
    clips = np.random.default_rng(0).uniform(-1, 1, (2, 8, 4, 4, 3)).astype(np.float32)
    between = fvdm.blended(clips)
    np.testing.assert_allclose(between[:, [0, -1]], clips[:, [0, -1]], atol=1e-6)
    assert fvdm.blended_error(clips) > 0.1 and fvdm.blended_error(between) < 1e-10


def test_the_arms_differ_in_p_alone():
    arms = load(FILE).arms
    shares = {}
    for name, entry in arms.items():
        shares[name] = entry.objective.draw.probability
        entry.objective.draw.probability = 0.0
    assert shares == {"synchronous": 0.0, "mixed": 0.2, "independent": 1.0}
    assert all(entry.to_dict() == arms.mixed.to_dict() for entry in arms.values())


def test_the_published_setting_has_a_time_for_every_frame_and_the_size_of_latte(capsys):
    main(["fvdm:paper"])
    assert 650 < float(capsys.readouterr().out.split("network: ")[1].split()[0]) < 700
    config = load(f"{FILE}:paper")
    assert config.inputs.t == (16,) and config.objective.draw.probability == 0.2


def test_frames_are_a_set_without_temporal_positions():
    """Permuting frames together with their times permutes the answer: times reach their own frame's patches."""
    network = video_dit("S/2", patch=2, width=16, depth=2, heads=2, temporal_positions="none")
    x, t = (np.asarray(draw(jax.random.key(0), shape)) for draw, shape in
            ((jax.random.normal, (2, 5, 4, 4, 3)), (jax.random.uniform, (2, 5))))  # fmt: skip
    params = drawn_params(network, x, t, {})
    order = np.array([3, 0, 4, 1, 2])
    apply = compiled(lambda x, t: network.apply(params, x, t, {})[0])
    np.testing.assert_allclose(apply(x[:, order], t[:, order]), apply(x, t)[:, order], atol=1e-5)
    assert np.abs(apply(x[:, order], t) - apply(x, t)[:, order]).max() > 1e-3


@pytest.mark.usefixtures("one_device")
def test_long_clips_go_on_and_tasks_keep_what_is_given(tmp_path):
    """The smoke run makes no long clips."""
    config = load(f"{FILE}:smoke")
    config.chunks, config.tasks = 2, ("image to video",)
    s = Study(config, (0,), tmp_path, True, {})
    known = np.random.default_rng(0).standard_normal((2, 8, 1, 1, 8), np.float32)
    arms = fvdm.task_arms(s, known)(0)
    chosen = {name: arms[name] for name in ("mixed, start and end", "mixed, extension", "replacement", "mixed, long")}
    found = table(chosen, (0,), {}, shape=(8, 1, 1, 8), count=2)
    x = found.samples
    np.testing.assert_array_equal(x["mixed, start and end"][:, [0, 7]], known[:, [0, 7]])
    np.testing.assert_array_equal(x["mixed, extension"][:, :4], known[:, :4])
    np.testing.assert_allclose(x["replacement"][:, 0], known[:, 0], atol=1e-5)
    assert x["mixed, long"].shape == (2, 12, 1, 1, 8) and np.isfinite(x["mixed, long"]).all()
    np.testing.assert_array_equal(x["mixed, long"][:, :4], known[:, :4])
    assert [found[name]["evaluations"][0] for name in chosen] == [2, 2, 2, 4]
