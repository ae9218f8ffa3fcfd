"""The figures that parity tests measure, for `python -m benchmarks.parity`."""

FIGURES: dict[tuple[str, str, str], float] = {}
"""(kind, name, dtype) to the largest absolute error seen."""


def record(kind: str, name: str, error: float, dtype: str = "float32") -> None:
    """Keeps the larger of what was measured before and `error`."""
    FIGURES[kind, name, dtype] = max(FIGURES.get((kind, name, dtype), 0.0), float(error))
