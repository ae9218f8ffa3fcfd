"""Every preset runs wherever a plain denoiser does, does less, and can be named in a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import acceleration, denoisers, models, processes, solvers, timesteps
from diffusion_jax.config import call
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import defaults, prepare, prepare_sampling
from diffusion_jax.sampling import make_sampler, sample

STEPS = 12


@pytest.fixture(scope="module")
def model():
    network, x, cond = (
        models.dit(width=16, depth=2, heads=2, conditions=(models.label(3),)),
        jnp.zeros((2, 4, 4, 1)),
        {"label": jnp.array([0, 2])},
    )
    params = network.init(jax.random.key(0), x, jnp.zeros(2), cond)
    return network, jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.02), params), cond


def guided_run(model, make):
    network, params, cond = model
    denoiser = denoisers.guided(make(network, processes.vp_linear()), 1.5, null={"label": 3})
    key, grid = jax.random.key(0), timesteps.linspace(STEPS)
    run = jax.jit(lambda params: sample(key, denoiser, params, solvers.ddim(), grid, shape=(2, 4, 4, 1), cond=cond))
    return run(params)


@pytest.fixture(scope="module")
def plain(model):
    return guided_run(model, denoisers.denoiser)


@pytest.mark.parametrize("preset", acceleration.PRESETS)
def test_a_preset_does_less_and_stays_near(model, plain, preset):
    fast = guided_run(model, lambda network, process: acceleration.accelerated(network, process, preset))
    assert float(fast.cost.compute) <= float(plain.cost.compute)
    assert (float(fast.cost.evaluations) < float(plain.cost.evaluations)) == (preset != "plain")
    # The features of so small a network move slowly, so every forecast is good.
    np.testing.assert_allclose(fast.x, plain.x, atol=0.05 * float(jnp.abs(plain.x).max()))


def test_a_preset_with_other_settings_is_what_they_say(model):
    process = processes.vp_linear()
    fast, slow = (
        guided_run(model, lambda network, process, n=n: acceleration.accelerated(network, process, "dmd", interval=n))
        for n in (4, 2)
    )
    assert float(fast.cost.evaluations) < float(slow.cost.evaluations)
    for name, preset in acceleration.PRESETS.items():
        with pytest.raises(InvalidInput, match=f"preset '{name}'"):
            acceleration.accelerated(model[0], process, name, intervall=3)
        for setting in preset.settings:
            with pytest.raises(InvalidInput, match=f"accelerated.{setting} is 'much'"):
                acceleration.accelerated(model[0], process, name, **{setting: "much"})


def test_a_preset_on_a_mesh_leaves_the_same_trace(model):
    """One of them: each kind of denoiser is run on a mesh where its own laws are."""
    network, params, _ = model
    cond, index = {"label": jnp.arange(8) % 3}, jnp.arange(8)
    quick = acceleration.accelerated(network, processes.rectified_flow(), "taylorseer")
    one, eight = (
        make_sampler(quick, solvers.flow_euler(), shape=(4, 4, 1), mesh=mesh, save_every=1)(
            jax.random.key(0), params, timesteps.linspace(6), cond, index
        )
        for mesh in (None, make_mesh(data=8))
    )
    assert one.trace.shape == (6, 8, 4, 4, 1)
    np.testing.assert_allclose(eight.trace, one.trace, atol=1e-5)
    assert float(eight.cost.compute) == pytest.approx(float(one.cost.compute))


def test_presets_are_named_in_configs():
    config = defaults(steps=1, batch_size=8)
    config.data = config.held_out = call("data.digits")
    config.model = call("models.dit", width=16, depth=2, heads=2, conditions=(models.label(10),))
    config.process = call("processes.rectified_flow")
    config.objective = call("objectives.denoising")
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-3)
    config.sampling.update(solver=call("solvers.ddim"), grid=call("timesteps.linspace", steps=4))
    config.sampling.acceleration.preset = "taylorseer_vast"
    with pytest.raises(InvalidInput, match="taylorseer_fast"):
        prepare_sampling(prepare(config))
    config.sampling.acceleration.preset = "taylorseer_fast"
    experiment = prepare(config)
    carry = jax.eval_shape(
        lambda key: prepare_sampling(experiment).denoiser.init(
            experiment.init_params(key), jnp.zeros((2, 8, 8, 1)), {"label": jnp.zeros(2, jnp.int32)}
        ),
        jax.random.key(0),
    )
    assert jax.tree.leaves(carry)
