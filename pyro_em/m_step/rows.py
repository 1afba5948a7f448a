"""Q of some elements of a data plate: a model run on a part of its arguments.

With q fixed, Q is a sum over the elements of a data plate and of what is outside of it. For a set B of N elements

    Q_B(θ) = Q_outside(θ) + (N/|B|) Σ_{n ∈ B} Q_n(θ)

has the expectation Q under random sets, and Q_B of sets that partition the plate average to Q. The model is run on B
by slicing those of its arguments that are as long as the plate. That the rows of such a run are those of a run on all
(no batch normalisation, no other statistic of the data, no data that the model has from elsewhere) is certified once,
factor by factor.

Not handled: models with continuous latents or loops over time, data that are no arguments of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.model import few_rows
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.graph import FactorGraph, FactorInfo
from pyro_em.model.packing import multiply
from pyro_em.model.recognise import second_point
from pyro_em.model.trace import Run
from pyro_em.model.use import Use
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors
from pyro_em.types import Params

PROBED = 16  # rows of the certificate


class NotSliced(Exception):
    """The model cannot be run on some rows; the text is the reason."""


@dataclass(frozen=True)
class Rows:
    """Elements of one plate of a problem; made by `rows_of`, which certifies them."""

    problem: Problem
    plate: str
    symbol: str
    size: int

    def objective(self, index: Tensor, weights: Posteriors) -> Callable[[Params], tuple[Tensor, Run]]:
        """Q_B as a function of the parameters, and the run behind it.

        :param index: elements of B, (B,), each once.
        :param weights: posterior weights of every factor for all rows.
        """
        part = self.at(index)
        own = {name: self._cut(x, index) if isinstance(x, Tensor) else x for name, x in weights.items()}
        return lambda params: part.expected_log_joint(params, own)

    def at(self, index: Tensor) -> Problem:
        """The problem on some rows, each of which counts N/|B| times."""
        problem = self.problem
        args, kwargs = few_rows.Rows(self.plate, self.size, index).cut((problem.args, problem.kwargs))
        share = with_dims(torch.tensor(self.size / len(index), dtype=torch.float64), "")
        factors = {name: self._info(info, index, share) for name, info in problem.graph.factors.items()}
        graph = dataclasses.replace(problem.graph, factors=factors)
        return dataclasses.replace(problem, args=args, kwargs=kwargs, graph=graph, uses=self._opaque)

    @cached_property
    def _opaque(self) -> dict[str, tuple[Use, ...]]:
        """What is known of the arguments holds for all rows: the model is to be run."""
        uses = self.problem.uses.items()
        return {name: tuple(dataclasses.replace(u, index=None, predictor=None) for u in own) for name, own in uses}

    def _info(self, info: FactorInfo, index: Tensor, share: Tensor) -> FactorInfo:
        if self.symbol not in info.plates:
            return info
        weight = None if info.weight is None else self._cut(info.weight, index)
        return dataclasses.replace(info, weight=multiply(weight, share))

    def _cut(self, packed: Tensor, index: Tensor) -> Tensor:
        dims = dims_of(packed)
        if self.symbol not in dims:
            return packed
        return with_dims(packed.index_select(dims.index(self.symbol), index.to(packed.device)), dims)


def rows_of(problem: Problem) -> Rows:
    """The rows of the largest data plate of a problem.

    :raises NotSliced: with the reason.
    """
    graph = problem.graph
    if problem.continuous is not None:
        raise NotSliced("the model has continuous latents")
    if graph.loops:
        raise NotSliced("the model has a loop over time")
    plate, symbol, size = _largest(graph)
    rows = Rows(problem, plate, symbol, size)
    generator = torch.Generator("cpu").manual_seed(0)
    index = torch.randperm(size, generator=generator, device="cpu")[: min(PROBED, size - 1)]
    params = {name: second_point(record, generator) for name, record in problem.parameters.items()}
    if not few_rows.Rows(plate, size, index).cuts((problem.args, problem.kwargs)):
        raise NotSliced(f"no argument of the model is as long as plate '{plate}'")
    try:
        part = rows.at(index)
    except ValueError as error:
        raise NotSliced(f"an argument is as long as plate '{plate}' in two dims") from error
    with torch.no_grad():
        whole = problem.factors(problem.run(params))
        try:
            some = part.factors(part.run(params))
        except Exception as error:  # the user's program may fail in any way on data of another length
            raise NotSliced(f"on some rows of plate '{plate}' the model fails: {error}") from error
    for name, factor in whole.items():
        expected = rows._cut(factor, index)
        if dims_of(expected) != dims_of(some[name]) or not _equal(expected, some[name]):
            raise NotSliced(f"site '{name}' at a row of plate '{plate}' depends on the other rows")
    return rows


def _largest(graph: FactorGraph) -> tuple[str, str, int]:
    inside = [s for s in graph.plate_names if any(s in info.plates for info in graph.factors.values())]
    if not inside:
        raise NotSliced("the model has no plate")
    symbol = max(inside, key=graph.plate_sizes.__getitem__)
    return graph.plate_names[symbol], symbol, graph.plate_sizes[symbol]


def _equal(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-8 if a.dtype == torch.float64 else 1e-4
    return a.shape == b.shape and bool((torch.isclose(a, b, rtol=tolerance, atol=tolerance) | (a == b)).all())
