"""Linear predictors: arguments that are a link of offset + Σ_j c_j·θ[i_j]; affine.py finds them in a model.

A design is kept in factored form: index and coefficient of a term lose every dim along which they are constant
(index (K, 1), coefficient (1, N) for w (K, p) in `(w[z] * x).sum(-1)`), and nothing of size N·P is formed.

A positive parameter may enter by its logarithm: the θ of its terms is then log θ (`logarithmic`), so that products of
positive parameters (r·exp(X b), a[i]·b[j]) are linear predictors behind exp.

Not handled: products of other parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    logarithmic: bool = False


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

    @property
    def logarithmic(self) -> frozenset[str]:
        """Parameters that enter by their logarithms."""
        return frozenset(term.parameter for term in self.terms if term.logarithmic)

    @property
    def linear(self) -> bool:
        """The argument itself is affine in the parameters themselves."""
        return self.link.name == "identity" and not self.logarithmic

    def coordinates(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the terms are linear in: the parameters, or their logarithms."""
        return {n: params[n].log() if n in self.logarithmic else params[n] for n in self.parameters}

    def eta(self, params: Mapping[str, Tensor]) -> Tensor:
        """Linear predictor, shape of the argument, differentiable in `params`."""
        assert self.offset is not None
        return linear_part(self.terms, self.coordinates(params), self.offset)

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
    """start + Σ c·θ[i], θ in the coordinates of the terms.

    Terms of many cells that are outer products of index and coefficient go by one matrix product for all.
    """
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
    return replace(term, index=index, coefficient=own)
