"""Linear predictors: arguments that are a link of offset + Σ_j c_j·θ[i_j]; affine.py finds them in a model.

A design is kept in factored form: index and coefficient of a term lose every dim along which they are constant
(index (K, 1), coefficient (1, N) for w (K, p) in `(w[z] * x).sum(-1)`), and nothing of size N·P is formed.

Not handled: products of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.model.links import INNER, PredictorLink

MANY = 2**14  # cells of a coefficient, from which its terms are multiplied together


@dataclass(frozen=True, eq=False)
class Term:
    """c·θ[i] of one parameter; `index` (-1 for none) and `coefficient` broadcast against the argument."""

    parameter: str
    index: Tensor
    coefficient: Tensor


@dataclass(frozen=True, eq=False)
class Predictor:
    """link⁻¹(argument) = offset + Σ terms. `offset` is None if it depends on parameters outside of the terms.

    With `moving` the coefficients depend on continuous latents: the terms are those at one value, see `terms_at`.
    `fixed`, if given, holds the argument where no parameter reaches it (a structural zero may have no η), else NaN.
    """

    site: str
    slot: str
    link: PredictorLink
    terms: tuple[Term, ...]
    offset: Tensor | None
    fixed: Tensor | None = None
    moving: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters of the terms, each once."""
        return tuple(dict.fromkeys(term.parameter for term in self.terms))

    def eta(self, params: Mapping[str, Tensor]) -> Tensor:
        """Linear predictor, shape of the argument, differentiable in `params`."""
        assert self.offset is not None
        return linear_part(self.terms, params, self.offset)

    def argument(self, params: Mapping[str, Tensor]) -> Tensor:
        """The argument at `params`."""
        found = self.link.forward(self.eta(params))
        return found if self.fixed is None else torch.where(self.fixed.isnan(), found, self.fixed.to(found))

    def inverse(self, argument: Tensor) -> Tensor:
        """η at an argument; 0 where it is fixed."""
        if self.fixed is None:
            return self.link.inverse(argument)
        free = self.fixed.isnan()
        return torch.where(free, self.link.inverse(torch.where(free, argument, INNER)), 0.0)


def linear_part(terms: Sequence[Term], params: Mapping[str, Tensor], start: Tensor) -> Tensor:
    """start + Σ c·θ[i]; terms of many cells that are outer products of the two by one matrix product for all."""
    total = start
    outer: dict[tuple[torch.Size, torch.Size], list[Term]] = {}
    for term in terms:
        own = (term.index.shape, term.coefficient.shape)
        apart = len(own[0]) == len(own[1]) and all(1 in pair for pair in zip(*own, strict=True))
        if apart and term.coefficient.numel() >= MANY:
            outer.setdefault(own, []).append(term)
        else:
            total = total + _masked(term, term.coefficient.to(total)) * _entries(term, params, total.dtype)
    for (index, coefficient), group in outer.items():
        # Dims of the coefficient come last: (index dims, terms) @ (terms, coefficient dims).
        last = [i for i, size in enumerate(coefficient) if size > 1]
        first = [i for i in range(len(coefficient)) if i not in last]
        zero = torch.zeros((), dtype=total.dtype)
        thetas = [torch.where(t.index >= 0, _entries(t, params, total.dtype), zero).reshape(-1) for t in group]
        columns = torch.stack([t.coefficient.to(total).reshape(-1) for t in group])
        product = torch.stack(thetas, -1) @ columns
        product = product.reshape([*(index[i] for i in first), *(coefficient[i] for i in last)])
        order = [*first, *last]
        total = total + product.permute([order.index(i) for i in range(len(order))])
    return total


def _entries(term: Term, params: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return params[term.parameter].reshape(-1).to(dtype)[term.index.clamp(min=0)]


def _masked(term: Term, coefficient: Tensor) -> Tensor:
    return torch.where(term.index >= 0, coefficient, torch.zeros((), dtype=coefficient.dtype))


def at_entry(term: Term, d: int) -> Term:
    """The term of one entry of a vector argument."""
    index = term.index[..., min(d, term.index.shape[-1] - 1)]
    coefficient = term.coefficient
    own = coefficient[..., min(d, coefficient.shape[-1] - 1)] if coefficient.dim() else coefficient
    return Term(term.parameter, index, own)
