"""The composition matrix on the library's own networks: each with transformations, solvers, times and a mesh.

`test_composition` takes a covering sample of the whole product on a network of a few numbers; here the networks are
real (tiny), so that what they do with vector times, labels and doubled batches is part of the promise. What a network
sees of a transformation is how it is called: here is one of each kind, and every kind of time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, distributed, models, processes, sampling, solvers
from tests.models.drawn import drawn
from tests.models.shared import image
from tests.test_composition import SOLVERS as EVERY_SOLVER
from tests.test_composition import TWO_NETWORKS, transformations

BATCH, CLASSES = 8, 3
LABELS = {"label": jnp.arange(BATCH) % CLASSES}
NULL = {"label": CLASSES}
FLOW = processes.rectified_flow()

NETWORKS = {
    "dit": (models.dit("S/2", width=16, depth=2, heads=2, conditions=(models.label(CLASSES),)), (4, 6, 3), FLOW),
    "unet": (
        models.unet(
            channels=8,
            multipliers=(1, 1),
            num_residual=1,
            attention=(0, 0),
            mid_residual=1,
            conditions=(models.label(CLASSES),),
        ),
        (4, 4, 1),
        processes.edm(),
    ),
    "mlp": (
        models.mlp(width=16, depth=2, conditions=(models.label(CLASSES),)),
        (3,),
        processes.vp_cosine(prediction="v"),
    ),
    "text": (
        models.text_transformer(vocab_size=5, width=16, depth=1, heads=2, conditions=(models.label(CLASSES),)),
        (6,),
        processes.absorbing(5),
    ),
}

CASES = [
    ("dit", "dpm", "bounded", 3),
    ("unet", "dpm", "bounded", 3),
    ("mlp", "dpm", "guided", 2),
    ("text", "ancestral", "guided", 2),
]
SOLVERS = {"dpm": solvers.dpm_solver_pp(2), "ancestral": solvers.ancestral()}
TRANSFORMATIONS = {
    "guided": lambda d: denoisers.guided(d, 2.0, NULL, interval=(0.2, 0.9)),
    "bounded": lambda d: denoisers.thresholded(denoisers.guided(d, 2.0, NULL)),
}


@functools.cache
def drawn_params(name):
    """Random parameters: fresh networks answer zero, and every parameter is to have a say."""
    network, shape, cond, _ = PUBLISHED[name] if name in PUBLISHED else (*NETWORKS[name][:2], LABELS, None)
    x = jax.ShapeDtypeStruct((BATCH, *shape), jnp.int32 if name == "text" else jnp.float32)
    return drawn(jax.eval_shape(network.init, jax.random.key(0), x, jax.ShapeDtypeStruct((BATCH,), jnp.float32), cond))


def two_steps(shape, time_axes):
    """A grid of two steps, with a time for each entry of the first axes; every second entry waits for a step."""
    grid = np.array([1.0, 0.5, 0.0], np.float32)
    if time_axes < 2:
        return jax.device_put(np.broadcast_to(grid[:, None], (3, BATCH)) if time_axes else grid)
    prefix = (BATCH, *shape)[:time_axes]
    lag = np.arange(np.prod(prefix)).reshape(prefix) % 2
    return jax.device_put(np.stack([np.ones(prefix), np.where(lag, 1.0, 0.5), np.zeros(prefix)]).astype(np.float32))


@pytest.mark.parametrize(("name", "solver", "transformation", "time_axes"), CASES)
def test_it_runs_and_the_mesh_changes_nothing(name, solver, transformation, time_axes):
    network, shape, process = NETWORKS[name]
    params = drawn_params(name)
    denoiser = TRANSFORMATIONS[transformation](denoisers.denoiser(network, process))

    plan = two_steps(shape, time_axes)
    arguments = (jax.random.key(2), params, plan, LABELS, jnp.arange(BATCH))
    mesh = distributed.make_mesh(data=4, fsdp=2)
    alone, spread = (
        np.asarray(sampling.make_sampler(denoiser, SOLVERS[solver], shape=shape, **where)(*arguments).x)
        for where in ({}, {"mesh": mesh, "axis": distributed.BATCH_AXES})
    )
    assert alone.shape == (BATCH, *shape)
    assert np.isfinite(alone).all()
    if name == "text":
        np.testing.assert_array_equal(spread, alone)
        assert alone.max() < 5, "every token has been unmasked"
    else:
        np.testing.assert_allclose(spread, alone, rtol=2e-4, atol=2e-4)


CONTEXT = {"context": image((BATCH, 3, 5))}
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
            multipliers=(1,),
            num_residual=1,
            attention=(0,),
            mid_residual=1,
            heads=2,
            groups=4,
            in_channels=3,
            conditions=(models.context("none", 5),),
        ),
        (4, 4, 3),
        CONTEXT,
        processes.vp_scaled_linear(),
    ),
}
TRANSFORMED = transformations({"context": 0.0})


MATRIX = [
    ("pixart", "nested", "dpm++ 2", 0),
    ("pixart", "autoguided", "unipc", 2),
    ("pixart", "energy", "ddim", 0),
    ("pixart", "switched", "lms", 1),
    ("pixart", "scheduled", "euler", 0),
    ("sd", "projected", "dpm++ 2 sde", 2),
    ("sd", "classifier", "euler ancestral", 1),
]
"""Batches that are doubled, by one scale or by one for each entry; two parameter trees; gradients; two conditions."""


@pytest.mark.parametrize(("name", "transformation", "solver", "time_axes"), MATRIX)
def test_the_matrix_on_published_architectures(name, transformation, solver, time_axes):
    (network, shape, cond, process), params = PUBLISHED[name], drawn_params(name)
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
    assert np.isfinite(np.asarray(result.x)).all()
