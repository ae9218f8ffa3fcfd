"""`python -m benchmarks.memory ours|peers WORKLOAD`: peak resident MiB while one side runs, in a process of its own.

The peak is counted anew once the program is compiled and warm, so it holds libraries, parameters and what a call needs,
not what compiling needed. Where the system cannot count anew (only Linux can), it is the peak since the start.
"""

import dataclasses
import importlib
import resource
import sys

from benchmarks.workload import Workload


def peak(side: str, work: Workload) -> float:
    """Runs the side's program three times, counting during the last two."""
    program = importlib.import_module(f"benchmarks.{side}")
    if side == "peers":
        program.same_threads()
    call = program.build(work).call
    call()
    anew = _count_anew()
    call()
    call()
    if anew:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _count_anew() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as control:
            control.write("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    work = Workload.read(sys.argv[2])
    # A sampling run repeats one step: two of them already reach its peak.
    print(peak(sys.argv[1], dataclasses.replace(work, steps=min(work.steps, 2))))
