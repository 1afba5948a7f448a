"""Joint configurations of a model's discrete latents: the most probable one, or draws.

The factors are contracted in the ring of maxima, or in one whose sums draw (ring.py); the gradient with respect to each
factor then is 1 at the picked configuration and 0 elsewhere. Draws are one more plate.

Shapes: numbers of states have (draws,) + plates, outermost first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.evidence.discrete import contract, with_plate
from pyro_em.evidence.ring import Elimination
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.graph import FactorGraph
from pyro_em.model.packing import align
from pyro_em.model.trace import Run, SiteRecord

DRAWS = "⊗"  # symbol of the extra plate over draws


def pick(
    graph: FactorGraph, factors: Mapping[str, Tensor], run: Run, elimination: Elimination, num: int | None
) -> dict[str, Tensor]:
    """State numbers of one joint configuration (of `num` draws), shape (num,) + plates, by latent."""
    if num is not None:
        graph = with_plate(graph, DRAWS)
    leaves: dict[str, Tensor] = {}
    with torch.enable_grad():  # packing makes a view, through which the gradient has to come back
        for component in graph.components:
            for name in component.factors:
                leaf, dims = factors[name].detach(), dims_of(factors[name])
                if num is not None:
                    leaf, dims = leaf.expand(num, *leaf.shape), DRAWS + dims
                leaves[name] = with_dims(leaf.clone().requires_grad_(True), dims)
        total = sum((contract(graph, c, leaves, elimination).sum() for c in graph.components), torch.zeros(()))
    found = torch.autograd.grad(total, list(leaves.values())) if leaves else ()
    indicators = {name: with_dims(g, dims_of(leaves[name])) for name, g in zip(leaves, found, strict=True)}
    return {site: _state(indicators.get(site), run.sites[site], num) for site in graph.latents}


def _state(indicator: Tensor | None, record: SiteRecord, num: int | None) -> Tensor:
    if indicator is None:  # a latent of one state connects no factors
        return torch.zeros((*(() if num is None else (num,)), *plates_of(record)), dtype=torch.long)
    dims, symbol = dims_of(indicator), record.symbol
    assert symbol is not None
    keep = {*record.plate_dims, symbol, DRAWS}
    gone = [i for i, d in enumerate(dims) if d not in keep]
    own = with_dims(indicator.sum(gone) if gone else indicator, "".join(d for d in dims if d in keep))
    if num is None:
        return over_plates(own, record, symbol).argmax(-1)
    kept = "".join(d for d in dims_of(own) if d != DRAWS)
    lead = align(own, DRAWS + kept)
    states = [over_plates(with_dims(row, kept), record, symbol).argmax(-1) for row in lead]
    return torch.stack(states)


def over_plates(packed: Tensor, record: SiteRecord, symbol: str) -> Tensor:
    """Shape plates (outermost first) + (K,); a latent with one state has K = 1."""
    order = [record.symbols[plate.dim] for plate in record.plates]
    wide = align(packed, "".join(order) + symbol)
    return wide.expand(*plates_of(record), wide.shape[-1])


def plates_of(record: SiteRecord) -> tuple[int, ...]:
    """Sizes of a site's plates, outermost first."""
    return tuple(plate.size for plate in record.plates)


def joint_states(site: SiteRecord, run: Run, graph: FactorGraph, picked: Mapping[str, Tensor]) -> Tensor:
    """Numbers of the joint states of all latents that a site reads, (draws,) + the batch of its plates.

    Their dims stand left of the plates in its batch shape, the last one counting fastest.
    """
    depth = max([0, *(-plate.dim for plate in site.plates)])
    found = torch.zeros((1,) * depth, dtype=torch.long)
    for dim in range(-len(site.batch_shape), -depth):
        size, name = site.batch_shape[dim], graph.symbol_sites.get(site.symbols.get(dim, ""))
        if name is None or size == 1:
            continue
        own = run.sites[name]
        sizes = {plate.dim: plate.size for plate in own.plates}
        draws = picked[name].shape[: picked[name].dim() - len(own.plates)]
        found = found * size + picked[name].reshape(*draws, *(sizes.get(d, 1) for d in range(-depth, 0)))
    plates = site.batch_shape[len(site.batch_shape) - depth :]
    return found.expand(*found.shape[: found.dim() - depth], *plates)
