"""What the study of SDP measures, and the released settings."""

import jax
import numpy as np
import pytest

from diffusion_jax.config import build, load
from diffusion_jax.control import Rollout
from diffusion_jax.recipes import sdp
from diffusion_jax.recipes.__main__ import main


def test_the_released_settings_train_the_levels_of_their_stream(capsys):
    config = load("configs/recipes/sdp.py:paper")
    draw = build(config.objective.draw)
    t, weight = draw.draw(draw.init(), jax.random.key(0), (4000, 20))
    levels = np.round(np.asarray(t) * 100).astype(int) - 1
    assert (np.asarray(weight) == 1).all()
    constant = (levels == levels[:, :1]).all(axis=1)
    assert 0.17 < constant.mean() < 0.23
    assert set(levels[constant, 0]) == set(range(100))
    # The entry of the past joins the first chunk, an incomplete tail the last one.
    visited = {(*[49 - j] * 9, *[99 - j] * 11) for j in range(50)}
    assert set(map(tuple, levels[~constant])) == visited
    assert build(config.process).schedule.num_steps == 100
    main(["sdp:paper"])
    assert "million parameters" in capsys.readouterr().out


def test_what_a_jump_takes_is_a_share_of_the_successes_without_it():
    names = {"full, mixed": ([1.0, 0.8], [0.9, 0.8]), "stream": ([0.5, 0.4], [0.25, 0.1])}
    found = {}
    for name, (calm, after) in names.items():
        found |= {f"{name}, table: in time": calm, f"{name}, jump: in time": after}
    (row,) = sdp.success_rows(found)
    assert row.title == "It reacts later: stream" and row.direction == "higher"
    assert row.ours == pytest.approx([0.5, 0.75]) and row.against == pytest.approx([0.1, 0.0])


def test_episodes_are_in_time_until_the_deadline():
    config = load("configs/recipes/sdp.py")
    config.update({"deadline": 2, "chunk": 2})
    done = np.array([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    state = sdp.tabletop.State(*[np.zeros((4, 5, 2), np.float32)] * 4)
    figures = sdp.measures(Rollout(state, np.zeros((4, 4, 2), np.float32), done), config)
    assert figures == {"success": 0.75, "in time": 0.5, "wavering": 0.0}
