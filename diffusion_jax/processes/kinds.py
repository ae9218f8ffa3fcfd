"""The kinds of processes, by which other packages decide what they can do with a process."""

from typing import Any

from diffusion_jax.errors import InvalidInput

KINDS = {
    "gaussian": "x_t = alpha x0 + sigma eps: has rates, from_eps, score, velocity",
    "discrete": "tokens, lost at random: has posterior and log_prob",
    "absorbing": "tokens, lost to a mask: has is_masked and nelbo_weight too",
    "joint": "a dict of data: has processes, a dict of the other kinds",
}
"""What `process.kind` may be, and what such a process has besides the methods of `typing.Process`."""


def kind_of(process: Any) -> str:
    """`process.kind`, a key of `KINDS`. Raises InvalidInput for a process that does not say what it is."""
    kind = getattr(process, "kind", None)
    if kind not in KINDS:
        told = "has no attribute kind" if kind is None else f"has kind {kind!r}"
        raise InvalidInput(f"the process {type(process).__name__} {told}, but one of {', '.join(KINDS)} was expected.")
    return kind


def is_gaussian(process: Any) -> bool:
    """Whether x_t = alpha x0 + sigma eps."""
    return kind_of(process) == "gaussian"


def is_discrete(process: Any) -> bool:
    """Whether the data are tokens, absorbing processes included."""
    return kind_of(process) in ("discrete", "absorbing")


def is_joint(process: Any) -> bool:
    """Whether the data are a dict, with a process for each entry."""
    return kind_of(process) == "joint"


def members(process: Any) -> dict[str, Any]:
    """The processes of a joint process by name; a process of its own is the member ""."""
    return process.processes if is_joint(process) else {"": process}


def by_modality(process: Any) -> Any:
    """What `time_axes.each` maps over beside the data: a dict of processes for a joint one, else the process itself."""
    return process.processes if is_joint(process) else process


def with_condition(process: Any, cond: Any) -> tuple[Any, Any]:
    """The process as the condition makes it, and the condition of the network: `process.given(cond)` of one that has
    such a method, because it takes something from the condition (`EndpointProcess`); of any other both as they are.

    Denoisers and losses of one network call it before `network_input`, `predict` and `target`; corrupting data, priors
    and solvers need alpha and sigma alone, which no condition changes.
    """
    return process.given(cond) if hasattr(process, "given") else (process, cond)


def need_gaussian(what: str, process: Any) -> None:
    """Raises InvalidInput when `what` needs x_t = alpha x0 + sigma eps and `process` has no such pair."""
    for member in members(process).values():
        if not is_gaussian(member):
            raise InvalidInput(
                f"{what} needs Gaussian processes, whose noise can be scaled; {type(member).__name__} is discrete."
            )
