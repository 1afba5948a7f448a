"""Published fits and trajectories of state-space models; each function returns its case's quantities by name."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from scipy.io import loadmat
from torch import Tensor
from torch.distributions import constraints

from models import state_space
from tests.classics import positive
from tests.published import Found, fit, read


def local_level(y: Tensor, mean: float, variance: float) -> None:
    """The first level has a known distribution: no move before the first observation."""
    q, r = (pyro.param(name, torch.tensor(1000.0), constraint=positive) for name in ("q", "r"))
    zero, one = torch.zeros(1), torch.eye(1)
    start = dist.Normal(torch.tensor([mean]), math.sqrt(variance)).to_event(1)
    moves = torch.cat([zero, q.sqrt().expand(len(y) - 1)]).unsqueeze(-1)
    step = dist.Normal(zero, moves, validate_args=False).to_event(1)
    noise = dist.Normal(zero, r.sqrt()).to_event(1)
    pyro.sample("y", dist.LinearHMM(start, one, step, one, noise, duration=len(y)), obs=y.unsqueeze(-1))


def robot_arm(y: Tensor, A: Tensor, b: Tensor, C: Tensor, d: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Everything is known but the two noises; offsets of the states differ from step to step."""
    Q = pyro.param("Q", 10 * torch.eye(5), constraint=constraints.positive_definite)
    R = pyro.param("R", 10 * torch.eye(2), constraint=constraints.positive_definite)
    noise = dist.MultivariateNormal
    fn = dist.GaussianHMM(noise(mean, covariance), A.mT, noise(b, Q), C.mT, noise(d, R))
    pyro.sample("y", fn, obs=y)


def robot() -> tuple[Tensor, ...]:
    """Arguments of `robot_arm`, from the file that pykalman installs (its own loader leaves that file open).

    There are 501 states; nothing is observed of the first.
    """
    spec = find_spec("pykalman")
    assert spec is not None and spec.origin is not None
    data = loadmat(Path(spec.origin).parent / "datasets" / "data" / "robot.mat")
    parts = (data["y"].T, data["A"], data["b"].T, data["C"], data["d"][:, 0], data["x0"][:, 0], data["P_0"])
    return tuple(torch.tensor(part, dtype=torch.float64) for part in parts)


def lgssm_nile() -> Found:
    y = read("nile", "flow")[:, 0]
    diffuse = fit(state_space.local_level, y, restarts=1, init="model", accelerate="squarem", tol=1e-6)
    known = fit(local_level, y, 0.0, 1e7, restarts=1, init="model", accelerate="squarem", tol=1e-8)
    level, noise = diffuse.params["level"], diffuse.params["noise"]
    errors = diffuse.standard_errors()
    return {
        "sigma2_eps, sigma2_eta": torch.stack([noise, level]) ** 2,
        "loglik (first obs dropped, i.e. Durbin-Koopman diffuse with constant only for t>=2)": diffuse.log_likelihood,
        "loglik with N(0,1e7) initial": known.log_likelihood,
        "params with N(0,1e7)": torch.stack([known.params["r"], known.params["q"]]),
        "loglik statsmodels exact diffuse": diffuse.log_likelihood - 0.5 * math.log(2 * math.pi),
        "SE (var scale)": torch.stack([2 * noise * errors["noise"], 2 * level * errors["level"]]),
    }


def factor_with_two_lags(y: Tensor) -> None:
    """f_t = φ₁ f_{t-1} + φ₂ f_{t-2} + N(0, 1), stationary from the start; the state is (f_t, f_{t-1})."""
    partial = pyro.param("partial", torch.tensor([0.6, 0.4]), constraint=constraints.interval(-1.0, 1.0))
    phi = _lags(partial)
    loadings = pyro.param("loadings", 0.5 * y.std(0))
    noise = pyro.param("noise", 0.7 * y.std(0), constraint=positive)
    F = torch.stack([phi, torch.tensor([1.0, 0.0])], 1)
    # Stationary variance γ₀ and first autocovariance γ₁ of the factor.
    rho = phi[0] / (1 - phi[1])
    variance = 1 / (1 - phi[0] * rho - phi[1] * (phi[0] * rho + phi[1]))
    covariance = variance * (torch.eye(2) + rho * (1 - torch.eye(2)))
    start = dist.MultivariateNormal(torch.zeros(2), covariance)
    step = dist.Normal(torch.zeros(2), torch.tensor([1.0, 0.0]), validate_args=False).to_event(1)
    H = torch.stack([loadings, torch.zeros(y.shape[1])])
    error = dist.Normal(torch.zeros(y.shape[1]), noise).to_event(1)
    pyro.sample("y", dist.LinearHMM(start, F, step, H, error, duration=len(y)), obs=y)


def _lags(partial: Tensor) -> Tensor:
    """Coefficients of a stationary AR(2) from its partial autocorrelations (Barndorff-Nielsen and Schou 1973)."""
    return torch.stack([partial[0] * (1 - partial[1]), partial[1]])


def lgssm_dfm_lutkepohl() -> Found:
    y = read("lutkepohl_dlog", "dln_inv", "dln_inc", "dln_consump")
    y = y[~y.isnan().any(1)][:75]
    result = fit(factor_with_two_lags, y, restarts=1, init="model", accelerate="squarem", max_iter=300, tol=1e-4)
    return {
        "loglik": result.log_likelihood,
        "loadings": result.params["loadings"],
        "idiosyncratic variances": result.params["noise"] ** 2,
        "factor AR": _lags(result.params["partial"]),
        "SE loadings": result.standard_errors()["loadings"],
    }
