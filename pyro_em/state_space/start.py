"""Which starts of chains are open, so that data determine them and not a prior: flat ones, and wide normal ones.

A filter that takes away nearly all of a wide variance keeps few digits of what is left, and of a flat density there is
no variance: the first steps of such a chain are filtered in another way (head.py). Also how an operation to torch tells
what was wrong. Shapes: as `Chain`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.state_space.linear_gaussian import Chain
from pyro_em.state_space.steps import SingularInnovation

WIDE = 1e3  # times the variance that noises give an observation: a start's is wide
FINE, UNDETERMINED = -1, -2  # what an operation to torch tells instead of raising


class Undetermined(ArithmeticError):
    """The data do not determine a flat start."""


def status_of(error: SingularInnovation | Undetermined) -> int:
    """The step without a density, or `UNDETERMINED`."""
    return error.step if isinstance(error, SingularInnovation) else UNDETERMINED


def raise_unless_fine(status: int) -> None:
    """The inverse of `status_of`."""
    if status == UNDETERMINED:
        raise Undetermined
    if status != FINE:
        raise SingularInnovation(status)


def is_open(chain: Chain) -> bool:
    """Whether the start is flat in some direction, or wide."""
    return chain.flat is not None or is_wide(chain)


def is_wide(chain: Chain) -> bool:
    """Whether what the start says of the first observations is nothing beside what they say themselves."""
    if chain.num_steps == 1:
        return False
    with torch.no_grad():
        size, R = chain.covariance.diagonal(dim1=-2, dim2=-1), chain.R[:, 0]
        least = R.diagonal(dim1=-2, dim2=-1).min()
        if bool(size.max() <= WIDE * least) or bool(torch.linalg.cholesky_ex(R)[1].any()):
            return False
        if bool(torch.linalg.cholesky_ex(filled(chain.covariance))[1].any()):
            return False
        A, Q, C = chain.A[:, 0], chain.Q[:, 0], chain.C[:, -1]
        noise = (R + C @ Q @ C.mT).diagonal(dim1=-2, dim2=-1)
        for _ in range(chain.A.shape[-1]):
            seen = (C @ chain.covariance @ C.mT).diagonal(dim1=-2, dim2=-1)
            if bool((seen > WIDE * noise).any()):
                return True
            C = C @ A
    return False


def filled(covariance: Tensor) -> Tensor:
    """With ones in the place of zero variances."""
    return covariance + torch.diag_embed((covariance.diagonal(dim1=-2, dim2=-1) == 0).to(covariance.dtype))
