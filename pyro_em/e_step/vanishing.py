"""Variances of random effects whose maximum-likelihood estimate is 0: EM only ever comes near it.

An update multiplies such a variance by a factor that tends to 1, so that a fit ends a little above 0, where the score
is small. Whether 0 itself is better is a question that the engine can answer, if its E-step allows it, or at a
thousandth of the estimate:

    log p(x | θ with the variance at 0)  ≥  log p(x | θ)

Asked entry by entry of scales and variances; of a covariance matrix, or of its Cholesky factor, for the covariance's
smallest eigenvalue (a correlation of ±1 in two dimensions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.types import Params

MATRICES = ("covariance_matrix", "scale_tril")
MAX_ENTRIES = 32  # of one parameter that are asked for


@runtime_checkable
class WithSpreads(Protocol):
    """An engine that says which spreads vanish."""

    def vanishing(self, params: Params) -> tuple[str, ...]:
        """Names of parameters."""
        ...


def vanishing(
    problem: Problem, params: Params, evidence: Callable[[Params], tuple[float, float]], least: float = 0.0
) -> tuple[str, ...]:
    """Parameters of which some entry (or eigenvalue) is better at 0, priors not counted.

    :param evidence: log p(x|θ) and the magnitude of its terms.
    :param least: the share of an entry that stands for 0.
    """
    uses = {name: [use for use in problem.uses[name] if use.slot != VALUE] for name in params}
    spreads = {name: own for name, own in uses.items() if own and all(_is_spread(use, problem) for use in own)}
    if not spreads:
        return ()
    likelihood, magnitude = evidence(params)
    least_likely = likelihood - 8 * torch.finfo(torch.float64).eps * (1 + magnitude)
    zeros = {name: _at_zero(params[name], own[0], least) for name, own in spreads.items()}
    return tuple(
        name for name, own in zeros.items() if any(evidence({**params, name: x})[0] >= least_likely for x in own)
    )


def _is_spread(use: Use, problem: Problem) -> bool:
    """The use is the scale of continuous latents, or their variance."""
    continuous = problem.continuous
    if continuous is None or use.site not in continuous.names or use.exponential:
        return False
    return use.index is not None and use.power > 0 and use.slot in ("scale", *MATRICES)


def _at_zero(value: Tensor, use: Use, least: float) -> Iterator[Tensor]:
    value = value.detach().double()
    if use.slot in MATRICES and value.dim() == 2:
        factor = use.slot == "scale_tril"
        values, vectors = torch.linalg.eigh(value @ value.mT if factor else value)
        values[0] = least * values[0]
        if factor:
            upper = torch.linalg.qr((vectors * values.clamp(min=0).sqrt()).mT).R
            yield (upper * torch.where(upper.diagonal() < 0, -1.0, 1.0).unsqueeze(-1)).mT
        else:
            yield (vectors * values) @ vectors.mT
    elif value.numel() <= MAX_ENTRIES:
        for i in range(value.numel()):
            own = value.clone().reshape(-1)
            own[i] = least * own[i]
            yield own.reshape(value.shape)
