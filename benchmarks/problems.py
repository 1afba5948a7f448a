"""Data and starts, the same for every contender.

Mixture data: means N(0, sep²), covariances A Aᵀ with A = I + noise, equally likely components; the start is the
true means plus noise, a common covariance 1.5 I, equal weights. Latent classes: binary items with success
probabilities U(0.1, 0.9), the start is the truth plus noise. Letters: rows N, components K, features D, items J.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models import gmm
from pyro_em.types import Params


@dataclass(frozen=True)
class Mixture:
    """`spread` is the start's covariance (K, D, D), or its variance (K, D) for a diagonal model."""

    data: Tensor  # (N, D)
    weights: Tensor  # (K,)
    loc: Tensor  # (K, D)
    spread: Tensor

    @property
    def diagonal(self) -> bool:
        """Whether features are independent within a component."""
        return self.spread.dim() == 2

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.weights)

    @property
    def start(self) -> Params:
        """For the models of models/gmm.py."""
        own = {"scale": self.spread.sqrt()} if self.diagonal else {"covariance": self.spread}
        return {"weights": self.weights, "loc": self.loc, **own}


@dataclass(frozen=True)
class LatentClasses:
    """Binary items. `success` (K, J) is the start's probability of a 1."""

    data: Tensor  # (N, J), integers
    weights: Tensor  # (K,)
    success: Tensor  # (K, J)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.weights)

    @property
    def start(self) -> Params:
        """For `models.lca.model`: probs (K, J, 2)."""
        return {"weights": self.weights, "probs": torch.stack([1 - self.success, self.success], -1)}


@dataclass(frozen=True)
class ItemResponse:
    """Answers (N, J) of people, 0 or 1, and the number of nodes of the abilities."""

    data: Tensor
    num_nodes: int

    def work(self) -> dict[str, int]:
        """Two products of the answers and a one with the nodes, and a softmax over the nodes."""
        rows, items = self.data.shape
        return {"flops": 4 * rows * self.num_nodes * (1 + items), "exps": rows * self.num_nodes}


@dataclass(frozen=True)
class MixedLogit:
    """Trials (G, n) of groups, their covariates (G, n, P), and the number of nodes of each intercept."""

    y: Tensor
    x: Tensor
    num_nodes: int

    def work(self) -> dict[str, int]:
        """An exponential of every row and node in the E-step and in two steps of Newton's method."""
        cells = self.y.numel() * self.num_nodes
        return {"flops": 12 * cells + 4 * self.x.numel() * self.x.shape[-1], "exps": 3 * cells}


def mixture(
    num_rows: int, num_components: int, num_features: int, *, diagonal: bool = False, sep: float = 2.0
) -> Mixture:
    """Simulated rows of a mixture of Gaussians and a start not far from the truth."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_components, num_features)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    loc, eye = sep * normal(*shape), torch.eye(num_features, dtype=torch.float64)
    factor = eye + 0.5 * num_features**-0.5 * normal(*shape, num_features)
    z = torch.randint(num_components, (num_rows,), generator=generator)
    data = torch.empty(num_rows, num_features, dtype=torch.float64)
    for k in range(num_components):
        rows = (z == k).nonzero().squeeze(1)
        data[rows] = loc[k] + normal(len(rows), num_features) @ factor[k].T
    return Mixture(
        data=data,
        weights=torch.full((num_components,), 1 / num_components, dtype=torch.float64),
        loc=loc + 0.5 * normal(*shape),
        spread=torch.full(shape, 1.5, dtype=torch.float64) if diagonal else (1.5 * eye).repeat(num_components, 1, 1),
    )


def iris() -> Mixture:
    """Fisher's irises (150, 4), three components; means of the slices of the data, their pooled covariance."""
    return _sliced(gmm.load_iris(), 3)


def old_faithful() -> Mixture:
    """Old Faithful (272, 2), two components."""
    return _sliced(gmm.load(), 2)


def _sliced(data: Tensor, num_components: int) -> Mixture:
    """Rows in the order of the feature of greatest variance, cut into equal slices."""
    order = data[:, data.var(0).argmax()].argsort()
    slices = [data[rows] for rows in order.tensor_split(num_components)]
    within = torch.cat([rows - rows.mean(0) for rows in slices])
    return Mixture(
        data=data,
        weights=torch.full((num_components,), 1 / num_components, dtype=torch.float64),
        loc=torch.stack([rows.mean(0) for rows in slices]),
        spread=(within.T @ within / len(data)).repeat(num_components, 1, 1),
    )


def latent_classes(num_rows: int, num_items: int, num_classes: int) -> LatentClasses:
    """Simulated answers and a start not far from the truth."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_classes, num_items)
    success = 0.1 + 0.8 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    z = torch.randint(num_classes, (num_rows,), generator=generator)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return LatentClasses(
        data=torch.bernoulli(success[z], generator=generator).long(),
        weights=torch.full((num_classes,), 1 / num_classes, dtype=torch.float64),
        success=(success + 0.15 * noise).clamp(0.05, 0.95),
    )


@dataclass(frozen=True)
class LinearSystems:
    """Series (S, T, P), and a start of F (D, D), H (D, P), Q and R."""

    data: Tensor
    start: Params

    @property
    def num_states(self) -> int:
        return len(self.start["F"])

    def work(self) -> dict[str, int]:
        """Filtered, predicted and smoothed means, innovations, and the second moments of one update."""
        steps, D, P = self.data[..., 0].numel(), self.num_states, self.data.shape[-1]
        return {"flops": 2 * steps * (3 * D * D + 3 * D * P + (2 * D) ** 2 + (D + P) ** 2), "exps": 0}


@dataclass(frozen=True)
class Regressions:
    """Response (N,), covariates (N, P) without the constant, and a start."""

    y: Tensor
    x: Tensor
    poisson: bool
    start: Params

    @property
    def num_components(self) -> int:
        return len(self.start["weights"])

    def work(self) -> dict[str, int]:
        """Predictors and Gram matrices of one update; as many exponentials as a softmax needs."""
        rows, width = len(self.y), self.x.shape[1] + 1
        size = self.num_components
        return {"flops": 2 * rows * size * width * (width + 2), "exps": rows * size * (2 if self.poisson else 1)}
