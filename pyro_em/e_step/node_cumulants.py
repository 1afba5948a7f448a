"""Densities of one predictor η, as the sums over rows and nodes that quadrature needs of them.

    log p(y | η) = a η - m A(η) + const,    A the cumulant function of the family

    trials      A = log(1 + e^η)      q = 1/(1 + e^η):   A = -log q,   A' = 1 - q,   A'' = q (1 - q)
    counts      A = e^η = A' = A''
    any other   a = 0, m = 1, A minus the curve of its kernel (m_step/curves.py)

A *table* holds what is needed at every row and node; all sums are formed from it. One sigmoid or exponential is taken
for each cell. The sum of A over the trials of a group is the logarithm of one product, if each trial is one. Where
all rows of a group move alike along its nodes, η = b + t, counts need no table: e^η = e^b e^t.

Shapes: as in node_panels.py; weights v (1, Q, G) belong to nodes, b (W, 1, G) to rows.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.node_panels import Panel, Panels
from pyro_em.families.base import IDENTITY, LOGIT
from pyro_em.kernels import BetaKernel, Kernel, PowerKernel
from pyro_em.m_step.curves import Curve, curve_of
from pyro_em.model.links import PredictorLink
from pyro_em.model.trace import SiteRecord
from pyro_em.shapes import broadcast_shapes
from pyro_em.statistics import site_moments

TINY = 1e-290  # smaller products have lost digits
NEVER = -1e30  # η of an empty place: no event is expected there


class Memory:
    """Memory of tables, given again when nobody holds the table that was made in it.

    What is allocated anew for each table is given back to the system and faulted in again, page by page, which takes
    longer than what is done with it.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, weakref.ref[Tensor]]] = []

    def take(self, *shapes: torch.Size) -> Tensor:
        """A table of the shape that these broadcast to."""
        shape = broadcast_shapes(*shapes)
        for i, (flat, table) in enumerate(self._known):
            if flat.numel() == shape.numel() and table() is None:
                found = flat.view(shape)
                self._known[i] = flat, weakref.ref(found)
                return found
        flat = torch.empty(shape.numel(), dtype=torch.float64)
        found = flat.view(shape)
        self._known.append((flat, weakref.ref(found)))
        return found


class Cumulant(ABC):
    """`linear` a and `count` m are (R,); `empty` is η at empty places.

    `memory`, if given, is what tables are made in. (A recording has its own, tape/.)
    """

    empty: float = NEVER
    memory: Memory | None = None

    def __init__(self, linear: Tensor, count: Tensor) -> None:
        self.linear, self.count = linear, count

    @abstractmethod
    def table(self, panel: Panel, b: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """What is kept of η = b + t; t (1, Q, G), or of every cell."""

    @abstractmethod
    def sums(self, panel: Panel, table: tuple[Tensor, ...]) -> Tensor:
        """Σ m A over the rows of each group, (Q, G of the panel)."""

    @abstractmethod
    def moments(self, panel: Panel, table: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_q v m A' and Σ_q v m A'' of every row, (W, 1, G)."""

    def in_groups(self, panel: Panel, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Σ m A' and Σ m A'' over the rows of each group at one node, (1, G of the panel)."""
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        first, second = self.moments(panel, table, one)
        return panel.over_rows(first), panel.over_rows(second)


class Trials(Cumulant):
    """Bernoulli and binomial data behind a logit."""

    def __init__(self, linear: Tensor, count: Tensor, empty: Tensor) -> None:
        super().__init__(linear, count)
        self.single = bool(((count == 1) | empty).all())  # empty places have q = 1

    def table(self, panel: Panel, b: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        out = None if self.memory is None else self.memory.take(b.shape, t.shape)
        return torch.sub(-b, t, out=out).sigmoid_(), b, t

    def sums(self, panel: Panel, table: tuple[Tensor, ...]) -> Tensor:
        q, b, t = table
        if self.single:
            product = q.prod(-1).mT if panel.last else q.prod(0)
            if bool((product > TINY).all()):
                return product.log().neg_()
        elif bool(q.amin() > TINY):
            return panel.over_rows(q.log().mul_(-panel.of_rows(self.count)))
        return panel.over_rows(torch.nn.functional.softplus(b + t, threshold=1e9) * panel.of_rows(self.count))

    def moments(self, panel: Panel, table: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor]:
        q = table[0]
        weighted = torch.mul(q, v, out=None if self.memory is None else self.memory.take(q.shape, v.shape))
        first = weighted.sum(1, keepdim=True)
        second = weighted.mul_(q).sum(1, keepdim=True)
        slope, curvature = v.sum(1, keepdim=True) - first, first - second
        if self.single:
            return slope, curvature
        m = panel.of_rows(self.count)
        return m * slope, m * curvature

    def in_groups(self, panel: Panel, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if not self.single:
            return super().in_groups(panel, table)
        q = table[0]
        first, dim = panel.over_rows(q), 2 if panel.last else 0
        return q.shape[dim] - first, first - panel.over_rows(q * q)


class Counts(Cumulant):
    """Poisson and exponential data behind an exponential; `t` of one row only where all rows move alike."""

    def table(self, panel: Panel, b: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        m = panel.of_rows(self.count)
        if t.shape[2 if panel.last else 0] == 1:
            return m * b.exp(), t.exp()
        return (m * (b + t).exp_(),)

    def sums(self, panel: Panel, table: tuple[Tensor, ...]) -> Tensor:
        if len(table) == 1:
            return panel.over_rows(table[0])
        by_row, by_node = table
        return panel.over_rows(by_row) * (by_node.squeeze(-1).mT if panel.last else by_node.squeeze(0))

    def moments(self, panel: Panel, table: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor]:
        if len(table) == 1:
            found = (table[0] * v).sum(1, keepdim=True)
        else:
            found = table[0] * (table[1] * v).sum(1, keepdim=True)
        return found, found


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

    def table(self, panel: Panel, b: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return (b + t,)

    def sums(self, panel: Panel, table: tuple[Tensor, ...]) -> Tensor:
        return panel.over_rows(-self._curves[panel.begin].value(table[0]) * panel.of_rows(self.count))

    def moments(self, panel: Panel, table: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor]:
        slope, curvature = self._curves[panel.begin].derivatives(table[0])
        m = panel.of_rows(self.count)
        return -m * (slope * v).sum(1, keepdim=True), m * (curvature * v).sum(1, keepdim=True)


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
