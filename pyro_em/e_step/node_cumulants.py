"""Which density of one predictor η a site is, and those that are no trials (node_trials.py):

    counts      A = e^η = A' = A''
    any other   a = 0, m = 1, A minus the curve of its kernel (m_step/curves.py)

Where all rows of a group move alike along its nodes, η = b + t, counts need no table: e^η = e^b e^t.
Shapes: as in node_panels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.node_panels import Panel, Panels
from pyro_em.e_step.node_tables import Cumulant, Table
from pyro_em.e_step.node_trials import Trials
from pyro_em.families.base import IDENTITY, LOGIT
from pyro_em.kernels import BetaKernel, Kernel, PowerKernel
from pyro_em.m_step.curves import Curve, curve_of
from pyro_em.model.links import PredictorLink
from pyro_em.model.trace import SiteRecord
from pyro_em.statistics import site_moments


class Counts(Cumulant):
    """Poisson and exponential data behind an exponential; `t` of one row only where all rows move alike."""

    concave = True

    def base(self, panel: Panel, b: Tensor, arguments: Mapping[str, Tensor] | None = None) -> Tensor:
        return b

    def table(self, panel: Panel, base: Tensor, t: Tensor) -> Table:
        m = panel.of_rows(self.count)
        if t.shape[2 if panel.last else 0] == 1:
            return _CountsTable(panel, m * base.exp(), t.exp())
        return _CountsTable(panel, m * (base + t).exp_(), None)


class _CountsTable(Table):
    """m e^η, or m e^b and e^t."""

    def __init__(self, panel: Panel, by_row: Tensor, by_node: Tensor | None) -> None:
        self.panel, self.by_row, self.by_node = panel, by_row, by_node

    @cached_property
    def sums(self) -> Tensor:
        total = self.panel.over_rows(self.by_row)
        if self.by_node is None:
            return total
        return total * (self.by_node.squeeze(-1).mT if self.panel.last else self.by_node.squeeze(0))

    def first(self, v: Tensor) -> Tensor:
        if self.by_node is None:
            return (self.by_row * v).sum(1, keepdim=True)
        return self.by_row * (self.by_node * v).sum(1, keepdim=True)

    def second(self, v: Tensor, first: Tensor) -> Tensor:
        return first

    def in_groups(self) -> tuple[Tensor, Tensor]:
        return self.sums, self.sums


class Curved(Cumulant):
    """Any other kernel of one argument, with `kernel` over the places."""

    empty = 0.0

    def __init__(
        self, kernel: Kernel, panels: Panels, curve: Callable[[Kernel], Curve], linear: Tensor, count: Tensor
    ) -> None:
        super().__init__(linear, count)
        self._curves = {
            panel.begin: curve(kernel.map(lambda c, _, p=panel: p.of_rows(c)))  # type: ignore[misc]
            for panel in panels.panels
        }

    def base(self, panel: Panel, b: Tensor, arguments: Mapping[str, Tensor] | None = None) -> Tensor:
        return b

    def table(self, panel: Panel, base: Tensor, t: Tensor) -> Table:
        return _CurvedTable(panel, self._curves[panel.begin], panel.of_rows(self.count), base + t)


class _CurvedTable(Table):
    """η itself."""

    def __init__(self, panel: Panel, curve: Curve, count: Tensor, eta: Tensor) -> None:
        self.panel, self.curve, self.count, self.eta = panel, curve, count, eta

    @cached_property
    def sums(self) -> Tensor:
        return self.panel.over_rows(-self.curve.value(self.eta) * self.count)

    def first(self, v: Tensor) -> Tensor:
        return -self.count * (self._derivatives[0] * v).sum(1, keepdim=True)

    def second(self, v: Tensor, first: Tensor) -> Tensor:
        return self.count * (self._derivatives[1] * v).sum(1, keepdim=True)

    @cached_property
    def _derivatives(self) -> tuple[Tensor, Tensor]:
        slope, curvature = self.curve.derivatives(self.eta)
        assert isinstance(curvature, Tensor)  # of a scalar predictor
        return slope, curvature

    def in_groups(self) -> tuple[Tensor, Tensor]:
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        first = self.first(one)
        return self.panel.over_rows(first), self.panel.over_rows(self.second(one, first))


def kernel_of(site: SiteRecord, slot: str, cells: torch.Size) -> Kernel:
    """The kernel of the moving argument for every row by itself."""
    family = site.family
    assert family is not None and site.arguments is not None
    arguments = {a: v.detach().double() for a, v in site.arguments.items()}
    arguments[slot] = arguments[slot].expand(cells)
    moments = site_moments(site, arguments, torch.ones(cells, dtype=torch.float64), None).moments
    kernel = family.kernel(slot, moments, {**site.constants, **arguments}, None)
    if kernel is None or kernel.event_dim:
        raise NotCompiled(f"the {slot} of '{site.name}' has no kernel")
    return kernel


def cumulant_of(site: SiteRecord, slot: str, link: PredictorLink, kernel: Kernel, panels: Panels) -> Cumulant:
    """Of a site whose argument `slot` is `link` of the predictor, from its kernel over the rows."""
    assert site.family is not None
    canonical = site.family.link(slot)

    def placed(x: Tensor) -> Tensor:
        return panels.placed(x.double().reshape(-1))

    if isinstance(kernel, BetaKernel) and (link.name, canonical) in (("identity", LOGIT), ("sigmoid", IDENTITY)):
        a, b = (placed(x) for x in torch.broadcast_tensors(kernel.successes, kernel.failures))
        return Trials(a, a + b, panels.rows < 0)
    if isinstance(kernel, PowerKernel) and link.name == "exp" and kernel.exponent == 1:
        a, up, down = (placed(x) for x in torch.broadcast_tensors(*kernel.coefficients))
        if not bool(down.any()):
            return Counts(a, up)
    own = kernel.map(lambda c, _: panels.placed(c.double().reshape(-1)))
    present = (panels.rows >= 0).double()
    return Curved(
        own, panels, lambda part: curve_of(part, link.name, canonical, link.forward), torch.zeros_like(present), present
    )
