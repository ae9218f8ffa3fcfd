"""How a run is spread over devices: one mesh with named axes, shardings as a pure function of (abstract tree, rules,
mesh), the timestep pipeline, and the start of several processes. Nothing here knows models or training.
"""

from diffusion_jax.distributed.agreement import first_said, said_by_all
from diffusion_jax.distributed.mesh import AXES, automatic, initialize, make_mesh, wait_for_all
from diffusion_jax.distributed.pipeline import NOTHING, Flight, TimestepPipeline, sequential, timestep_pipeline
from diffusion_jax.distributed.sharding import (
    BATCH_AXES,
    TRANSFORMER,
    Rules,
    batch_sharding,
    batch_shards,
    check_batch,
    constrain,
    init_sharded,
    path_name,
    replicated,
    shard_batch,
    shardings,
)

__all__ = [
    "AXES",
    "BATCH_AXES",
    "NOTHING",
    "TRANSFORMER",
    "Flight",
    "Rules",
    "TimestepPipeline",
    "automatic",
    "batch_sharding",
    "batch_shards",
    "check_batch",
    "constrain",
    "first_said",
    "init_sharded",
    "initialize",
    "make_mesh",
    "path_name",
    "replicated",
    "said_by_all",
    "sequential",
    "shard_batch",
    "shardings",
    "timestep_pipeline",
    "wait_for_all",
]
