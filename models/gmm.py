"""Mixture of Gaussians: the covariance structure is however the model writes it.

    z_n ~ Categorical(weights),    x_n | z_n = k ~ N(loc_k, Σ_k)            x (N, D), weights (K,), loc (K, D)

    model             Σ_k any covariance              covariance (K, D, D)      mclust "VVV"
    scale_tril        the same, Σ_k = L_k L_kᵀ        scale_tril (K, D, D)      "VVV"
    tied              one Σ for all components        covariance (D, D)         "EEE"
    diagonal          Σ_k = diag(scale_k²)            scale (K, D)              "VVI"
    shared_diagonal   one diagonal for all            scale (D,)                "EEI"
    spherical         Σ_k = scale_k² I                scale (K, 1)              "VII"
    shared_spherical  one scale² I for all            scale ()                  "EII"
    univariate        x (N,), Σ_k = scale_k²          scale (K,)                "V"
    bayesian          diagonal, with priors on weights, means and variances (for MAP, SVI or NUTS)

The likelihood has no finite maximum if a component may shrink onto one row; priors (`bayesian`) cure that.
The number of components is given, not chosen.

Data: Old Faithful (`load`; Azzalini and Bowman 1990) and Fisher's iris (`load_iris`); see data/README.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> Tensor:
    """Old Faithful: eruption time and waiting time, both in minutes. (272, 2)."""
    return torch.from_numpy(np.loadtxt(DATA / "faithful.csv", delimiter=",", skiprows=1))


def load_iris() -> Tensor:
    """Sepal length and width, petal length and width of 150 irises, in cm. (150, 4)."""
    return torch.from_numpy(np.loadtxt(DATA / "iris.csv", delimiter=",", skiprows=1, usecols=range(4)))


def simulate(num_rows: int = 300, num_components: int = 2, num_features: int = 2, *, seed: int = 0) -> Tensor:
    """Equally likely components of unit covariance whose means stand 5 apart on the diagonal. (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(num_components, (num_rows, 1), generator=generator)
    noise = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64)
    return 5.0 * z / num_features**0.5 + noise


def _weights(num_components: int) -> Tensor:
    start = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    return pyro.param("weights", start, constraint=constraints.simplex)


def _filled(data: Tensor) -> Tensor:
    """Float64, with the mean of the column in cells that are not finite: a start must not depend on them.

    Of many rows every n-th, ten thousand or a few more: a start needs no more.
    """
    data = data[:: max(1, len(data) // 10_000)]
    finite = data.isfinite()
    mean = data.double().where(finite, 0.0).sum(0) / finite.sum(0).clamp(min=1)
    return data.double().where(finite, mean)


def _slices(data: Tensor, num_components: int) -> tuple[Tensor, Tensor]:
    """Means (K, D) of K equal slices along the axis of greatest variance, and covariance (D, D) within them.

    Deterministic, equivariant to shifts and to a common scale, and distinct wherever the data are.
    """
    data = _filled(data)
    if len(data) < num_components:
        raise ValueError(f"{num_components} components need at least as many rows; the data have {len(data)}.")
    centred = data - data.mean(0)
    axis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    order = (data @ (axis * axis.sum().sign())).argsort()
    slices = [data[rows] for rows in order.tensor_split(num_components)]
    within = torch.cat([rows - rows.mean(0) for rows in slices])
    return torch.stack([rows.mean(0) for rows in slices]), within.T @ within / len(data)


def _loc(data: Tensor, num_components: int) -> Tensor:
    return pyro.param("loc", lambda: _slices(data, num_components)[0])


def _covariance(data: Tensor, num_components: int) -> Tensor:
    return _slices(data, num_components)[1]


def _scale(data: Tensor, num_components: int) -> Tensor:
    return _slices(data, num_components)[1].diagonal().sqrt()


def model(data: Tensor, num_components: int = 2) -> None:
    """Each component has a covariance of its own."""
    weights, loc = _weights(num_components), _loc(data, num_components)
    covariance = pyro.param(
        "covariance",
        lambda: _covariance(data, num_components).repeat(num_components, 1, 1),
        constraint=constraints.positive_definite,
    )
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], covariance_matrix=covariance[z]), obs=data)


def scale_tril(data: Tensor, num_components: int = 2) -> None:
    """`model` in terms of the Cholesky factors of the covariances."""
    weights, loc = _weights(num_components), _loc(data, num_components)
    tril = pyro.param(
        "scale_tril",
        lambda: torch.linalg.cholesky(_covariance(data, num_components)).repeat(num_components, 1, 1),
        constraint=constraints.lower_cholesky,
    )
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=tril[z]), obs=data)


def tied(data: Tensor, num_components: int = 2) -> None:
    """All components share one covariance."""
    weights, loc = _weights(num_components), _loc(data, num_components)
    covariance = pyro.param(
        "covariance", lambda: _covariance(data, num_components), constraint=constraints.positive_definite
    )
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], covariance_matrix=covariance), obs=data)


def diagonal(data: Tensor, num_components: int = 2) -> None:
    """Features are independent within a component; each component has scales of its own."""
    weights, loc = _weights(num_components), _loc(data, num_components)
    scale = pyro.param(
        "scale",
        lambda: _scale(data, num_components).repeat(num_components, 1),
        constraint=constraints.positive,
    )
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=data)


def shared_diagonal(data: Tensor, num_components: int = 2) -> None:
    """Features are independent within a component; all components share the scales."""
    weights, loc = _weights(num_components), _loc(data, num_components)
    scale = pyro.param("scale", lambda: _scale(data, num_components), constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale).to_event(1), obs=data)


def spherical(data: Tensor, num_components: int = 2) -> None:
    """One scale a component, the same for all features."""
    weights, loc = _weights(num_components), _loc(data, num_components)
    # (K, 1): the last dim broadcasts over the features.
    scale = pyro.param(
        "scale",
        lambda: _scale(data, num_components).mean().repeat(num_components, 1),
        constraint=constraints.positive,
    )
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=data)


def shared_spherical(data: Tensor, num_components: int = 2) -> None:
    """One scale for everything; as it goes to 0 this becomes k-means."""
    weights, loc = _weights(num_components), _loc(data, num_components)
    scale = pyro.param("scale", lambda: _scale(data, num_components).mean(), constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale).to_event(1), obs=data)


def univariate(data: Tensor, num_components: int = 2) -> None:
    """One feature, `data` (N,): each component has a mean and a scale."""
    weights, column = _weights(num_components), data.unsqueeze(-1)
    loc = pyro.param("loc", lambda: _slices(column, num_components)[0].squeeze(-1))
    scale = pyro.param(
        "scale",
        lambda: _scale(column, num_components).repeat(num_components),
        constraint=constraints.positive,
    )
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=data)


def bayesian(data: Tensor, num_components: int = 2) -> None:
    """`diagonal` with priors: the same text serves maximum likelihood, MAP, SVI and NUTS.

    weights ~ Dirichlet(2, ..., 2);  loc_k ~ N(mean, (3 sd)²);  variance_k ~ InverseGamma(2, sd²), with mean
    and sd of each feature over all rows: weak, and equivariant to the units of the data.
    """
    mean, sd = _filled(data).mean(0), _filled(data).std(0, correction=0)
    two = torch.full_like(sd, 2.0)  # the smallest whole shape at which an InverseGamma has a mean
    weights = pyro.sample("weights", dist.Dirichlet(two.new_full((num_components,), 2.0)))
    with pyro.plate("components", num_components):
        loc = pyro.sample("loc", dist.Normal(mean, 3.0 * sd).to_event(1))
        variance = pyro.sample("variance", dist.InverseGamma(two, sd.square()).to_event(1))
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()).to_event(1), obs=data)
