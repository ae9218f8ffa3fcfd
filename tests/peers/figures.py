"""The figures that parity tests measure, for `python -m benchmarks.parity`."""

FIGURES: dict[tuple[str, str], float] = {}
"""(kind, name) to the largest absolute error seen."""


def record(kind: str, name: str, error: float) -> None:
    """Keeps the larger of what was measured before and `error`."""
    FIGURES[kind, name] = max(FIGURES.get((kind, name), 0.0), float(error))
