"""The one mesh of a run and the start of its processes.

The mesh always has the same five named axes, any of which may have size 1. `sharding` decides which arrays are split
along which axis.
"""

import os

import jax
from jax.sharding import AxisType, Mesh

from diffusion_jax.errors import InvalidInput, invalid

AXES = ("data", "fsdp", "tensor", "sequence", "pipe")
"""`data` replicates parameters, `fsdp` splits parameters and batch, `tensor` splits heads and hidden units,
`sequence` splits tokens, `pipe` gives each device a range of layers or of denoising steps."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    pipe: int = 1,
    *,
    devices: list | int | None = None,
) -> Mesh:
    """A mesh of all devices (or of `devices`, a list or how many) with the axes `AXES`; one size may be -1: the rest.

    Axis types are `Auto`: shardings are given at the borders of a jitted function and propagated inside.

    Raises InvalidInput if a size is not positive, if more than one is -1, if the product is not the number of devices,
    or if there are fewer devices than were asked for.
    """
    devices = _devices(devices)
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor, sequence, pipe), strict=True))
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise invalid(f"mesh.{axis}", size, "a mesh axis must be a positive whole number, or -1 for what is left")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InvalidInput(f"mesh.{free[0]} and mesh.{free[1]} are both -1, but only one axis can take what is left.")
    given = 1
    for size in sizes.values():
        given *= max(size, 1)
    told = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "all axes 1"
    if free:
        if len(devices) % given:
            raise InvalidInput(
                f"mesh ({told}) needs a multiple of {given} devices, but there are {len(devices)}; "
                "choose sizes whose product divides the number of devices."
            )
        sizes[free[0]] = len(devices) // given
    elif given != len(devices):
        raise InvalidInput(
            f"mesh ({told}) has {given} places, but there are {len(devices)} devices; "
            "set one axis to -1 to take what is left."
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes of type `Auto`, which all functions of this library that take a mesh work with.

    `jax.make_mesh` gives explicit ones by default, whose shardings are part of the types of arrays.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _devices(chosen: list | int | None) -> list:
    every = jax.devices()
    if chosen is None:
        return every
    if not isinstance(chosen, int):
        return chosen
    if isinstance(chosen, bool) or not 1 <= chosen <= len(every):
        raise invalid("mesh.devices", chosen, f"it must be within 1 .. {len(every)}, the devices that there are")
    return every[:chosen]


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to a run of several; does nothing when there is only one. Call it before any computation.

    coordinator: `host:port` of process 0. Without arguments the variables `JAX_COORDINATOR_ADDRESS`,
        `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are read, and otherwise the cluster is asked (TPU pods, Slurm, MPI,
        Kubernetes), where one is seen to have more than one process.

    Raises InvalidInput if only some of the three are given.
    """
    given = {
        "coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number("num_processes", num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _number("process_id", process_id, "JAX_PROCESS_ID"),
    }
    if jax.distributed.is_initialized():
        return
    if all(value is None for value in given.values()):
        if _cluster_has_several_processes():
            jax.distributed.initialize()
        return
    absent = [name for name, value in given.items() if value is None]
    if absent:
        raise InvalidInput(
            f"{absent[0]} is missing: a run of several processes needs coordinator, num_processes and process_id."
        )
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise invalid("process_id", given["process_id"], f"it must be within 0 .. {given['num_processes'] - 1}")
    if given["num_processes"] > 1:
        jax.distributed.initialize(given["coordinator"], given["num_processes"], given["process_id"])


def _number(field: str, value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or text is None:
        return value
    try:
        return int(text)
    except ValueError:
        raise invalid(f"{field} ({variable})", text, "it must be a whole number") from None


def _cluster_has_several_processes() -> bool:
    """Whether the environment of Slurm, MPI or a TPU pod announces more than one process."""
    counts = (os.environ.get(name, "") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if any(count.isdigit() and int(count) > 1 for count in counts):
        return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    return os.environ.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1")


def wait_for_all(name: str) -> None:
    """Returns once every process has come here; at once where there is only one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
