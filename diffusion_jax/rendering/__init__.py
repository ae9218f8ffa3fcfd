"""Cameras and a renderer of 3-D Gaussians, as pure functions of arrays: any leading axes, jitted, differentiable.

A point of the world is `[..., 3]`, in any unit of length; depths have the same unit. Images are `[..., H, W, C]`. Pixel
(row i, column j) covers [j, j + 1) x [i, i + 1), x to the right and y downwards, so its middle is (j + 0.5, i + 0.5).
"""

from diffusion_jax.rendering.cameras import (
    Camera,
    Projected,
    camera_numbers,
    camera_path,
    camera_rays,
    cosine_easing,
    looking_at,
    project,
    unproject,
)
from diffusion_jax.rendering.fitting import fit_splats, splats_from_depth, view_psnr
from diffusion_jax.rendering.splats import Rendered, Splats, render_splats
from diffusion_jax.rendering.views import plane_sweep, reprojection_error, sampled_at, seen_from

__all__ = [
    "Camera",
    "Projected",
    "Rendered",
    "Splats",
    "camera_numbers",
    "camera_path",
    "camera_rays",
    "cosine_easing",
    "fit_splats",
    "looking_at",
    "plane_sweep",
    "project",
    "render_splats",
    "reprojection_error",
    "sampled_at",
    "seen_from",
    "splats_from_depth",
    "unproject",
    "view_psnr",
]
