"""What the study of the difficulty curriculum adds: its ramps, when a loss is reached, and the published setting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.config import build, load
from diffusion_jax.recipes import difficulty_curriculum
from diffusion_jax.recipes.__main__ import main

FILE = "configs/recipes/difficulty_curriculum.py"


@pytest.mark.parametrize(("name", "share"), [("easy first", 0.1), ("hard first", 0.1), ("easy first, long", 0.4)])
def test_the_last_stage_begins_after_the_share_of_the_steps_that_is_said(name, share):
    config = load(FILE)
    draw, steps = build(config.draws[name]), config.experiment.train.steps

    @jax.jit
    def stages():
        state, loss = draw.init(), jnp.ones(1)
        body = lambda state, _: (made := draw.update(state, loss, loss), made.stage)  # noqa: E731
        return jax.lax.scan(body, state, length=steps)[1]

    assert np.argmax(np.asarray(stages()) == config.intervals) + 1 == share * steps


def test_a_loss_is_reached_when_it_is_first_as_low_or_in_the_end():
    losses, bound = np.array([[4.0, 3, 1, 2, 1], [4.0, 3, 3, 3, 3], [1.0, 2, 2, 2, 2]]), np.array([1.0, 2.0, 2.0])
    assert difficulty_curriculum.share_until(losses, bound) == [0.5, 1.0, 0.0]


def test_a_network_of_one_interval_is_looked_at_there():
    """The loss of a network that answers 0 is the variance of noise; of one that knows only its time it differs."""
    one = difficulty_curriculum.prepare(load(f"{FILE}:smoke").experiment)
    times = one._replace(
        network=one.network._replace(apply=lambda params, x, t, cond, **_: (x * 0 + t[:, None, None, None] / 1000, {}))
    )
    loss = jax.jit(difficulty_curriculum.held_out_loss(times, 2))
    for low, high in ((0.0, 0.25), (0.5, 1.0)):
        # E (eps - t)^2 = 1 + E t^2 for t uniform in [low, high].
        expected = 1 + (high**3 - low**3) / 3 / (high - low)
        np.testing.assert_allclose(loss({}, low, high), expected, rtol=0.02)


def test_the_published_setting(capsys):
    main(["difficulty_curriculum:paper"])
    assert 120 < float(capsys.readouterr().out.split("network: ")[1].split()[0]) < 140
    assert load(f"{FILE}:paper").objective.draw.edges == 20
