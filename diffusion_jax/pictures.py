"""Pictures for people: grids of images, named strips, scatter plots, curves, all written as PNG.

Plots of numbers say what they show in a title, name both axes with units, mark what was measured, keep their legend
beside the axes, and carry their numbers as text in the PNG file, from which `redraw` draws them anew.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np

from diffusion_jax import pixels, reading
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.typing import Number, Numbers

DPI = 110
"""Pixels of an inch of every plot."""

LINE, TEXT = (110, 140, 190), 10
"""The colour of the lines between images, which neither black, grey nor white images run into; points of text."""

READABLE, WIDEST = 64, 1400
"""Pixels that the shorter side of a small image is enlarged to; pixels of a row that are not exceeded for it."""

MEASURED = 40
"""Curves of at most so many points have each of them marked."""

CHUNK = "curves"
"""The text of a PNG file that holds the numbers of a plot."""

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


def readable_zoom(height: int, width: int, columns: int = 1) -> int:
    """How many times images are enlarged so that a person sees their pixels: to `READABLE`, within `WIDEST`."""
    return max(1, min(round(READABLE / min(height, width)), WIDEST // (width * columns)))


def grid(images: Numbers, columns: int, *, pad: int = 2, zoom: int | None = 1) -> np.ndarray:
    """Tiles `[B, H, W, C]` images in [-1, 1] row by row into one uint8 picture `[rows (H + pad), ..., 3]`.

    Takes uint8 as well. Floats that all lie in [0, 1], which would be shown pale, are told in a warning. zoom: how many
    times each pixel is repeated; None enlarges small images until they can be read.
    """
    _warn_pale(images)
    images = to_uint8(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise invalid("images.shape", images.shape, "expected [B, H, W, C] with 1 or 3 channels")
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    count, height, width, _ = images.shape
    times = readable_zoom(height, width, columns) if zoom is None else zoom
    images = images.repeat(times, axis=1).repeat(times, axis=2)
    height, width = times * height, times * width
    rows = -(-count // columns)
    sheet = np.empty((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), np.uint8)
    sheet[:] = LINE
    # Where the last row has no image, there is nothing.
    sheet[(rows - 1) * (height + pad) + pad :, (count - (rows - 1) * columns) * (width + pad) + pad :] = 255
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + pad) + pad, (i % columns) * (width + pad) + pad
        sheet[top : top + height, left : left + width] = image
    return sheet


def _warn_pale(images):
    """Warns of floats that all lie in [0, 1]: those of another convention."""
    values = np.asarray(images)
    if values.dtype.kind == "f" and values.size and values.min() >= 0 and 0 < values.max() <= 1:
        warnings.warn("images hold floats from 0 to 1, which are pale in [-1, 1]: 2 * x - 1 scales them.", stacklevel=4)


def save_grid(path: Path | str, images: Numbers, columns: int, *, zoom: int | None = None) -> None:
    """Writes `grid(images, columns)` as a PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, grid(images, columns, zoom=zoom))


def save_strips(
    path: Path | str, strips: Mapping[str, Any], *, title: str = "", along: str = "", zoom: int | None = None
) -> None:
    """Writes strips of images `[F, H, W, C]`, the frames of a clip say, below each other with their names on the left.

    A strip `[N, F, H, W, C]` is several of one name, below each other. along: what changes from left to right, such as
    "time"; it stands below with an arrow.
    """
    sheets = {}
    for name, images in strips.items():
        images = np.asarray(images)
        images = images[None] if images.ndim == 4 else images
        columns = images.shape[1]
        sheets[name] = grid(images.reshape(-1, *images.shape[2:]), columns, zoom=zoom)
    heights = [sheet.shape[0] for sheet in sheets.values()]
    width = max(sheet.shape[1] for sheet in sheets.values())
    margin = max(_width(name) for name in sheets) + 0.3
    top, bottom, gap = 0.4 * bool(title) + 0.1, 0.3 * bool(along) + 0.1, 0.12
    inches = width / DPI + margin + 0.1
    tall = sum(heights) / DPI + gap * (len(sheets) - 1) + top + bottom
    figure = _figure((inches, tall))
    above = tall - top
    for name, sheet in sheets.items():
        height, across = sheet.shape[0] / DPI, sheet.shape[1] / DPI
        above -= height
        axis = figure.add_axes((margin / inches, above / tall, across / inches, height / tall))
        axis.imshow(sheet, interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        figure.text((margin - 0.12) / inches, (above + height / 2) / tall, name, ha="right", va="center", fontsize=TEXT)
        above -= gap
    if title:
        figure.text(margin / inches, 1 - 0.12 / tall, title, ha="left", va="top", fontsize=TEXT + 1, weight="bold")
    if along:
        figure.text(margin / inches, 0.08 / tall, f"{along} →", ha="left", va="bottom", fontsize=TEXT)
    _save(figure, path, tight=False)


def save_captioned(
    path: Path | str, rows: Mapping[str, tuple[Any, Sequence[str]]], *, title: str = "", size: float = 0.7
) -> None:
    """Writes rows of images `[N, H, W, C]` in [-1, 1], each image above its own caption, names of rows on the left.

    size: side of an image in inches.
    """
    columns = max(len(images) for images, _ in rows.values())
    figure, axes = _subplots(
        len(rows), columns, figsize=(size * columns + 2.2, (size + 0.3) * len(rows) + 0.2), squeeze=False
    )
    for line, (name, (images, captions)) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image, caption in zip(line, to_uint8(images), captions, strict=False):
            axis.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
            axis.text(0.5, -0.08, caption, transform=axis.transAxes, ha="center", va="top", fontsize=TEXT - 1)
        line[0].text(-0.2, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=TEXT)
    if title:
        line = axes[0, 0]
        line.text(0, 1.25, title, transform=line.transAxes, ha="left", va="bottom", fontsize=TEXT + 1, weight="bold")
    _save(figure, path)


def save_scatter(
    path: Path | str,
    points: Mapping[str, Any],
    *,
    title: str = "",
    x_label: str = "x",
    y_label: str = "y",
    columns: int = 4,
) -> None:
    """Writes named sets of two-dimensional points `[B, 2]` beside and below each other, on one scale."""
    columns = min(columns, len(points))
    rows = -(-len(points) // columns)
    figure, axes = _subplots(
        rows, columns, figsize=(2.8 * columns + 0.6, 3.0 * rows + 0.6), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, (name, values) in zip(axes.flat, points.items(), strict=False):
        values = np.asarray(values)
        axis.scatter(values[:, 0], values[:, 1], s=2, alpha=0.5)
        axis.set_title(name, fontsize=TEXT)
        axis.set_aspect("equal")
        axis.locator_params(nbins=4)
    for axis in axes.flat[len(points) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel(x_label)
    for axis in axes[:, 0]:
        axis.set_ylabel(y_label)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1, weight="bold")
    _save(figure, path)


def save_curves(
    path: Path | str,
    curves: Mapping[str, tuple[Any, Any]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log: bool = True,
    falling: bool = False,
    doublings: bool = False,
) -> None:
    """Writes named curves, each `(x, y)`; y is logarithmic when all of it is positive, unless `log` is False.

    falling: x runs from right to left, as the time of a run does. doublings: x is logarithmic, as for numbers of steps.
    """
    from matplotlib import ticker  # slow to import

    plain = {name: ([*map(float, x)], [*map(float, y)]) for name, (x, y) in curves.items()}
    given = {"title": title, "x_label": x_label, "y_label": y_label, "log": log, "falling": falling}
    given["doublings"] = doublings
    names = len(plain) > 1
    figure, axis = _subplots(figsize=(8.2 if names else 6.4, 3.9))
    looks = zip("osDv^<>Ph*Xp" * len(plain), plain.items())
    for marker, (name, (x, y)) in looks:
        marked = {"marker": marker, "markersize": 4.5} if len(x) <= MEASURED else {}
        axis.plot(x, y, label=name, linewidth=1.4, **marked)
    positive = all(value > 0 for _, y in plain.values() for value in y)
    if log and positive:
        axis.set_yscale("log")
        readable_decades(axis.yaxis, *axis.get_ylim())
    if doublings:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
    elif all(value.is_integer() for x, _ in plain.values() for value in x):
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if falling:
        axis.invert_xaxis()
    axis.set_title(title, loc="left", fontsize=TEXT + 1, weight="bold")
    axis.set_xlabel(x_label + (" (a run goes from left to right)" if falling else ""))
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    if names:
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _save(figure, path, numbers={"curves": plain, **given})


def redraw(path: Path | str, **changes: Any) -> None:
    """Draws a plot of curves anew from the numbers in its own file. changes: of the arguments of `save_curves`.

    Raises InvalidInput for a picture without them.
    """
    text = reading.read_image(path).info.get(CHUNK)
    if not isinstance(text, str):
        raise InvalidInput(f"{path} carries no curves: only what save_curves has written can be redrawn.")
    given = reading.parse_json(text, f"the curves in {path}")
    given["curves"] = {name: tuple(pair) for name, pair in given["curves"].items()}
    save_curves(path, **{**given, **changes})


def readable_decades(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis as a person writes them: 0.02, 0.05, 0.1; powers of ten where there are many."""
    from matplotlib import ticker

    decades = math.log10(high / low)
    if decades > 3.5:
        axis.set_major_locator(ticker.LogLocator(numticks=9))
        axis.set_minor_locator(ticker.NullLocator())
        return
    subs = (1.0, 2.0, 5.0) if decades > 1.2 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    ticks = [sub * 10.0**power for power in range(-12, 13) for sub in subs if low <= sub * 10.0**power <= high]
    if decades < 0.6:
        ticks = [tick for tick in ticker.MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(ticker.FixedLocator(ticks))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def save_panels(
    path: Path | str,
    panels: Mapping[str, Mapping[str, tuple[Any, Any, Any]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    reference: str,
    filled_means: str,
    columns: int = 2,
) -> None:
    """Writes panels of named curves, `{title: {name: (x, y, filled)}}`, both axes logarithmic; a name looks alike in
    all of them.

    filled: bools, which points are filled; filled_means: what that says, which stands below the legend. reference: the
    name of the curve that the others are compared with, drawn in black. Points are marked, so a curve may be a single
    one. The legend of all names stands below.
    """
    from matplotlib import colormaps

    names = [name for name in dict.fromkeys(name for curves in panels.values() for name in curves) if name != reference]
    colours, markers = colormaps["tab20"], "osDv^<>Ph*XpH8d"
    looks = {name: (colours(i % 20), markers[i % len(markers)]) for i, name in enumerate(names)}
    rows = -(-len(panels) // columns)
    lines = -(-(len(names) + 1) // (2 * columns))
    legend = 0.24 * lines + 0.5
    figure, axes = _subplots(rows, columns, figsize=(5.6 * columns, 4.6 * rows + legend + 0.4), squeeze=False)
    for axis, (name_of_panel, curves) in zip(axes.flat, panels.items()):
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
        axis.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axis.set_title(name_of_panel, loc="left", fontsize=TEXT + 1, weight="bold")
        for one, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            readable_decades(one, low, high)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles = dict(pair[::-1] for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels()))
    tall = figure.get_figheight()
    figure.suptitle(title, fontsize=TEXT + 2, weight="bold")
    figure.tight_layout(rect=(0, legend / tall, 1, 1))
    figure.legend(
        handles.values(), handles, loc="lower center", bbox_to_anchor=(0.5, 0.32 / tall), ncols=2 * columns,
        fontsize=TEXT - 1, frameon=False,
    )  # fmt: skip
    figure.text(0.5, 0.12 / tall, filled_means, ha="center", va="bottom", fontsize=TEXT)
    _save(figure, path, tight=False)


def _figure(size: tuple[Number, Number]) -> Any:
    """A figure that only this module knows: pyplot would choose the backend of the whole process, a notebook's too."""
    from matplotlib.figure import Figure

    return Figure(figsize=size)


def _subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[Number, Number], **options: Any) -> tuple[Any, Any]:
    figure = _figure(figsize)
    return figure, figure.subplots(rows, columns, **options)


def _width(text: str) -> float:
    """Inches that a text takes."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=TEXT).get_extents().width / 72 if text.strip() else 0.0


def _save(figure, path: Path | str, tight: bool = True, numbers: Mapping[str, Any] | None = None) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=DPI, metadata=None if numbers is None else {CHUNK: json.dumps(numbers)})
