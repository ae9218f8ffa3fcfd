"""Curves as SVG for web pages: readable on a phone, in the colours of the page, light or dark, and without scripts.

`STYLE` is the CSS that they need. Files of curves are drawn by `pictures`.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from diffusion_jax.typing import Number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 260, 58, 14, 14, 44
"""The size of a chart and its margins, in units of its own."""

MOST_POINTS, SMOOTHED_FROM = 400, 40
"""Longer curves are drawn by the means of neighbours; noisy curves get a smooth one from so many points on."""

COLOURS = 6

MOST_TICKS, DIGITS = 7, ((1,), (1, 2, 5), (1, 2, 3, 5, 7), tuple(range(1, 10)))
"""Ticks of a logarithmic axis: of the coarsest of these scales that has three on it."""

STYLE = """
.chart { margin: 0; }
.chart svg { width: 100%; height: auto; display: block; overflow: visible; }
.chart text { font: 14px system-ui, sans-serif; fill: var(--quiet); }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart path { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart path.raw { stroke-width: 1; opacity: .3; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; color: var(--quiet); margin: 0 0 .3rem; }
.legend i { display: inline-block; width: 1rem; height: .2rem; border-radius: 1px; margin-right: .4rem;
  vertical-align: middle; }
.k0 { stroke: #2f6fde; background: #2f6fde; } .k1 { stroke: #d9730d; background: #d9730d; }
.k2 { stroke: #1a9c72; background: #1a9c72; } .k3 { stroke: #8b5cd6; background: #8b5cd6; }
.k4 { stroke: #d6456b; background: #d6456b; } .k5 { stroke: #6b7785; background: #6b7785; }
circle.k0 { fill: #2f6fde; } circle.k1 { fill: #d9730d; } circle.k2 { fill: #1a9c72; }
circle.k3 { fill: #8b5cd6; } circle.k4 { fill: #d6456b; } circle.k5 { fill: #6b7785; }
"""

Curve = tuple[Any, Any]
"""x and y, of any numbers."""


def line_chart(
    curves: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    marked: bool = False,
    x_range: Sequence[Number] = (0.0,),
    y_range: Sequence[Number] = (),
) -> str:
    """Named curves `(x, y)` as a `<figure>`; points that are not finite are left out. "" where no point is left.

    log: y is logarithmic, where all of it is positive. marked: points are marked, and say their value.
    x_range, y_range: values that the axes show in any case.
    """
    shown = {name: _finite(*curve) for name, curve in curves.items()}
    shown = {name: curve for name, curve in shown.items() if len(curve[0])}
    if not shown:
        return ""
    xs = np.concatenate([x for x, _ in shown.values()] + [np.asarray(x_range, np.float64)])
    ys = np.concatenate([y for _, y in shown.values()] + [np.asarray(y_range, np.float64)])
    log = log and bool(np.all(ys > 0))
    x_ticks, x_low, x_high = _axis(xs.min(), xs.max(), False, tight=True)
    y_ticks, y_low, y_high = _axis(ys.min(), ys.max(), log)
    across = _scale(x_low, x_high, LEFT, WIDTH - RIGHT, False)
    up = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP, log)
    parts = []
    for value in y_ticks:
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{tick_label(value)}</text>')
    for value in x_ticks:
        parts.append(
            f'<text x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick_label(value)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for number, (name, (x, y)) in enumerate(shown.items()):
        colour = f"k{number % COLOURS}"
        noisy = not marked and len(x) >= SMOOTHED_FROM
        if noisy:
            parts.append(_path(*_thinned(x, y), across, up, f"{colour} raw"))
            y = _smoothed(y)
        parts.append(_path(*_thinned(x, y), across, up, colour))
        if marked or len(x) == 1:
            parts += [
                f'<circle class="{colour}" cx="{across(a):.1f}" cy="{up(b):.1f}" r="4">'
                f"<title>{escape(name)}: {b:.4g} at {a:.4g}</title></circle>"
                for a, b in zip(x, y)
            ]
    described = escape(f"{y_label} by {x_label}: {', '.join(shown)}", quote=True)
    legend = "".join(
        f'<span><i class="k{number % COLOURS}"></i>{escape(name)}</span>' for number, name in enumerate(shown)
    )
    legend = f'<div class="legend">{legend}</div>' if len(shown) > 1 else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg>'
    return f'<figure class="chart">{legend}{svg}</figure>'


def tick_label(value: Number) -> str:
    """A number beside an axis: `0.5`, `2,000`, `1e-05`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _finite(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    good = np.isfinite(a) & np.isfinite(b)
    return a[good], b[good]


def _axis(low: Number, high: Number, log: bool, tight: bool = False) -> tuple[list[float], float, float]:
    """Ticks, and the ends of an axis that shows `low` to `high`. tight: it ends where the values do."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    if log:
        low, high = low / (high / low) ** 0.05, high * (high / low) ** 0.05
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in DIGITS:
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            ticks = [value for value in ticks if low <= value <= high]
            if 3 <= len(ticks) <= MOST_TICKS:
                return ticks, low, high
        if len(ticks := [10.0**decade for decade in decades if low <= 10.0**decade <= high]) > MOST_TICKS:
            return ticks[:: -(-len(ticks) // MOST_TICKS)], low, high
    elif not tight:
        margin = 0.05 * (high - low)
        low, high = low - margin if not 0 <= low <= margin else low, high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return ticks, low, high


def _scale(low: Number, high: Number, start: Number, end: Number, log: bool):
    to = math.log if log else float
    a, b = to(low), to(high)
    return lambda value: start + (end - start) * (to(value) - a) / (b - a)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = max(1, -(-len(x) // MOST_POINTS))
    if parts == 1:
        return x, y
    cuts = np.arange(0, len(x), parts)
    counts = np.diff(np.append(cuts, len(x)))
    return np.add.reduceat(x, cuts) / counts, np.add.reduceat(y, cuts) / counts


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Means over a twentieth of the curve, narrower at its ends."""
    half = max(1, len(y) // 40)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    place = np.arange(len(y))
    reach = np.minimum(half, np.minimum(place, len(y) - 1 - place))
    return (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)


def _path(x, y, across, up, kind: str) -> str:
    points = "L".join(f"{across(a):.1f} {up(b):.1f}" for a, b in zip(x, y))
    return f'<path class="{kind}" d="M{points}"/>'
