"""When caches are filled: schedules as published, counted from simulated calls, in one program for all values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes
from diffusion_jax.acceleration import either, every, first_and_last, on_schedule, refresh, refresh_table
from diffusion_jax.errors import InvalidInput
from diffusion_jax.typing import Step


def filled(policy, steps):
    """The steps at which a run of `steps` fills the cache."""
    return refresh_table(policy, jnp.linspace(1.0, 0.0, steps + 1))


def test_every_fills_the_first_ones_and_then_each_nth_in_one_program():
    traces = []

    @jax.jit
    def run(interval, warmup):
        traces.append(1)
        return filled(every(interval, warmup), 20)

    for interval in (1, 2, 3, 5, 30):
        for warmup in (1, 2, 3, 20):
            now = np.asarray(run(jnp.int32(interval), jnp.int32(warmup)))
            expected = [i < warmup or (i - warmup + 1) % interval == 0 for i in range(20)]
            np.testing.assert_array_equal(now, expected)
            assert now.sum() == warmup + (20 - warmup) // interval
    assert len(traces) == 1


def test_schedules_say_where_and_an_empty_cache_is_filled_whatever_they_say():
    schedule = jnp.array([False, False, True, False, True])
    np.testing.assert_array_equal(filled(on_schedule(schedule), 5), [True, False, True, False, True])
    # The last entry serves later steps.
    np.testing.assert_array_equal(filled(on_schedule(schedule), 7)[5:], [True, True])


def test_both_ends_and_any_of_several():
    np.testing.assert_array_equal(np.flatnonzero(filled(first_and_last(2), 6)), [0, 1, 5])
    np.testing.assert_array_equal(np.flatnonzero(filled(first_and_last(2, last=False), 6)), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(filled(either(every(4), first_and_last()), 7)), [0, 4, 6])


def test_the_coordinate_of_a_step_is_that_of_its_noisiest_entry():
    process = processes.rectified_flow()
    step = Step(jnp.int32(3), jnp.array([[0.2, 0.5], [0.1, 0.0]]), jnp.zeros((2, 2)), jnp.int32(9))
    assert float(refresh.coordinate("index", step, process)) == 3.0
    assert float(refresh.coordinate("t", step, process)) == 0.5
    assert float(refresh.coordinate("log_snr", step, process)) == pytest.approx(0.0, abs=1e-5)
    ends = [step._replace(t=jnp.float32(t)) for t in (0.0, 1.0)]
    assert [float(refresh.coordinate("log_snr", end, process)) for end in ends] == [10.0, -10.0]


def test_what_is_no_policy_is_refused():
    for arguments in ((0,), (2, 0)):
        with pytest.raises(InvalidInput, match="at least 1"):
            every(*arguments)
    with pytest.raises(InvalidInput, match="one bool a step"):
        on_schedule(jnp.zeros((2, 2), bool))
    step = Step(0, jnp.float32(1), jnp.float32(0), 1)
    with pytest.raises(InvalidInput, match="coordinate"):
        refresh.coordinate("sigma", step, processes.rectified_flow())
