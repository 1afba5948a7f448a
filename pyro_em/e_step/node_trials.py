"""Bernoulli and binomial data behind a logit at the nodes of quadrature.

    A = log(1 + e^η),    q = 1/(1 + e^η):    A = -log q,    A' = 1 - q,    A'' = q (1 - q)

The sum of A over the trials of a group is the logarithm of one product, if each trial is one. Where all rows of a group
move alike along its nodes, η = b + t, cells take no exponential: e^η = e^b e^t. Else one sigmoid is taken for each.

Shapes: as in node_panels.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyro_em.e_step.node_panels import Panel
from pyro_em.e_step.node_tables import Cumulant, Table

LARGE = 1e290  # products that are larger, or smaller than its inverse, may have left the range of floats


class Trials(Cumulant):
    """Bernoulli and binomial data behind a logit."""

    concave = True

    def __init__(self, linear: Tensor, count: Tensor, empty: Tensor) -> None:
        super().__init__(linear, count)
        self.single = bool(((count == 1) | empty).all())  # empty places have q = 1

    def base(self, panel: Panel, b: Tensor, arguments: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return b, b.exp()

    def table(self, panel: Panel, base: tuple[Tensor, Tensor], t: Tensor) -> Table:
        (b, odds), memory = base, self.memory
        out = None if memory is None else memory.take(b.shape, t.shape)
        if t.shape[2 if panel.last else 0] > 1:
            return _TrialsTable(self, panel, b, t, None, torch.sub(-b, t, out=out).sigmoid_())
        one = torch.ones((), dtype=torch.float64)
        return _TrialsTable(self, panel, b, t, torch.addcmul(one, odds, t.exp(), out=out), None)


class _TrialsTable(Table):
    """1 + e^η as long as nothing but sums is asked for, or q."""

    def __init__(self, own: Trials, panel: Panel, b: Tensor, t: Tensor, odds: Tensor | None, q: Tensor | None) -> None:
        self.own, self.panel, self.b, self.t = own, panel, b, t
        self._odds, self._q = odds, q

    @cached_property
    def sums(self) -> Tensor:
        panel, odds, single = self.panel, self._odds, self.own.single
        if odds is not None:
            product = self._product(odds) if single else odds
            if bool(product.max() < LARGE):  # so that every factor is a number, and none is infinite
                return product.log_() if single else panel.over_rows(product.log().mul_(panel.of_rows(self.own.count)))
            self._odds, self._q = None, torch.sub(-self.b, self.t).sigmoid_()
        assert self._q is not None
        product = self._product(self._q) if single else self._q
        if bool(product.min() > 1 / LARGE):
            logs = product.log_() if single else panel.over_rows(product.log().mul_(panel.of_rows(self.own.count)))
            return logs.neg_()
        eta = self.b + self.t
        return panel.over_rows(torch.nn.functional.softplus(eta, threshold=1e9) * panel.of_rows(self.own.count))

    def _product(self, table: Tensor) -> Tensor:
        return table.prod(-1).mT if self.panel.last else table.prod(0)

    @property
    def q(self) -> Tensor:
        """In the memory of the odds, when these have been read."""
        if self._q is None:
            _ = self.sums
        if self._q is None:
            assert self._odds is not None
            self._q, self._odds = self._odds.reciprocal_(), None
        return self._q

    def first(self, v: Tensor) -> Tensor:
        return self._counted(v.sum(1, keepdim=True) - self._over_nodes(v, self.q))

    def second(self, v: Tensor, first: Tensor) -> Tensor:
        return self._counted(v.sum(1, keepdim=True) - self._over_nodes(v, self.q, self.q)) - first

    def _over_nodes(self, v: Tensor, *tables: Tensor) -> Tensor:
        """Σ_q of a product of tables; of large ones in one pass, without a table of the product."""
        if self.own.memory is not None and v.device.type == "cpu":
            arrays = [x.numpy() for x in (*tables, v.expand_as(tables[0]))]
            return torch.from_numpy(np.einsum(",".join(["wqg"] * len(arrays)) + "->wg", *arrays)).unsqueeze(1)
        return math.prod(tables, start=v).sum(1, keepdim=True)

    def _counted(self, x: Tensor) -> Tensor:
        return x if self.own.single else self.panel.of_rows(self.own.count) * x

    def in_groups(self) -> tuple[Tensor, Tensor]:
        panel, q = self.panel, self.q
        if not self.own.single:
            m = panel.of_rows(self.own.count)
            return panel.over_rows(m * (1 - q)), panel.over_rows(m * (q - q * q))
        first, dim = panel.over_rows(q), 2 if panel.last else 0
        return q.shape[dim] - first, first - panel.over_rows(q * q)
