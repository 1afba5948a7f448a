"""Affine predictors: arguments that are a link of offset + Σ_j c_j·θ[i_j], over several parameters jointly.

    X @ w,   w[z] * x,   a[z] + X @ b[z],   nn.Linear,   einsum,   base + effect[0] * u + effect[1] * v
    exp, sigmoid, softplus or softmax of any of these
    r * exp(X @ b), a[i] * b[j], X @ b - log(r)      with r, a, b > 0: affine in their logarithms

Whether an argument g(θ) is one is a question about η = link⁻¹(g): its tangents are the same at two feasible
points, and η(θ₂) − η(θ₁) is what they predict. Its design is then read off from tangents along *coded*
directions, as index codes are in recognise.py: where at most one entry of a slice of the parameter reaches a
cell, the tangents along the slice of ones and of 1..P give the coefficient and the entry's number. Slices: the
whole parameter, then along each of its dims, then single entries, so that w (K, p) in `(w[z] * x).sum(-1)` costs
p slices, not K·p. A random tangent certifies the result.

A design is kept in factored form: index and coefficient of a term lose every dim along which they are constant
(index (K, 1), coefficient (1, N) above), and nothing of size N·P is formed.

Not handled: designs that depend on other parameters (products of parameters that are not positive), links that are not
in `LINKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.derivatives import pulled_back
from pyro_em.device import seeded_normal
from pyro_em.errors import ResourceError
from pyro_em.model.links import INNER, LINKS, PredictorLink
from pyro_em.model.predictor import Predictor, Term, linear_part

Array = NDArray[Any]
MAX_SLICES = 4096  # tangents that are worth to be pushed for one parameter


@dataclass(frozen=True)
class Point:
    """A raw argument in one run of the model, and the run's leaf and value of every parameter."""

    argument: Tensor
    leaves: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class Drawn:
    """A random direction of a parameter, and the tangents of an argument along it at both points."""

    direction: Tensor
    tangents: tuple[Tensor, Tensor]
    whole: tuple[Tensor, Tensor]  # at the first point, along ones and the entries' numbers 1, 2, ...


def find_predictor(
    site: str,
    slot: str,
    event_dim: int,
    first: Point,
    second: Point,
    moving: Sequence[str],
    generator: torch.Generator,
    positive: Collection[str] = (),
    known: Mapping[str, Drawn] = MappingProxyType({}),
) -> Predictor | None:
    """The predictor of one argument over those parameters in which it is affine, or None if there are none.

    :param event_dim: event dims of the argument (a softmax needs one).
    :param moving: parameters that reach the argument.
    :param positive: those of them that may enter by their logarithms.
    :param known: tangents of the argument along a random direction of some parameters.
    """
    v1, v2 = first.argument.detach().double(), second.argument.detach().double()
    tolerance = _tolerance(first.argument, *(first.leaves[n] for n in moving))
    pushes = {n: (_push(first.argument, first.leaves[n]), _push(second.argument, second.leaves[n])) for n in moving}
    draws = {n: known[n].direction if n in known else _draw(first.leaves[n], generator) for n in moving}
    tangents_of = {n: known[n].tangents if n in known else [push(draws[n]) for push in pushes[n]] for n in moving}
    drawn = {n: tuple(x.double() for x in both) for n, both in tangents_of.items()}
    logs = {n: tuple(_by_logarithm(*pair) for pair in zip(pushes[n], _values(n, first, second), strict=True))
            for n in moving if n in positive}  # fmt: skip
    by_log = {n: tuple(push(draws[n]).double() for push in both) for n, both in logs.items()}
    still = torch.stack([tangent == 0 for both in drawn.values() for tangent in both]).all(0) & (event_dim == 0)
    fixed = torch.where(still, v1, torch.nan) if bool(still.any()) else None
    if fixed is not None:
        v1, v2 = torch.where(still, INNER, v1), torch.where(still, INNER, v2)
    for link in LINKS:
        if not (link.reaches(v1, event_dim) and link.reaches(v2, event_dim)):
            continue
        terms: list[Term] = []
        kept = []
        for name in moving:
            for tangents, directions, by_logarithm in ((drawn, pushes, False), (by_log, logs, True)):
                if name not in tangents or name in kept:
                    continue
                one, two = tangents[name]
                if not close(link.slope(v1, one), link.slope(v2, two), tolerance):
                    continue
                found = _design(
                    name, first.leaves[name], directions[name][0], v1, link, draws[name], one, tolerance, still,
                    exact=not by_logarithm, whole=known[name].whole if name in known and not by_logarithm else None,
                )  # fmt: skip
                if found is not None:
                    kept.append(name)
                    terms += [replace(term, logarithmic=by_logarithm) for term in found]
        if not kept:
            continue
        there = Predictor(site, slot, link, tuple(terms), None, fixed)
        start = there.coordinates({n: first.values[n].detach() for n in kept})
        eta = link.inverse(v1)
        offset = eta - linear_part(terms, start, torch.zeros_like(v1))
        if fixed is not None:
            offset = torch.where(still, torch.zeros_like(offset), offset)
        if len(kept) < len(moving):
            return there
        rounding = 1e-4 * tolerance * float(eta.abs().max())
        offset = torch.where(offset.abs() <= rounding, torch.zeros_like(offset), offset)
        end = linear_part(terms, there.coordinates({n: second.values[n].detach() for n in kept}), offset)
        if fixed is not None:
            end = torch.where(still, link.inverse(v2), end)
        if close(link.inverse(v2), end, tolerance):
            return replace(there, offset=compressed(offset, rounding))
    return None


def _values(name: str, first: Point, second: Point) -> tuple[Tensor, Tensor]:
    return first.values[name].detach(), second.values[name].detach()


def _by_logarithm(push: Callable[[Tensor], Tensor], value: Tensor) -> Callable[[Tensor], Tensor]:
    """Directional derivatives along directions of log θ."""
    return lambda direction: push(direction * value)


def terms_at(name: str, leaf: Tensor, argument: Tensor, link: PredictorLink = LINKS[0]) -> list[Term]:
    """Terms of an argument that is known to be a link of something affine in a parameter, at the run that gave it."""
    push, draw = _push(argument, leaf), _draw(leaf, torch.Generator().manual_seed(0))
    value, tolerance = argument.detach().double(), _tolerance(argument, leaf)
    still = torch.zeros_like(value, dtype=torch.bool)
    found = _design(name, leaf, push, value, link, draw, push(draw).double(), tolerance, still)
    if found is None:
        raise ResourceError(
            f"Parameter '{name}' has {leaf.numel()} entries that continuous latents multiply, more than {MAX_SLICES} "
            f"that are solved for jointly. Use m_step={{'{name}': 'gradient'}}."
        )
    return found


def _tolerance(*tensors: Tensor) -> float:
    """Share of the largest entry that rounding explains; parameters in float32 beside data in float64 round too."""
    return 1e-9 if all(x.dtype == torch.float64 for x in tensors) else 1e-4


def _draw(leaf: Tensor, generator: torch.Generator) -> Tensor:
    return seeded_normal(leaf.shape, generator).to(leaf)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree up to a share of their largest entry."""
    if not a.numel():
        return True
    size = torch.maximum(a.abs().max(), b.abs().max())
    return bool(size < torch.inf) and bool(((a - b).abs() <= tolerance * size).all())


def _push(output: Tensor, leaf: Tensor) -> Callable[[Tensor], Tensor]:
    """Directional derivative of one argument along directions of `leaf` (double vjp, see recognise.tangents)."""

    @cache
    def pulled() -> tuple[Tensor, Tensor | None]:
        cotangent = torch.zeros_like(output, requires_grad=True)
        return cotangent, pulled_back([output], [leaf], [cotangent], graph=True)[0]

    def push(direction: Tensor) -> Tensor:
        cotangent, gradient = pulled()
        if gradient is None or not gradient.requires_grad:
            return torch.zeros_like(output).detach()
        (found,) = pulled_back([gradient], [cotangent], [direction])
        return torch.zeros_like(output).detach() if found is None else found.detach()

    return push


def _slices(shape: torch.Size) -> Iterator[list[Tensor]]:
    """0/1 masks that partition the parameter: all of it, slices along each dim, single entries."""
    yield [torch.ones(shape)]
    if len(shape) > 1:
        for dim in reversed(range(len(shape))):
            masks = []
            for i in range(shape[dim]):
                mask = torch.zeros(shape)
                mask.select(dim, i).fill_(1)
                masks.append(mask)
            yield masks
    if shape.numel() <= MAX_SLICES:
        yield [row.reshape(shape) for row in torch.eye(shape.numel())]


def _design(
    name: str,
    leaf: Tensor,
    push: Callable[[Tensor], Tensor],
    value: Tensor,
    link: PredictorLink,
    draw: Tensor,
    drawn: Tensor,
    tolerance: float,
    still: Tensor,
    exact: bool = True,
    whole: tuple[Tensor, Tensor] | None = None,
) -> list[Term] | None:
    code, expected = torch.arange(1, leaf.numel() + 1).to(leaf).reshape(leaf.shape), link.slope(value, drawn)
    # Dividing by the slope of a link leaves rounding where a tangent is 0 or constant; so do derivatives by log θ.
    rounding = 0.0 if exact and link is LINKS[0] else 1e-3 * tolerance
    for masks in _slices(leaf.shape):
        if len(masks) > MAX_SLICES:
            continue
        terms: list[Term] = []
        for mask in masks:
            mask = mask.to(leaf)
            tangents = whole if whole is not None and len(masks) == 1 else (push(mask), push(mask * code))
            one, numbers = (link.slope(value, tangent.double()) for tangent in tangents)
            term = _term(name, one, numbers, leaf.numel(), rounding, still)
            if term is None:
                break
            if bool((term.index >= 0).any()):
                terms.append(term)
        else:
            found = linear_part(terms, {name: draw}, torch.zeros_like(value))
            if close(torch.where(still, 0.0, found), expected, tolerance):
                return terms
    return None


def _term(name: str, one: Tensor, code: Tensor, numel: int, rounding: float, still: Tensor) -> Term | None:
    """In NumPy, whose calls take a third of the time of torch's: designs are many small arrays."""
    slope, numbers, fixed = _narrowed(one.detach().cpu().numpy(), code.detach().cpu().numpy(), still.cpu().numpy())
    limit = rounding * float(np.abs(slope).max())
    none = np.abs(slope) <= limit
    with np.errstate(all="ignore"):
        ratio = np.where(none, 0.0, numbers / np.where(none, 1.0, slope))
        nearest = np.rint(ratio)
        index = nearest.astype(np.int64) - 1
    if (np.abs(ratio - nearest) > 1e-3).any() or (index >= numel).any() or (index < -1).any():
        return None
    for dim in range(index.ndim):
        if index.shape[dim] == 1:
            continue
        first = index[(slice(None),) * dim + (slice(0, 1),)]
        if (index == first).all():
            index = first
            continue
        # An entry that is not used at a cell (a covariate of 0 there) is no reason to keep the dim.
        low = np.where(index < 0, numel, index).min(dim, keepdims=True)
        high = index.max(dim, keepdims=True)
        if ((low == high) | (high < 0)).all():
            index = high
    coefficient = _compressed(np.where(none, 0.0, slope), limit, (index < 0) | fixed)
    return Term(name, _tensor(index, one), _tensor(coefficient, one))


def _narrowed(*arrays: Array) -> list[Array]:
    """Arrays of one shape without the dims along which all of them are constant: what follows is that much shorter."""
    for dim in range(arrays[0].ndim):
        firsts = [x[(slice(None),) * dim + (slice(0, 1),)] for x in arrays]
        if all((x == first).all() for x, first in zip(arrays, firsts, strict=True)):
            arrays = tuple(firsts)
    return list(arrays)


def _tensor(x: Any, like: Tensor) -> Tensor:
    """On the device of another one; NumPy makes numbers of arrays without dims."""
    return torch.from_numpy(np.asarray(x)).to(like.device)


def compressed(x: Tensor, limit: float) -> Tensor:
    """Without the dims along which it is constant, up to `limit`."""
    return _tensor(_compressed(x.detach().cpu().numpy(), limit), x)


def _compressed(x: Array, limit: float, free: Array | None = None) -> Array:
    """The same; where it is `free` its value does not matter."""
    if free is not None and free.any():
        free = np.broadcast_to(free, x.shape)
        for dim in range(x.ndim):
            filled = np.broadcast_to(np.where(free, -np.inf, x).max(dim, keepdims=True), x.shape)
            known = np.isfinite(filled)
            x = np.where(free & known, filled, x)
            free = free & ~known
    for dim in range(x.ndim):
        first = x[(slice(None),) * dim + (slice(0, 1),)]
        if x.shape[dim] > 1 and (np.abs(x - first) <= limit).all():
            x = first
    return x
