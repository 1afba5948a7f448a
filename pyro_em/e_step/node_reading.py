"""Sites that read latents by quadrature, read off from runs of the model: what node_rows.py holds.

With the latents at 0, and at 1 in one column after the other, a site's predictor is B_0 and B_0 + B_k. That it is of
this form, η = B_0 + Σ_k B_k z_k with every B_k affine in the parameters, is certified at random latents, for two
parameters. Letters: as in node_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.design import Design
from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.node_cumulants import cumulant_of, kernel_of
from pyro_em.e_step.node_panels import Panels, panels_of
from pyro_em.e_step.node_probe import Probe
from pyro_em.e_step.node_rows import NodeRows, coordinates
from pyro_em.e_step.node_several import Several
from pyro_em.e_step.node_tables import Cumulant
from pyro_em.errors import PyroEMError
from pyro_em.evidence.quadrature import QuadratureRoute
from pyro_em.kernels import Kernel
from pyro_em.m_step.location import full_cells
from pyro_em.m_step.unit import begins_of
from pyro_em.model.affine import close, terms_at
from pyro_em.model.density import clean_value
from pyro_em.model.links import LINKS, PredictorLink
from pyro_em.model.predictor import Term
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.model.use import Use
from pyro_em.problem import Problem
from pyro_em.shapes import broadcast_shapes
from pyro_em.statistics import site_weight
from pyro_em.types import Params

ROUNDED = 1e-14  # of an argument that is computed from others which the latents move
RIGHT = 1e-9  # relative deviation of a predictor that rounding explains


def read_rows(problem: Problem, route: QuadratureRoute, name: str, probe: Probe) -> NodeRows:
    """A site that reads the latents of a route.

    :raises NotCompiled: if it is of another kind, see the module docstring.
    """
    site = probe.units[0].sites[name]
    family = site.family
    if family is None or site.arguments is None or family.integrates or family.latent_response or family.event_dim:
        raise NotCompiled(f"'{name}' has no predictor of its own")
    slot, others = _slots(problem, probe, name)
    if family.arguments[slot] or ((slot not in family.closed or slot in family.by_row) and not others):
        raise NotCompiled(f"the {slot} of '{name}' has no kernel")
    size = probe.states.numel() * torch.Size(route.layout.sizes).numel()
    cells = _cells(route, site, probe.states)
    kernel = None if others else kernel_of(site, slot, cells)
    group, seen = _groups(route, site, cells, probe.states)
    present = seen if kernel is None else seen & _informed(kernel, cells)
    panels = panels_of(torch.where(present, group, -1), size, route.rule.num_nodes)
    names = tuple(n for n, uses in problem.uses.items() if any((u.site, u.slot) == (name, slot) for u in uses))
    uses = [u for n in names for u in problem.uses[n] if (u.site, u.slot) == (name, slot)]
    logs = frozenset(n for u in uses if u.predictor is not None for n in u.predictor.logarithmic)
    link = _link(problem, probe, site, slot, uses, logs, cells, group, present)
    terms = _terms(probe, names, name, slot, link, logs)
    if kernel is None:
        if link.name == "identity" and family.bounded(slot):
            raise NotCompiled(f"the {slot} of '{name}' may leave its space")
        cumulant: Cumulant = Several(site, slot, link.forward, others, panels, cells)
    else:
        cumulant = cumulant_of(site, slot, link, kernel, panels)
    at = [_eta(run, name, slot, link, cells) for run in probe.units]
    etas = [at[0], *(x - at[0] for x in at[1:])]
    offsets = []
    starts, length = begins_of(names, problem.start)
    theta = coordinates(problem.start, names, logs)
    for k, eta in enumerate(etas):
        known = Design(terms[k], starts, length, cells).predict(theta).expand(cells) if terms[k] else 0.0
        left = (eta - known).reshape(-1)
        left = torch.where(left.abs() <= 1e-4 * RIGHT * float(eta[present.reshape(cells)].abs().max()), 0.0, left)
        offsets.append(panels.placed(left, cumulant.empty if k == 0 else 0.0))
    rounding = 1e-3 * RIGHT * (1 + float(at[0][present.reshape(cells)].abs().max()))
    alike = all(_one_number(terms[k], left, panels, rounding) for k, left in enumerate(offsets) if k)
    if alike:  # of empty places too
        offsets = [offsets[0], *(left[panels.rows >= 0].mean().expand(left.shape) for left in offsets[1:])]
    constant = torch.zeros(panels.size, dtype=torch.float64)
    if kernel is not None:
        constant = _constant(site, cumulant, panels, group, seen, at[0], cells)
    return NodeRows(
        name, slot, cells, panels, cumulant, tuple(map(tuple, terms)), tuple(offsets), alike, constant,
        _weight(problem, site, group, present, cells, size), names, logs,
    )  # fmt: skip


def _slots(problem: Problem, probe: Probe, name: str) -> tuple[str, tuple[str, ...]]:
    """The one argument that depends on latents (or on parameters, if none does), and others that parameters reach.

    :raises NotCompiled: if there are several of the first kind.
    """
    moved = {use.slot for uses in problem.uses.values() for use in uses if use.site == name}
    first = probe.units[0].sites[name].arguments or {}
    found: set[str] = set()
    for run in probe.units[1:]:
        other = run.sites[name].arguments or {}
        found |= {s for s, x in first.items() if not close(x.detach(), other[s].detach(), ROUNDED)}
    found = found or moved
    if len(found) != 1:
        raise NotCompiled(f"several arguments of '{name}' move: {', '.join(sorted(found))}")
    return next(iter(found)), tuple(slot for slot in first if slot in moved - found)


def _eta(run: Run, name: str, slot: str, link: PredictorLink, cells: torch.Size) -> Tensor:
    argument = (run.sites[name].arguments or {})[slot]
    return link.inverse(argument.detach().double()).expand(cells)


def _cells(route: QuadratureRoute, site: SiteRecord, states: torch.Size) -> torch.Size:
    """Rows of the site, those of every state of the discrete latents that the set reads.

    :raises NotCompiled: if it has dims that are none of these.
    """
    own, m = full_cells(site), len(route.layout.sizes)
    batch, elements = own[: len(own) - site.element_dims], own[len(own) - site.element_dims :]
    if states:
        batch = broadcast_shapes(batch, (*states, *(1,) * m))
    if batch[: max(0, len(batch) - m)] != states or (len(batch) >= m and batch[-m] != 1):
        raise NotCompiled(f"'{site.name}' has dims that are no plates")
    return torch.Size((*batch, *elements))


def _groups(route: QuadratureRoute, site: SiteRecord, cells: torch.Size, states: torch.Size) -> tuple[Tensor, Tensor]:
    """The element that every row reads (N,), and whether the row has a datum (N,)."""
    m, sizes = len(route.layout.sizes), torch.Size(route.layout.sizes)
    batch = cells[: len(cells) - site.element_dims]
    index = route.layout.rows[site.name]
    if index is None:
        index = torch.arange(sizes.numel()).reshape(sizes)
    index = index + sizes.numel() * torch.arange(states.numel()).reshape(*states, *(1,) * m)
    index = index.reshape(index.shape[max(0, index.dim() - len(batch)) :])
    index = index.reshape((*index.shape, *(1,) * site.element_dims))
    present = torch.ones((), dtype=torch.bool)
    if site.mask is not None:
        present = site.mask.reshape((*site.mask.shape, *(1,) * site.element_dims))
    if site.element_mask is not None:
        present = present & site.element_mask
    return index.expand(cells).reshape(-1), present.expand(cells).reshape(-1)


def _informed(kernel: Kernel, cells: torch.Size) -> Tensor:
    """Rows whose density depends on η at all (N,): not so without trials."""
    informed = torch.zeros(cells, dtype=torch.bool)
    for coefficient in kernel.coefficients:
        informed = informed | (coefficient != 0)
    return informed.reshape(-1)


def _link(
    problem: Problem, probe: Probe, site: SiteRecord, slot: str, uses: Sequence[Use], logs: frozenset[str],
    cells: torch.Size, group: Tensor, present: Tensor,
) -> PredictorLink:  # fmt: skip
    """The link behind which the argument is affine in the latents, and in the parameters for given latents."""
    names = tuple(dict.fromkeys(use.parameter for use in uses))
    known = {id(u.predictor.link): u.predictor.link for u in uses if u.predictor is not None}
    if len(known) > 1 or any(u.predictor is not None and u.predictor.fixed is not None for u in uses):
        raise NotCompiled(f"the {slot} of '{site.name}' is fixed in part")
    for link in known.values() or LINKS:
        runs = (*probe.units, *(run for run, _, _ in probe.random))
        values = [(run.sites[site.name].arguments or {})[slot].detach().double() for run in runs]
        if link.vector or not all(link.reaches(v, 0) for v in values):
            continue
        try:
            terms = _terms(probe, names, site.name, slot, link, logs)
        except NotCompiled:
            continue
        at = [_eta(run, site.name, slot, link, cells) for run in probe.units]
        if all(_predicted(own, terms, logs, at, problem.start, site.name, slot, link, cells, group, present)
               for own in probe.random):  # fmt: skip
            return link
    raise NotCompiled(f"the {slot} of '{site.name}' is no link of something linear in latents and in parameters")


def _predicted(
    random: tuple[Run, Tensor, Params], terms: Sequence[Sequence[Term]], logs: frozenset[str], at: Sequence[Tensor],
    start: Params, name: str, slot: str, link: PredictorLink, cells: torch.Size, group: Tensor, present: Tensor,
) -> bool:  # fmt: skip
    """Whether the runs at units say what the predictor is at other latents and parameters."""
    run, z, params = random
    used = tuple(dict.fromkeys(term.parameter for own in terms for term in own))
    starts, size = begins_of(used, params)
    step = coordinates(params, used, logs) - coordinates(start, used, logs)
    expected = torch.zeros(cells.numel(), dtype=torch.float64)
    for k, own in enumerate(terms):
        b = at[0] if k == 0 else at[k] - at[0]
        if own:
            b = b + Design(own, starts, size, cells).predict(step)
        expected = expected + b.expand(cells).reshape(-1) * (1.0 if k == 0 else z[group, k - 1])
    found = _eta(run, name, slot, link, cells).reshape(-1)
    return close(found[present], expected[present], RIGHT)


def _terms(
    probe: Probe, names: Sequence[str], site: str, slot: str, link: PredictorLink, logs: frozenset[str]
) -> list[list[Term]]:
    """Terms of B_k for every k.

    :raises NotCompiled: if the argument is not affine in a parameter.
    """
    found: list[list[Term]] = [[] for _ in probe.units]
    for name in names:
        base: list[Term] = []
        for k, run in enumerate(probe.units):
            argument = (run.sites[site].arguments or {})[slot]
            try:
                own = terms_at(name, run.leaves[name], argument, link)
            except (PyroEMError, RuntimeError) as error:  # too many entries to solve for; no derivative
                raise NotCompiled(f"'{name}' enters '{site}' in a way that is not affine") from error
            if name in logs:
                own = [_by_logarithm(term, run.leaves[name]) for term in own]
            if k == 0:
                base = own
                found[0] += own
            elif not _same(own, base):
                found[k] += [*own, *(replace(t, coefficient=-t.coefficient) for t in base)]
    return found


def _by_logarithm(term: Term, leaf: Tensor) -> Term:
    """∂η/∂log θ = θ ∂η/∂θ."""
    theta = leaf.detach().double().reshape(-1)[term.index.clamp(min=0)]
    return replace(term, coefficient=term.coefficient * theta, logarithmic=True)


def _same(one: Sequence[Term], other: Sequence[Term]) -> bool:
    if len(one) != len(other):
        return False
    return all(
        torch.equal(a.index, b.index)
        and a.coefficient.shape == b.coefficient.shape
        and close(a.coefficient, b.coefficient, RIGHT)
        for a, b in zip(one, other, strict=True)
    )


def _one_number(terms: Sequence[Term], left: Tensor, panels: Panels, rounding: float) -> bool:
    own = left[panels.rows >= 0]
    if not len(own) or bool(((own - own[0]).abs() > rounding).any()):
        return False
    return all(term.index.numel() == 1 and term.coefficient.numel() == 1 for term in terms)


def _constant(
    site: SiteRecord, cumulant: Cumulant, panels: Panels, group: Tensor, present: Tensor, eta: Tensor, cells: torch.Size
) -> Tensor:  # fmt: skip
    """log p(y) - a η + m A(η) at one η, summed over the rows of each element."""
    assert site.family is not None
    arguments = {**site.constants, **(site.arguments or {})}
    density = site.family.log_prob(arguments, clean_value(site)).detach().double().expand(cells).reshape(-1)
    total = torch.zeros(1, panels.size, dtype=torch.float64).index_add(1, group[present], density[present].unsqueeze(0))
    at = panels.placed(eta.reshape(-1), cumulant.empty)
    linear: Tensor | None = None
    zero = torch.zeros(1, panels.size, dtype=torch.float64)
    for panel in panels.panels:
        b = panel.of_rows(at)
        table = cumulant.table(panel, cumulant.base(panel, b), panel.of_nodes(zero))
        own = panel.over_rows(panel.of_rows(cumulant.linear) * b) - table.sums
        linear = panel.into(linear, own, panels.size)
    return (total if linear is None else total - linear).squeeze(0)


def _weight(
    problem: Problem, site: SiteRecord, group: Tensor, present: Tensor, cells: torch.Size, size: int
) -> Tensor | None:
    """:raises NotCompiled: if rows of one element count differently."""
    count = site_weight(site, problem.graph.factors[site.name], None).expand(cells).reshape(-1)[present]
    own = group[present]
    found = torch.ones(size, dtype=torch.float64).index_copy(0, own, count)
    if not bool((found[own] == count).all()):
        raise NotCompiled(f"rows of '{site.name}' count otherwise than their element")
    return None if bool((found == 1).all()) else found
