"""Feed-forward reconstruction: from two views of a scene to a Gaussian on the ray of each of their pixels.

As in pixelSplat (Charatan et al. 2024) and MVSplat (Chen et al. 2024): at each of D depths a pixel is compared with
what the other view shows there (`rendering.plane_sweep`), a small convolutional network makes of these costs, of the
pictures and of the rays a distribution over the depths, and its mean is the depth of the Gaussian. It is trained by the
images that its Gaussians render to (`objectives.splat_rendering`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.layers.convolution import conv
from diffusion_jax.rendering import Camera, Splats, camera_rays, plane_sweep, splats_from_depth
from diffusion_jax.typing import Number, Params


class Reconstructor(NamedTuple):
    """init: (key, views, cameras) -> params. apply: (params, views [B, 2, H, W, C], cameras [B, 2]) -> `Splats`
    `[B, 2 H W, ...]`, the pixels of the first view first."""

    init: Callable[..., Params]
    apply: Callable[..., Splats]


class PixelGaussians(nn.Module):
    """`[B, 2, H, W, planes + 2 + C]` of each pixel: a logit of each depth, opacity, size, and the change of colour."""

    planes: int
    width: int
    depth: int

    @nn.compact
    def __call__(self, views, costs, rays):
        batch, two, height, width, channels = views.shape
        h = jnp.concatenate([views, jnp.flip(views, axis=1), jnp.exp(-8.0 * costs), rays], axis=-1)
        h = conv(self.width, name="embed")(h.reshape(batch * two, height, width, -1))
        for i in range(self.depth):
            h = h + conv(self.width, name=f"block_{i}")(jax.nn.gelu(h))
        y = conv(self.planes + 2 + channels, 1, zero=True, name="out")(jax.nn.gelu(h))
        return y.reshape(batch, two, height, width, -1)


def pixel_reconstructor(near: Number, far: Number, planes: int = 16, width: int = 32, depth: int = 4) -> Reconstructor:
    """A network from two views to pixel-aligned Gaussians.

    near, far: the depths between which there is something, in the unit of the cameras. planes: depths D that are
    compared, evenly spread. width, depth: of the network.
    Raises InvalidInput for other than two views, and depths that are not 0 < near < far.
    """
    if not 0 < near < far or planes < 2:
        raise invalid("near, far, planes", (near, far, planes), "0 < near < far and at least two planes are needed")
    module, depths = PixelGaussians(planes, width, depth), jnp.linspace(near, far, planes)

    def inputs(views, cameras):
        views = jnp.asarray(views, jnp.float32)
        if views.ndim != 5 or views.shape[1] != 2:
            raise invalid("views.shape", views.shape, "two views of each scene, [B, 2, H, W, C], were expected")
        costs = plane_sweep(views, cameras, depths)
        first = Camera(*(leaf[:, :1] for leaf in cameras))
        # Where a ray goes as the first camera sees it, so that turning the world changes nothing.
        rays = camera_rays(cameras, (views.shape[2], views.shape[3]))
        rays = jnp.einsum("bvhwc,bvdc->bvhwd", rays, jnp.broadcast_to(first.rotation, cameras.rotation.shape))
        return views, costs, rays

    def init(key, views, cameras):
        return jax.jit(lambda: module.init(key, *inputs(views, cameras))["params"])()

    def apply(params, views, cameras):
        views, costs, rays = inputs(views, cameras)
        y: Any = module.apply({"params": params}, views, costs, rays)
        share = jax.nn.softmax(y[..., :planes] - 8.0 * costs, axis=-1)
        opacities = jax.nn.sigmoid(y[..., planes] + 2.0)
        size = 0.7 * jnp.exp(jnp.clip(y[..., planes + 1], -2.0, 2.0))
        return splats_from_depth(cameras, share @ depths, views + y[..., planes + 2 :], opacities, size)

    return Reconstructor(init, apply)
