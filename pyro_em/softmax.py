"""Softmax over the states of a table that has the states first, with its normaliser, where exponentials are fastest.

With L (R·J, n), R starts of J states each, and w (n,) or 1 the weights of the rows,

    lse_sn = log Σ_j exp L_sjn,      R_sjn = w_n exp(L_sjn - lse_sn).

NumPy's vectorised exponential is twice as fast as torch's where it has one for the processor (AVX-512), to half a unit
in the last place. It is one thread's: with more than two of them, on another device, for tables too small for it to
show, and for NumPy that does not say what it has, torch computes the same. Which of them it is does not change within
a process on one machine, so that results stay the same bit for bit.

Products of a table with its padding, rows of zeros up to `padded`, are what the matrix kernels of x86 are fast at.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

FEW = 2**14  # cells, below which calls cost more than exponentials
ONE_THREAD = 2  # torch's threads up to which NumPy's one is faster
NARROW, MANY = 32, 2**12  # entries of a last dim up to which, and cells from which torch is slow along it
WIDTH = 12  # rows that a matrix kernel takes at once
_LIBRARY = torch.library.Library("pyro_em", "DEF")  # so that recordings (tape/) see it as one operation


@cache
def _vectorised() -> bool:
    """Whether NumPy says that its exponential of doubles is made for AVX-512."""
    introspect = getattr(getattr(np, "lib", None), "introspect", None)
    if introspect is None:  # NumPy 1
        return False
    found = introspect.opt_func_info(func_name="^exp$", signature="float64").get("exp", {})
    return any("AVX512" in own["current"] or own["current"] == "X86_V4" for own in found.values())


def padded(rows: int) -> int:
    """Rows with zeros below, if the kernel would else do the last ones in another, slower way."""
    last = rows % WIDTH
    return rows + WIDTH - last if rows >= 10 and last >= 4 else rows


def by_numpy(table: Tensor) -> bool:
    """Whether `softmax_` of this table is NumPy's work."""
    return (
        table.numel() >= FEW
        and table.device.type == "cpu"
        and torch.get_num_threads() <= ONE_THREAD
        and table.dtype in (torch.float64, torch.float32)
        and table.is_contiguous()
        and _vectorised()
    )


def softmax_(table: Tensor, starts: int = 1, weight: Tensor | None = None) -> Tensor:
    """`table` (R·J, n) becomes the weighted responsibilities; lse (R, n) is returned."""
    if not by_numpy(table):
        by_start = table.unflatten(0, (starts, -1))
        peak = by_start.amax(1)
        total = by_start.sub_(peak.unsqueeze(1)).exp_().sum(1)
        factor = total.reciprocal() if weight is None else weight.to(total) / total
        by_start.mul_(factor.unsqueeze(1))
        return peak + total.log_()
    own = table.numpy().reshape(starts, -1, table.shape[1])
    with np.errstate(all="ignore"):  # as torch does
        peak = own.max(1)
        np.subtract(own, peak[:, None], out=own)
        np.exp(own, out=own)
        total = own.sum(1)
        factor = np.reciprocal(total) if weight is None else weight.numpy() / total
        np.multiply(own, factor.astype(own.dtype, copy=False)[:, None], out=own)
        return torch.from_numpy(np.log(total, out=total) + peak)


def _softmax(table: Tensor, starts: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = len(table)
    found = table.new_zeros(padded(rows), table.shape[1])
    found[:rows] = table
    return found, softmax_(found[:rows], starts, weight)


_LIBRARY.define("softmax(Tensor table, int starts, Tensor? weight) -> (Tensor, Tensor)")
_LIBRARY.impl("softmax", _softmax, "CompositeExplicitAutograd")


def softmax(table: Tensor, starts: int = 1, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same with the responsibilities in memory of their own, perhaps with their padding, and lse (R, n).

    Operations of torch, which a recording can repeat: one for a large table.
    """
    if table.numel() >= FEW:
        return torch.ops.pyro_em.softmax(table, starts, weight)
    by_start = table.unflatten(0, (starts, -1))
    r = torch.softmax(by_start, 1)
    # softmax leaves max R = exp(max L - lse), so that lse costs no second pass over exp.
    lse = by_start.amax(1) - r.amax(1).log()
    return (r if weight is None else r * weight.to(r)).flatten(0, 1), lse


def log_softmax(x: Tensor) -> Tensor:
    """That of the last dim, which torch takes eight times as long over as over a first one, where it has few entries.

    >>> log_softmax(torch.zeros(2, 4, dtype=torch.float64)).exp()[0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    if x.dim() < 2 or x.shape[-1] > NARROW or x.numel() < MANY:
        return x.log_softmax(-1)
    return x.movedim(-1, 0).log_softmax(0).movedim(0, -1)
