"""Variances of random effects, and of noises of state-space models, whose maximum-likelihood estimate is 0.

EM only ever comes near it: an update multiplies such a variance by a factor that tends to 1, so that a fit ends a
little above 0, where the score is small. Whether 0 itself is better is a question that the engine can answer, if its
E-step allows it, or at a thousandth of the estimate:

    log p(x | θ with the variance at 0)  ≥  log p(x | θ)

Asked entry by entry of scales and variances; of a covariance matrix, or of its Cholesky factor, for the covariance's
smallest eigenvalue (a correlation of ±1 in two dimensions).

A likelihood that is the same with the entry many times as large does not depend on it (the spread of effects that no
data read): that is another thing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.types import Params

MATRICES = ("covariance_matrix", "scale_tril")
MAX_ENTRIES = 32  # of one parameter that are asked for
EPS = torch.finfo(torch.float64).eps
NEXT_TO_NOTHING = 1e-3  # of a scale: a variance of 0 has no density in the model itself
LARGER = (1e3, 1e8)  # times the estimate: one that has come close to 0 needs much to be seen


@runtime_checkable
class WithSpreads(Protocol):
    """An engine that says which spreads vanish."""

    def vanishing(self, params: Params) -> dict[str, bool]:
        """Names of parameters, and whether the likelihood depends on what is better at 0."""
        ...


def vanishing(
    problem: Problem, params: Params, evidence: Callable[[Params], tuple[float, float]], least: float = 0.0
) -> dict[str, bool]:
    """Parameters of which some entry (or eigenvalue) is better at 0, priors not counted, and whether it matters at all.

    :param evidence: log p(x|θ) and the magnitude of its terms.
    :param least: the share of an entry that stands for 0.
    """
    uses = {name: [use for use in problem.uses[name] if use.slot != VALUE] for name in params}
    spreads = {name: own for name, own in uses.items() if all(_is_spread(use, problem) for use in own)}
    spreads = {name: own for name, own in spreads.items() if any(_is_of_many(use, problem) for use in own)}
    if not spreads:
        return {}
    likelihood, magnitude = evidence(params)
    found = {}
    for name, own in spreads.items():

        def gain(share: float, i: int, name: str = name, use: Use = own[0]) -> float:
            """Of the log-likelihood, in units of its rounding."""
            there, size = evidence({**params, name: _with_share(params[name], use, share, i)})
            return (there - likelihood) / (8 * EPS * (1 + max(magnitude, size)))

        at_zero = {i: gain(least, i) for i in range(_entries(params[name], own[0]))}
        gone = [i for i, more in at_zero.items() if more >= -1]
        if gone:
            found[name] = not all(abs(more) <= 1 for i in gone for more in (at_zero[i], *(gain(v, i) for v in LARGER)))
    return found


def _is_spread(use: Use, problem: Problem) -> bool:
    """The use is the scale of continuous latents, or their variance; or a noise of a site with latents inside."""
    if use.index is None or use.power <= 0 or use.exponential:
        return False
    kind, family, continuous = use.slot.rpartition(".")[2], problem.family(use.site), problem.continuous
    if kind not in ("scale", *MATRICES):
        return False
    inside = family is not None and family.integrates
    return inside or (continuous is not None and use.site in continuous.names)


def _is_of_many(use: Use, problem: Problem) -> bool:
    """The spread is not that of the first state of a chain alone, of which there is one value a sequence."""
    family = problem.family(use.site)
    return family is None or not family.integrates or family.is_noise(use.slot)


def _entries(value: Tensor, use: Use) -> int:
    """How many numbers are asked about: of a matrix one, its smallest eigenvalue."""
    if use.slot.rpartition(".")[2] in MATRICES and value.dim() == 2:
        return 1
    return value.numel() if value.numel() <= MAX_ENTRIES else 0


def _with_share(value: Tensor, use: Use, share: float, i: int) -> Tensor:
    """The value with that many times its i-th entry, or smallest eigenvalue."""
    value = value.detach().double()
    if use.slot.rpartition(".")[2] in MATRICES and value.dim() == 2:
        factor = use.slot.endswith("scale_tril")
        values, vectors = torch.linalg.eigh(value @ value.mT if factor else value)
        values[0] = share * values[0]
        if factor:
            upper = torch.linalg.qr((vectors * values.clamp(min=0).sqrt()).mT).R
            return (upper * torch.where(upper.diagonal() < 0, -1.0, 1.0).unsqueeze(-1)).mT
        return (vectors * values) @ vectors.mT
    own = value.clone().reshape(-1)
    own[i] = share * own[i]
    return own.reshape(value.shape)
