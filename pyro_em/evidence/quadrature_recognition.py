"""Which element of the latents each row of a factor reads, for densities of any form.

The tangent of a log-density along the latents moved by 1 in all elements is, row by row, its derivative in the
elements that the row reads; along arange(1..E) it is that derivative times the element's number, if there is only
one; along a random direction, times the direction's entry there. Taken at two random points, with two parameters.

Refused: latents that are not real-valued, in different plates, or of too many dimensions; rows that read several
elements; discrete latents in other plates than the latents'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.device import checked_indices, seeded_normal
from pyro_em.errors import Refusal
from pyro_em.evidence.columns import Column, direction, push
from pyro_em.evidence.element_states import state_of_element
from pyro_em.evidence.elimination import Candidate, Values
from pyro_em.evidence.quadrature import QuadratureRoute
from pyro_em.evidence.quadrature_layout import Layout
from pyro_em.evidence.rule import MAX_DIMENSIONS, MAX_PRODUCT, Quadrature
from pyro_em.model.density import log_density
from pyro_em.model.trace import Run, SiteRecord

SVI = "algorithm='svi' with a guide for it"


def recognise_quadrature(candidate: Candidate, rules: Mapping[str, Quadrature]) -> QuadratureRoute:
    """The route of a set of latents of which the user named at least one.

    :raises Refusal: see the module docstring.
    """
    names, run = candidate.latents.names, candidate.first
    rule = _rule(names, rules, run)
    _check_precision(candidate)
    plates = [p for p in run.sites[names[0]].plates if p.size > 1]
    for name in names[1:]:
        if [p.name for p in run.sites[name].plates if p.size > 1] != [p.name for p in plates]:
            raise Refusal(
                name,
                f"it is connected with the latent '{names[0]}' of other plates, so that the posterior of an element "
                "is not low-dimensional.",
                f"make one of them a parameter by roles=, or use {SVI}.",
            )
    m = -candidate.dim
    sizes = [1] * m
    for plate in plates:
        sizes[plate.dim] = plate.size
    rows = _rows(candidate, tuple(sizes))
    apart, read = True, dict(rows)
    for name, index in rows.items():
        if index is not None and bool((index < 0).any()):
            # A row without a derivative: masked, or one that reads none. Its density counts with element 0.
            apart = apart and _only_masked(run.sites[name], index)
            rows[name] = index.clamp(min=0)
    symbols = dict(candidate.symbols)
    states = _states(candidate, plates, tuple(sizes), read if apart else None)
    latent = run.sites[names[0]]
    symbols.update({p.dim: latent.symbols[p.dim] for p in plates})
    terms = frozenset(latent.symbols[p.dim] for p in plates) if apart else frozenset()
    sites = {name: run.sites[name] for name in candidate.latents.factors}
    row_symbols = {name: {p.dim: site.symbols[p.dim] for p in site.plates} for name, site in sites.items()}
    cells = sum(math.prod(site.batch_shape) * max(1, site.fn.event_shape.numel()) for site in sites.values())
    dtypes = {n: candidate.leaves[0][n].dtype for n in names}
    layout = Layout(candidate.latents, tuple(sizes), rows, 1 + cells // math.prod(sizes))
    layout = dataclasses.replace(layout, batched=_batched(candidate, layout, dtypes))
    return QuadratureRoute(candidate.latents, layout, rule, symbols, row_symbols, terms, dtypes, states)


def _rule(names: Sequence[str], rules: Mapping[str, Quadrature], run: Run) -> Quadrature:
    for name in names:
        if name not in rules:
            given = next(n for n in names if n in rules)
            raise Refusal(
                name,
                f"it is connected with the latent '{given}', which is integrated by quadrature, but has no rule.",
                f"name it in e_step= too, or use {SVI}.",
            )
        support = run.sites[name].fn.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real and support is not constraints.real_vector:
            raise Refusal(
                name,
                f"its support is {support}, and Gauss-Hermite quadrature needs real values.",
                "write it as a function of a real latent (an exponential of a Normal for a positive one).",
            )
    chosen = {rules[name] for name in names}
    if len(chosen) > 1:
        raise Refusal(
            names[0],
            f"the latents {', '.join(map(repr, names))} are integrated jointly, but have different rules.",
            "give them the same Quadrature.",
        )
    (rule,) = chosen
    k = sum(run.sites[name].fn.event_shape.numel() for name in names)
    if k > MAX_DIMENSIONS or rule.num_nodes**k > MAX_PRODUCT:
        raise Refusal(
            names[0],
            f"a product rule for its {k} dimensions has {rule.num_nodes}^{k} nodes; the limits are {MAX_DIMENSIONS} "
            f"dimensions and {MAX_PRODUCT} nodes.",
            f"use fewer nodes in each dimension, or {SVI}.",
        )
    return rule


def _check_precision(candidate: Candidate) -> None:
    """:raises Refusal: if a density is computed in float32 whatever the latents are (a matrix does not promote)."""
    for name in candidate.latents.factors:
        if log_density(candidate.first.sites[name]).dtype != torch.float64:
            raise Refusal(
                name,
                "its density is computed in float32, in which the modes that quadrature is centred at are not found to "
                "enough digits.",
                "give the model float64: torch.set_default_dtype(torch.float64), or data and starting values in it.",
            )


def _rows(candidate: Candidate, sizes: tuple[int, ...]) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    elements = math.prod(sizes)
    runs = (candidate.first, candidate.second)
    for name in candidate.latents.factors:
        parts = [_indices(run, name, leaves, candidate) for run, leaves in zip(runs, candidate.leaves, strict=True)]
        index = None
        for part in (p for both in parts for p in both):
            if index is not None and bool(((part >= 0) & (index >= 0) & (part != index)).any()):
                raise _several(name, candidate.latents.names[0])
            index = part if index is None else torch.maximum(index, part)
        m = len(sizes)
        if index is None or elements == 1:
            found[name] = None
            continue
        own = torch.arange(elements).reshape(sizes)
        fits = all(a in (1, b) for a, b in zip(sizes, index.shape, strict=True))
        same = fits and bool(((index == own) | (index < 0)).all())
        found[name] = None if same else index.reshape((1,) * (m - index.dim()) + tuple(index.shape))
    return found


def _indices(run: Run, name: str, leaves: Values, candidate: Candidate) -> list[Tensor]:
    """Element that each row reads, by every column of the latents that it reads at all; -1 for none."""
    density = log_density(run.sites[name])
    generator = torch.Generator().manual_seed(0)
    m, found = -candidate.dim, []
    for latent in candidate.latents.names:
        batch, event = candidate.latents.shapes[latent]
        n = batch.numel()
        one, code = torch.ones(n, dtype=torch.float64), torch.arange(1, n + 1, dtype=torch.float64)
        draw = seeded_normal((n,), generator)
        for e in range(event.numel()):
            ways = [direction(Column(latent, e), (batch, event), along) for along in (one, code, draw)]
            ((ones,), (codes,), (drawn,)) = push([density], leaves[latent], ways, graph=False)
            if bool((ones == 0).all()) and bool((drawn == 0).all()):
                continue
            valid = ones != 0
            number = torch.where(valid, codes / torch.where(valid, ones, 1.0), 0.0)
            index = number.round().long() - 1
            entry = torch.where(valid, ones * draw[index.clamp(0, n - 1)], 0.0)
            scale = float(ones.abs().max())
            whole = bool(((number - number.round()).abs() < 1e-6).all()) and bool((index < n).all())
            if not whole or not torch.allclose(drawn, entry, rtol=1e-6, atol=1e-9 * scale):
                raise _several(name, latent)
            if index.dim() > m:
                lead = tuple(range(index.dim() - m))
                common = index.amax(lead)
                if bool(((index != common) & (index >= 0)).any()):
                    raise _several(name, latent)
                index = common
            found.append(index.reshape((1,) * (m - index.dim()) + tuple(index.shape)))
    return found


def _several(site: str, latent: str) -> Refusal:
    return Refusal(
        site,
        f"a row of it reads several elements of the latent '{latent}', so that the elements are not independent given "
        "the data and quadrature would have as many dimensions as there are elements.",
        f"let every row read one element, or use {SVI}.",
    )


def _only_masked(site: SiteRecord, index: Tensor) -> bool:
    if site.mask is None:
        return False
    mask = site.mask.reshape((1,) * (index.dim() - site.mask.dim()) + tuple(site.mask.shape))
    return not bool(((index < 0) & mask).any())


def _states(
    candidate: Candidate, plates: Sequence[object], sizes: tuple[int, ...], rows: Mapping[str, Tensor | None] | None
) -> tuple[str, ...]:
    """Names of the discrete latents that the set reads.

    :param rows: element that each row reads, None where some rows read none.
    :raises Refusal: if the state that a row meets is not known from the element that it reads.
    """
    sites = [candidate.first.sites[name] for name in candidate.latents.factors]
    meets = {s.symbols[d] for s in sites for d in s.symbols if d < candidate.dim}
    owners = [s for s in candidate.first.sites.values() if s.symbol in meets]
    own = {getattr(p, "name", "") for p in plates}
    for owner in owners:
        elsewhere = {p.name for p in owner.plates if p.size > 1} - own
        sibling = rows is None or any(index is not None for index in rows.values())
        if (elsewhere or sibling) and (rows is None or not state_of_element(candidate, sizes, rows, owner)):
            raise Refusal(
                candidate.latents.names[0],
                f"its posterior depends on the states of the discrete latent '{owner.name}' in other plates.",
                "let the discrete latent share the plate of the continuous one, write that of each row as a density "
                f"that sums over its states (ZeroInflatedPoisson, MixtureSameFamily), or use {SVI}.",
            )
    return tuple(owner.name for owner in owners)


def _batched(candidate: Candidate, layout: Layout, dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether one run at two nodes gives what two runs give (a latent indexed by position does not)."""
    generator = torch.Generator().manual_seed(3)
    z = seeded_normal((2, *layout.sizes[1:], layout.num_columns), generator)
    with torch.no_grad():
        single = [layout.total(candidate.run_at[0], layout.values(z[i : i + 1], dtypes)) for i in (0, 1)]
        try:
            with checked_indices():
                both = layout.total(candidate.run_at[0], layout.values(z, dtypes))
        except (RuntimeError, IndexError, ValueError, TypeError):  # whatever indexing a wrong dim leads to
            return False
    axis = single[0].dim() - len(layout.sizes)
    expected = torch.cat(single, axis)
    return both.shape == expected.shape and torch.allclose(both, expected, rtol=1e-9, atol=1e-9)
