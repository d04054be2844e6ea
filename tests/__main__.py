"""Run the tests on one Keras backend after the other: `python -m tests --help`.

Tests of the examples' data, the experiments and the benchmarks (tests/tools) are the
same on all backends, and run on the first one only.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BACKENDS = ("tensorflow", "jax", "torch")
PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "--durations=20"),
    *("-n", "2", "--dist", "worksteal"),
]


def main() -> int:
    options = parse()
    backends = options.backends or [b for b in BACKENDS if importlib.util.find_spec(b)]
    if not backends:
        print(f"None of {', '.join(BACKENDS)} is installed; nothing to test.")
        return 2
    failed = [
        backend
        for backend in backends
        if run(backend, options.quick, with_tools=backend == backends[0])
    ]
    print(f"=== failed: {', '.join(failed)}" if failed else "=== all passed")
    return len(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="for daily work, under two minutes: one case of each test that is fast",
    )
    parser.add_argument(
        "backends",
        nargs="*",
        metavar="BACKEND",
        help=f"{', '.join(BACKENDS)}; without, every one that is installed",
    )
    options = parser.parse_args()
    if unknown := set(options.backends) - set(BACKENDS):
        parser.error(f"no such backend: {', '.join(sorted(unknown))}")
    return options


def run(backend: str, quick: bool, with_tools: bool) -> int:
    """Test one backend; pytest's exit status."""
    print(f"=== {backend}", flush=True)
    command = [*PYTEST, *["--quick"] * quick]
    if not with_tools:
        command.append("--ignore=tests/tools")
    environment = {**os.environ, "KERAS_BACKEND": backend}
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    print(f"=== {backend}: {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
