"""The composition matrix on the library's own networks: each with transformations, solvers, times and a mesh.

`test_composition` takes a covering sample of the whole product on a network of a few numbers; here the networks are
real (tiny), so that what they do with vector times, labels and doubled batches is part of the promise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, distributed, models, processes, sampling, solvers

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


@pytest.mark.parametrize(("name", "solver", "transformation", "time_axes"), CASES)
def test_it_runs_and_the_mesh_changes_nothing(name, solver, transformation, time_axes):
    network, shape, process = NETWORKS[name]
    dtype = jnp.int32 if name == "text" else jnp.float32
    x = jnp.zeros((1, *shape), dtype)
    cond = {"label": jnp.zeros(1, jnp.int32)}
    params = network.init(jax.random.key(0), x, jnp.zeros(1), cond)
    # Fresh networks answer zero; every parameter gets a say.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(next(keys), p.shape), params)
    denoiser = TRANSFORMATIONS[transformation](denoisers.denoiser(network, process))

    grid = jnp.array([1.0, 0.5, 0.0])
    prefix = (BATCH, *shape)[:time_axes]
    # Every second entry of a vector time waits for a step.
    lag = jnp.arange(np.prod(prefix)).reshape(prefix) % 2
    plan = jnp.stack([jnp.full(prefix, t) for t in grid[:1]] + [jnp.where(lag, t, grid[1]) for t in grid[:1]] +
                     [jnp.zeros(prefix)])  # fmt: skip
    plan = plan if time_axes > 1 else grid

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
