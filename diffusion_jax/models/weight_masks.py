"""Masks of weights: which entries of frozen matrices take part, for each sample (MaskUNet).

    y_b = x_b (W o M_b) + bias,      M_b in {0, 1}^(in x out)                                                      (1)

Nothing is rescaled. An edit for `interception.intercepted`, of the dense layers of any network; masks are data, stacked
over depth. `routing.gumbel_sigmoid_st(key, logits, tau=1, single=True)` draws them with the gradient of a sigmoid.
Masks of a sample take B times the memory of the matrices that they mask: select few layers, or share them.

Source: "Not All Parameters Matter: Masking Diffusion Models for Enhancing Generation Ability" (MaskUNet), equation for
its masked layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.interception import Edit, Select, Site
from diffusion_jax.models.paths import by_path
from diffusion_jax.models.routing import over_rows

MASKS = "weight_masks"


def masked_weights(select: Select = ("attention/q", "attention/k", "attention/v", "attention/out")) -> Edit:
    """Equation (1) for the selected dense layers, by `weight_masks/.../mask [L, B or 1, in, out]`, all 1 to begin with.

    Where all samples share a mask (an axis of 1 in place of B) it is an edit of the weights, and with ones the layer
    itself bit for bit. Derivatives with respect to masks are those of equation (1). Rows that stand for frames or
    tokens of a sample share its mask. Raises InvalidInput, when the network runs, where what is selected has no matrix
    or masks are of neither one nor all samples.
    """
    return Edit(select, _masked, (MASKS,))


def kept_share(masks: Any) -> dict[str, Any]:
    """By module the share of weights that take part, `[L, B or 1]`: of the entry `weight_masks` of the parameters."""
    return {path.removesuffix("/mask"): leaf.mean(axis=(-2, -1)) for path, leaf in by_path(masks).items()}


def _masked(site: Site, x: Any, *others: Any) -> Any:
    kernel = site.params.get("kernel")
    if kernel is None or kernel.ndim != 2:
        raise invalid("select", "/".join(site.module.path), "dense layers, with a matrix each, can be masked")
    mask = site.get(MASKS, "mask", lambda: jnp.ones((1, *kernel.shape), kernel.dtype))
    if site.initialising:
        return site.run(x)

    def one(mask, x):
        return site.run_with({**site.params, "kernel": kernel * mask.astype(kernel.dtype)}, x)

    if mask.shape[0] == 1:
        return one(mask[0], x)
    if x.shape[0] % mask.shape[0]:
        raise invalid("weight_masks", mask.shape, f"one mask, or one for each sample of {x.shape[0]} rows, is needed")
    return jax.vmap(one)(over_rows(mask, x.shape[0]), x)
