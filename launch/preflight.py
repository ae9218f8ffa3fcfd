"""Compiles a config's training step for a TPU topology on a machine without one, and says whether it fits.

    pip install libtpu
    python launch/preflight.py --topology=v5e:4x4 --config=imagenet_dit:XL/2 --config.mesh.fsdp=4 \
        --shape=32,32,4 --classes=1000

Prints memory and FLOPs a device. Nothing is allocated and no data is read: the data's shape is given here.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from diffusion_jax import training
from diffusion_jax.command import parse_config, run_command
from diffusion_jax.config import build
from diffusion_jax.distributed import Rules, batch_sharding, make_mesh, shardings
from diffusion_jax.errors import InvalidInput, invalid

GIB = 2**30


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--topology", default="v5e:4x4", help="e.g. v5e:4x4, v5p:2x2x2, v6e:8x8 (default v5e:4x4)")
    parser.add_argument("--shape", default="32,32,4", help="shape of one example (default 32,32,4)")
    parser.add_argument("--classes", type=int, default=0, help="number of classes of the label, 0 for none")
    arguments, config = parse_config(parser, argv)
    try:
        shape = tuple(int(size) for size in arguments.shape.split(","))
    except ValueError:
        raise invalid("--shape", arguments.shape, "numbers separated by commas are needed, such as 32,32,4") from None
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(
            f"The topology {arguments.topology!r} cannot be had ({reason}); pip install libtpu."
        ) from None

    sizes = {name: value for name, value in config.mesh.items() if name not in ("call", "devices")}
    mesh = make_mesh(**sizes, devices=list(topology.devices))
    network, process = build(config.model), build(config.process)
    objective = build(config.objective, network=network, process=process)
    optimizer = build(config.optimizer, total_steps=max(config.train.steps, 1))
    ema = {name: build(track) for name, track in config.ema.items()}
    size = config.train.batch_size
    batch = {"x0": jax.ShapeDtypeStruct((size, *shape), jnp.float32), "index": jax.ShapeDtypeStruct((size,), jnp.int32)}
    if arguments.classes:
        batch["cond"] = {"label": jax.ShapeDtypeStruct((size,), jnp.int32)}

    def init_params(key):
        cond = {name: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch.get("cond", {}).items()}
        return network.init(key, jnp.zeros((1, *shape)), jnp.zeros(1), cond or None)

    abstract = jax.eval_shape(training.make_init(objective, optimizer, init_params, batch, ema=ema, seed=config.seed))
    rules = Rules()
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings(abstract, mesh, rules),
    )
    split = batch_sharding(mesh)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split), batch)
    step = training.make_train_step(
        objective,
        optimizer,
        mesh,
        rules,
        ema=ema,
        accumulate=config.train.accumulate,
        clip_norm=config.train.clip_norm,
        seed=config.seed,
    )
    begun = time.perf_counter()
    compiled = step.lower(placed, batch).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    state = memory.argument_size_in_bytes / GIB
    scratch = memory.temp_size_in_bytes / GIB
    print(f"{arguments.topology}: {len(topology.devices)} x {topology.devices[0].device_kind}, mesh {dict(mesh.shape)}")
    print(f"compiled in {time.perf_counter() - begun:.0f} s")
    print(f"state and batch {state:.2f} GiB, scratch {scratch:.2f} GiB, together {state + scratch:.2f} GiB a device")
    print(f"{cost.get('flops', float('nan')) / 1e12:.3f} TFLOP a step and device (a scanned loop is counted once)")


if __name__ == "__main__":
    sys.exit(run_command(main))
