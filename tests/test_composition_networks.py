"""The composition matrix on the library's own networks: each with transformations, solvers, times and a mesh.

`test_composition` takes a covering sample of the whole product on a network of a few numbers; here the networks are
real (tiny), so that what they do with vector times, labels and doubled batches is part of the promise.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, distributed, models, processes, sampling, solvers
from tests.test_composition import DISCRETE_SOLVERS, TWO_NETWORKS, transformations
from tests.test_composition import SOLVERS as EVERY_SOLVER

BATCH, CLASSES = 8, 3
LABELS = {"label": jnp.arange(BATCH) % CLASSES}
NULL = {"label": CLASSES}
FLOW = processes.rectified_flow()

NETWORKS = {
    "dit": (models.dit("S/2", width=16, depth=2, heads=2, num_classes=CLASSES), (4, 6, 3), FLOW),
    "unet": (
        models.unet(channels=8, multipliers=(1, 1), num_residual=1, attention=(0, 1), heads=2, num_classes=CLASSES),
        (4, 4, 1),
        processes.edm(),
    ),
    "mlp": (models.mlp(width=16, depth=2, num_classes=CLASSES), (3,), processes.vp_cosine(prediction="v")),
    "text": (
        models.text_transformer(vocab_size=5, width=16, depth=1, heads=2, num_classes=CLASSES),
        (6,),
        processes.absorbing(5),
    ),
}

CASES = [
    ("dit", "dpm", "plain", 1),
    ("dit", "heun", "guided", 2),
    ("dit", "dpm", "bounded", 3),
    ("unet", "heun", "guided", 1),
    ("unet", "dpm", "bounded", 3),
    ("mlp", "dpm", "guided", 2),
    ("mlp", "heun", "bounded", 1),
    ("text", "ancestral", "guided", 1),
    ("text", "ancestral", "plain", 2),
]
SOLVERS = {"dpm": solvers.dpm_solver_pp(2), "heun": solvers.heun(), "ancestral": solvers.ancestral()}
TRANSFORMATIONS = {
    "plain": lambda d: d,
    "guided": lambda d: denoisers.guided(d, 2.0, NULL, interval=(0.2, 0.9)),
    "bounded": lambda d: denoisers.thresholded(denoisers.guided(d, 2.0, NULL)),
}


def drawn_params(network, shape, cond, dtype=jnp.float32):
    """Random parameters: fresh networks answer zero, and every parameter is to have a say."""
    x = jnp.zeros((1, *shape), dtype)
    params = network.init(jax.random.key(0), x, jnp.zeros(1), jax.tree.map(lambda leaf: leaf[:1], cond))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.05 * jax.random.normal(next(keys), p.shape), params)


def two_steps(shape, time_axes):
    """A grid of two steps, with a time for each entry of the first axes; every second entry waits for a step."""
    grid = jnp.array([1.0, 0.5, 0.0])
    if time_axes < 2:
        return jnp.broadcast_to(grid[:, None], (3, BATCH)) if time_axes else grid
    prefix = (BATCH, *shape)[:time_axes]
    lag = jnp.arange(np.prod(prefix)).reshape(prefix) % 2
    return jnp.stack([jnp.ones(prefix), jnp.where(lag, 1.0, 0.5), jnp.zeros(prefix)])


@pytest.mark.parametrize(("name", "solver", "transformation", "time_axes"), CASES)
def test_it_runs_and_the_mesh_changes_nothing(name, solver, transformation, time_axes):
    network, shape, process = NETWORKS[name]
    params = drawn_params(network, shape, LABELS, jnp.int32 if name == "text" else jnp.float32)
    denoiser = TRANSFORMATIONS[transformation](denoisers.denoiser(network, process))

    plan = two_steps(shape, time_axes)
    arguments = (jax.random.key(2), params, plan, LABELS, jnp.arange(BATCH))
    alone = sampling.make_sampler(denoiser, SOLVERS[solver], shape=shape)(*arguments)
    mesh = distributed.make_mesh(data=4, fsdp=2)
    spread = sampling.make_sampler(denoiser, SOLVERS[solver], shape=shape, mesh=mesh, axis=distributed.BATCH_AXES)(
        *arguments
    )
    assert alone.x.shape == (BATCH, *shape)
    assert bool(jnp.all(jnp.isfinite(alone.x)))
    if name == "text":
        agreement = float(jnp.mean(alone.x == spread.x))
        assert agreement == 1.0
        assert int(alone.x.max()) < 5, "every token has been unmasked"
    else:
        np.testing.assert_allclose(spread.x, alone.x, rtol=2e-4, atol=2e-4)


CONTEXT = {"context": jax.random.normal(jax.random.key(3), (BATCH, 3, 5))}
PUBLISHED = {
    "pixart": (
        models.pixart("XL/2", width=16, depth=1, heads=2),
        (4, 4, 3),
        {**CONTEXT, "context_mask": jnp.arange(3) < 1 + jnp.arange(BATCH)[:, None] % 3},
        FLOW,
    ),
    "sd": (
        models.unet(
            "sd15",
            channels=8,
            multipliers=(1, 2),
            num_residual=1,
            attention=(1, 0),
            mid_attention=0,
            heads=2,
            groups=4,
            in_channels=3,
            context_channels=5,
        ),
        (4, 4, 3),
        CONTEXT,
        processes.vp_scaled_linear(),
    ),
}
TRANSFORMED = transformations({"context": 0.0})


def covering():
    """Every solver once; every transformation and every kind of time on both networks."""
    gaussian = [name for name in EVERY_SOLVER if name not in DISCRETE_SOLVERS | {"joint"}]
    pairs = list(itertools.product(PUBLISHED, TRANSFORMED))
    count = max(len(gaussian), len(pairs))
    return [(pairs[i % len(pairs)], gaussian[i % len(gaussian)], i % 3 if i % 2 else (i + 1) % 3) for i in range(count)]


@pytest.mark.parametrize(("pair", "solver", "time_axes"), covering())
def test_the_matrix_on_published_architectures(pair, solver, time_axes):
    (network, shape, cond, process), transformation = PUBLISHED[pair[0]], pair[1]
    params = drawn_params(network, shape, cond)
    if transformation in TWO_NETWORKS:
        params = {"main": params, "guide": params}
    if transformation == "switched":
        params = (params, params)
    denoiser = TRANSFORMED[transformation](denoisers.denoiser(network, process))
    mesh = distributed.make_mesh(data=4, fsdp=2)
    sampler = sampling.make_sampler(denoiser, EVERY_SOLVER[solver], shape=shape, mesh=mesh, axis=distributed.BATCH_AXES)
    plan = two_steps(shape, 3 if time_axes == 2 else time_axes)
    result = sampler(jax.random.key(2), params, plan, cond, jnp.arange(BATCH))
    assert result.x.shape == (BATCH, *shape)
    assert bool(jnp.all(jnp.isfinite(result.x)))
