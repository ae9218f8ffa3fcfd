"""The small video transformer: a time for every frame, in a latent space, with a label where it has classes."""

import jax

from diffusion_jax import baselines, models
from diffusion_jax.experiment import prepare


def test_the_model_has_a_time_for_every_frame():
    small = {"clips": 32, "components": 8, "batch_size": 2, "width": 16, "depth": 2, "heads": 2}
    experiment = prepare(baselines.clip_transformer(2, classes=("colour",), **small))
    assert experiment.shape == (8, 1, 1, 8)
    batch = experiment.example(2)
    params = jax.eval_shape(experiment.init_params, jax.random.key(0))
    objective = experiment.objective
    state = objective.init(jax.random.key(0), params, batch)
    prepared = jax.eval_shape(objective.prepare, state, batch, jax.random.key(0))
    assert prepared["t"].shape == (2, 8)
    loss, _ = jax.eval_shape(objective.loss, params, state, batch, jax.random.key(0))
    assert loss.shape == (2,)
    assert experiment.conditions == (models.label(6),)
    assert prepare(baselines.clip_transformer(2, **small)).conditions == ()
