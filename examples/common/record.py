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
    processor = _processor()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor.get("model name") or platform.processor(),
        "processor_family": processor.get("cpu family"),
        "processor_model": processor.get("model"),
        "processor_stepping": processor.get("stepping"),
        "processor_flags": _vector_flags(processor),
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


def _processor(about: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    if not about.exists():
        return {}
    first, _, _ = about.read_text(encoding="utf-8").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _vector_flags(processor: dict[str, str]) -> list[str]:
    """Instructions by which libraries choose their code, and so round differently."""
    flags = processor.get("flags") or processor.get("Features") or ""
    vectors = ("amx", "asimd", "avx", "fma", "sve")
    return sorted(flag for flag in flags.split() if flag.startswith(vectors))


def _without_nan(value: Any) -> Any:
    """Put null for what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
