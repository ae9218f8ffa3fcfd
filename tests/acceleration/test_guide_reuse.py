"""Laws of guidance with a forecast guide: refreshed always it is guidance; a skipped step runs the main row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes
from diffusion_jax.acceleration import cached_outputs, every, guided_with_reuse, reused_guide
from diffusion_jax.denoisers import guided, in_one_batch, linear_rule, steered
from diffusion_jax.errors import InvalidInput
from tests.acceleration.test_outputs import FLOW, NULL, PARAMS, plain, run
from tests.denoisers.tiny import network, remembering


@pytest.mark.parametrize("options", [{}, {"interval": (0.3, 0.8)}, {"rescale": 0.7}], ids=str)
def test_refreshed_at_every_step_it_is_guided_bit_for_bit(options):
    found = run(guided_with_reuse(plain(), 3.0, NULL, refresh=every(1), **options))
    expected = run(guided(plain(), 3.0, NULL, **options))
    np.testing.assert_array_equal(found.x, expected.x)
    assert float(found.cost.evaluations) == float(expected.cost.evaluations)


def test_a_skipped_step_runs_the_conditional_rows_alone():
    calls = []
    counted = plain(on_call=lambda rows: calls.append(int(rows)))
    found = run(guided_with_reuse(counted, 3.0, NULL, refresh=every(2)))
    jax.effects_barrier()
    assert calls == [16, 8, 16, 8, 16, 8]
    assert float(found.cost.evaluations) == 9


def test_a_difference_that_does_not_change_is_forecast_exactly():
    """Two points: main and guide differ by a constant in the clean sample, so by alpha / sigma of it in the noise."""
    points = denoisers.gaussian_mixture(jnp.stack([jnp.ones((4, 2)), -jnp.ones((4, 2))]), 0.0, labels=[0, 4])
    cond = {"label": jnp.zeros(8, jnp.int32)}
    exact = denoisers.analytic(FLOW)
    expected = run(guided(exact, 2.0, NULL), params=points, cond=cond)
    found = run(guided_with_reuse(exact, 2.0, NULL, refresh=every(9), prediction="x0"), params=points, cond=cond)
    np.testing.assert_allclose(found.x, expected.x, atol=1e-4)
    assert float(found.cost.evaluations) == 7


def test_the_error_of_a_reused_guide_falls_with_the_steps():
    def error(steps):
        grid = jnp.linspace(1.0, 0.0, steps + 1)
        found = run(guided_with_reuse(plain(), 3.0, NULL, refresh=every(2)), grid=grid).x
        return float(jnp.abs(found - run(guided(plain(), 3.0, NULL), grid=grid).x).mean())

    assert error(40) < 0.5 * error(10)


def test_other_rules_two_networks_and_memories_work_unchanged():
    rule = linear_rule(FLOW)
    branches = denoisers.from_two_networks(plain(), plain(), NULL, 0.5)
    both = {"main": PARAMS, "guide": jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS)}
    found = run(steered(reused_guide(branches, every(1)), rule, 2.0), params=both)
    np.testing.assert_array_equal(found.x, run(steered(branches, rule, 2.0), params=both).x)
    assert float(run(steered(reused_guide(branches, every(2)), rule, 2.0), params=both).cost.compute) == 6 + 3 * 0.5
    memory = remembering(plain())
    found = run(guided_with_reuse(memory, 2.0, NULL, refresh=every(1), interval=(0.0, 0.7)))
    np.testing.assert_array_equal(found.x, run(guided(memory, 2.0, NULL, interval=(0.0, 0.7))).x)
    # The guide was left out, so both rows begin anew, as they do where an interval leaves it out.
    twice = run(steered(reused_guide(in_one_batch(memory, NULL), every(3)), rule, 2.0))
    assert float(twice.cost.evaluations) == 8 and bool(jnp.isfinite(twice.x).all())
    # Its own reuse within, and that of the whole around it.
    nested = run(cached_outputs(guided_with_reuse(plain(), 2.0, NULL, refresh=every(2)), every(2)))
    assert float(nested.cost.evaluations) == 2 + 1 + 2


def test_discrete_answers_have_no_difference_of_outputs():
    with pytest.raises(InvalidInput, match="discrete"):
        guided_with_reuse(denoisers.denoiser(network(4), processes.absorbing(4)), 2.0, NULL, refresh=every(2))
