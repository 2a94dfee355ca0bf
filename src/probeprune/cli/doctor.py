"""`probeprune doctor`: what this installation and this machine have, and what is missing for what."""

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from probeprune.cli.groups import Json
from probeprune.cli.terminal import print_text
from probeprune.errors import UsageError
from probeprune.foreign.extras import EXTRAS, missing
from probeprune.model.gguf_files import EMBEDDED_INSTALL, embedded_gguf
from probeprune.model.machine import (
    DTYPES,
    PRODUCT_FLOP,
    cache_dir,
    check_cache,
    choose_device,
    choose_dtype,
    product_seconds,
)
from probeprune.provenance import dtype_name

PACKAGES = ("probeprune", "torch", "transformers", "accelerate", "safetensors", "gguf")


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, the measured speed of each dtype, missing extras and the cache.

    Example: [bold]probeprune doctor[/bold]
    """
    found = findings()
    print(json.dumps(found)) if as_json else print_text("\n".join(_lines(found)))


def findings() -> dict[str, Any]:
    """What `doctor` shows, as one record. Measures for about a second."""
    device = choose_device("auto")
    place = cache_dir()
    existing = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": str(device),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(choose_dtype("auto", device)),
        "gflops": {name: _speed(dtype, device) for name, dtype in DTYPES.items()},
        "missing": {name: missing(name) for name in EXTRAS},
        "embedded_model": _works(embedded_gguf),
        "cache": str(place),
        "cache_writable": _works(check_cache),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """10^9 operations a second of one linear map of a small MLP's size."""
    return PRODUCT_FLOP / product_seconds(dtype, device) / 1e9


def _works(call: Any) -> bool:
    try:
        call()
    except UsageError:
        return False
    return True


def _lines(found: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in found["gflops"].items())
    lines = [
        f"versions   Python {found['python']} on {found['machine']}; {versions}",
        f"devices    {', '.join(found['devices'])}; auto takes {found['device']}, {found['threads']} threads",
        f"speed      GFLOP/s of a linear map: {speeds}; --dtype auto takes {found['dtype']}",
    ]
    for name, lacking in found["missing"].items():
        purpose = EXTRAS[name].purpose
        state = f'no {", ".join(lacking)}: pip install "probeprune[{name}]"' if lacking else "installed"
        lines.append(f"extra      {name}, for {purpose}: {state}")
    model = "installed" if found["embedded_model"] else f"not installed: {EMBEDDED_INSTALL}"
    writable = "" if found["cache_writable"] else ", which cannot be written: set PROBEPRUNE_CACHE"
    lines += [
        f"model      smollm2-135m: {model}",
        f"cache      {Path(found['cache'])}{writable}; {found['free_bytes'] / 1e9:.1f} GB free",
    ]
    return lines
