"""Networks of actions: what was observed, numbers or pictures, becomes the vector that they are conditioned on."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.interception import wrapped
from diffusion_jax.models.layers.patches import to_patches
from diffusion_jax.typing import Network


def observing(network: Network) -> Network:
    """The network, conditioned on `cond["observation"] [B, history, D]` in place of `cond["pooled"] [B, history D]`.

    It takes the conditions of demonstrations and of policies as they are (`data.tabletop`, `data.push_t`); parameters
    and other conditions are those of the network. Observations as one global vector are Diffusion Policy's (Chi et
    al. 2023). Raises InvalidInput for a condition without observations.
    """

    def told(cond):
        if not cond or "observation" not in cond:
            raise InvalidInput(f"cond has {sorted(cond or ())}, but this network needs cond['observation'].")
        rest = {name: value for name, value in cond.items() if name != "observation"}
        observation = cond["observation"]
        return {**rest, "pooled": observation.reshape(observation.shape[0], -1)}

    def init(key, x, t, cond=None):
        return network.init(key, x, t, told(cond))

    def around(inner, params, x, t, cond, train, key):
        return inner(params, x, t, told(cond), train, key)

    return wrapped(network, around, init)


class FrameEncoder(nn.Module):
    """Frames `[B, history, H, W, C]` to features `[B, hidden]`: one layer on each patch, one over all of them.

    The frames of a history are stacked along the channels, so that the first layer sees what moves.
    patch: its side in pixels. features: of each patch. hidden: of the whole.
    """

    patch: int
    features: int
    hidden: int

    @nn.compact
    def __call__(self, frames):
        batch, history, height, width, channels = frames.shape
        stacked = jnp.moveaxis(frames, 1, 3).reshape(batch, height, width, history * channels)
        h = nn.Dense(self.features, name="patches")(to_patches(stacked, (self.patch, self.patch)))
        return nn.gelu(nn.Dense(self.hidden, name="whole")(nn.gelu(h).reshape(batch, -1)))


def watching(network: Network, patch: int = 4, features: int = 64, hidden: int = 256) -> Network:
    """The network, conditioned on `cond["frames"] [B, history, H, W, C]` in place of `cond["pooled"] [B, hidden]`.

    A small encoder of frames, trained with the network, stands in between (see `FrameEncoder`); parameters are
    `{"network": ..., "frames": ...}`, and what opens it opens the network. Vector observations in `cond` are not looked
    at: what acts on pictures must not see the state that they were drawn from. Other conditions are the network's own.
    Images as one global vector that modulates all tokens: Zhu et al. 2025 (UWM), with a ResNet-18 in place of the small
    encoder.
    Raises InvalidInput for a condition without frames, and frames that do not divide by the patch.
    """
    for name, value in (("patch", patch), ("features", features), ("hidden", hidden)):
        if value < 1:
            raise invalid(name, value, "it must be a positive integer")
    encoder = FrameEncoder(patch, features, hidden)

    def frames_of(cond):
        if not cond or "frames" not in cond:
            raise InvalidInput(f"cond has {sorted(cond or ())}, but this network needs cond['frames'].")
        frames = jnp.asarray(cond["frames"])
        if frames.ndim != 5 or frames.shape[2] % patch or frames.shape[3] % patch:
            expected = f"[B, history, H, W, C] with sides that divide by the patch {patch} was expected"
            raise invalid("cond['frames'].shape", frames.shape, expected)
        return frames

    def told(cond, pooled):
        rest = {name: value for name, value in cond.items() if name not in ("frames", "observation")}
        return {**rest, "pooled": pooled}

    def init(key, x, t, cond=None):
        first, second = jax.random.split(key)

        def fresh(frames):
            params = encoder.init(first, frames)["params"]
            return params, encoder.apply({"params": params}, frames)

        params, pooled = jax.jit(fresh)(frames_of(cond))
        return {"frames": params, "network": network.init(second, x, t, told(cond, pooled))}

    def around(inner, params, x, t, cond, train, key):
        pooled = encoder.apply({"params": params["frames"]}, frames_of(cond))
        return inner(params["network"], x, t, told(cond, pooled), train, key)

    return wrapped(network, around, init, ("network",))
