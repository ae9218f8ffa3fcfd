"""`python -m benchmarks.parity`: how far networks, pipelines and solvers are from diffusers and transformers.

Runs the parity tests (`make test-peers` runs the same), prints a line for each network, pipeline and solver with the
largest absolute error that they measured, in float32 (the default of both libraries) and where it was measured in
float64, and writes `results/parity.json`, a list of such rows. Exit code 1 if a test fails.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import RESULTS

FILE = "parity.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default benchmarks/results)")
    parser.add_argument("-k", dest="only", default="", help="only tests whose names match, as for pytest; not written")
    arguments = parser.parse_args(argv)
    try:
        import diffusers  # noqa: F401
        import pytest
        import torch  # noqa: F401
    except ImportError as error:
        print(f"error: {error.name} is not installed: pip install -e '.[peers,test]'.", file=sys.stderr)
        return 2
    options = ["-q", "-m", "peers", *(["-k", arguments.only] if arguments.only else [])]
    code = int(pytest.main([*options, str(Path(__file__).parent.parent / "tests" / "peers")]))

    from tests.peers.figures import FIGURES

    measured: dict[tuple[str, str], dict] = {}
    for (kind, name, dtype), error in sorted(FIGURES.items()):
        measured.setdefault((kind, name), {})[dtype] = error
    rows = [{"kind": kind, "name": name, **errors} for (kind, name), errors in measured.items()]
    print(f"{'':14} {'':56} float32  float64")
    for row in rows:
        figures = (f"{row[dtype]:.1e}" if dtype in row else "      -" for dtype in ("float32", "float64"))
        print(f"{row['kind']:14} {row['name']:56} {'  '.join(figures)}")
    if not arguments.only:
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
