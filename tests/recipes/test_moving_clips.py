"""What recipes about moving clips share: their measures tell true clips from still, swapped and noisy ones."""

import numpy as np

from diffusion_jax.recipes.parts import moving_clips


def test_measures_know_the_truth_and_what_is_wrong():
    real = moving_clips.truth(64)
    still = np.repeat(real[:, :1], 8, axis=1)
    assert moving_clips.identity_share(real, real) > 0.99
    assert moving_clips.identity_share(still, real) > 0.99
    assert moving_clips.identity_share(real[::-1], real) < 0.3
    assert moving_clips.colour(still, real) > 0.99
    assert moving_clips.colour(real[::-1], real) < 0.5
    assert moving_clips.mean_position_error(real, real) == 0
    assert moving_clips.mean_position_error(still, real) > 1
    same, wrong = moving_clips.distances(real, real), moving_clips.distances(still, real)
    assert max(same.values()) < 1e-6
    assert wrong["motion"] > 1


def test_longer_clips_go_on_as_shorter_ones_began():
    np.testing.assert_array_equal(moving_clips.truth(2, frames=24)[:, :8], moving_clips.truth(2))
