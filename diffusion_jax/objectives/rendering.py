"""The loss of a reconstruction in 3-D: what its Gaussians look like from cameras that it has not seen."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models import Reconstructor
from diffusion_jax.objectives.batches import refuse_weight
from diffusion_jax.objectives.entries import per_example, squared_error
from diffusion_jax.randomness import fold
from diffusion_jax.rendering import Camera, render_splats
from diffusion_jax.typing import Aux, Objective, Params


def coarse_clips(
    reconstructor: Reconstructor, params: Params, clips: Any, cameras: Camera, background: Any = -1.0
) -> Any:
    """Clips `[B, F, H, W, C]` of what `reconstructor` makes of the first and the last frame, from all `cameras [B, F]`.

    clips: `[B, F, H, W, C]`, of which only these two frames are looked at.
    """
    splats = reconstructor.apply(params, *_ends(clips, cameras))
    splats = jax.tree.map(lambda leaf: leaf[:, None], splats)
    return render_splats(splats, cameras, clips.shape[2:4], background).colour


def splat_rendering(reconstructor: Reconstructor, shown: int = 2, background: Any = -1.0) -> Objective:
    """The mean square error of renderings, as an `Objective` on clips of still scenes from known cameras.

    Batches: "x0" `[B, F, H, W, C]`, and "cond" with the fields of `rendering.Camera`, `[B, F, ...]`. The network sees
    the first and the last frame; the loss is that of `shown` frames, drawn anew at each step for the whole batch.
    Raises InvalidInput for more frames than there are.
    """
    if shown < 1:
        raise invalid("shown", shown, "at least one frame is needed")

    def init(key, params, batch):
        refuse_weight(batch, "splat_rendering")
        if shown > batch["x0"].shape[1]:
            raise invalid("shown", shown, f"the clips have {batch['x0'].shape[1]} frames")
        return ()

    def loss(params, state, batch, key):
        x0, cameras = batch["x0"], Camera(**batch["cond"])
        frames = jax.random.permutation(fold(key, 2), x0.shape[1])[:shown]
        splats = jax.tree.map(lambda leaf: leaf[:, None], reconstructor.apply(params, *_ends(x0, cameras)))
        seen_by = jax.tree.map(lambda leaf: leaf[:, frames], cameras)
        drawn = render_splats(splats, seen_by, x0.shape[2:4], background).colour
        losses = per_example(squared_error(drawn, x0[:, frames]))
        return losses, Aux(state, {"mse": jnp.mean(losses)}, {"loss": losses})

    return Objective(init, loss)


def _ends(clips, cameras):
    ends = jnp.asarray([0, clips.shape[1] - 1])
    return clips[:, ends], jax.tree.map(lambda leaf: leaf[:, ends], cameras)
