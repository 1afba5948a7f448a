"""The machine under a measurement: threads, versions, load, peak memory, and what its arithmetic can do.

Anchors are measured in the process of the workload, so that a time can be read against them:

    gemm   float64 multiply-adds ×2 per second in a product of 1024 × 1024 matrices
    exp    float64 exponentials per second in cache
    copy   bytes read and written per second, from memory

Memory is the peak of the resident set above its size before the call, from Linux's own counters (reset through
/proc/self/clear_refs); where these are missing it is None, not an estimate.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
PACKAGES = ("torch", "pyro-ppl", "numpy", "scipy", "scikit-learn", "pomegranate", "stepmix", "dynamax")
# By which the surroundings may force the kernels of another processor upon a library, ours or a peer's.
KERNEL_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_ENABLE_INSTRUCTIONS", "NPY_DISABLE_CPU_FEATURES")


def environment(threads: int) -> dict[str, str]:
    """Variables of a child process: libraries read them when they are imported. Each chooses kernels for itself."""
    own = {name: value for name, value in os.environ.items() if name not in KERNEL_VARIABLES}
    return {**own, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


def set_threads(threads: int) -> None:
    """To be called again after every import of a peer: one of them sets torch's threads."""
    torch.set_num_threads(threads)


def describe() -> dict[str, Any]:
    """CPU, operating system and versions."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "threads": torch.get_num_threads(),
    }


def load() -> float | None:
    """Processes that wanted to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def anchors() -> dict[str, float]:
    """Rates per second: see the head of this file. Half a second."""
    a, b = (torch.randn(1024, 1024, dtype=torch.float64) for _ in range(2))
    out = torch.empty_like(a)
    x = torch.randn(16384, dtype=torch.float64)
    y = torch.empty_like(x)
    source = torch.ones(8_000_000, dtype=torch.float64)
    target = torch.empty_like(source)
    return {
        "gemm": 2 * 1024**3 / _best(lambda: torch.mm(a, b, out=out), 7),
        "exp": len(x) / _best(lambda: torch.exp(x, out=y), 200),
        "copy": 2 * 8 * len(source) / _best(lambda: target.copy_(source), 7),
    }


def _best(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def peak_bytes(call: Callable[[], object]) -> int | None:
    """How far the resident set rose during the call, above where it was."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        before = _kilobytes(status.read_text(), "VmRSS")
        clear.write_text("5")  # the high-water mark becomes the present size
    except OSError:
        return None
    call()
    return 1024 * max(0, _kilobytes(status.read_text(), "VmHWM") - before)


def _kilobytes(status: str, name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", status)
    if found is None:
        raise OSError(f"/proc/self/status does not tell {name}")
    return int(found[1])
