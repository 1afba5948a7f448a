"""Gauss-Hermite rules for a latent vector of few dimensions, product form.

    ∫ exp f(z) dz ≈ Σ_q exp(f(m + √2 L x_q) + v_q) |L|,     v_q = Σ_d (log w_qd + x_qd²) + (k/2) log 2

with x, w the nodes and weights for exp(-x²). With m the mode of f and LLᵀ the inverse of its negative Hessian there
(Naylor & Smith 1982; Liu & Pierce 1994) the rule is exact for a Gaussian, and its error for a smooth f falls
geometrically with the number of nodes.

Letters: k dimensions, Q nodes in all (num_nodes to the power k).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import InputError

MAX_DIMENSIONS, MAX_PRODUCT = 4, 20_000  # of one element, and nodes in all
MAX_NODES = 200  # in one dimension: beyond, the outermost weights underflow


@dataclass(frozen=True)
class Quadrature:
    """Integrate a continuous latent numerically: `fit(..., e_step={"site": Quadrature(num_nodes=21)})`.

    For low-dimensional latents whose posterior is not Gaussian (item response models, generalised linear mixed
    models). The nodes are centred and scaled at each posterior mode, anew at every E-step. The log-likelihood is that
    of the rule; its error is estimated by doubling the nodes, and a fit whose error exceeds the tolerance is refused.

    :param num_nodes: nodes in each dimension.
    :param adaptive: nodes of their own for every element. False: all elements share equally spaced nodes over 8
        standard deviations to either side of a prior that is fixed (a standard normal ability), which are then
        enumerated like the states of a discrete latent: many times faster where the data are many and their
        posteriors wide. It takes about 8 nodes for each posterior standard deviation in a prior one, 61 or more.
    :param tolerance: largest error of the log-likelihood, relative to 1 + |log-likelihood|.
    :raises InputError: if either cannot be.

    >>> nodes, log_weights = Quadrature(num_nodes=3).product(2)
    >>> nodes.shape
    torch.Size([9, 2])
    """

    num_nodes: int = 21
    tolerance: float = 1e-6
    adaptive: bool = True

    def __post_init__(self) -> None:
        n = self.num_nodes
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_NODES:
            raise InputError(f"Quadrature: num_nodes must be an integer from 1 to {MAX_NODES}, not {n!r}.")
        if not isinstance(self.adaptive, bool) or (not self.adaptive and n < 2):
            raise InputError("Quadrature: adaptive is True or False, and a fixed grid has at least 2 nodes.")
        if not (isinstance(self.tolerance, int | float) and 0 < self.tolerance < math.inf):
            raise InputError(f"Quadrature: tolerance must be a positive number, not {self.tolerance!r}.")

    def doubled(self) -> Quadrature:
        """The rule with 2n + 1 nodes, for the error estimate."""
        return Quadrature(min(2 * self.num_nodes + 1, MAX_NODES + 1 - self.num_nodes % 2), self.tolerance)

    def product(self, dimensions: int) -> tuple[Tensor, Tensor]:
        """√2 x (Q, k) and v (Q,)."""
        x, w = np.polynomial.hermite.hermgauss(self.num_nodes)
        one = torch.tensor(np.log(w) + x * x)
        nodes = torch.tensor(list(itertools.product(x.tolist(), repeat=dimensions)), dtype=torch.float64)
        logs = torch.tensor(list(itertools.product(one.tolist(), repeat=dimensions)), dtype=torch.float64).sum(-1)
        return math.sqrt(2) * nodes, logs + 0.5 * dimensions * math.log(2)
