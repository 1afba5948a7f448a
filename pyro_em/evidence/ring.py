"""One elimination, three readings: a numerically sound ring for plated tensor contraction.

`pyro.ops.contract.contract_tensor_tree` eliminates the discrete latents of a model over any ring.
Pyro's own log ring multiplies in probability space and clamps `log` at eps, so its gradients are
silently wrong once a normalised product underflows (a logit of -40 gives -0.017 instead of -1).
This ring adds log-factors and eliminates with one of

    "sum"     log sum exp: the value is log Z, its gradient the posterior weights (exact softmax, and
              zero, not NaN, on slices that are -inf throughout);
    "max"     the value is the best joint log-density, its gradient the indicator of the joint mode
              (Viterbi: back-propagation is the back-trace);
    "sample"  the value is log Z, its gradient the indicator of one joint posterior draw
              (forward filtering, backward sampling: each elimination draws its own variables given
              those that were drawn after it).

Tables are checked against a memory limit before they are allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

import opt_einsum
import torch
from pyro.ops.rings import Ring
from torch import Tensor

from pyro_em.errors import ResourceError
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.nests import Nests, sum_over

Elimination = Literal["sum", "max", "sample"]


def logsumexp(x: Tensor) -> Tensor:
    """log Σ exp over the last dim; gradient = softmax, zero where a whole slice is -inf.

    Written in differentiable operations, so that second derivatives (observed information) are
    exact too. `torch.logsumexp` gives NaN gradients on slices of -inf.
    """
    shift = x.detach().amax(-1, keepdim=True)
    shift = torch.where(shift.isfinite(), shift, torch.zeros_like(shift))
    total = (x - shift).exp().sum(-1)
    possible = total > 0
    value = torch.where(possible, total, torch.ones_like(total)).log() + shift.squeeze(-1)
    return torch.where(possible, value, torch.full_like(value, -math.inf))


class _Pick(torch.autograd.Function):
    """Eliminate the last dim; the gradient goes to one picked entry of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: bool) -> Tensor:
        ctx.draw = draw
        if draw:
            ctx.save_for_backward(x)
            return torch.logsumexp(x, -1)
        value, index = x.max(-1)
        ctx.save_for_backward(index)
        ctx.size = x.shape[-1]
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        (saved,) = ctx.saved_tensors
        if ctx.draw:
            # Only cells with gradient 1 are on the drawn path; the draw elsewhere is not used.
            weights = torch.softmax(saved, -1)
            weights = torch.where(weights.isnan(), torch.ones_like(weights), weights)
            flat = weights.reshape(-1, weights.shape[-1])
            index = torch.multinomial(flat, 1).reshape(saved.shape[:-1])
            size = saved.shape[-1]
        else:
            index, size = saved, ctx.size
        one_hot = torch.nn.functional.one_hot(index, size).to(gradient.dtype)
        return gradient.unsqueeze(-1) * one_hot, None


@lru_cache(maxsize=4096)
def _path(inputs: tuple[str, ...], output: str, sizes: tuple[tuple[str, int], ...]) -> list[tuple[int, ...]]:
    """Order of pairwise contractions, by opt_einsum's planner (independent of the values)."""
    size = dict(sizes)
    shapes = [tuple(size[d] for d in dims) for dims in inputs]
    optimize = "auto" if len(inputs) <= 64 else "greedy"
    path, _ = opt_einsum.contract_path(f"{','.join(inputs)}->{output}", *shapes, shapes=True, optimize=optimize)
    return list(path)


class LogDensityRing(Ring):
    """Tensors are packed log-factors; see the module docstring for `elimination`.

    :param names: site name of each enumeration symbol, for messages.
    :param max_bytes: largest table that may be allocated.
    :param nests: plates that are nested in others by an index (model/nests.py), and `sizes` of plates.
    """

    def __init__(
        self,
        elimination: Elimination,
        *,
        names: dict[str, str] | None = None,
        max_bytes: float = math.inf,
        nests: Nests | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.elimination = elimination
        self.names = names or {}
        self.max_bytes = max_bytes
        self.nests, self.sizes = nests or {}, sizes or {}

    def _eliminate(self, x: Tensor) -> Tensor:
        if self.elimination == "sum":
            return logsumexp(x)
        return _Pick.apply(x, self.elimination == "sample")

    def _join(self, terms: list[Tensor], keep: str, drop: str, size: dict[str, int]) -> Tensor:
        """Broadcast-add `terms` over dims keep + drop, then eliminate `drop`."""
        order = keep + drop
        numel = math.prod(size[d] for d in order)
        needed = numel * terms[0].element_size()
        if needed > self.max_bytes:
            sites = ", ".join(f"'{self.names[d]}'" for d in order if d in self.names)
            raise ResourceError(
                f"Eliminating the discrete latents {sites} together needs a table of {needed / 2**20:.0f} MiB "
                f"({numel} cells), more than the limit of {self.max_bytes / 2**20:.0f} MiB. Break the dependence "
                "between them (pyro.markov for sequences, plates for independent groups), reduce their number "
                "of states, or raise the limit with pyro_em.settings.max_table_bytes."
            )
        total: Tensor | None = None
        for term in terms:
            dims = dims_of(term)
            aligned = term.permute([dims.index(d) for d in order if d in dims])
            shape = [size[d] if d in dims else 1 for d in order]
            aligned = aligned.reshape(shape)
            total = aligned if total is None else total + aligned
        assert total is not None
        if drop:
            total = total.expand([size[d] for d in order])
            total = self._eliminate(total.reshape(*total.shape[: len(keep)], -1))
        else:
            total = total[...]  # a new object: packed dims are attached to it
        return with_dims(total, keep)

    def sumproduct(self, terms: list[Tensor], dims: Iterable[str]) -> Tensor:
        """Add the log-factors `terms`, then eliminate `dims`."""
        eliminated = set(dims)
        size: dict[str, int] = {}
        for term in terms:
            size.update(zip(dims_of(term), term.shape, strict=True))
        used = "".join(dict.fromkeys("".join(dims_of(term) for term in terms)))
        output = "".join(d for d in used if d not in eliminated)
        if len(terms) == 1 and not eliminated:
            return terms[0]
        if len(terms) <= 2:
            return self._join(terms, output, "".join(d for d in used if d in eliminated), size)
        path = _path(tuple(dims_of(term) for term in terms), output, tuple(sorted(size.items())))
        pending = list(terms)
        for indices in path:
            chosen = [pending.pop(i) for i in sorted(indices, reverse=True)]
            elsewhere = set(output).union(*(dims_of(term) for term in pending))
            own = "".join(dict.fromkeys("".join(dims_of(term) for term in chosen)))
            keep = "".join(d for d in own if d in elsewhere)
            pending.append(self._join(chosen, keep, "".join(d for d in own if d not in elsewhere), size))
        (result,) = pending
        return result

    def product(self, term: Tensor, ordinal: Iterable[str]) -> Tensor:
        """Sum log-factors over the plates in `ordinal` (a product of independent densities)."""
        return sum_over(term, ordinal, self.nests, self.sizes)

    def inv(self, term: Tensor) -> Tensor:
        raise NotImplementedError("Marginals come from the gradient; no division is needed.")
