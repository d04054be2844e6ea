"""What the comparisons need besides this project's own environment."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

TFA = ["tensorflow-cpu==2.15.1", "tensorflow-addons==0.23.0", "numpy<2"]
PYTORCH_OPTIMIZER = ["pytorch_optimizer==4.1.0"]


class NotMeasured(Exception):
    """Something that could not be measured here. The message says why."""


def tfa_python(folder: Path) -> Path:
    """The Python of an environment with TensorFlow Addons, made if need be."""
    environment = folder / "tfa"
    python = environment / "bin" / "python"
    if (environment / "complete").exists():
        return python
    # TensorFlow 2.15, the last that Addons works with, has no build for later ones.
    base = shutil.which("python3.11")
    if base is None:
        raise NotMeasured("TensorFlow Addons needs a Python 3.11, and none was found")
    _run([base, "-m", "venv", "--clear", str(environment)])
    _run([str(python), "-m", "pip", "install", "--quiet", *TFA])
    (environment / "complete").touch()
    return python


def pytorch_optimizer_path(folder: Path) -> str:
    """A folder to import pytorch_optimizer from; empty if it needs, or has, none."""
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        return ""
    target = folder / "pytorch_optimizer"
    if not target.exists():
        install = ["install", "--quiet", "--no-deps", "--target", str(target)]
        try:
            _run([sys.executable, "-m", "pip", *install, *PYTORCH_OPTIMIZER])
        except NotMeasured:
            return ""  # The worker will say that the module is missing.
    return str(target)


def check_gpu() -> None:
    """Raise `NotMeasured` on a machine without a CUDA GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None or "GPU" not in _run([tool, "-L"]):
        raise NotMeasured("no GPU")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=900
        )
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        last = output.strip().splitlines()[-1:] or ["no output"]
        raise NotMeasured(f"{Path(command[0]).name} failed: {last[0]}") from error
    return done.stdout
