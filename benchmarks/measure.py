"""What benchmarks share: a process for each measurement, and how much memory it took."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def in_a_process(module: str, arguments: Sequence[object]) -> Any:
    """What `python -m module arguments` prints last, a line of JSON; nothing before it was in its memory."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes


def timed(
    call: Callable[[], Any], evaluate: Callable[[Any], Any], repeats: int
) -> tuple[Any, dict[str, float]]:
    """What a call gives, and seconds: of the "first" one, and of the fastest of `repeats` that follow.

    evaluate: what makes sure that a result has been computed.
    """
    times, result = [], None
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = call()
        evaluate(result)
        times.append(time.perf_counter() - start)
    return result, {"seconds": min(times[1:]), "first": times[0]}


def show(row: dict) -> str:
    """A part's figures, of "flux" and maybe of a "reference", as a line of a table."""
    ours, theirs = row["flux"], row.get("reference")
    line = f"{row['part']:<11}{ours['seconds']:>9.3f} s{ours['peak'] / 1e6:>8.0f} MB"
    if theirs:
        line += f"{theirs['seconds']:>12.3f} s{theirs['peak'] / 1e6:>8.0f} MB"
        line += f"{ours['seconds'] / theirs['seconds']:>8.2f} x{ours['peak'] / theirs['peak']:>8.2f} x"
        line += f"{row['error']:>12.1e}"
    return line
