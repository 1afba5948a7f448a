"""The data of a loop over time in blocks: emission likelihoods of all steps, and moments from their posterior.

The sites of the first step and of all others are one site in a plate of T steps, whose log-density is W Φ as in
plated.py (W natural parameters of the K states, Φ sufficient statistics). Rows t·C + c of the data are laid out
as blocked.py wants them, Φ as (F, L·M) with zeros for padding, so that padding and masked data have likelihood 1
and no moments. Where the data are discrete and few rows are distinct, likelihoods are computed for the distinct
rows and looked up, and posteriors are counted into them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em import settings
from pyro_em.e_step import direct
from pyro_em.e_step.base import IMPOSSIBLE, NotCompiled
from pyro_em.e_step.collapse import distinct
from pyro_em.e_step.features import Block
from pyro_em.e_step.layout import SiteLayout, weights_of
from pyro_em.e_step.natural import NATURAL
from pyro_em.e_step.product import Prepared
from pyro_em.e_step.rows import site_layouts
from pyro_em.e_step.states import JointStates
from pyro_em.evidence.blocked import Blocks, Scratch
from pyro_em.evidence.windows import Groups, Windows
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.sufficient import Arguments

FEW = 0.125  # share of distinct rows below which they are looked up
NARROW = 64  # features up to which products of short chains cost less than the calls of a look-up


class Emissions:
    """Likelihoods and moments of the observed sites of one loop. F features, K states, blocks (K, L, M).

    :param narrow: how many features are multiplied rather than looked up.
    """

    def __init__(
        self,
        sites: Sequence[SiteRecord],
        component: Component,
        graph: FactorGraph,
        states: JointStates,
        blocks: Blocks | Windows | Groups,
        narrow: int,
    ) -> None:
        run = Run({site.name: site for site in sites}, {}, {})
        layouts, parts, base, num_rows = site_layouts(component, run, graph, states, complement=False)
        self.states, self.blocks, self.num_rows = states, blocks, num_rows
        order = blocks.order().reshape(-1)
        self.order = torch.where(order < 0, num_rows, order)  # padding is one row more
        self.padding = order < 0 if bool((order < 0).any()) else None
        base = torch.zeros(num_rows, dtype=torch.float64) if base is None else base
        self.base = base.reshape(blocks.steps, blocks.chains).sum(0)
        features = 1 + sum(part.num_features for part in parts)
        if 16 * features * num_rows > settings.max_table_bytes:
            raise NotCompiled("the statistics of its data do not fit")
        kinds = None if features <= narrow else distinct(parts, num_rows, max(16, FEW * num_rows))
        self.lookup: Tensor | None = None
        if kinds is not None:
            columns, row_of = kinds
            self.lookup = torch.cat([row_of, torch.tensor([len(columns)])])[self.order]
            parts = [part.take(columns) for part in parts]
            self.phi = _fill(parts, len(columns))
        else:
            parts = [part.take(self.order.clamp(max=num_rows - 1)) for part in parts]
            self.phi = _fill(parts, len(order))
            if self.padding is not None:
                self.phi[:, self.padding] = 0.0
        self.layouts = [replace(x, block=part) for x, part in zip(layouts, parts, strict=True)]
        self.rms = torch.linalg.vector_norm(self.phi, dim=1) / math.sqrt(self.phi.shape[1])

    def prepared(self, arguments: Arguments, magnitude: Tensor) -> Prepared:
        """W, and the normal sites that it leaves out because rounding would show (see program.py).

        :param magnitude: Σ|ll| of the last E-step.
        """
        w = self._coefficients(arguments, ())
        normal = tuple(i for i, x in enumerate(self.layouts) if direct.serves(x))
        if not normal:
            return Prepared(w)
        if not direct.is_rough(w, self.rms, self.num_rows, magnitude):
            return Prepared(w)
        sites = [self.layouts[i] for i in normal]
        parts = [direct.prepare(layout, arguments[layout.site.name], self.states) for layout in sites]
        return Prepared(self._coefficients(arguments, sites), normal, tuple(x for part in parts for x in part))

    def log_likelihood(self, prepared: Prepared, scratch: Scratch) -> Tensor:
        """Log-densities in blocks without base measures, (K, L, M), padding 0."""
        K, blocks, w = self.states.num, self.blocks, prepared.coefficients
        out = scratch.array("likelihood", K, blocks.length, blocks.columns)
        flat = out.view(K, -1)
        if self.lookup is not None:
            table = w @ self.phi
            torch.index_select(torch.cat([table, table.new_zeros(K, 1)], 1), 1, self.lookup, out=flat)
            return out
        torch.mm(w, self.phi, out=flat)
        differences = self.differences(prepared)
        if differences is not None:
            flat += differences
            if self.padding is not None:
                flat[:, self.padding] = 0.0
        return out

    def differences(self, prepared: Prepared) -> Tensor | None:
        """Log-densities of the sites that W leaves out, (K, L·M), if there are any."""
        found: Tensor | None = None
        for place, i in enumerate(prepared.direct):
            begin = place * direct.NUM_PREPARED
            loc, factor, normalizer = prepared.normal[begin : begin + direct.NUM_PREPARED]
            own = direct.centered_log_density(self.layouts[i], (loc, factor, normalizer), 0, self.phi.shape[1])
            found = own if found is None else found + own
        return found

    def likelihood(self, prepared: Prepared, scratch: Scratch) -> tuple[Tensor, Tensor] | None:
        """b (K, L, M), scaled so that the largest of every column is 1, and the logs of the scales by chain (C,).

        None if some row has no possible state.
        """
        K, blocks = self.states.num, self.blocks
        if self.lookup is not None:
            table = prepared.coefficients @ self.phi
            shift = table.amax(0)
            b = scratch.array("likelihood", K, blocks.length, blocks.columns)
            table = torch.cat([(table - shift).exp_(), table.new_ones(K, 1)], 1)
            torch.index_select(table, 1, self.lookup, out=b.view(K, -1))
            scales = torch.cat([shift, shift.new_zeros(1)])[self.lookup].reshape(blocks.length, -1)
        else:
            b = self.log_likelihood(prepared, scratch)
            scales = b.amax(0)
            b = b.sub_(scales).exp_()
        if not float(scales.min()) > 0.1 * IMPOSSIBLE:
            return None
        return b, scales.sum(0).reshape(blocks.chains, -1).sum(1) + self.base

    def first_rows(self, arguments: Arguments, prepared: Prepared, count: int) -> tuple[Tensor, Tensor]:
        """Log-densities of the first rows without base measures, (K, count): as used, and the families' own."""
        place = torch.zeros(self.num_rows + 1, dtype=torch.long)
        place[self.order] = torch.arange(len(self.order))
        used = self.log_likelihood(prepared, Scratch()).flatten(1)[:, place[:count]]
        own = torch.zeros(self.states.num, self.phi.shape[1], dtype=torch.float64)
        for layout in self.layouts:
            own = own + layout.log_density(arguments[layout.site.name], self.states, self.phi.shape[1])
        return used, own[:, place[:count] if self.lookup is None else self.lookup[place[:count]]]

    def totals(self, posterior: Tensor) -> Tensor:
        """Sums of posterior weights (K, L, M) times features, (K, F)."""
        if self.lookup is None:
            return posterior.flatten(1) @ self.phi.mT
        size = self.phi.shape[1]
        counts = [torch.bincount(self.lookup, own, size + 1) for own in posterior.flatten(1)]
        return torch.stack(counts)[:, :size] @ self.phi.mT

    def _coefficients(self, arguments: Arguments, without: Sequence[SiteLayout]) -> Tensor:
        bias = torch.zeros(self.states.num, dtype=torch.float64)
        columns = []
        for layout in self.layouts:
            if layout in without:
                columns.append(bias.new_zeros(self.states.num, layout.block.num_features))
                continue
            natural = NATURAL[type(layout.site.family)]  # type: ignore[index]
            own, own_bias = weights_of(natural(arguments[layout.site.name], layout.center), layout, self.states)
            columns.append(own)
            bias = bias + own_bias
        w = torch.cat([bias.unsqueeze(1), *columns], 1)
        return w.clamp(min=IMPOSSIBLE)


def _fill(parts: Sequence[Block], num_rows: int) -> Tensor:
    """Φ of all rows, (F, rows)."""
    phi = torch.empty(1 + sum(part.num_features for part in parts), num_rows, dtype=torch.float64)
    phi[0] = 1.0
    row = 1
    for part in parts:
        part.fill(phi[row : row + part.num_features], 0, num_rows)
        row += part.num_features
    return phi
