"""Laws of grids and mappings: they fall from 1 to 0, hit the published times, and units map back."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax import processes, timesteps
from diffusion_jax.errors import InvalidInput

PROCESSES = {
    "vp": processes.vp_linear(),
    "ztsnr": processes.vp_scaled_linear(zero_terminal_snr=True),
    "edm": processes.edm(),
    "flow": processes.rectified_flow(),
    "ve": processes.variance_exploding(),
}
GRIDS = {
    "linspace": timesteps.linspace,
    "linspace_1000": lambda steps: timesteps.linspace(steps, 1000),
    "trailing": lambda steps: timesteps.trailing(steps, 1000),
    "quadratic": timesteps.quadratic,
    "beta": timesteps.beta_grid,
    "shift": lambda steps: timesteps.shift(timesteps.linspace(steps), 3.0),
    "resolution": lambda steps: timesteps.resolution_shift(timesteps.linspace(steps), 1024),
    **{f"karras_{name}": lambda steps, p=p: timesteps.karras(p, steps) for name, p in PROCESSES.items()},
    **{f"log_snr_{name}": lambda steps, p=p: timesteps.uniform_log_snr(p, steps) for name, p in PROCESSES.items()},
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [2, 5, 50])
def test_grids_fall_from_one_to_zero(name, steps):
    grid = np.asarray(GRIDS[name](steps))
    assert grid.shape == (steps + 1,) and grid.dtype == np.float32
    assert grid[0] == 1.0 and grid[-1] == 0.0
    assert (np.diff(grid) < 0).all()


def test_discrete_grids_are_the_published_indices():
    """Lin et al. 2024, table 2, with 5 steps; the middle of `linspace` is rounded from index 499.5 as in diffusers."""
    expected = {
        "leading": (timesteps.leading(5, 1000, steps_offset=0), [801, 601, 401, 201, 1]),
        "linspace": (timesteps.linspace(5, 1000), [1000, 750, 501, 251, 1]),
        "trailing": (timesteps.trailing(5, 1000), [1000, 800, 600, 400, 200]),
    }
    for name, (grid, times) in expected.items():
        np.testing.assert_allclose(1000 * grid, [*times, 0], atol=1e-3, err_msg=name)
    np.testing.assert_allclose(1000 * timesteps.leading(5, 1000, 1)[0], 802, atol=1e-3)


def test_karras_levels_are_those_of_the_paper():
    grid = timesteps.karras(processes.edm(), 18, sigma_min=0.002, sigma_max=80)
    sigma = 80 * np.asarray(grid, np.float64)
    assert sigma[[0, 17]] == pytest.approx([80, 0.002], rel=1e-4)
    np.testing.assert_allclose(np.diff(sigma[:-1] ** (1 / 7), 2), 0.0, atol=1e-4)


def test_noise_ratios_are_met_and_nodes_are_exact():
    process = processes.vp_scaled_linear()
    ratios = process.schedule.noise_ratios
    np.testing.assert_array_equal(
        timesteps.from_noise_ratios(process, ratios[[1000, 500, 1]], 1e-3),
        timesteps.from_indices([999, 499, 0], 1000, 1e-3),
    )
    for name, shape in timesteps.NOISE_RATIOS.items():
        found = shape(9, 0.1, 10.0)
        assert found[0] == pytest.approx(10.0) and found[-1] == pytest.approx(0.1) and (np.diff(found) < 0).all(), name
        times = timesteps.from_noise_ratios(processes.edm(20.0), found)
        np.testing.assert_allclose(20.0 * times[:-1], found, rtol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_uniform_log_snr_is_uniform_in_log_snr(name):
    grid = timesteps.uniform_log_snr(PROCESSES[name], 12, -4.0 if name != "edm" else -8.0, 6.0)
    steps = np.diff(PROCESSES[name].log_snr(grid[:-1]))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)


@settings(deadline=None, max_examples=20)
@given(s=st.floats(0.2, 8.0))
def test_shifts_move_the_log_snr_of_a_flow_and_compose(s):
    grid, flow = timesteps.linspace(10), PROCESSES["flow"]
    shifted = timesteps.shift(grid, s)
    inner = slice(1, -1)
    np.testing.assert_allclose(flow.log_snr(shifted)[inner], flow.log_snr(grid)[inner] - 2 * np.log(s), atol=2e-5)
    np.testing.assert_allclose(timesteps.shift(shifted, 1 / s), grid, atol=1e-6)


def test_resolution_shift_passes_through_its_two_points():
    grid = timesteps.linspace(4)
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        np.testing.assert_allclose(
            timesteps.resolution_shift(grid, tokens), timesteps.shift(grid, float(np.exp(mu))), atol=1e-6
        )
    sqrt = timesteps.resolution_shift(grid, 1024, 256, rule="sqrt")
    np.testing.assert_allclose(sqrt, timesteps.shift(grid, 2.0), atol=1e-6)


def test_index_round_trip_and_buckets():
    for num_steps in (1, 7, 1000, 4096):
        index = jnp.arange(num_steps)
        t = timesteps.index_to_time(index, num_steps)
        np.testing.assert_array_equal(timesteps.time_to_index(t, num_steps), index)
        centre = timesteps.bucket_center(index, num_steps)
        np.testing.assert_array_equal(timesteps.bucket(centre, num_steps), index)
    np.testing.assert_array_equal(timesteps.bucket(jnp.array([0.0, 0.249, 0.25, 1.0]), 4), [0, 0, 1, 3])
    np.testing.assert_array_equal(timesteps.bucket_of(jnp.array([-5.0, 0.0, 3.0]), [-1.0, 2.0]), [0, 1, 2])


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_ratio_round_trip_and_windows(name):
    process = PROCESSES[name]
    t = jnp.array([0.01, 0.2, 0.5, 0.9])
    np.testing.assert_allclose(timesteps.time_at_noise_ratio(process, timesteps.noise_ratio(process, t)), t, rtol=2e-5)
    low, high = timesteps.log_snr_window(process, *map(float, process.log_snr(t[jnp.array([2, 1])])))
    np.testing.assert_allclose([low, high], t[1:3], rtol=2e-5)
    np.testing.assert_array_equal(timesteps.in_window(t, low * 0.999, high * 1.001), [False, True, True, False])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: timesteps.linspace(0), "steps is 0"),
        (lambda: timesteps.trailing(-3, 1000), "steps is -3"),
        (lambda: timesteps.leading(2000, 1000), "1000 steps"),
        (lambda: timesteps.leading(1000, 1000, 1), "steps_offset"),
        (lambda: timesteps.from_array([1.0, 0.4, 0.5, 0.0]), "entry 2 is larger than entry 1"),
        (lambda: timesteps.from_array([2.0, 0.0]), r"lie in \[0, 1\]"),
        (lambda: timesteps.from_array([float("nan"), 0.0]), r"lie in \[0, 1\]"),
        (lambda: timesteps.from_array([1.0]), "at least two"),
        (lambda: timesteps.from_indices([1000], 1000), "indices span"),
        (lambda: timesteps.karras(processes.edm(), 5, sigma_max=100), "sigma_max"),
        (lambda: timesteps.karras(processes.edm(), 5, sigma_min=90), "sigma_min"),
        (lambda: timesteps.karras(processes.JointProcess({"a": processes.edm()}), 5), "one entry"),
        (lambda: timesteps.shift(timesteps.linspace(4), 0), "shift is 0"),
        (lambda: timesteps.resolution_shift(timesteps.linspace(4), rule="sqr"), "did you mean 'sqrt'"),
        (lambda: timesteps.bucket(0.5, 0), "num_buckets"),
    ],
)
def test_wrong_values_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


def test_a_grid_spliced_to_another_hands_over_at_the_nearest_time():
    long, short = timesteps.linspace(10), timesteps.from_array([1.0, 0.72, 0.31, 0.0])
    grid, which, stop = timesteps.spliced(long, short, 1)
    np.testing.assert_allclose(grid, [1.0, 0.9, 0.8, 0.72, 0.31, 0.0], atol=1e-6)
    np.testing.assert_array_equal(which, [0, 0, 0, 1, 1])
    assert stop == 3
    for k in range(4):
        itself, which, stop = timesteps.spliced(short, short, k)
        np.testing.assert_array_equal(itself, short)
        np.testing.assert_array_equal(which, [0] * k + [1] * (3 - k))
        assert stop == k
    np.testing.assert_array_equal(timesteps.spliced(long, short, 0).grid, short)
    np.testing.assert_array_equal(timesteps.spliced(long, short, 3).grid, long)
    with pytest.raises(InvalidInput, match="k is 4"):
        timesteps.spliced(long, short, 4)
    with pytest.raises(InvalidInput, match="one time a step"):
        timesteps.spliced(long[:, None], short, 1)


def test_padded_grids_stand_still_at_their_end():
    grid = timesteps.quadratic(4)
    found = timesteps.padded(grid, 7)
    np.testing.assert_array_equal(found[:5], grid)
    np.testing.assert_array_equal(found[5:], np.full(3, grid[-1]))
    np.testing.assert_array_equal(timesteps.padded(grid, 4), grid)
    assert timesteps.padded(jnp.zeros((5, 1, 3)), 6).shape == (7, 1, 3)
    with pytest.raises(InvalidInput, match="at least the 4 steps"):
        timesteps.padded(grid, 3)
