"""log p(x_n|θ) of every data element at many parameter values at once.

A model is run by Python, so S values cost S runs. `torch.func.vmap` runs it once for a whole batch of values
(measured: 20 to 40 times faster), but some models cannot be run so (they look at the values, or keep their
parameters in torch modules). The first two values are therefore done both ways, and unless the results
agree the rest is done one by one.

Sites with latents inside (`GaussianHMM`, folded loops) come first, where their arguments are recognised: a Kalman
filter looks at its numbers, but takes any number of chains at once, those of all values among them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.evidence.discrete import Evidence, contract
from pyro_em.evidence.integrated import integrates
from pyro_em.families.batches import ChainFamily
from pyro_em.information import Information
from pyro_em.model.compat import pack
from pyro_em.model.density import log_density
from pyro_em.model.trace import SiteRecord
from pyro_em.problem import Problem
from pyro_em.terms import pointwise
from pyro_em.types import Params

CHUNK_CELLS = 2**20  # cells of densities held at once, elements of events among them: about a cache
AGREE = 1e-9  # relative


def pointwise_draws(problem: Problem, params: Params, information: Information, draws: Tensor) -> Tensor:
    """Pointwise log-likelihood, shape (S,) + data plates.

    :param params: parameters of which those that `information` has are moved.
    :param draws: free coordinates, shape (S, P).
    """

    def moved(u: Tensor) -> Params:
        return {**problem.start, **params, **information.constrained(u)}

    def at(u: Tensor) -> Tensor:
        return _pointwise(problem, moved(u))

    def given(u: Tensor, inside: Params) -> Tensor:
        """The same, given the densities of sites with latents inside."""
        run = problem.replayed(moved(u))
        own = {name: pack(density, run.sites[name].symbols) for name, density in inside.items()}
        factors = {**problem.factors(run, without=own), **own}
        return pointwise(problem, _evidence(problem, factors), run, factors)

    def chained(part: Tensor) -> Tensor:
        return torch.func.vmap(given, randomness="same")(part, _densities_inside(problem, moved, part))

    with torch.no_grad():
        cells = sum(_cells(site) for site in problem.run(params).sites.values())
        chunk = max(1, CHUNK_CELLS // max(1, cells))
        if problem.recognised and any(integrates(site) for site in problem.sites):
            batched: Callable[[Tensor], Tensor] = chained
        else:
            batched = torch.func.vmap(at, randomness="same")
        if len(draws) < 3 or not _agrees(batched, at, draws[:2]):
            return torch.stack([at(u) for u in draws])
        return torch.cat([batched(part) for part in draws.split(chunk)])


def _densities_inside(problem: Problem, moved: Callable[[Tensor], Params], draws: Tensor) -> Params:
    """Log-densities of sites with latents inside at all draws, (S,) + batch."""

    def arguments(u: Tensor) -> dict[str, Params]:
        run = problem.replayed(moved(u))
        return {name: dict(site.arguments or {}) for name, site in run.sites.items() if integrates(site)}

    found = {}
    for name, own in torch.func.vmap(arguments, randomness="same")(draws).items():
        site = problem.first.sites[name]
        family = site.family
        assert isinstance(family, ChainFamily)
        leads = {n: len(family.lead(n, x)) for n, x in own.items()}
        rank = max(leads.values())
        wide = {n: x.reshape(len(x), *(1,) * (rank - leads[n]), *x.shape[1:]) for n, x in own.items()}
        found[name] = log_density(dataclasses.replace(site, arguments=wide))
    return found


def _evidence(problem: Problem, factors: Params) -> Evidence:
    terms = tuple(contract(problem.graph, component, factors) for component in problem.graph.components)
    zero = torch.zeros(())
    return Evidence(zero, zero, zero, terms, {})


def _cells(site: SiteRecord) -> int:
    """Cells of a site's log-density before elements of its events are summed."""
    split = site.value.dim() - site.fn.event_dim
    batch = max(math.prod(site.fn.batch_shape), site.value.shape[:split].numel())  # some are no torch.Size
    return batch * max(math.prod(site.fn.event_shape), site.value.shape[split:].numel())


def _agrees(batched: Callable[[Tensor], Tensor], at: Callable[[Tensor], Tensor], draws: Tensor) -> bool:
    """Whether all values at once give what they give one by one."""
    try:
        found = batched(draws)
    except Exception:  # whatever the model's code does with a tensor that it cannot look into
        return False
    return torch.allclose(found, torch.stack([at(u) for u in draws]), rtol=AGREE, atol=AGREE, equal_nan=True)


class _Moved(Messenger):
    """Hand parameter-role sample sites their values last of all.

    Pyro's enumeration handler reads `.data` of what a sample site returns, which vmap forbids; being the
    innermost handler, this one replaces the value after it. The trace keeps the value from before, which
    only the site's own prior sees, and that is no part of the likelihood.
    """

    def __init__(self, values: Params) -> None:
        super().__init__()
        self.values = values

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def _pointwise(problem: Problem, params: Params) -> Tensor:
    sites = {name: params[name] for name, record in problem.parameters.items() if record.kind == "sample"}
    others = {name: value for name, value in params.items() if name not in sites}
    moved = dataclasses.replace(problem, model=_Moved(sites)(problem.model))
    if problem.continuous is not None:
        evidence, run = problem.evidence({**problem.start, **params})
        return pointwise(problem, evidence, run)
    run = moved.run({**problem.start, **others})
    factors = problem.factors(run)
    return pointwise(problem, _evidence(problem, factors), run, factors)
