"""Run the test suite once for each Keras backend: `python -m tests [BACKEND ...]`.

Without arguments: for every backend that is installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")


def main() -> int:
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    chosen = sys.argv[1:] or installed
    if not chosen:
        print(f"None of {', '.join(BACKENDS)} is installed; nothing to test.")
        return 2
    failed = []
    for backend in chosen:
        print(f"=== {backend}", flush=True)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"],
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
