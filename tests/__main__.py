"""Run the tests on one Keras backend after the other: `python -m tests --help`.

Tests of the examples' data, the experiments and the benchmarks (tests/tools) are the
same on all backends, and run on the first one only. Those that run a whole command for
minutes need `--long`.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BACKENDS = ("tensorflow", "jax", "torch")
PYTEST = ["-m", "pytest", "-q", "--durations=20", "-n", "2", "--dist", "worksteal"]
WITHOUT_TOOLS = "--ignore=tests/tools"


def main() -> int:
    options = parse()
    python, backends = sys.executable, options.backends
    if options.oldest:
        # Needed here only; mypy knows it as the tests do, without the folder.
        oldest = importlib.import_module("tests.oldest")
        python, backends = oldest.make(options.python), backends or BACKENDS
    backends = backends or [b for b in BACKENDS if importlib.util.find_spec(b)]
    if not backends:
        print(f"None of {', '.join(BACKENDS)} is installed; nothing to test.")
        return 2
    failed = []
    for i, backend in enumerate(backends):
        which = [] if i == 0 and not options.oldest else [WITHOUT_TOOLS]
        if options.quick:
            which = [WITHOUT_TOOLS, f"--quick={i + 1}/{len(backends)}"]
        if options.long:
            which.append("--long")
        if run(python, backend, which):
            failed.append(backend)
    print(f"=== failed: {', '.join(failed)}" if failed else "=== all passed")
    return len(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="for daily work: of each test that is not slow one case, on one backend",
    )
    parser.add_argument(
        "--long",
        action="store_true",
        help="also run the tools' commands that take minutes, before a release",
    )
    parser.add_argument(
        "--oldest",
        action="store_true",
        help="in .venv-oldest, with the oldest versions that pyproject.toml admits",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="for --oldest: the oldest Python; without, the one on the PATH",
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


def run(python: str, backend: str, which: list[str]) -> int:
    """Test one backend; pytest's exit status, 0 if all passed."""
    print(f"=== {backend}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            # A thread for each process: torch's wait for each other while they spin.
            "OMP_NUM_THREADS": "1",
            # Many tests compile the same programs: JAX keeps one's for the others.
            "JAX_COMPILATION_CACHE_DIR": folder,
            # With the oldest JAX some of these crash or give wrong values.
            "JAX_ENABLE_COMPILATION_CACHE": str(python == sys.executable),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [python, *PYTEST, *which]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    print(f"=== {backend}: {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
