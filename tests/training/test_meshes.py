"""A transformer learns the same on every mesh, and is laid out on it as the rules say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import distributed, models, objectives, processes, timesteps, training
from diffusion_jax.training import optimizers
from tests.models.shared import image

MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def transformer():
    """Twenty steps of a small DiT on a mesh; `None` is one device."""
    network = models.dit("S/2", width=16, depth=1, heads=4, conditions=(models.label(3),))
    objective = objectives.denoising(
        network, processes.rectified_flow(), timesteps.stratified(), cond_dropout=0.2, null={"label": 3}
    )
    x0 = image((16, 4, 4, 1), 7)
    batch = {"x0": x0, "cond": {"label": np.arange(16, dtype=np.int32) % 3}, "index": np.arange(16, dtype=np.int32)}
    rules = distributed.Rules(fsdp_min_size=256)
    optimizer = optimizers.adamw(3e-3)

    def init(key):
        return network.init(key, x0, jnp.zeros(16), batch["cond"])

    def twenty(sizes):
        mesh = None if sizes is None else distributed.make_mesh(**sizes)
        if sizes == MESHES["data"]:
            # One as `jax.make_mesh` gives it.
            mesh = jax.make_mesh(tuple(mesh.shape.values()), distributed.AXES)
        state = training.init_state(objective, optimizer, init, batch, mesh=mesh, rules=rules)
        step = training.make_train_step(objective, optimizer, mesh, rules, clip_norm=1.0)
        placed = distributed.shard_batch(jax.device_get(batch), mesh)
        found = []
        for _ in range(20):
            state, metrics = step(state, placed)
            found.append(float(metrics["loss"]))
        assert step.programs() == 1
        return found, state

    alone = twenty(None)[0]
    return twenty, alone


@pytest.mark.parametrize("name", MESHES)
def test_one_device_is_eight(transformer, name):
    twenty, alone = transformer
    found, state = twenty(MESHES[name])
    assert bool(jnp.any(state.params["final"]["kernel"] != 0)), "it has learned"
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    kernel = state.params["blocks"]["block"]["attention"]["attention"]["q"]["kernel"]
    moments = state.opt_state[0].mu["blocks"]["block"]["attention"]["attention"]["q"]["kernel"]
    shards = MESHES[name].get("fsdp", 1) * MESHES[name].get("tensor", 1)
    for leaf in (kernel, moments):
        assert leaf.addressable_shards[0].data.size * shards == leaf.size
