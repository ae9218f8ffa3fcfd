"""Low-rank adaptation to a time for each frame: the base until it is asked for more, and nothing else learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, denoisers, models, objectives, processes, sampling, solvers, timesteps, training
from diffusion_jax.models import by_path
from tests.models.shared import scramble

SHAPE = (2, 3, 4, 4, 2)
LABEL = {"label": jnp.array([0, 2])}


def clips(seed=0):
    return jax.random.normal(jax.random.key(seed), SHAPE)


def network(**fields):
    return models.video_dit(
        "S/2", **{"width": 16, "depth": 2, "heads": 2, "conditions": (models.label(3),), "attention": "joint", **fields}
    )


@pytest.fixture(scope="module")
def case():
    base = network()
    params = scramble(base.init(jax.random.key(0), clips(), jnp.zeros(2), LABEL))
    adapted = objectives.adaptation(
        adapters.lora(base, rank=2, select=("q", "v", "feed_forward/up")),
        params,
        lambda network: objectives.denoising(
            network, processes.rectified_flow(), timesteps.independent(timesteps.uniform()), t_shape=2
        ),
        {"x0": clips(), "cond": LABEL},
    )
    return base, params, adapted


def sampled(network, params, plan, x):
    sampler = sampling.make_sampler(
        denoisers.guided(denoisers.denoiser(network, processes.rectified_flow()), 1.5, null={"label": 3}),
        solvers.flow_euler(),
        shape=SHAPE[1:],
    )
    return sampler(jax.random.key(1), params, plan, LABEL, np.arange(2), x).x


def test_at_scale_0_the_sampler_is_the_base_and_given_frames_stay_bit_for_bit(case):
    base, params, adapted = case
    factors = scramble(adapted.init(jax.random.key(2)))
    grid, x = timesteps.linspace(3), clips(3)
    every, given = (timesteps.multiplied(grid, m) for m in ([1, 1, 1], [0, 1, 0.5]))
    before = sampled(base, params, every, x)
    np.testing.assert_array_equal(sampled(adapted.network, adapters.at_scale(params, factors, 0.0), every, x), before)
    # A scalar grid is another program: its sums are rounded elsewhere.
    np.testing.assert_allclose(sampled(base, params, grid, x), before, atol=2e-6)
    after = sampled(adapted.network, adapters.at_scale(params, factors, 1.4), given, x)
    np.testing.assert_array_equal(after[:, 0], x[:, 0])
    assert float(jnp.abs(after - sampled(base, params, given, x)).max()) > 0.01
    merged = adapters.merged(params, factors, 1.4)
    np.testing.assert_allclose(sampled(base, merged, given, x), after, atol=1e-4)


def test_only_factors_learn_each_frame_at_its_own_time_and_they_are_saved_alone(case, tmp_path):
    _, params, adapted = case
    batch = {"x0": clips(), "cond": LABEL, "index": jnp.arange(2)}
    optimizer = training.optimizers.adamw(1e-2)
    state = training.init_state(adapted.objective, optimizer, adapted.init, batch)
    key = jax.random.key(0)
    prepared = adapted.objective.prepare(adapted.objective.init(key, state.params, batch), batch, key)
    assert prepared["t"].shape == (2, 3) and float(jnp.ptp(prepared["t"], axis=1).min()) > 0
    state, _ = training.make_train_step(adapted.objective, optimizer)(state, batch)
    found = adapters.relative_change(params, state.params)
    assert {path.split("/")[-1] for path in found} == {"q", "v", "up"} and min(found.values()) > 0
    training.save_params(tmp_path, state.params)
    for path, leaf in by_path(training.load_params(tmp_path)).items():
        np.testing.assert_array_equal(leaf, by_path(state.params)[path])
