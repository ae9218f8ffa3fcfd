"""Early exit: a sample leaves the network once its prediction is certain enough, or after a given number of blocks.

The depth of a sample depends on t and on the sample (`exit_by_uncertainty`: Tang et al. 2023, DeeDiff). The mean depth
of recorded runs is a table by step (`depth_table`). With it (`at_depth`) no uncertainty has to be estimated, and no
sample waits for a deeper one. Otherwise a batch takes as long as its deepest sample, and that is what the cost counts.
The threshold for a budget of blocks is found on a recorded run of the whole network:

    read = lambda prediction, x, step: prediction.extras["uncertainty"]
    seen = denoisers.recorded(whole_depth(exits, process), steps, read, axes=1)
    uncertainty = sampling.sample(key, seen, params, solver, grid, shape=shape).run.carry.values        # [S, L, B]
    early = exit_by_uncertainty(exits, process, threshold_for_depth(uncertainty, 5.0))

Where t is large a small error of epsilon is a large one of x0: put `denoisers.clipped` or `thresholded` around the
denoiser where data have bounds.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from diffusion_jax.clock import network_inputs, to_prediction
from diffusion_jax.denoisers.scales import Scale, check_scale, value_at
from diffusion_jax.errors import invalid
from diffusion_jax.models import EarlyExit
from diffusion_jax.typing import Cost, Denoiser


def exit_by_uncertainty(exits: EarlyExit, process: Any, threshold: Scale, gather: bool = False) -> Denoiser:
    """Each sample leaves behind the first block whose mean estimated uncertainty is at most `threshold`.

    threshold: in [0, 1]: at 0 no sample leaves, at 1 all do behind the first block; a number, an array by step or a
        function of the step. Its values may be traced. gather: runs all blocks and chooses afterwards, for reference.

    `extras["exit_depth"] [B]` is the number of blocks of each sample, `cost.compute` the share of blocks computed,
    those of the batch's deepest sample; embeddings, estimates and the tail, which are small, are not in it.
    Raises InvalidInput for what is not a scale.
    """
    check_scale("threshold", threshold)

    def answer(params, x, t, cond, step):
        return (exits.gather if gather else exits.leave)(params, x, t, cond, value_at(threshold, step))

    return _denoiser(exits, process, answer)


def at_depth(exits: EarlyExit, process: Any, depths: Any) -> Denoiser:
    """All samples leave behind `depths[step]` blocks; nothing is estimated on the way.

    depths: ints from 1 to L, `[S]` by step, or `[S, B]` for each sample; steps behind the last have its depth. They may
        be traced: another table does not compile anew. Raises InvalidInput for known depths outside of 1 .. L.
    """
    depths = jnp.asarray(depths)
    if depths.ndim not in (1, 2) or not jnp.issubdtype(depths.dtype, jnp.integer):
        raise invalid("depths", f"{depths.dtype}{list(depths.shape)}", "ints by step, [S] or [S, B], were expected")
    if not isinstance(depths, Tracer):
        known = np.asarray(depths)
        if known.min() < 1 or known.max() > exits.depth:
            raise invalid("depths", f"{known.min()} .. {known.max()}", f"they must lie in 1 .. {exits.depth}")

    def answer(params, x, t, cond, step):
        return exits.stop(params, x, t, cond, jnp.take(depths, step.index, axis=0, mode="clip"))

    return _denoiser(exits, process, answer)


def whole_depth(exits: EarlyExit, process: Any) -> Denoiser:
    """No sample leaves; `extras["uncertainty"] [L, B]` are the mean estimates behind all blocks, which
    `threshold_for_depth` reads."""

    def answer(params, x, t, cond, step):
        said, extras = exits.network.apply(params, x, t, cond)
        mean = said.uncertainty.reshape(*said.uncertainty.shape[:2], -1).mean(axis=2)
        return said.output[-1], {**extras, "uncertainty": mean, "blocks": jnp.int32(exits.depth)}

    return _denoiser(exits, process, answer)


def _denoiser(exits, process, answer):
    def init(params, x, cond):
        return ()

    def apply(params, carry, x, step, cond):
        output, extras = answer(params, *network_inputs(process, x, step.t), cond, step)
        cost = Cost(jnp.float32(1), extras["blocks"].astype(jnp.float32) / exits.depth)
        extras = {name: extras[name] for name in extras if name != "blocks"}
        return to_prediction(process, output, x, step.t, extras, cost), carry

    return Denoiser(init, apply, process)


def exit_depths(uncertainty: Float[Array | np.ndarray, "S L B"], threshold: float) -> Int[np.ndarray, "S B"]:
    """Behind how many blocks samples would leave: the first whose estimate is at most `threshold`, L where none is."""
    sure = np.asarray(uncertainty) <= threshold
    return np.where(sure.any(axis=1), sure.argmax(axis=1) + 1, sure.shape[1])


def threshold_for_depth(uncertainty: Float[Array | np.ndarray, "S L B"], depth: float) -> float:
    """The smallest threshold at which samples run at most `depth` blocks on average, by estimates of whole runs.

    Runs that leave early see other x than those whose estimates these are, so the depth that comes of it is near the
    wanted one, not equal to it. Raises InvalidInput for a depth outside of 1 .. L.
    """
    uncertainty = np.asarray(uncertainty)
    if not 1 <= depth <= uncertainty.shape[1]:
        raise invalid("depth", depth, f"blocks on average, from 1 to {uncertainty.shape[1]}, were expected")
    # The mean changes where the threshold passes an estimate, and nowhere else.
    values = np.concatenate([[0.0], np.unique(uncertainty)])
    first, last = 0, len(values) - 1
    while first < last:
        middle = (first + last) // 2
        deep = exit_depths(uncertainty, values[middle]).mean() > depth
        first, last = (middle + 1, last) if deep else (first, middle)
    return float(values[first])


def depth_table(depths: Int[Array, "S B"]) -> Int[Array, " S"]:
    """The mean depth of each step as ints whose sum over the run is that of the means, to half a block.

    depths: as recorded by `denoisers.recorded(..., read=lambda prediction, x, step: prediction.extras["exit_depth"])`.
    Each entry is the mean rounded up or down: the fractions left at one step are carried to the next.
    """
    total = jnp.round(jnp.cumsum(jnp.mean(depths.astype(jnp.float32), axis=1)))
    return jnp.diff(total, prepend=0.0).astype(jnp.int32)
