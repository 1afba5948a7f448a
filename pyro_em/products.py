"""Matrix products by the library whose kernels suit the processor: PyTorch's, or NumPy's.

PyTorch's wheels multiply by MKL, which takes another, slower path on processors of another maker: on an AMD EPYC with
AVX-512 it does half of what OpenBLAS does, with which NumPy's wheels come. Which of the two it is depends on the
processor, the two libraries and their threads, and does not change within a process, so that results stay the same bit
for bit. Threads: NumPy's are what the environment says, PyTorch's what `torch.set_num_threads` says; only where they
are as many is NumPy asked. On another device, and for integers, it is always PyTorch.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@cache
def _processor() -> str:
    """The maker, as the processor names itself ("AuthenticAMD")."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@cache
def _numpy_suits() -> bool:
    """Whether NumPy has OpenBLAS and PyTorch has MKL, on a processor that MKL is not made for."""
    try:
        own = np.show_config(mode="dicts")  # type: ignore[call-overload, unused-ignore]
    except TypeError:  # NumPy before 1.25 does not say
        return False
    name = str(own.get("Build Dependencies", {}).get("blas", {}).get("name", ""))
    return "openblas" in name and torch.backends.mkl.is_available() and "AuthenticAMD" in _processor()


@cache
def _numpy_threads() -> int:
    """Threads of NumPy's library, which reads the environment when it is loaded."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_numpy(x: Tensor) -> bool:
    """Whether products of tensors like this are NumPy's work."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float64, torch.float32)
        and _numpy_suits()
        and _numpy_threads() == torch.get_num_threads()
    )


def product_of(x: Tensor) -> tuple[Callable[[Any, Any, Any], Any], Callable[[Tensor], Any]]:
    """For many products of tensors like `x`: `multiply(a, b, out)`, and how it is given them: views of their memory.

    Without gradients; not to be recorded (tape/).
    """
    if by_numpy(x):
        return np.matmul, lambda tensor: tensor.detach().numpy()
    return lambda a, b, out: torch.mm(a, b, out=out), lambda tensor: tensor


def product_(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a @ b` (n, m)(m, p) in the memory of `out` (n, p), without gradients. Not to be recorded (tape/).

    >>> product_(torch.eye(2), torch.ones(2, 3), torch.empty(2, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    if not by_numpy(out):
        return torch.mm(a, b, out=out)
    np.matmul(a.detach().numpy(), b.detach().numpy(), out=out.numpy())
    return out
