"""Gaussians from pictures: one for each pixel of known depth, and a fit to all views by gradient descent."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.errors import invalid
from diffusion_jax.rendering.cameras import Camera, unproject
from diffusion_jax.rendering.splats import Splats, render_splats
from diffusion_jax.typing import Number


def splats_from_depth(camera: Camera, depth: Any, colours: Any, opacities: Any, size: Any = 0.7) -> Splats:
    """A round Gaussian on the ray of each pixel, at `depth [..., V, H, W]`: N = V H W of them, view after view.

    colours: `[..., V, H, W, C]`. opacities: `[..., V, H, W]`. size: the standard deviation in pixels, `[..., V, H, W]`
    or a number. With opacity 1 and a size of about 0.7 a view gives back its own picture, slightly blurred.
    """
    lead, (views, height, width) = depth.shape[:-3], depth.shape[-3:]
    count = views * height * width
    pixel = 2 * depth / (camera.focal[..., None, None] * height)
    scales = jnp.broadcast_to((jnp.asarray(size) * pixel)[..., None], (*depth.shape, 3))
    turned = jnp.broadcast_to(jnp.asarray([1.0, 0.0, 0.0, 0.0], depth.dtype), (*lead, count, 4))
    means, scales, colours = (
        leaf.reshape(*lead, count, leaf.shape[-1]) for leaf in (unproject(camera, depth), scales, colours)
    )
    return Splats(means, scales, turned, opacities.reshape(*lead, count), colours)


def fit_splats(
    start: Splats, images: Any, cameras: Camera, steps: int = 200, rate: Number = 0.02, background: Any = -1.0
) -> tuple[Splats, Any]:
    """Gaussians whose renderings are the nearest to `images [..., F, H, W, C]` of `cameras [..., F]`.

    Minimises the mean square error over all views with Adam, from `start`, whose leading axes are those of the images
    before F. Scales and opacities are learned as logarithms and logits. rate: of means in units of the mean scale at
    the start, and of all else as it is. Returns the Gaussians and the losses `[steps]`.
    Raises InvalidInput for less than one step.
    """
    if steps < 1:
        raise invalid("steps", steps, "at least one is needed")
    unit = jnp.mean(start.scales)
    shape = images.shape[-3:-1]

    def free(splats):
        opacities = jnp.clip(splats.opacities, 1e-3, 1 - 1e-3)
        logits = jnp.log(opacities) - jnp.log1p(-opacities)
        return splats._replace(means=splats.means / unit, scales=jnp.log(splats.scales), opacities=logits)

    def bound(raw):
        opacities = jax.nn.sigmoid(raw.opacities)
        return raw._replace(means=raw.means * unit, scales=jnp.exp(raw.scales), opacities=opacities)

    def error(raw):
        several = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, cameras.focal.ndim - 1), bound(raw))
        drawn = render_splats(several, cameras, shape, background).colour
        return jnp.mean(jnp.square(drawn - images))

    optimizer = optax.adam(rate)

    def step(carry, _):
        raw, state = carry
        loss, gradient = jax.value_and_grad(error)(raw)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(raw, updates), state), loss

    raw = free(start)
    (raw, _), losses = jax.lax.scan(step, (raw, optimizer.init(raw)), None, steps)
    return bound(raw), losses


def view_psnr(splats: Splats, images: Any, cameras: Camera, background: Any = -1.0) -> Any:
    """The PSNR in dB of renderings of `splats` against `images [..., F, H, W, C]` of `cameras [..., F]`, pixels in
    [-1, 1]: the mean over the views, `[...]`. Of views that were not fitted it says whether the geometry is right."""
    several = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, cameras.focal.ndim - 1), splats)
    drawn = render_splats(several, cameras, images.shape[-3:-1], background).colour
    error = jnp.mean(jnp.square(drawn - images), axis=(-3, -2, -1))
    return jnp.mean(10 * jnp.log10(4.0 / error), axis=-1)
