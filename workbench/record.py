"""What a number depends on besides the code, and the file that holds both."""

import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Describe the machine and the day, without loading a backend."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }


def environment() -> dict[str, Any]:
    """Describe the machine, and what Keras runs on in this process."""
    import keras

    import keras_lookahead_lazy

    backend = keras.backend.backend()
    return {
        "keras_lookahead_lazy": keras_lookahead_lazy.__version__,
        "keras": keras.__version__,
        "backend": backend,
        "backend_version": getattr(importlib.import_module(backend), "__version__", ""),
        "device": str(keras.ops.zeros(()).device),
        **machine(),
    }


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all, with null for NaN and infinity."""
    text = json.dumps(_without_nan(content), indent=1, allow_nan=False)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.split(":", 1)[1] for line in lines if "model name" in line]
    return models[0].strip() if models else platform.processor()


def _without_nan(value: Any) -> Any:
    """Put null for what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
