"""What a Gaussian route takes for granted, certified: normal sites with constant noise, affine in the latents.

The residual w (residuals.py) of every site that reads a set of latents must be affine in them. Of two values z and z'

    w(z') = w(z) + w'(z) (z' - z),

the tangent w' being the model's own: of random values that holds for no other w. Both runs are there in any case.

Refused: sites that read latents and are not normal, residuals that are not affine in the latents, scales that
depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.derivatives import pulled_back
from pyro_em.device import seeded_normal
from pyro_em.errors import Refusal
from pyro_em.evidence.columns import push
from pyro_em.evidence.elimination import Candidate, Values
from pyro_em.evidence.residuals import is_normal, whitened
from pyro_em.evidence.rule import MAX_DIMENSIONS
from pyro_em.model.trace import SiteRecord

AFFINE = 1e-7  # relative deviation from an affine residual that rounding explains
ROUNDING = 1e-10  # the same, of the residual itself, where its data are far larger than what the latents move
AFFINE_SINGLE = 1e-3  # both, of latents in float32

Parts = Sequence[tuple[Tensor, Tensor]]
"""Residuals and log-normalisers of all factors, as `whitened` gives them."""


def normal_parts(candidate: Candidate) -> tuple[tuple[Parts, Parts], tuple[Parts, Parts]]:
    """The factors' residuals at both points, with gradients to the latents' leaves, and those at the other values.

    :raises Refusal: see the module docstring.
    """
    names = candidate.latents.factors
    found: list[Parts] = []
    others: list[Parts] = []
    for i, run in enumerate((candidate.first, candidate.second)):
        for name in names:
            _check_normal(run.sites[name], candidate)
        parts = [whitened(run.sites[name]) for name in names]
        _check_scales(names, [p[1] for p in parts], candidate.leaves[i])
        others.append([whitened(candidate.others[i][1].sites[name]) for name in names])
        _check_affine(candidate, i, [p[0] for p in parts], [p[0] for p in others[i]])
        found.append(parts)
    return (found[0], found[1]), (others[0], others[1])


def deviates(found: Tensor, predicted: Tensor, moved: float, single: bool) -> bool | None:
    """Whether a residual is not the one that its tangents predict; None if one of them is not finite.

    :param moved: by how much the latents have moved it at most.
    :param single: latents are in float32.
    """
    size = 1.0 + float(torch.maximum(found.abs().max(), predicted.abs().max())) if found.numel() else 1.0
    difference = float((found - predicted).abs().max()) if found.numel() else 0.0
    if not (size < torch.inf and difference < torch.inf):
        return None
    bound = AFFINE_SINGLE * (size + moved) if single else AFFINE * moved + ROUNDING * size
    return difference > bound


def not_affine(site: str, latent: str, numerically: str = "") -> Refusal:
    """The refusal of a site that is not linear in a latent."""
    return Refusal(
        site,
        f"its location is not an affine function of the Gaussian latent '{latent}' (a nonlinearity such as tanh, exp, "
        "abs or where, or a product of latents), so the posterior is not Gaussian.",
        f"make it linear, or use {numerically}algorithm='svi' with a guide.",
    )


def _check_normal(site: SiteRecord, candidate: Candidate) -> None:
    if is_normal(site):
        return
    family = type(site.fn).__name__ if site.family is None else type(site.family).distribution.__name__
    latents = ", ".join(repr(name) for name in candidate.latents.names)
    if site.name in candidate.latents.names:
        others = ", ".join(repr(name) for name in candidate.latents.names if name != site.name)
        met = f" (it meets {others} in one density)" if others else ""
        raise Refusal(
            site.name,
            f"the latent is {family}, whose density is not Gaussian, so that its posterior is not{met}.",
            "give it a normal prior, use e_step=pyro_em.Quadrature if it is of low dimension and its density smooth, "
            "make it a parameter by roles=, or use algorithm='svi' with a guide for it.",
        )
    if family == "Unit":
        raise Refusal(
            site.name,
            f"this factor depends on the Gaussian latents {latents}, and of factors it is not found whether they are "
            "quadratic.",
            "write it as a normal site (-½(z - m)²/v is Normal(z, v.sqrt()) with obs=m, but for a constant), "
            f"or use {_numerically(candidate)}algorithm='svi' with a guide for them.",
        )
    raise Refusal(
        site.name,
        f"its {family} density is not quadratic in the Gaussian latents {latents} that it reads.",
        f"use {_numerically(candidate)}algorithm='svi' with a guide for them.",
    )


def _numerically(candidate: Candidate) -> str:
    """Quadrature, where it could serve: the states of a chain, say, are too many to be integrated jointly."""
    size = sum(event.numel() for _, event in candidate.latents.shapes.values())
    return "" if size > MAX_DIMENSIONS else "e_step=pyro_em.Quadrature for latents of low dimension, or "


def _check_scales(names: Sequence[str], log_norms: Sequence[Tensor], leaves: Values) -> None:
    for name, log_norm in zip(names, log_norms, strict=True):
        if not log_norm.requires_grad:
            continue
        found = pulled_back([log_norm], list(leaves.values()), [torch.ones_like(log_norm)])
        for latent, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                raise Refusal(
                    name,
                    f"its scale depends on the Gaussian latent '{latent}', so the posterior is not Gaussian.",
                    "let latents enter the location only, or use algorithm='svi' with a guide.",
                )


def _check_affine(candidate: Candidate, i: int, outputs: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Residuals at other values are those that the tangent towards these predicts.

    At the start, which the caller may have replaced, they need not be finite: then the second point alone tells.
    """
    leaves, values = candidate.leaves[i], candidate.others[i][0]
    names, moved = candidate.latents.factors, [torch.zeros_like(w).detach() for w in outputs]
    for latent, leaf in leaves.items():
        (own,) = push(outputs, leaf, [values[latent].to(leaf) - leaf.detach()], graph=False)
        moved = [a + b for a, b in zip(moved, own, strict=True)]
    single = any(leaf.dtype == torch.float32 for leaf in leaves.values())
    for name, w, step, other in zip(names, outputs, moved, others, strict=True):
        size = float(step.abs().max()) if step.numel() else 0.0
        wrong = deviates(other.detach(), w.detach() + step, size, single)
        if wrong or (wrong is None and i == 1):
            _name_latent(candidate, outputs, leaves)
            raise not_affine(name, next(iter(leaves)), _numerically(candidate))


def _name_latent(candidate: Candidate, outputs: Sequence[Tensor], leaves: Values) -> None:
    """Refuse residuals whose tangent in a random direction itself has a tangent, with the latent."""
    names = candidate.latents.factors
    generator = torch.Generator().manual_seed(1)
    ways = {n: seeded_normal(v.shape, generator) for n, v in leaves.items()}
    for i, name in enumerate(names):
        if not outputs[i].requires_grad:
            continue
        for latent, leaf in leaves.items():
            ((first,),) = push([outputs[i]], leaf, [ways[latent]], graph=True)
            if not first.requires_grad:
                continue
            scale = float(first.detach().abs().max())
            for other, inner in leaves.items():
                ((second,),) = push([first], inner, [ways[other]], graph=False)
                if float(second.abs().max()) > AFFINE * max(scale, 1e-300):
                    raise not_affine(name, latent, _numerically(candidate))
