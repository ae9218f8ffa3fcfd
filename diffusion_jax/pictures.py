"""Pictures for people: grids of images, named strips, scatter plots, curves, all written as PNG."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np

from diffusion_jax import pixels
from diffusion_jax.errors import invalid
from diffusion_jax.typing import Number, Numbers

SCALED = 16.0
"""Floats from 0 to more than this were never in [-1, 1], however far a network overshot."""


def to_uint8(images: Numbers) -> np.ndarray:
    """Images `[..., H, W, C]` as bytes: floats in [-1, 1], or what `pixels.scaled` makes pixels of.

    Values outside are clipped, as those that a network overshoots, and NaN is black. Raises InvalidInput for floats
    that can only be pixels in 0 .. 255.
    """
    images = pixels.scaled(images, "images")
    images = np.nan_to_num(images, nan=-1.0)
    if images.size and images.min() >= 0 and images.max() > SCALED:
        raise invalid("the range of images", f"0 to {images.max():g}", "floats in [-1, 1] or uint8 are needed")
    images = np.clip(images, -1, 1)
    return np.round((images + 1) * 127.5).astype(np.uint8)


def grid(images: Numbers, columns: int, *, pad: int = 1, zoom: int = 1) -> np.ndarray:
    """Tiles `[B, H, W, C]` images in [-1, 1] row by row into one uint8 picture `[rows (H + pad), ..., 3]`.

    Takes uint8 as well. Floats that all lie in [0, 1], which would be shown pale, are told in a warning.
    """
    _warn_pale(images)
    images = to_uint8(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise invalid("images.shape", images.shape, "expected [B, H, W, C] with 1 or 3 channels")
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + pad) + pad, (i % columns) * (width + pad) + pad
        sheet[top : top + height, left : left + width] = image
    return sheet


def _warn_pale(images):
    """Warns of floats that all lie in [0, 1]: those of another convention."""
    values = np.asarray(images)
    if values.dtype.kind == "f" and values.size and values.min() >= 0 and 0 < values.max() <= 1:
        warnings.warn("images hold floats from 0 to 1, which are pale in [-1, 1]: 2 * x - 1 scales them.", stacklevel=4)


def save_grid(path: Path | str, images: Numbers, columns: int, *, zoom: int = 1) -> None:
    """Writes `grid(images, columns)` as a PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, grid(images, columns, zoom=zoom))


def save_strips(path: Path | str, strips: Mapping[str, Any], *, zoom: int = 3) -> None:
    """Writes strips of images `[F, H, W, C]`, the frames of a clip say, below each other with their names on the left.

    A strip `[N, F, H, W, C]` is several of one name, below each other.
    """
    sheets = {}
    for name, images in strips.items():
        images = np.asarray(images)
        images = images[None] if images.ndim == 4 else images
        sheets[name] = grid(images.reshape(-1, *images.shape[2:]), images.shape[1], zoom=zoom)
    heights = [sheet.shape[0] for sheet in sheets.values()]
    width = max(sheet.shape[1] for sheet in sheets.values())
    margin = 0.2 + 0.07 * max(map(len, sheets))
    inches = width / 110 + margin + 0.1
    edges = {"left": margin / inches, "right": 1 - 0.1 / inches, "top": 0.99, "bottom": 0.01}
    figure, axes = _subplots(
        len(sheets),
        1,
        figsize=(inches, sum(heights) / 110 + 0.1 * len(sheets)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights, **edges},
    )
    for axis, (name, sheet) in zip(axes[:, 0], sheets.items(), strict=True):
        axis.imshow(sheet, interpolation="nearest", aspect="equal")
        axis.set_anchor("W")
        axis.set_axis_off()
        axis.text(-0.02, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=8)
    _save(figure, path, tight=False)


def save_captioned(path: Path | str, rows: Mapping[str, tuple[Any, Sequence[str]]], *, size: float = 0.55) -> None:
    """Writes rows of images `[N, H, W, C]` in [-1, 1], each image above its own caption, names of rows on the left.

    size: side of an image in inches.
    """
    columns = max(len(images) for images, _ in rows.values())
    figure, axes = _subplots(
        len(rows), columns, figsize=(size * columns + 1.8, (size + 0.25) * len(rows)), squeeze=False
    )
    for line, (name, (images, captions)) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image, caption in zip(line, to_uint8(images), captions, strict=False):
            axis.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
            axis.text(0.5, -0.08, caption, transform=axis.transAxes, ha="center", va="top", fontsize=7)
        line[0].text(-0.2, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    _save(figure, path)


def save_scatter(path: Path | str, points: Mapping[str, Any]) -> None:
    """Writes named sets of two-dimensional points `[B, 2]` side by side, on one scale."""
    figure, axes = _subplots(1, len(points), figsize=(3.2 * len(points), 3.2), sharex=True, sharey=True, squeeze=False)
    for axis, (name, values) in zip(axes[0], points.items(), strict=True):
        values = np.asarray(values)
        axis.scatter(values[:, 0], values[:, 1], s=2, alpha=0.5)
        axis.set_title(name)
        axis.set_aspect("equal")
    _save(figure, path)


def save_curves(
    path: Path | str,
    curves: Mapping[str, tuple[Any, Any]],
    *,
    x_label: str,
    y_label: str,
    log: bool = True,
) -> None:
    """Writes named curves, each `(x, y)`; y is logarithmic when all of it is positive, unless `log` is False."""
    figure, axis = _subplots(figsize=(6, 3.6))
    for name, (x, y) in curves.items():
        axis.plot(x, y, label=name, linewidth=1.2)
    if log and all(np.all(np.asarray(y) > 0) for _, y in curves.values()):
        axis.set_yscale("log")
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def save_panels(
    path: Path | str,
    panels: Mapping[str, Mapping[str, tuple[Any, Any, Any]]],
    *,
    x_label: str,
    reference: str,
    columns: int = 2,
) -> None:
    """Writes panels of named curves, `{title: {name: (x, y, filled)}}`, both axes logarithmic; a name looks alike in
    all of them.

    filled: bools, which points are filled and joined by a full line; the others are pale. reference: the name of the
    curve that the others are compared with, drawn in black. Points are marked, so a curve may be a single one. The
    legend of all names stands below.
    """
    from matplotlib import colormaps, ticker

    names = [name for name in dict.fromkeys(name for curves in panels.values() for name in curves) if name != reference]
    colours, markers = colormaps["tab20"], "osDv^<>Ph*XpH8d"
    looks = {name: (colours(i % 20), markers[i % len(markers)]) for i, name in enumerate(names)}
    rows = -(-len(panels) // columns)
    lines = -(-(len(names) + 1) // (2 * columns))
    legend = 0.22 * lines + 0.1
    figure, axes = _subplots(rows, columns, figsize=(5.6 * columns, 4.4 * rows + legend), squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for name, (x, y, filled) in curves.items():
            if name == reference:
                axis.plot(x, y, label=name, color="black", marker=".", linewidth=1.8, zorder=3)
                continue
            colour, marker = looks[name]
            axis.plot(x, y, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot([], [], label=name, color=colour, marker=marker, linewidth=0.7)
            for i, whole in enumerate(filled):
                face = colour if whole else "none"
                axis.plot(x[i], y[i], color=colour, marker=marker, markerfacecolor=face, markersize=6.5, zorder=4)
        axis.set(xscale="log", yscale="log", title=title, xlabel=x_label)
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
            one.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            one.set_minor_locator(ticker.NullLocator())
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles = dict(pair[::-1] for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels()))
    figure.tight_layout(rect=(0, legend / figure.get_figheight(), 1, 1))
    figure.legend(handles.values(), handles, loc="lower center", ncols=2 * columns, fontsize=8, frameon=False)
    _save(figure, path, tight=False)


def _subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[Number, Number], **options: Any) -> tuple[Any, Any]:
    """A figure that only this module knows: pyplot would choose the backend of the whole process, a notebook's too."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns, **options)


def _save(figure, path: Path | str, tight: bool = True) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=110)
