"""The table of state-space models for the laws; their oracle is in state_space.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from tests.classics import positive
from tests.state_space import Case, Dense

definite = constraints.positive_definite


def _simulated(seed: int, S: int, T: int, F: Any, H: Any, q: float, r: float) -> Tensor:
    rng = np.random.default_rng(seed)
    F, H = np.asarray(F, dtype=float), np.broadcast_to(np.asarray(H, dtype=float), (T, *np.shape(H)[-2:]))
    z = rng.normal(size=(S, len(F)))
    steps = []
    for t in range(T):
        z = z @ F + q * rng.normal(size=z.shape)
        steps.append(z @ H[t] + r * rng.normal(size=(S, H.shape[2])))
    return torch.as_tensor(np.stack(steps, 1))


def _gaussian_hmm(y: Tensor, *arguments: Any, family: Any = dist.GaussianHMM) -> None:
    """S sequences in a plate, or the only one outside of any."""
    fn = family(*arguments, duration=y.shape[-2])
    if len(y) == 1:
        pyro.sample("y", fn, obs=y[0])
    else:
        with pyro.plate("sequences", len(y)):
            pyro.sample("y", fn, obs=y)


def full(y: Tensor) -> None:
    """Every matrix is free."""
    F, H = pyro.param("F", 0.5 * torch.eye(2)), pyro.param("H", torch.ones(2, 3))
    Q, R = pyro.param("Q", torch.eye(2), constraint=definite), pyro.param("R", torch.eye(3), constraint=definite)
    m, P = pyro.param("m", torch.zeros(2)), pyro.param("P", torch.eye(2), constraint=definite)
    noise, zero = dist.MultivariateNormal, torch.zeros
    _gaussian_hmm(y, noise(m, P), F, noise(zero(2), Q), H, noise(zero(3), R))


def offsets(y: Tensor) -> None:
    """Offsets of states and observations; a Cholesky factor and a precision."""
    F, H = pyro.param("F", torch.tensor([[0.6, 0.1], [0.0, 0.5]])), torch.tensor([[1.0, 0.0, 0.5], [0.3, 1.0, 0.0]])
    b, d = pyro.param("b", torch.zeros(2)), pyro.param("d", torch.zeros(3))
    L = pyro.param("L", torch.eye(2), constraint=constraints.lower_cholesky)
    W = pyro.param("W", torch.eye(3), constraint=definite)
    start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    noise = dist.MultivariateNormal
    _gaussian_hmm(y, start, F, noise(b, scale_tril=L), H, noise(d, precision_matrix=W))


def trend(y: Tensor) -> None:
    """Local linear trend: known matrices, three variances."""
    q = pyro.param("q", torch.tensor([1.0, 0.5]), constraint=positive)
    r = pyro.param("r", torch.tensor(1.0), constraint=positive)
    F, H = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
    start = dist.MultivariateNormal(torch.zeros(2), 10 * torch.eye(2))
    noise = dist.Normal(0.0, r).expand([1]).to_event(1)
    _gaussian_hmm(y, start, F, dist.Normal(torch.zeros(2), q).to_event(1), H, noise)


def autoregression(y: Tensor) -> None:
    """AR(2) with measurement noise in companion form: one row of the matrix is free, one state has no noise."""
    phi = pyro.param("phi", torch.tensor([0.4, 0.1]))
    s = pyro.param("s", torch.tensor(1.0), constraint=positive)
    F = torch.stack([phi, torch.tensor([1.0, 0.0])], 1)
    scale = torch.stack([s, torch.zeros(())])
    start = dist.MultivariateNormal(torch.zeros(2), 2 * torch.eye(2))
    move = dist.Normal(torch.zeros(2), scale, validate_args=False).to_event(1)
    noise = dist.Normal(torch.zeros(1), 0.5).to_event(1)
    _gaussian_hmm(y, start, F, move, torch.tensor([[1.0], [0.0]]), noise, family=dist.LinearHMM)


def tied(y: Tensor) -> None:
    """A damped rotation a·I + b·J of which each number fills two entries, one scale for both states."""
    a, r = pyro.param("a", torch.tensor(0.5)), pyro.param("r", torch.tensor(0.8), constraint=positive)
    q = pyro.param("q", torch.tensor(0.9), constraint=positive)
    F = a * torch.eye(2) + torch.tensor([[0.0, 0.3], [-0.3, 0.0]])
    H = torch.tensor([[1.0, 0.0, 0.5], [0.3, 1.0, 0.0]])
    noise = dist.Normal
    start = noise(torch.zeros(2), 1.0).to_event(1)
    _gaussian_hmm(y, start, F, noise(torch.zeros(2), q).to_event(1), H, noise(torch.zeros(3), r).to_event(1))


def regression(y: Tensor) -> None:
    """Coefficients that wander: the observation matrix is the covariates of each step."""
    q = pyro.param("q", torch.tensor([0.5, 0.5]), constraint=positive)
    r = pyro.param("r", torch.tensor(1.0), constraint=positive)
    start = dist.MultivariateNormal(torch.zeros(2), 4 * torch.eye(2))
    noise = dist.Normal(torch.zeros(1), r).to_event(1)
    _gaussian_hmm(y, start, torch.eye(2), dist.Normal(torch.zeros(2), q).to_event(1), _covariates(y.shape[1]), noise)


def _covariates(T: int) -> Tensor:
    return torch.stack([torch.ones(T), torch.sin(torch.arange(T, dtype=torch.float64))], -1).unsqueeze(-1)


def prior(y: Tensor) -> None:
    """Local level with inverse gamma priors on both variances."""
    q = pyro.sample("q", dist.InverseGamma(3.0, 2.0))
    r = pyro.sample("r", dist.InverseGamma(2.0, 1.0))
    start = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
    move, noise = (dist.Normal(torch.zeros(1), v.sqrt().unsqueeze(-1)).to_event(1) for v in (q, r))
    _gaussian_hmm(y, start, torch.eye(1), move, torch.eye(1), noise)


def _t(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _build() -> list[Case]:
    F, H = [[0.8, 0.2], [-0.2, 0.7]], [[1.0, 0.0, 0.5], [0.3, 1.0, 0.0]]
    three = _simulated(1, 3, 6, F, H, 0.5, 0.7)
    eye, z = torch.eye, torch.zeros

    def dense(y: Tensor, *arguments: Any) -> Dense:
        return Dense.of(y.shape[1], *arguments)

    one = _simulated(2, 1, 12, [[1.0, 0.0], [1.0, 1.0]], [[1.0], [0.0]], 0.4, 0.8)
    ar = _simulated(3, 2, 9, [[0.6, 1.0], [0.2, 0.0]], [[1.0], [0.0]], 0.7, 0.5)
    level = _simulated(4, 2, 7, [[1.0]], [[1.0]], 0.6, 0.9)
    jay = _t([[0.0, 0.3], [-0.3, 0.0]])
    covariates = _covariates(14)
    wander = _simulated(6, 1, 14, eye(2).tolist(), covariates, 0.8, 0.6)

    def log_inverse_gamma(x: Tensor, a: float, b: float) -> Tensor:
        return dist.InverseGamma(a, b).log_prob(x)

    return [
        Case(
            "full",
            full,
            three,
            {"F": _t(F) + 0.1, "H": _t(H) - 0.2, "Q": eye(2), "R": eye(3), "m": z(2), "P": eye(2)},
            lambda p: dense(three, p["m"], p["P"], p["F"], z(2), p["Q"], p["H"], z(3), p["R"]),
            {"Q": definite, "R": definite, "P": definite},
        ),
        Case(
            "offsets",
            offsets,
            three + _t([5.0, -3.0, 1.0]),
            {"F": _t(F), "b": z(2), "d": z(3), "L": eye(2), "W": eye(3)},
            lambda p: dense(
                three, z(2), eye(2), p["F"], p["b"], p["L"] @ p["L"].mT, _t(H), p["d"], torch.linalg.inv(p["W"])
            ),
            {"L": constraints.lower_cholesky, "W": definite},
        ),
        Case(
            "trend",
            trend,
            one,
            {"q": _t([1.0, 0.5]), "r": _t(1.0)},
            lambda p: dense(
                one, z(2), 10 * eye(2), _t([[1.0, 0.0], [1.0, 1.0]]), z(2), torch.diag(p["q"] ** 2),
                _t([[1.0], [0.0]]), z(1), p["r"] ** 2 * eye(1),
            ),
            {"q": positive, "r": positive},
        ),
        Case(
            "autoregression",
            autoregression,
            ar,
            {"phi": _t([0.4, 0.1]), "s": _t(1.0)},
            lambda p: dense(
                ar, z(2), 2 * eye(2), torch.stack([p["phi"], _t([1.0, 0.0])], 1), z(2),
                torch.diag(torch.stack([p["s"] ** 2, z(())])), _t([[1.0], [0.0]]), z(1), 0.25 * eye(1),
            ),
            {"s": positive},
            copies=True,
            attained=True,
        ),
        Case(
            "tied",
            tied,
            three,
            {"a": _t(0.5), "q": _t(0.9), "r": _t(0.8)},
            lambda p: dense(
                three, z(2), eye(2), p["a"] * eye(2) + jay, z(2), p["q"] ** 2 * eye(2), _t(H), z(3),
                p["r"] ** 2 * eye(3),
            ),
            {"q": positive, "r": positive},
            attained=True,
        ),
        Case(
            "regression",
            regression,
            wander,
            {"q": _t([0.5, 0.5]), "r": _t(1.0)},
            lambda p: dense(
                wander, z(2), 4 * eye(2), eye(2), z(2), torch.diag(p["q"] ** 2), covariates, z(1), p["r"] ** 2 * eye(1)
            ),
            {"q": positive, "r": positive},
        ),
        Case(
            "prior",
            prior,
            level,
            {"q": _t(0.8), "r": _t(0.6)},
            lambda p: dense(level, z(1), eye(1), eye(1), z(1), p["q"] * eye(1), eye(1), z(1), p["r"] * eye(1)),
            {"q": positive, "r": positive},
            lambda p: log_inverse_gamma(p["q"], 3.0, 2.0) + log_inverse_gamma(p["r"], 2.0, 1.0),
            attained=True,
        ),
    ]  # fmt: skip


default_dtype = torch.get_default_dtype()
torch.set_default_dtype(torch.float64)  # the table is built on import, before any fixture runs
try:
    CASES = _build()
finally:
    torch.set_default_dtype(default_dtype)
