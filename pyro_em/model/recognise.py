"""What each parameter does in the model, found by pushing tangents through it, certified at two points.

The tangent arange(1..P) of a parameter, pushed through the model to every raw distribution argument,
is the *index code* of the argument: where the argument picks entries of the parameter the tangent is the
entry's number. One double-vjp per parameter gives all codes. An argument is

    elementwise   every entry of it depends on one entry θ_i of the parameter (or on none: a fixed part);
                  certified by a random tangent, r[i] times the tangent of ones;
    power         ... and equals c·θ_i^r with c, r the same at a second point (gather: c = r = 1;
                  exposure·rate[z]: r = 1; var[z].sqrt(): r = 1/2);
    exponential   ... and equals c·exp(r·θ_i);
    canonical     its canonical coordinate picks rows of the parameter: log w, logit p (canonical.py);
    affine        a link of a linear predictor in several parameters jointly (affine.py);
    opaque        anything else (a network, a sum of products of parameters).

A parameter-role sample site is also *used* by its own prior, as its value. A site whose distribution
hides its arguments (an unknown family, a mixture, a flow) makes the parameters it depends on opaque.
What is opaque is maximised numerically, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.charts import base_constraint, chart
from pyro_em.derivatives import pulled_back
from pyro_em.device import seeded_normal
from pyro_em.families.base import Link
from pyro_em.model.affine import Drawn, Point, find_predictor
from pyro_em.model.canonical import rows_taken
from pyro_em.model.capture import ParameterRecord
from pyro_em.model.density import log_density
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.model.use import VALUE, Use, by_place

__all__ = ["VALUE", "Use", "recognise", "second_point", "tangents"]


def tangents(outputs: list[Tensor], leaf: Tensor, directions: list[Tensor]) -> list[list[Tensor]]:
    """Directional derivatives of every output along each direction of `leaf` (double vjp).

    Forward mode would miss parameters of torch modules; the vjp is linear in its cotangent, so its
    own vjp is the Jacobian-vector product.
    """
    cotangents = [torch.zeros_like(o, requires_grad=True) for o in outputs]
    zeros = [torch.zeros_like(o) for o in outputs]
    (pulled,) = pulled_back(outputs, [leaf], cotangents, graph=True)
    if pulled is None or not pulled.requires_grad:
        return [zeros for _ in directions]
    found = []
    for direction in directions:
        pushed = pulled_back([pulled], cotangents, [direction])
        found.append([z if p is None else p.detach() for p, z in zip(pushed, zeros, strict=True)])
    return found


def second_point(record: ParameterRecord, generator: torch.Generator) -> Tensor:
    """Another feasible value, away from `record.value`, drawn in free coordinates."""
    value = record.value
    own = chart(record.constraint, value)
    u = own.to_free(value)
    noise = seeded_normal(u.shape, generator).to(u)
    return own.from_free(u + 0.5 * noise).detach()


@dataclass(frozen=True)
class _Slot:
    site: str
    argument: str
    event_dim: int
    link: Link
    first: Tensor
    second: Tensor
    drawn: dict[str, Drawn] = field(default_factory=dict)  # by parameter


def recognise(
    first: Run,
    second: Run,
    parameters: Mapping[str, ParameterRecord],
    priors: frozenset[str],
    values: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> dict[str, tuple[Use, ...]]:
    """Uses of every parameter, from two runs at different feasible values (with gradients).

    :param values: of the parameters in the two runs; by default those of the runs' leaves (a torch module's own
        leaf no longer has them).
    :param priors: names of the parameters that are sample sites (their own prior uses their value).
    """
    generator = torch.Generator().manual_seed(0)
    slots = _slots(first, second)
    hidden = {name: site for name, site in first.sites.items() if site.family is None or site.arguments is None}
    at, at2 = values or (first.leaves, second.leaves)
    found: dict[str, tuple[Use, ...]] = {}
    for name in parameters:
        if (leaf := first.leaves.get(name)) is None:
            found[name] = ()
            continue
        uses = _argument_uses(name, (leaf, second.leaves[name]), (at[name], at2[name]), slots, generator)
        uses += _opaque_uses(name, leaf, first, hidden)
        if name in priors:
            uses.append(_value_use(name, first.sites[name], hidden))
        found[name] = tuple(uses)
    positive = {n for n, record in parameters.items() if _is_positive(record) and bool((at[n] > 0).all())}
    places, leaves = by_place(found), (first.leaves, second.leaves)
    better: dict[int, Use] = {}
    for slot in slots:
        own = places.get((slot.site, slot.argument), {})
        affine = _affine_uses(slot, own, leaves, (at, at2), generator, positive)
        better |= {id(own[name]): use for name, use in affine.items()}
    return {name: tuple(better.get(id(use), use) for use in uses) for name, uses in found.items()}


def _is_positive(record: ParameterRecord) -> bool:
    constraint = base_constraint(record.constraint)
    return getattr(constraint, "lower_bound", None) == 0 and not hasattr(constraint, "upper_bound")


def _affine_uses(
    slot: _Slot,
    own: Mapping[str, Use],
    leaves: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    values: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    generator: torch.Generator,
    positive: set[str],
) -> dict[str, Use]:
    """A predictor in place of the uses `own` of one argument, if it has one and some of them are opaque."""
    if all(use.index is not None for use in own.values()):
        return {}
    points = [Point(*point) for point in zip((slot.first, slot.second), leaves, values, strict=True)]
    here, names = (slot.site, slot.argument, slot.event_dim), list(own)
    predictor = find_predictor(*here, points[0], points[1], names, generator, positive, slot.drawn)
    if predictor is None:
        return {}
    return {
        name: Use(name, slot.site, slot.argument, None, reason="an affine predictor", predictor=predictor)
        for name in predictor.parameters
        if predictor.offset is not None or own[name].index is None
    }


def _slots(first: Run, second: Run) -> list[_Slot]:
    slots = []
    for name, site in first.sites.items():
        for argument, value in (site.arguments or {}).items():
            other = (second.sites[name].arguments or {})[argument]
            if value.requires_grad:
                assert site.family is not None
                family = site.family
                slots.append(_Slot(name, argument, family.arguments[argument], family.link(argument), value, other))
    return slots


def _argument_uses(
    name: str,
    leaves: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    slots: list[_Slot],
    generator: torch.Generator,
) -> list[Use]:
    if not slots:
        return []
    leaf, other = leaves
    code = torch.arange(1, leaf.numel() + 1, dtype=leaf.dtype, device=leaf.device).reshape(leaf.shape)
    ones, draw = torch.ones_like(leaf), seeded_normal(leaf.shape, generator).to(leaf)
    by_code, by_one, by_draw = tangents([s.first for s in slots], leaf, [code, ones, draw])
    (other_one, other_draw) = tangents([s.second for s in slots], other, [ones, draw])
    uses = []
    for i, slot in enumerate(slots):
        if bool((by_draw[i] != 0).any()) or bool((other_draw[i] != 0).any()):
            at = values[0].detach(), values[1].detach()
            slot.drawn[name] = Drawn(draw, (by_draw[i], other_draw[i]), (by_one[i], by_code[i]))
            use = _classify(name, slot, *at, by_code[i], by_one[i], by_draw[i], other_one[i], draw)
            pair, known = (slot.first, slot.second), use.index is not None
            index = None if known else rows_taken(slot.link, slot.event_dim, pair, at)
            uses.append(use if index is None else Use(name, slot.site, slot.argument, index, link=slot.link))
    return uses


def _classify(
    name: str,
    slot: _Slot,
    theta: Tensor,
    theta2: Tensor,
    by_code: Tensor,
    by_one: Tensor,
    by_draw: Tensor,
    by_one2: Tensor,
    draw: Tensor,
) -> Use:
    def opaque(reason: str) -> Use:
        return Use(name, slot.site, slot.argument, None, reason=reason)

    value, value2 = slot.first.detach(), slot.second.detach()
    tolerance = 1e-9 if theta.dtype == torch.float64 else 1e-4
    fixed = by_one == 0
    ratio = torch.where(fixed, torch.zeros_like(by_one), by_code / torch.where(fixed, torch.ones_like(by_one), by_one))
    index = ratio.round().long() - 1
    index = torch.where(fixed, torch.full_like(index, -1), index)
    if bool(((ratio - ratio.round()).abs() > 1e-6).any()) or bool((index >= theta.numel()).any()):
        return opaque("the argument mixes entries of the parameter")
    pick = index.clamp(min=0)
    expected = torch.where(fixed, torch.zeros_like(by_one), by_one * draw.reshape(-1)[pick])
    if not torch.allclose(by_draw, expected, rtol=tolerance, atol=tolerance * float(by_one.abs().max())):
        return opaque("the argument mixes entries of the parameter")
    if bool(((by_one2 == 0) != fixed).any()):
        return opaque("which entries the argument uses changes with the parameter")
    theta, theta2 = theta.reshape(-1)[pick], theta2.reshape(-1)[pick]
    moving = ~fixed
    if torch.equal(value[moving], theta[moving]) and torch.equal(value2[moving], theta2[moving]):
        return Use(name, slot.site, slot.argument, index)
    for exponential in (False, True):
        found = _link(value, value2, theta, theta2, by_one, by_one2, moving, tolerance, exponential)
        if found is not None:
            coefficient, power = found
            return Use(name, slot.site, slot.argument, index, coefficient, power, exponential)
    return opaque("a nonlinear or affine function of one entry of the parameter")


def _link(
    value: Tensor,
    value2: Tensor,
    theta: Tensor,
    theta2: Tensor,
    slope: Tensor,
    slope2: Tensor,
    moving: Tensor,
    tolerance: float,
    exponential: bool,
) -> tuple[Tensor, float] | None:
    """c and r of value = c·θ^r (or c·exp(rθ)) if they are the same at both points, else None."""
    v, v2, t, t2, s, s2 = (x[moving] for x in (value, value2, theta, theta2, slope, slope2))
    if bool((v == 0).any()) or bool((v2 == 0).any()):
        return None
    if exponential:
        rate, rate2 = s / v, s2 / v2
        base, base2 = t.exp(), t2.exp()
    else:
        rate, rate2 = s * t / v, s2 * t2 / v2
        base, base2 = t, t2
    power = round(float(rate.reshape(-1)[0]) * 12) / 12  # halves, thirds, quarters and whole powers
    if power == 0 or not all(
        torch.allclose(x, torch.full_like(x, power), rtol=tolerance, atol=tolerance) for x in (rate, rate2)
    ):
        return None
    if power != int(power) and (bool((base <= 0).any()) or bool((base2 <= 0).any())):
        return None
    full = same_link(value, value2, theta, theta2, moving, power, exponential, tolerance)
    return None if full is None else (full, power)


def same_link(
    value: Tensor,
    value2: Tensor,
    theta: Tensor,
    theta2: Tensor,
    moving: Tensor,
    power: float,
    exponential: bool,
    tolerance: float,
) -> Tensor | None:
    """c of value = c·θ^r (or c·exp(rθ)), 1 where nothing moves; None if it is another one at the second point."""
    v, v2, t, t2 = (x[moving] for x in (value, value2, theta, theta2))
    base, base2 = (t.exp(), t2.exp()) if exponential else (t, t2)
    coefficient, coefficient2 = v / base**power, v2 / base2**power
    if not torch.allclose(coefficient, coefficient2, rtol=tolerance, atol=0):
        return None
    full = torch.ones_like(value)
    full[moving] = coefficient
    return full


def _opaque_uses(name: str, leaf: Tensor, run: Run, hidden: Mapping[str, SiteRecord]) -> list[Use]:
    """Uses that no argument explains: by unknown families, or through observed values."""
    uses = []
    for site_name, site in run.sites.items():
        if site_name == name:
            continue
        reason = (
            f"{type(site.fn).__name__} hides its arguments"
            if site_name in hidden
            else "the observed value depends on it"
        )
        density = log_density(site) if site_name in hidden else site.value
        if density.requires_grad and density.is_floating_point() and (site_name in hidden or site.observed):
            (gradient,) = pulled_back([density], [leaf], [torch.ones_like(density)])
            if gradient is not None:
                uses.append(Use(name, site_name, VALUE, None, reason=reason))
    return uses


def _value_use(name: str, site: SiteRecord, hidden: Mapping[str, SiteRecord]) -> Use:
    if name in hidden:
        return Use(name, name, VALUE, None, reason=f"no conjugate form is known for {type(site.fn).__name__}")
    index = torch.arange(site.value.numel()).reshape(site.value.shape)
    return Use(name, name, VALUE, index)
