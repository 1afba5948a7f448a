"""The sets of Gaussian latents of a problem, read off from the model and pooled: what `Pooled` iterates on.

A set is taken if its elements are independent given the parameters, and all of its sites are normal with one noise
scale (or covariance) for all rows, up to known factors. Known factors divide the rows (eight schools).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.bilinear import Form, read_form
from pyro_em.e_step.pooled_data import Classes, Pooled, Rows, pool
from pyro_em.e_step.pooled_location import PooledSite
from pyro_em.evidence.assembly import Reading
from pyro_em.evidence.columns import Column, direction
from pyro_em.evidence.gaussian import GaussianRoute
from pyro_em.families.multivariate_normal import MultivariateNormalFamily
from pyro_em.families.normal import LocationScaleFamily, LogNormalFamily
from pyro_em.model.compat import unpack
from pyro_em.model.density import clean_value
from pyro_em.model.graph import Component
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.problem import Problem

T = TypeVar("T")
MAX_REGRESSORS = 512  # of a site: their products are formed in every update


@dataclass(frozen=True)
class PooledSet:
    """Sites in the order of `classes.sites`; `constant` is what does not depend on the parameters in log p(x)."""

    sites: tuple[PooledSite, ...]
    classes: Classes
    size: int  # K
    constant: float
    known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # kept from E-step to E-step

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What is the same in every E-step."""
        if name not in self.known:
            self.known[name] = make()
        found: T = self.known[name]
        return found

    @property
    def one(self) -> Tensor:
        """I (K, K)."""
        return self.kept("one", lambda: torch.eye(self.size, dtype=torch.float64))

    @property
    def text(self) -> str:
        """For the plan."""
        classes, columns = len(self.classes.weight), self.classes.ones.numel()
        return (
            f"moments of the rows formed once, {classes} class{'es' if classes > 1 else ''} of equal "
            f"designs with {columns} pseudo-elements in all; no row is read again"
        )


@dataclass(frozen=True)
class SiteRows:
    """One site as it is read from the model; `data` (N, V₀ + P) are the features that meet no latent, and the data.

    `scaled`: the noise scale is an argument, not known. `jacobian` (N or 1,) is what its log-density has less than
    that of a residual in units of the known scale.
    """

    site: SiteRecord
    form: Form
    data: Tensor
    scaled: bool
    jacobian: Tensor


def pooled_routes(problem: Problem) -> list[GaussianRoute]:
    """The routes of all sets.

    :raises NotCompiled: if one is not Gaussian, or meets discrete latents.
    """
    continuous = problem.continuous
    if continuous is None:
        raise NotCompiled("the model has no continuous latents")
    if problem.graph.symbol_sites:
        raise NotCompiled("discrete latents beside the Gaussian ones")
    routes: list[GaussianRoute] = []
    for route in continuous.routes:
        if not isinstance(route, GaussianRoute):
            raise NotCompiled(f"{route.name} latents")
        routes.append(route)
    return routes


def columns_of(route: GaussianRoute) -> tuple[Column, ...]:
    """All columns of a set, those of A first."""
    return (*route.geometry.columns_a, *route.geometry.offsets_b)


def at_units(problem: Problem, routes: list[GaussianRoute]) -> tuple[Run, Run]:
    """The model with every latent at one value, and with those of every set at 0, then at 1 in one column after the
    other: all that the latents move is read off from the second."""
    continuous = problem.continuous
    assert continuous is not None
    most = max(len(columns_of(route)) for route in routes)
    points: list[dict[str, Tensor]] = []
    for s in range(most + 1):
        point = {}
        for route in routes:
            columns = columns_of(route)
            for name in route.latents.names:
                batch, event = route.latents.shapes[name]
                value = torch.zeros([*batch, *event], dtype=torch.float64)
                if 0 < s <= len(columns) and columns[s - 1].site == name:
                    value = direction(columns[s - 1], (batch, event), torch.ones(batch.numel(), dtype=torch.float64))
                point[name] = value.to(route.dtypes[name])
        points.append(point)
    leaves = {n: v.detach().clone().requires_grad_(True) for n, v in problem.start.items()}
    with torch.enable_grad():
        return continuous.at_one, continuous.runs.several(leaves, continuous.runs.as_atoms(points))


def read_site(problem: Problem, route: GaussianRoute, name: str, plain: Run, run: Run) -> SiteRows:
    """A site of a set.

    :param plain, run: as `at_units` gives them.
    :raises NotCompiled: if it is of another kind, see the module docstring.
    """
    m, site = len(route.geometry.layout), plain.sites[name]
    check_site(site)
    scale = known_scale(site, problem, m)
    form = read_form(site, run, problem.start, reaching(problem, site), columns_of(route), m, scale)
    data, jacobian = form.alone, torch.zeros(1, dtype=torch.float64)
    if not site.latent:
        assert isinstance(site.family, LocationScaleFamily | MultivariateNormalFamily)
        y = rows_of(site.family.location(clean_value(site)).detach().double(), site) / scale.unsqueeze(-1)
        data = torch.cat([data, y], -1)
        jacobian = scale.log() * form.base.shape[1]
        if isinstance(site.family, LogNormalFamily):
            jacobian = jacobian + rows_of(clean_value(site).double().log(), site).sum(-1)
    return SiteRows(site, form, data, scale.numel() == 1, jacobian)


def pooled_set(problem: Problem, route: GaussianRoute, component: Component, plain: Run, run: Run) -> PooledSet:
    """A set whose elements are independent given the parameters.

    :raises NotCompiled: with the reason.
    """
    weight = element_weights(problem, route, component, plain)
    found, rows, constant = [], [], 0.0
    for reading in route.readings:
        own = read_site(problem, route, reading.site, plain, run)
        if own.form.num_regressors > MAX_REGRESSORS:  # rows of one element that take its latents one by one
            raise NotCompiled(f"'{own.site.name}' multiplies the latents of an element by too many covariates")
        element, kept = elements_read(problem, own.site, reading, route, weight)
        constant -= float((weight[element] * kept * own.jacobian).sum())
        rows.append(Rows(element[kept], own.form.shared[kept], own.data[kept]))
        found.append(own)
    classes = pool(rows, weight)
    sites = tuple(pooled_site(problem, own, of) for own, of in zip(found, classes.sites, strict=True))
    return PooledSet(sites, classes, len(route.geometry.columns_a), constant)


def pooled_site(problem: Problem, own: SiteRows, pooled: Pooled) -> PooledSite:
    """A site with its pseudo-rows."""
    return PooledSite(own.site, own.form, pooled, own.scaled, moves_otherwise(own.form, problem, own.site))


def moves_otherwise(form: Form, problem: Problem, site: SiteRecord) -> bool:
    """The location is more than an entry of a parameter, or a number, in each cell of all rows.

    :raises NotCompiled: for entries that are written out for the rows of a latent: its moments are those of all rows.
    """
    uses = [use for own in problem.uses.values() for use in own if use.site == site.name]
    if any(use.index is None for use in uses):
        return True
    assert site.arguments is not None
    loc = site.arguments["loc"]
    if site.latent and loc.shape[: max(0, loc.dim() - len(site.fn.event_shape))].numel() > 1:
        if any(use.slot == "loc" for use in uses):
            raise NotCompiled(f"the location of '{site.name}' is a parameter that is written out for every row")
        return True
    rows = {int(row) for entries in form.entries for row in entries.row}
    rows |= {int(row) for row in (form.base - form.value).abs().sum(-1).nonzero()}
    return not rows <= {form.ones}


def check_site(site: SiteRecord) -> None:
    """:raises NotCompiled: for a site that is not normal with all of its cells."""
    if site.element_mask is not None or (site.family is not None and site.family.latent_response):
        raise NotCompiled(f"'{site.name}' has missing cells")
    if not isinstance(site.family, LocationScaleFamily | MultivariateNormalFamily):
        raise NotCompiled(f"'{site.name}' hides its arguments")
    if isinstance(site.family, MultivariateNormalFamily) and site.element_dims:
        raise NotCompiled(f"'{site.name}' has several vectors in one event")


def reaching(problem: Problem, site: SiteRecord) -> list[str]:
    """Parameters that move the location, which is affine in each, and not in their products."""
    names = []
    for name, uses in problem.uses.items():
        for use in uses:
            if (use.site, use.slot) != (site.name, "loc"):
                continue
            affine = use.predictor is not None and use.predictor.linear
            gathered = use.index is not None and use.power == 1 and not use.exponential
            if not (affine or gathered):
                raise NotCompiled(f"'{name}' enters the location of '{site.name}' in a way that is not affine")
            names.append(name)
    return names


def row_sizes(site: SiteRecord, m: int) -> tuple[int, ...]:
    """Sizes of the plate-like dims, that of the atoms first and 1."""
    sizes = (1,) * (m - len(site.batch_shape)) + tuple(site.batch_shape)
    return (1, *sizes[1:])


def rows_of(x: Tensor, site: SiteRecord) -> Tensor:
    """A value over (rows, cells)."""
    event = tuple(site.fn.event_shape)
    batch = tuple(site.batch_shape)
    return x.expand([*batch, *event]).reshape(torch.Size(batch).numel(), -1)


def known_scale(site: SiteRecord, problem: Problem, m: int) -> Tensor:
    """The factor of the noise scale that differs from row to row, (N,) or (1,).

    :raises NotCompiled: if what differs is a parameter.
    """
    one = torch.ones(1, dtype=torch.float64)
    for slot, value in (site.arguments or {}).items():
        if slot == "loc":
            continue
        trailing = len(site.fn.event_shape) + (1 if site.family is not None and site.family.arguments[slot] == 2 else 0)
        lead = value.shape[: max(0, value.dim() - trailing)]
        if lead.numel() <= 1:
            continue
        moved = any(use.site == site.name and use.slot == slot for uses in problem.uses.values() for use in uses)
        if moved or site.family is None or site.family.event_dim or site.latent:
            raise NotCompiled(f"the {slot} of '{site.name}' differs from row to row")
        rows = rows_of(value.detach().double(), site)
        if not bool((rows == rows[:, :1]).all()):
            raise NotCompiled(f"the {slot} of '{site.name}' differs from row to row and cell to cell")
        return rows[:, 0].contiguous()
    return one


def element_weights(problem: Problem, route: GaussianRoute, component: Component, run: Run) -> Tensor:
    """How often every element counts, (G,)."""
    layout = route.geometry.layout
    if component.weight is None:
        weight = torch.ones(layout, dtype=torch.float64)
    else:
        weight = unpack(component.weight, dict(route.symbols)).double().expand(layout)
    for name in route.latents.names:
        own = problem.graph.factors[name].weight
        if own is None and component.weight is None:
            continue
        counted = torch.ones((), dtype=torch.float64) if own is None else unpack(own, run.sites[name].symbols).double()
        relevant = counted.expand(layout) if counted.dim() <= len(layout) else counted.reshape(layout)
        # Elements without data count 0 for the latents' own site; their evidence is 1 whatever the weight.
        if not bool(((relevant == weight) | (relevant == 0)).all()):
            raise NotCompiled(f"'{name}' counts otherwise than its data")
        weight = torch.where(relevant == 0, 0.0, weight)
    return weight.reshape(-1)


def elements_read(
    problem: Problem, site: SiteRecord, reading: Reading, route: GaussianRoute, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The element that every row reads (N,), and whether the row counts (N,)."""
    geometry = route.geometry
    sizes = row_sizes(site, len(geometry.layout))
    index = reading.index
    if index is None:
        index = torch.arange(geometry.elements).reshape(geometry.layout)
    element = index.clamp(min=0).expand(sizes).reshape(-1)
    kept = torch.ones(len(element), dtype=torch.bool)
    if site.mask is not None and not site.latent:
        kept = site.mask.expand(torch.Size(site.batch_shape)).reshape(-1)
    own = problem.graph.factors[site.name].weight
    counted = torch.ones(len(element), dtype=torch.float64)
    if own is not None:
        counted = unpack(own, site.symbols).double().expand(sizes).reshape(-1)
    if not bool((counted == weight[element] * kept).all()):
        raise NotCompiled(f"rows of '{site.name}' count otherwise than their element")
    return element, kept
