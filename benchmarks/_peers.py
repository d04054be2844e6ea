"""What the comparisons need besides this project's own environment."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ADDONS = "tensorflow-addons==0.23.0"
TFA = ["tensorflow-cpu==2.15.1", ADDONS, "numpy<2"]
PYTORCH_OPTIMIZER = ["pytorch_optimizer==4.1.0"]
TIMM = ["timm==1.0.31"]


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
    return _apart(folder, "pytorch_optimizer", PYTORCH_OPTIMIZER)


def timm_path(folder: Path) -> str:
    """The same for timm."""
    return _apart(folder, "timm", TIMM)


def tfa_path(folder: Path) -> str:
    """The same for TensorFlow Addons, beside a TensorFlow that it was not made for."""
    return _apart(folder, "tensorflow_addons", [ADDONS, "typeguard<3"])


def _apart(folder: Path, module: str, requirements: list[str]) -> str:
    if importlib.util.find_spec(module) is not None:
        return ""
    target = folder / module
    if not target.exists():
        install = ["install", "--quiet", "--no-deps", "--target", str(target)]
        try:
            _run([sys.executable, "-m", "pip", *install, *requirements])
        except NotMeasured:
            return ""  # Who imports it will say that the module is missing.
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
