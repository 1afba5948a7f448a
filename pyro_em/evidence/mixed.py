"""Continuous latents whose posterior depends on discrete ones: a mixture over their states.

    q(z) = Σ_c q(c) q(z | c),   E z = Σ_c q(c) m_c,   Var z = Σ_c q(c) (V_c + m_c²) - (E z)²

with q(c) the posterior weights of the set's evidence (discrete.py) and q(z | c) that of its route. Letters: C states
of all discrete latents that the set reads, flattened (1 if it reads none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.evidence.discrete import Evidence
from pyro_em.evidence.elimination import Continuous, SetPosterior
from pyro_em.evidence.quadrature_posterior import QuadraturePosterior
from pyro_em.model.compat import dims_of, unpack, with_dims
from pyro_em.model.graph import FactorGraph
from pyro_em.model.nests import at_rows
from pyro_em.model.packing import align
from pyro_em.model.trace import Run, SiteRecord

DRAWS = "⊗"


@dataclass(frozen=True)
class Mixed:
    """The posterior of the latents of set `number`."""

    graph: FactorGraph
    continuous: Continuous
    number: int
    evidence: Evidence
    run: Run

    @property
    def posterior(self) -> SetPosterior:
        return self.evidence.parts[self.number].posterior

    @property
    def _symbols(self) -> Mapping[int, str]:
        """Names of the dims of the set's evidence."""
        latents = self.continuous.sets[self.number]
        found: dict[int, str] = {}
        for name in (*latents.factors, *latents.names):  # rows of another plate may stand in the same dim
            found.update(self.run.sites[name].symbols)
        return {d: s for d, s in found.items() if s != latents.symbol}

    def _probs(self, site: str) -> Tensor | None:
        """q(c), shape (C,) + the batch of the latent; None if the set reads no discrete latent."""
        weights = self.evidence.states[self.number]
        if not set(dims_of(weights)) & self.graph.symbol_sites.keys():
            return None
        batch, _ = self.continuous.runs.shapes[site]
        wide = unpack(weights, {d: s for d, s in self._symbols.items() if s in dims_of(weights)})
        m = -self.continuous.runs.dim
        states = wide.shape[: wide.dim() - m]
        return wide.expand(*states, *(1,) * (m - len(batch)), *batch).reshape(states.numel(), *batch).double()

    def _flat(self, value: Tensor, site: str) -> Tensor:
        """A quantity of shape C + batch + event with the states flattened."""
        batch, event = self.continuous.runs.shapes[site]
        return value.reshape([-1, *batch, *event])

    def mean(self, site: str) -> Tensor:
        """Shape batch + event."""
        means, probs = self._flat(self.posterior.mean(site), site), self._probs(site)
        if probs is None:
            return means.squeeze(0)
        return (self._wide(probs, site) * means).sum(0)

    def variance(self, site: str) -> Tensor:
        """Shape batch + event."""
        variances, probs = self.posterior.variance(site), self._probs(site)
        means = self._flat(self.posterior.mean(site), site)
        if probs is None:
            return self._flat(variances, site).squeeze(0)
        _, event = self.continuous.runs.shapes[site]
        batch = self.continuous.runs.shapes[site][0]
        lead = variances.shape[: variances.dim() - len(batch) - len(event)]
        spread = variances.expand([*lead, *batch, *event]).reshape([-1, *batch, *event])
        weights, mean = self._wide(probs, site), self.mean(site)
        return (weights * (spread + (means - mean) ** 2)).sum(0)

    def _wide(self, probs: Tensor, site: str) -> Tensor:
        return probs.reshape(probs.shape + (1,) * len(self.continuous.runs.shapes[site][1]))

    def marginal(self, site: str) -> dist.Distribution:
        """Batch shape of the latent."""
        probs = self._probs(site)
        if probs is not None and isinstance(self.posterior, QuadraturePosterior):
            return self.posterior.marginal(site, probs)
        own: Any = self.posterior.marginal(site)
        if probs is None:
            batch = self.continuous.runs.shapes[site][0]
            return own.expand(batch) if own.batch_shape != batch else own
        # One component per state, in the last batch dim.
        lead = len(own.batch_shape) - (probs.dim() - 1)
        order = [*range(lead, len(own.batch_shape)), *range(lead)]
        component = _permuted(own, order, probs.shape[0], probs.dim() - 1)
        return dist.MixtureSameFamily(
            dist.Categorical(probs.movedim(0, -1), validate_args=False), component, validate_args=False
        )

    def given(self, site: str, value: Tensor, picked: Mapping[str, Tensor], *, draws: bool) -> Tensor:
        """The latent's value for the picked states of the discrete ones.

        :param value: shape (draws,) + C + batch + event; without the first if not `draws`.
        :param picked: state numbers by site, shape (draws,) + plates.
        """
        batch, event = self.continuous.runs.shapes[site]
        lead = 1 if draws else 0
        states = value.shape[lead : value.dim() - len(batch) - len(event)]
        record = self.run.sites[site]
        order = self._plate_symbols(record, len(batch))
        first = self.continuous.runs.dim - len(states)
        for i, size in enumerate(states):
            if size == 1:
                value = value.narrow(lead, 0, 1).squeeze(lead)
                continue
            name = self.graph.symbol_sites[self._symbols[first + i]]
            index = self._index(picked[name], self.run.sites[name], order, draws)
            index = index.reshape(
                *index.shape[:lead], *(1,) * (1 + len(states) - 1 - i), *index.shape[lead:], *(1,) * len(event)
            )
            target = list(value.shape)
            target[lead] = 1
            value = value.gather(lead, index.expand(target)).squeeze(lead)
        return value

    def _plate_symbols(self, record: SiteRecord, rank: int) -> list[str]:
        return [record.symbols.get(d, "") for d in range(-rank, 0)]

    def _index(self, index: Tensor, record: SiteRecord, order: list[str], draws: bool) -> Tensor:
        """State numbers over the plates of the continuous latent, size 1 where the discrete one has none."""
        own = "".join(record.symbols[plate.dim] for plate in record.plates)
        packed = with_dims(index, (DRAWS if draws else "") + own)
        nests = next(c.nests for c in self.graph.components if record.symbol in c.symbols)
        if nests:
            packed = at_rows(packed, [s for s in order if s], nests, self.graph.plate_sizes)
        aligned = align(packed, (DRAWS if draws else "") + "".join(s for s in order if s))
        shape, sizes = list(aligned.shape[: int(draws)]), iter(aligned.shape[int(draws) :])
        return aligned.reshape(shape + [next(sizes) if s else 1 for s in order])


def _permuted(own: Any, order: list[int], states: int, kept: int) -> Any:
    """The same distribution with its batch dims in another order, those after the first `kept` (states) flattened."""
    extra = 0
    while isinstance(own, torch.distributions.Independent):
        extra += own.reinterpreted_batch_ndims
        own = own.base_dist
    made = {}
    for name, constraint in own.arg_constraints.items():
        if name not in own.__dict__:
            continue
        value = getattr(own, name)
        event = constraint.event_dim
        value = (
            value.expand(*own.batch_shape, *value.shape[value.dim() - event :])
            if event
            else value.expand(own.batch_shape)
        )
        moved = value.permute(*order, *range(len(order), value.dim()))
        made[name] = moved.reshape([*moved.shape[:kept], states, *moved.shape[len(order) :]])
    made = {
        n: v for n, v in made.items() if n not in ("covariance_matrix", "precision_matrix") or "scale_tril" not in made
    }
    result = type(own)(**made, validate_args=False)
    return result.to_event(extra) if extra else result
