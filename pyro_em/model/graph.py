"""The frozen factor graph of a model: factors, latents, components, weights.

Built once from one enumerated run. A *component* is a set of factors connected through enumerated latents; its *root*
is the set of plates that all of its factors share, so log Z of a component is a tensor over its root plates, and a
weight w_n of a plate element multiplies log Z_n there.

Refused here and in components.py: several scales in one component, tensor-valued scales, weights on a plate that a
component's factors do not all share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pyro.distributions import Unit
from torch import Tensor

from pyro_em.errors import InputError, Refusal
from pyro_em.model import compat
from pyro_em.model.chained import ChainedLoop, chained_loops
from pyro_em.model.components import Component, components_of
from pyro_em.model.nested import Nesting
from pyro_em.model.nests import at_rows, closure
from pyro_em.model.packing import multiply
from pyro_em.model.relevance import relevance_of
from pyro_em.model.trace import Run, SiteRecord

__all__ = ["Component", "FactorGraph", "FactorInfo", "build_graph", "independent_plates"]


@dataclass(frozen=True)
class FactorInfo:
    """A factor without its numbers: packed dims, plates, and the multiplicity of its counts.

    `weight` (packed over plates, or None for one) multiplies the factor's expected counts: plate
    weights x scale x mask x relevance.
    """

    site: str
    dims: str
    plates: frozenset[str]
    enumerated: bool
    symbol: str | None
    weight: Tensor | None


@dataclass(frozen=True)
class FactorGraph:
    """Everything about the model that does not depend on the parameters' values."""

    factors: dict[str, FactorInfo]
    components: tuple[Component, ...]
    constants: tuple[str, ...]
    priors: tuple[str, ...]
    latents: dict[str, str]
    plate_names: dict[str, str]
    plate_sizes: dict[str, int]
    symbol_sites: dict[str, str]
    plate_weights: dict[str, Tensor]
    loops: tuple[ChainedLoop, ...] = ()
    penalties: frozenset[str] = frozenset()  # `pyro.factor` outside of all plates: a term of log p(x), but no datum

    @property
    def num_observations(self) -> float:
        """N of the stopping rule: elements of the data plates, or the sum of their weights (of BIC: counting.py).

        (Integer weights are repeats, so that both must count alike.) Data in plates side by side, such as the labelled
        and the unlabelled rows, are counted plate by plate. Where continuous latents couple all data (crossed effects)
        it is the number of rows.
        """
        if not any(self._roots()) and any(c.symbols - self.symbol_sites.keys() for c in self.components):
            return float(max(math.prod(self.plate_sizes[p] for p in f.plates) for f in self.factors.values()))
        total = sum(map(self.elements, independent_plates(self._roots(without=self.penalties))))
        return max(total, torch.finfo(torch.float64).tiny)

    def elements(self, plates: frozenset[str]) -> float:
        """Number of elements of some plates together, or the sum of their weights."""
        total = 1.0
        for plate in sorted(plates):
            weight = self.plate_weights.get(plate)
            total *= self.plate_sizes[plate] if weight is None else float(weight.double().sum())
        return total

    def _roots(self, without: frozenset[str] = frozenset()) -> list[frozenset[str]]:
        return [c.root for c in self.components] + [self.factors[n].plates for n in self.constants if n not in without]

    @property
    def nothing_to_sum(self) -> str:
        """Why there are no components, where there are none."""
        return "no latent has more than one state" if self.latents else "the model has no latents"

    @property
    def data_plates(self) -> tuple[str, ...]:
        """Symbols of the plates over which log p(x) is a sum of independent terms, outermost first."""
        roots = self._roots()
        shared = frozenset.intersection(*roots) if roots else frozenset()
        return tuple(symbol for symbol in self.plate_names if symbol in shared)


def independent_plates(roots: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """Sets of plates over which log p(x) is a sum of independent terms: one set where all data share it.

    :param roots: plates of every term; terms that share a plate are counted together, over their common ones.
    """
    if not roots or not all(roots):
        return [frozenset()]  # some term couples everything: one observation
    groups: list[tuple[frozenset[str], frozenset[str]]] = []  # (plates of any, plates of all)
    for root in roots:
        touched, common = root, root
        for group in [g for g in groups if g[0] & root]:
            groups.remove(group)
            touched, common = touched | group[0], common & group[1]
        groups.append((touched, common))
    return [common for _, common in groups]


def build_graph(
    run: Run,
    packed: Mapping[str, Tensor],
    parameters: frozenset[str],
    weights: Mapping[str, Tensor],
    atoms: Mapping[str, str] | None = None,
    maps: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> FactorGraph:
    """Factor graph of an enumerated run.

    :param packed: packed log-density of every site of the run.
    :param parameters: names of the parameter-role sample sites (their factors are priors).
    :param weights: plate name -> weights of its elements, shape (N,).
    :param atoms: symbol of the dim of values of each set of continuous latents -> the first of these latents.
    :param maps: element that every row of a site reads of a latent in other plates, by site and latent (row_maps.py).
    :raises Refusal, InputError: see the module docstring.
    """
    atoms = atoms or {}
    symbol_sites = {site.symbol: name for name, site in run.sites.items() if site.symbol is not None}
    plate_names = {symbol: name for name, symbol in run.plate_symbols.items()}
    plate_sizes = {run.plate_symbols[plate.name]: plate.size for site in run.sites.values() for plate in site.plates}
    loops = chained_loops(run, packed)
    chained = {loop.loop.plate for loop in loops}  # steps that depend on each other have no weights
    plates = {plate: symbol for plate, symbol in run.plate_symbols.items() if plate not in chained}
    weight_of = _plate_weights(weights, plates, plate_sizes)
    nesting = Nesting(run, plate_sizes, maps or {})
    relevance = relevance_of(run, packed, symbol_sites, loops, nesting.lifted)
    latents = {**symbol_sites, **atoms}
    enumerated = {name: set(compat.dims_of(packed[name])) & set(latents) for name in run.sites}
    priors = tuple(name for name in run.sites if name in parameters)
    for name in priors:
        if enumerated[name]:
            parent = latents[sorted(enumerated[name])[0]]
            raise Refusal(
                name,
                f"it is to be a parameter, but its prior depends on the latent '{parent}'.",
                "index it by the latent instead (loc[z]), or give the prior without the latent.",
            )
    names = [name for name in run.sites if name not in parameters]
    components = components_of(run, names, enumerated, weight_of, loops, nesting)
    inside = {name: component for component in components for name in component.factors}
    factors: dict[str, FactorInfo] = {}
    for name in run.sites:
        site = run.sites[name]
        nests = inside[name].nests if name in inside else {}
        own = {
            d: at_rows(w, site.plate_dims, nests, plate_sizes)
            for d, w in weight_of.items()
            if d in closure(site.plate_dims, nests)
        }
        weight = _count_weight(site, relevance.get(name), own, name in parameters)
        factors[name] = FactorInfo(
            name, compat.dims_of(packed[name]), site.plate_dims, site.enumerated, site.symbol, weight
        )
    constants = tuple(name for name in names if name not in inside)
    alone = (name for name in constants if not run.sites[name].plates)
    return FactorGraph(
        factors=factors,
        components=components,
        constants=constants,
        priors=priors,
        latents={name: symbol for symbol, name in symbol_sites.items()},
        plate_names=plate_names,
        plate_sizes=plate_sizes,
        symbol_sites=symbol_sites,
        plate_weights=weight_of,
        loops=loops,
        penalties=frozenset(n for n in alone if isinstance(compat.base_distribution(run.sites[n].fn), Unit)),
    )


def _plate_weights(
    weights: Mapping[str, Tensor], plates: Mapping[str, str], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in plates:
            known = ", ".join(f"'{plate}'" for plate in plates) or "none"
            raise InputError(f"weights: the model has no vectorised plate '{name}'. Its plates: {known}.")
        symbol = plates[name]
        weight = torch.as_tensor(weight).detach()
        if weight.shape != (sizes[symbol],):
            shape = tuple(weight.shape)
            raise InputError(f"weights: plate '{name}' has {sizes[symbol]} elements, its weights have shape {shape}.")
        bad = ~weight.isfinite() | (weight < 0)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            said = f"the weight of element {row} of plate '{name}' is {weight[row].item()}"
            raise InputError(f"weights: {said}; weights are finite and not negative.")
        if not bool((weight > 0).any()):
            raise InputError(f"weights: all weights of plate '{name}' are zero; there are no data to fit.")
        if not weight.is_floating_point():
            weight = weight.to(torch.get_default_dtype())
        many = weight.numel() > 1
        found[symbol] = compat.with_dims(weight if many else weight.reshape(()), symbol if many else "")
    return found


def _count_weight(
    site: SiteRecord, relevance: Tensor | None, weights: Mapping[str, Tensor], prior: bool
) -> Tensor | None:
    weight: Tensor | None = None
    for own in weights.values():
        weight = weight if prior else multiply(weight, own)
    if isinstance(site.scale, Tensor) and site.scale.numel() > 1:
        weight = multiply(weight, compat.pack(site.scale, site.symbols))
    elif float(site.scale) != 1.0:
        weight = multiply(weight, compat.with_dims(torch.tensor(float(site.scale)), ""))
    if site.mask is not None and not site.latent:
        mask = compat.pack(site.mask.to(torch.get_default_dtype()), site.symbols)
        weight = multiply(weight, mask)
    return multiply(weight, relevance)
