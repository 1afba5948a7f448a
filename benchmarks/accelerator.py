"""The same fit where the data are: on a CUDA device, and on one thread of the processor.

The workloads are there where a device is. Nothing but the device of the data differs between the two.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks import peers, problems
from benchmarks.harness import Fit
from benchmarks.paired import OURS, Entry, Paired
from benchmarks.problems import Mixture


def ours_on_device(problem: Mixture) -> Fit:
    """`pyro_em.fit` with data and start on the CUDA device."""
    tensors = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    return peers.ours_mixture(dataclasses.replace(problem, **{name: x.cuda() for name, x in tensors.items()}))


def _mixture(name: str, rows: int, components: int, features: int, counts: tuple[int, int]) -> Paired:
    title = f"Gaussian mixture on {torch.cuda.get_device_name()}, N={rows:,} K={components} D={features}"
    return Paired(
        name,
        title,
        lambda tiny: problems.mixture(*((200, 2, 3) if tiny else (rows, components, features))),
        {OURS: Entry(ours_on_device, (25, 225)), "CPU": Entry(peers.ours_mixture, counts)},
    )


WORKLOADS: tuple[Paired, ...] = ()
if torch.cuda.is_available():
    WORKLOADS = (
        _mixture("cuda-A1", 100_000, 10, 10, (25, 75)),
        _mixture("cuda-A2", 1_000_000, 10, 8, (25, 35)),
        _mixture("cuda-A3", 20_000, 50, 32, (25, 45)),
    )
