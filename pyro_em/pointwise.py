"""log p(x_n|θ) of every data element at many parameter values at once.

A model is run by Python, so S values cost S runs. `torch.func.vmap` runs it once for a whole batch of values
(measured: 20 to 40 times faster), but some models cannot be run so (they look at the values, or keep their
parameters in torch modules). The first two values are therefore done both ways, and unless the results
agree the rest is done one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.evidence.discrete import Evidence, contract
from pyro_em.information import Information
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

    def at(u: Tensor) -> Tensor:
        return _pointwise(problem, {**params, **information.constrained(u)})

    with torch.no_grad():
        if len(draws) < 3 or not _batches(at, draws[:2]):
            return torch.stack([at(u) for u in draws])
        cells = sum(_cells(site) for site in problem.run(params).sites.values())
        chunk = max(1, CHUNK_CELLS // max(1, cells))
        return torch.cat([torch.func.vmap(at, randomness="same")(part) for part in draws.split(chunk)])


def _cells(site: SiteRecord) -> int:
    """Cells of a site's log-density before elements of its events are summed."""
    split = site.value.dim() - site.fn.event_dim
    batch = max(site.fn.batch_shape.numel(), site.value.shape[:split].numel())
    return batch * max(site.fn.event_shape.numel(), site.value.shape[split:].numel())


def _batches(at: Callable[[Tensor], Tensor], draws: Tensor) -> bool:
    """Whether `at` gives under vmap what it gives value by value."""
    try:
        batched = torch.func.vmap(at, randomness="same")(draws)
    except Exception:  # whatever the model's code does with a tensor that it cannot look into
        return False
    return torch.allclose(batched, torch.stack([at(u) for u in draws]), rtol=AGREE, atol=AGREE, equal_nan=True)


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
    terms = tuple(contract(problem.graph, component, factors) for component in problem.graph.components)
    zero = torch.zeros(())
    return pointwise(problem, Evidence(zero, zero, zero, terms, {}), run)
