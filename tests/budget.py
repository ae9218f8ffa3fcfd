"""What each test file costs in processor time: the suite's plugin that measures it, and the lint that bounds it.

A run of the suite ends with its dearest files and names those over budget; whole files' times are kept in
`.cache/processor_seconds.json`. `python -m tests.budget` (a part of `make lint`) fails where a file of the last run
was over budget by more than runs of one code differ (`NOISE`): fifty-six systems only fit into a quarter of an hour if
none takes more than its share.

Times are of the process and its children, and are divided by how much slower this machine compiles a fixed program than
the one on which the budgets were set. What importing the files costs is told apart: the first one to import a part of
the library pays for all.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

BUDGET = 20.0
"""Processor seconds of a test file."""

SMOKE_BUDGET = 6.0
"""Processor seconds of one system's smoke run, `tests/recipes/test_smoke.py::...[slug]`, and of its page's code."""

BY_SYSTEM = ("test_smoke.py::", "test_pages.py::")
"""Files whose tests are one a system."""

NOISE = 1.5
"""How many times as long one smoke run took in one run of the suite as in another (6.4 and 9.5 s of processor time)."""

RECORD = Path(__file__).parent.parent / ".cache" / "processor_seconds.json"
DEAREST = 10

YARDSTICK = 0.21
"""Processor seconds that the first call of `yardstick` takes on the machine on which the budgets were set."""


def yardstick() -> float:
    """Processor seconds of compiling a program that differs from call to call in a number alone."""
    import jax
    import jax.numpy as jnp

    # Otherwise it would be found in the cache of compiled programs.
    unique = float(time.time_ns() % 10**9)

    def program(x):
        x = x + unique
        for i in range(24):
            x = jnp.tanh(x @ x.T) @ x + jnp.cumsum(x, axis=i % 2)
        return x

    begun = _seconds()
    jax.jit(program).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
    return _seconds() - begun


def _seconds() -> float:
    import resource

    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def item_of(nodeid: str) -> str:
    """What a test's time is counted for: its file, or a smoke run or a page of its own."""
    return nodeid if any(name in nodeid for name in BY_SYSTEM) else nodeid.partition("::")[0]


def budget_of(item: str) -> float:
    return SMOKE_BUDGET if "::" in item else BUDGET


def over(seconds: Mapping[str, float], noise: float = 1.0) -> list[str]:
    """A sentence for each file over `noise` times its budget, the dearest first."""
    return [
        f"{item} takes {spent:.1f} s of processor time, over its budget of {budget_of(item):.0f} s."
        for item, spent in sorted(seconds.items(), key=lambda pair: -pair[1])
        if spent > noise * budget_of(item)
    ]


class Meter:
    """Counts processor seconds in each process of the run; the one that the user started adds up and tells them."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.spent: Counter[str] = Counter()
        self.collected: Counter[str] = Counter()
        self.factors: list[float] = []
        self.begun = time.time()
        self.is_worker = hasattr(config, "workerinput")

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector):
        begun = _seconds()
        report = yield
        if isinstance(collector, pytest.Module):
            self.collected[collector.nodeid] += _seconds() - begun
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        if not self.factors:
            self.factors.append(max(1.0, yardstick() / YARDSTICK))
        begun = _seconds()
        result = yield
        self.spent[item_of(item.nodeid)] += _seconds() - begun
        return result

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """A worker of pytest-xdist has ended. Files are imported by every worker and counted once."""
        output = getattr(node, "workeroutput", {}).get("processor_seconds")
        if output:
            self.spent.update(output["spent"])
            self.collected |= Counter(output["collected"])
            self.factors += output["factors"]

    def pytest_sessionfinish(self):
        if self.is_worker:
            self.config.workeroutput["processor_seconds"] = {
                "spent": dict(self.spent),
                "collected": dict(self.collected),
                "factors": self.factors,
            }

    def pytest_terminal_summary(self, terminalreporter):
        if not self.spent or self.is_worker:
            return
        factor = sum(self.factors) / len(self.factors)
        seconds = {item: spent / factor for item, spent in self.spent.items()}
        files = {item.partition("::")[0] for item in seconds}
        terminalreporter.section("processor time")
        terminalreporter.line(
            f"{sum(seconds.values()):.0f} s in {len(files)} files, {time.time() - self.begun:.0f} s of wall time; "
            f"importing them takes {sum(self.collected.values()) / factor:.0f} s more in each worker. "
            f"This machine takes {factor:.2f} times as long as that of the budgets, which is taken out. The dearest:"
        )
        for item, spent in sorted(seconds.items(), key=lambda pair: -pair[1])[:DEAREST]:
            terminalreporter.line(f"{spent:8.1f} s  {item}")
        for sentence in over(seconds):
            terminalreporter.line(sentence)
        if self._to_be_kept():
            known = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
            RECORD.parent.mkdir(parents=True, exist_ok=True)
            RECORD.write_text(json.dumps(known | seconds, indent=1, sort_keys=True))

    def _to_be_kept(self) -> bool:
        """Whether whole files ran, and on the generation of JAX for which budgets are set (others compile longer)."""
        from tests.shipped import OPTIONS

        whole = not (self.config.option.keyword or any("::" in str(argument) for argument in self.config.args))
        return whole and bool(OPTIONS)


def main() -> int:
    if not RECORD.is_file():
        print("No run of the suite is on record, so no file can be over budget: make test writes it.")
        return 0
    seconds = {item: spent for item, spent in json.loads(RECORD.read_text()).items() if _exists(item)}
    sentences = over(seconds, NOISE)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if sentences else 0


def _exists(item: str) -> bool:
    return (Path(__file__).parent.parent / item.partition("::")[0]).is_file()


if __name__ == "__main__":
    sys.exit(main())
