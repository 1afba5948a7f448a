"""What accelerators share: free coordinates around a point, and proposals that are evaluated safely.

An accelerator extrapolates the EM map θ -> M(θ) in the coordinates u of charts.py, in which every u is a
feasible θ. Entries on the boundary there (structural zeros) have no coordinate and keep their value. It
does not know the model: all it sees are parameters and objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_em.charts import Chart, CovarianceChart, ElementwiseChart, SimplexChart, chart
from pyro_em.errors import DegenerateLikelihoodError, InputError, NonFiniteError
from pyro_em.loop import EMMap, Iterate, Steps
from pyro_em.types import Params


@dataclass(frozen=True)
class Coordinates:
    """The free coordinates (P,) of the parameters that move, float64, on the CPU; the others are held."""

    params: Params
    charts: Mapping[str, Chart]
    _known: list[tuple[Params, Tensor]] = field(default_factory=list)  # coordinates of the last few

    @classmethod
    def around(cls, em: EMMap, params: Params) -> Coordinates:
        """Charts built at `params`: what lies on the boundary there is held."""
        records = em.problem.parameters
        return cls(params, {name: chart(records[name].constraint, params[name]) for name in em.m_step.free})

    def to_free(self, params: Params) -> Tensor:
        """Coordinates (P,); not finite where an entry with a coordinate is on the boundary or outside."""
        for own, free in self._known:
            if own is params:
                return free
        free = self._to_free(params)
        self._known[:] = [(params, free), *self._known[:2]]
        return free

    def _to_free(self, params: Params) -> Tensor:
        try:
            parts = [c.to_free(params[name]).detach().double().cpu() for name, c in self.charts.items()]
        except LinAlgError:  # a covariance that is no longer positive definite
            return torch.full((sum(c.size for c in self.charts.values()),), torch.nan, dtype=torch.float64)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def from_free(self, free: Tensor) -> Params:
        """All parameters, those with coordinates at `free` (P,)."""
        moved = dict(self.params)
        parts = free.split([c.size for c in self.charts.values()])
        for (name, c), part in zip(self.charts.items(), parts, strict=True):
            moved[name] = c.from_free(part.to(self.params[name])).to(self.params[name].dtype)
        return moved

    def cover(self, params: Params) -> bool:
        """Whether `params` are at the boundary in the same entries, so that coordinates lose nothing."""
        free = self.to_free(params)
        if not _finite(free):
            return False
        if all(_whole(c) for c in self.charts.values()):
            return True
        again = self.from_free(free)
        return all(torch.allclose(again[name], params[name], equal_nan=True) for name in self.charts)


def _finite(free: Tensor) -> bool:
    return bool(np.isfinite(free.numpy()).all())


def _whole(own: Chart) -> bool:
    """Whether every entry has a coordinate, so that nothing is held."""
    if isinstance(own, ElementwiseChart):
        return own.whole
    if isinstance(own, SimplexChart):
        return own.size == own.logits.numel() - own.reference.numel()
    return isinstance(own, CovarianceChart)


def evaluate(em: EMMap, coordinates: Coordinates, free: Tensor, iteration: int) -> Steps[Iterate | None]:
    """E-step at proposed coordinates (P,), or None if they are not usable.

    A proposal that rounds to the boundary is not: EM would never leave it.
    """
    if not _finite(free):
        return None
    params = coordinates.from_free(free)
    if not _finite(coordinates.to_free(params)):
        return None
    try:
        return (yield from em.at(params, iteration))
    except (InputError, NonFiniteError, DegenerateLikelihoodError, LinAlgError):
        return None
