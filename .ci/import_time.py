"""Print how long `import pytrain` takes in a fresh interpreter, beside one that imports nothing."""

import statistics
import subprocess
import sys
import time

ROUNDS = 7


def seconds(statement: str) -> list[float]:
    """Wall-clock time of whole interpreters that run the statement."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    bare = statistics.median(seconds("pass"))
    for module in ("pytrain", "pytrain.train", "numpy"):
        print(f"  import {module:14} {statistics.median(seconds(f'import {module}')) - bare:.3f}")
