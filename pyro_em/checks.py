"""Warnings about a start that EM cannot leave, and about an end that needs care."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

import torch
from pyro.distributions import OrderedLogistic

from pyro_em.charts import base_constraint
from pyro_em.distributions import IncompleteNormal
from pyro_em.errors import BoundaryEstimate, CollinearDesign, SeparatedData, SymmetricStart, UnidentifiedParameter
from pyro_em.families.ordinal import CUTS
from pyro_em.loop import Ended
from pyro_em.model.compat import base_distribution
from pyro_em.model.trace import SiteRecord
from pyro_em.problem import Problem
from pyro_em.types import Params


def at_start(problem: Problem, params: Params) -> None:
    """Warn if no factor tells the states of some latent apart: EM keeps such components equal for ever."""
    graph = problem.graph
    if not graph.latents:
        return
    with torch.no_grad():
        if all(params[n] is value for n, value in problem.start.items()):
            run = problem.first
        else:
            run = problem.replayed(params) if problem.recognised else problem.run(params)
    for name, symbol in graph.latents.items():
        children = [run.sites[n] for n, f in graph.factors.items() if n != name and symbol in f.dims]
        if children and all(_same_for_all_states(site, symbol) for site in children):
            warnings.warn(
                f"All states of latent '{name}' start with equal parameters. EM keeps them equal for ever (a saddle "
                "point). Start from different values: init='kmeans++', init='random', or unequal initial values.",
                SymmetricStart,
                stacklevel=3,
            )
            return


def _same_for_all_states(site: SiteRecord, symbol: str) -> bool:
    """No argument or mask of the site varies along the latent's dim (a site that hides its arguments may)."""
    dim = next(d for d, s in site.symbols.items() if s == symbol)
    if site.family is None or site.arguments is None or site.family.integrates:
        return False
    for mask, trailing in ((site.mask, 0), (site.element_mask, site.element_dims)):
        position = -1 if mask is None else mask.dim() - trailing + dim
        if mask is not None and position >= 0 and mask.shape[position] > 1:
            return False  # which of the data count depends on the latent
    for name, value in site.arguments.items():
        position = value.dim() - site.family.arguments[name] - site.element_dims + dim
        if position < 0 or value.shape[position] == 1:
            continue
        if not bool((value == value.narrow(position, 0, 1)).all()):
            return False
    return site.observed or site.enumerated


def collinear(names: Collection[str]) -> None:
    """Warn about parameters that the design of the data leaves open, whatever the posterior."""
    if names:
        warnings.warn(
            f"The design is collinear: the data cannot tell entries of {', '.join(map(repr, sorted(names)))} apart, so "
            "each solve takes the step of least length from the current values. Drop the redundant covariates, or put "
            "a Normal prior on the coefficients and use algorithm='map-em'.",
            CollinearDesign,
            stacklevel=3,
        )


def unobserved_cells(problem: Problem) -> None:
    """Warn about cells of normal vectors that no row, or no two of which any row, shows."""
    for name, site in problem.capture.sites.items():
        if not isinstance(base_distribution(site.fn), IncompleteNormal):
            continue
        seen = (~site.value.isnan()).reshape(-1, site.value.shape[-1]).double()
        together = seen.mT @ seen
        pairs = (together == 0).triu().nonzero().tolist()
        if pairs:
            shown = ", ".join(f"{i}" if i == j else f"({i}, {j})" for i, j in pairs[:5])
            warnings.warn(
                f"Site '{name}': cells {shown}{' ...' if len(pairs) > 5 else ''} are never observed (a pair: never "
                "together), so that the data do not identify their means or covariances; these depend on the start. "
                "Leave the cells out, or put a prior on the parameters and use algorithm='map-em'.",
                UnidentifiedParameter,
                stacklevel=3,
            )


def unseen_categories(problem: Problem) -> frozenset[str]:
    """Warn about ordered categories that no observation of a site is in: their cut points have no maximum, or meet.

    :returns: these sites.
    """
    found = set()
    for name, site in () if problem.with_prior else problem.capture.sites.items():
        fn = base_distribution(site.fn)
        if not site.observed or not isinstance(fn, OrderedLogistic):
            continue
        size = fn.cutpoints.shape[-1] + 1
        seen = set(site.value[~site.value.isnan()].long().unique().tolist())
        unseen = [k for k in range(size) if k not in seen]
        if unseen:
            found.add(name)
            warnings.warn(
                f"Site '{name}': no observation is in category {', '.join(map(str, unseen))} of the {size} categories "
                f"0 to {size - 1} that its cut points give. The likelihood is highest with probability 0 there: cut "
                "points meet, or move on to infinity. Number the categories from 0 without gaps, with one cut point "
                "less than there are categories, or put a prior on them and use algorithm='map-em'.",
                BoundaryEstimate,
                stacklevel=3,
            )
    return frozenset(found)


def separated(names: Collection[str]) -> None:
    """Warn about coefficients whose maximum-likelihood value is infinite."""
    if names:
        warnings.warn(
            f"The likelihood has no maximum in {', '.join(map(repr, sorted(names)))}: it rises for ever, by ever less. "
            "Of coefficients: covariates predict some outcomes perfectly (complete or quasi-complete separation, or a "
            "class without events); of degrees of freedom, concentrations or sizes: the data are no more spread than "
            "the limit (a normal, a Poisson, a point). The values returned are where gains fell below the tolerance. "
            "Drop the covariate, use the limit's distribution, or put a prior on them and use algorithm='map-em'.",
            SeparatedData,
            stacklevel=3,
        )


def at_edges(arguments: Mapping[str, str], stalled: bool, known: Collection[str]) -> None:
    """Warn about arguments (by site) that have ended at the edge of their spaces.

    :param known: sites with ordered categories that have been warned of.
    """
    for site, argument in arguments.items():
        if argument == CUTS and site not in known:
            warnings.warn(
                f"Site '{site}': two cut points have met in some rows (of an item, say): no observation is in the "
                "category between them, whose probability is estimated as 0. Standard errors do not apply to them. "
                "Merge the category with one beside it, or put a prior on the cut points and use algorithm='map-em'.",
                BoundaryEstimate,
                stacklevel=3,
            )
        elif stalled:
            warnings.warn(
                f"Site '{site}': its argument '{argument}' ended at the edge of its space in some rows, and the "
                "likelihood rises towards it: the maximum is there, with a score that is not 0, so that convergence "
                "cannot be tested and standard errors do not apply. Write the argument so that it cannot leave its "
                "space (exp, softplus or sigmoid of a linear predictor).",
                BoundaryEstimate,
                stacklevel=3,
            )


def at_zero(found: Mapping[str, bool]) -> None:
    """Warn about spreads of latents that are estimated as 0, or (those marked False) that nothing informs."""
    if flat := [name for name, matters in found.items() if not matters]:
        warnings.warn(
            f"No data inform {', '.join(map(repr, flat))}: the likelihood is the same whatever the spread of these "
            "latents, which no observation reads (a slope that no later step uses, say). The value is where the fit "
            "started. Leave the latents out, or put a prior on their spread and use algorithm='map-em'.",
            UnidentifiedParameter,
            stacklevel=3,
        )
    if names := [name for name, matters in found.items() if matters]:
        warnings.warn(
            f"The likelihood is at least as high with {', '.join(map(repr, names))} at 0 (in some entry or direction): "
            "the estimate is on the boundary of its space, which updates approach but never reach. The model explains "
            "as much without these random effects, or this noise; standard errors do not apply to their spread. Leave "
            "them out, or put a prior on it and use algorithm='map-em'.",
            BoundaryEstimate,
            stacklevel=3,
        )


def after_fit(problem: Problem, ended: Ended) -> None:
    """Warn about parameters that no data informed, and about estimates on a boundary."""
    if ended.empty:
        warnings.warn(
            f"No data inform some entries of {', '.join(repr(n) for n in ended.empty)} (an empty component or an "
            "unvisited state); they kept their values. Use fewer components, or a prior and algorithm='map-em'.",
            UnidentifiedParameter,
            stacklevel=3,
        )
    boundary = [name for name, value in ended.last.params.items() if _at_boundary(problem, name, value)]
    if boundary:
        warnings.warn(
            f"Parameters {', '.join(repr(n) for n in boundary)} ended with entries on the boundary of their space "
            "(probabilities of 0 or 1, scales of 0). Standard errors do not apply to these.",
            BoundaryEstimate,
            stacklevel=3,
        )


def _at_boundary(problem: Problem, name: str, value: torch.Tensor) -> bool:
    record = problem.parameters[name]
    if torch.equal(value, record.value):
        return False  # never moved: structural zeros of a fixed table
    constraint = base_constraint(record.constraint)
    kept = (record.value == value) & (value == 0)
    if constraint is torch.distributions.constraints.simplex:
        return bool(((value == 0) & ~kept).any())
    lower, upper = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    low = torch.zeros_like(kept) if lower is None else (value <= lower) & ~kept
    high = torch.zeros_like(kept) if upper is None else value >= upper
    return bool((low | high).any())
