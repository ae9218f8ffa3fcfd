"""What recipes about moving clips share: their measures tell true clips from still, swapped and noisy ones."""

import jax
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


def test_the_model_has_a_time_for_every_frame():
    config = moving_clips.clip_experiment(2, clips=32, components=8, batch_size=2, width=16, depth=2, heads=2)
    experiment, space = moving_clips.prepared(config)
    assert experiment.shape == (8, *space.shape) == (8, 1, 1, 8)
    batch = experiment.example(2)
    params = jax.eval_shape(experiment.init_params, jax.random.key(0))
    objective = experiment.objective
    state = objective.init(jax.random.key(0), params, batch)
    prepared = jax.eval_shape(objective.prepare, state, batch, jax.random.key(0))
    assert prepared["t"].shape == (2, 8)
    loss, _ = jax.eval_shape(objective.loss, params, state, batch, jax.random.key(0))
    assert loss.shape == (2,)
