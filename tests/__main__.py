"""Run the test suite once for each Keras backend: `python -m tests [BACKEND ...]`.

Without arguments: for every backend that is installed. Tests of the tools around the
experiments, which are the same on all, run on the first only.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
PYTEST = ["-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "--durations=20"]
TESTS_OF_TOOLS = ["--ignore=tests/test_experiments.py", "--ignore=tests/test_site.py"]


def main() -> int:
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    chosen = sys.argv[1:] or installed
    if not chosen:
        print(f"None of {', '.join(BACKENDS)} is installed; nothing to test.")
        return 2
    failed = []
    for backend in chosen:
        print(f"=== {backend}", flush=True)
        once = [] if backend == chosen[0] else TESTS_OF_TOOLS
        run = subprocess.run(
            [sys.executable, *PYTEST, *once],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "KERAS_BACKEND": backend},
            check=False,
        )
        if run.returncode:
            failed.append(backend)
    print(f"=== failed: {', '.join(failed)}" if failed else "=== all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
