"""Meshes say in one sentence what does not fit; layouts follow paths and shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from diffusion_jax import distributed
from diffusion_jax.errors import InvalidInput
from tests.distributed.hosts import outputs_of_two

KEY = jax.random.key(0)


def test_the_free_axis_takes_what_is_left():
    mesh = distributed.make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1, "pipe": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert distributed.make_mesh(data=1, tensor=-1).shape["tensor"] == 8
    assert distributed.make_mesh(devices=jax.devices()[:1]).size == distributed.make_mesh(devices=1).size == 1


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"fsdp": 3}, ["fsdp=3", "8"]),
        ({"data": 4}, ["data=4", "8 devices"]),
        ({"data": 0}, ["mesh.data is 0"]),
        ({"tensor": -2}, ["mesh.tensor is -2"]),
        ({"tensor": 2.0}, ["mesh.tensor is 2.0"]),
        ({"pipe": -1}, ["mesh.data and mesh.pipe"]),
        ({"devices": 9}, ["mesh.devices is 9", "1 .. 8"]),
        ({"devices": 0}, ["mesh.devices is 0"]),
    ],
)
def test_impossible_meshes_are_named(sizes, words):
    # The shape checker would refuse a float before the library can say why.
    make_mesh = getattr(distributed.make_mesh, "__wrapped__", distributed.make_mesh)
    with pytest.raises(InvalidInput) as error:
        make_mesh(**sizes)
    assert all(word in str(error.value) for word in words)


def test_meshes_of_explicit_axes_serve_like_ours():
    sizes = tuple(distributed.make_mesh(fsdp=2).shape.values())
    explicit = jax.make_mesh(sizes, distributed.AXES, axis_types=(AxisType.Explicit,) * len(sizes))
    rules = distributed.Rules(fsdp_min_size=1)
    params = distributed.init_sharded(
        lambda key: {"w": jax.random.normal(key, (4, 8))}, KEY, mesh=explicit, rules=rules
    )
    batch = distributed.shard_batch({"x": np.ones((8, 4), np.float32)}, explicit)
    found = jax.jit(lambda params, batch: distributed.constrain(batch["x"] @ params["w"], explicit, rules))(
        params, batch
    )
    np.testing.assert_allclose(found, np.ones((8, 4)) @ np.asarray(params["w"]), rtol=1e-5)
    assert params["w"].addressable_shards[0].data.size == 16

    line = jax.make_mesh((8,), ("pipe",), axis_types=(AxisType.Explicit,))
    add = distributed.timestep_pipeline(lambda params, carry, x, level, cond, index: (x + level, carry), 8, mesh=line)
    blocks, _ = jax.jit(add.run)(None, jnp.zeros(8), jnp.zeros((3, 2)), jnp.zeros(3))
    np.testing.assert_array_equal(blocks, 28.0)


def test_rules_split_trailing_dimensions_and_fsdp_the_largest_that_is_left():
    mesh = distributed.make_mesh(data=1, fsdp=2, tensor=4)
    rules = distributed.Rules(patterns=((r"q/kernel$", (None, "tensor")), (r"odd", ("tensor",))), fsdp_min_size=64)
    tree = {
        "q": {"kernel": jnp.zeros((3, 16, 8))},
        "depth": {"q": {"kernel": jnp.zeros((16, 8))}},
        "big": jnp.zeros((3, 10, 40)),
        "prime": jnp.zeros((7, 13)),
        "small": jnp.zeros((8,)),
        "odd": jnp.zeros((6,)),
        "count": jnp.zeros(()),
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, distributed.shardings(tree, mesh, rules))
    assert specs == {
        "q": {"kernel": PartitionSpec(None, "fsdp", "tensor")},
        "depth": {"q": {"kernel": PartitionSpec("fsdp", "tensor")}},
        "big": PartitionSpec(None, None, "fsdp"),
        "prime": PartitionSpec(),
        "small": PartitionSpec(),
        "odd": PartitionSpec(),
        "count": PartitionSpec(),
    }
    with pytest.raises(InvalidInput, match=r"odd has shape \(6,\).*tensor=4"):
        distributed.shardings(tree, mesh, rules, strict=True)


def test_rules_are_checked():
    with pytest.raises(InvalidInput, match="did you mean 'tensor'"):
        distributed.Rules(patterns=(("kernel", (None, "tensors")),))
    with pytest.raises(InvalidInput, match="regular expression"):
        distributed.Rules(patterns=(("(", ("data",)),))


def test_initialisation_is_placed_and_the_same_on_every_mesh():
    def init(key):
        return {"q": {"kernel": jax.random.normal(key, (16, 32))}, "bias": jax.random.normal(key, (32,))}

    rules = distributed.Rules(fsdp_min_size=1)
    whole = distributed.init_sharded(init, jax.random.key(0), mesh=None)
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = distributed.make_mesh(**sizes)
        parts = distributed.init_sharded(init, jax.random.key(0), mesh=mesh, rules=rules)
        np.testing.assert_array_equal(whole["q"]["kernel"], parts["q"]["kernel"])
    shard = parts["q"]["kernel"].addressable_shards[0]
    assert shard.data.shape == (8, 16)


def test_batches_are_split_along_data_and_fsdp():
    mesh = distributed.make_mesh(data=2, fsdp=2, tensor=2)
    batch = {"x0": np.arange(24.0, dtype=np.float32).reshape(8, 3), "cond": {"label": np.arange(8)}}
    placed = distributed.shard_batch(batch, mesh)
    assert placed["x0"].addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(placed["cond"]["label"], np.arange(8))
    assert distributed.shard_batch(placed, mesh)["x0"] is placed["x0"]
    with pytest.raises(InvalidInput, match=r"batch_size is 6.*multiple of 4"):
        distributed.shard_batch({"x0": np.zeros((6, 3))}, mesh)


def test_starting_one_process_does_nothing_and_half_a_start_is_refused(monkeypatch):
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    with pytest.raises(InvalidInput, match="process_id is missing"):
        distributed.initialize("localhost:1", num_processes=2)
    with pytest.raises(InvalidInput, match="process_id is 2"):
        distributed.initialize("localhost:1", num_processes=2, process_id=2)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InvalidInput, match="JAX_NUM_PROCESSES"):
        distributed.initialize()


TWO_PROCESSES = """
import sys, numpy as np, jax, jax.numpy as jnp
from diffusion_jax import distributed
distributed.initialize()
mesh = distributed.make_mesh(data=2, fsdp=2)
mine = np.arange(4.0, dtype=np.float32).reshape(4, 1) + 4 * jax.process_index()
batch = distributed.shard_batch({"x0": mine}, mesh)
assert batch["x0"].shape == (8, 1), batch["x0"].shape
total = jax.jit(lambda x: jnp.sum(x * x))(batch["x0"])
print("total", float(total), jax.process_count(), jax.device_count())
"""


def test_two_processes_make_one_batch():
    for output in outputs_of_two(TWO_PROCESSES):
        assert f"total {sum(n * n for n in range(8)):.1f} 2 4" in output


def test_what_a_function_closes_over_is_an_argument_and_is_not_shared():
    held = jnp.arange(64.0).reshape(8, 8)
    for mesh in (None, distributed.make_mesh(fsdp=8)):
        rules = distributed.Rules(fsdp_min_size=0)
        made = distributed.init_sharded(lambda: {"w": held, "b": held[0] + 1}, mesh=mesh, rules=rules)
        np.testing.assert_array_equal(made["w"], held)
        consumed = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(made)
        np.testing.assert_array_equal(consumed["w"], held + 1)
        assert made["w"].is_deleted() and not held.is_deleted()
