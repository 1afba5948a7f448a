"""Published fits of hidden Markov and Markov-switching models with a stationary start, by `pyro_em.markov`.

The initial distribution is the stationary one of the transition table, so that the table has no closed form.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from tests.published import Found, read

simplex, positive = constraints.simplex, constraints.positive


def stationary(A: Tensor) -> Tensor:
    """π with πA = π: π (I - A + U) = 1, U all ones."""
    K = A.shape[-1]
    return torch.linalg.solve((torch.eye(K) - A + 1.0).mT, torch.ones(K))


def _sticky(K: int) -> Tensor:
    return 0.8 * torch.eye(K) + 0.2 / K


def poisson_hmm(counts: Tensor, rate: Tensor) -> None:
    A = pyro.param("A", _sticky(len(rate)), constraint=simplex)
    lam = pyro.param("lam", rate, constraint=positive)
    z = None
    for t in pyro_em.markov(len(counts)):
        z = pyro.sample(f"z_{t}", dist.Categorical(stationary(A) if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Poisson(lam[z]), obs=counts[t])


def bernoulli_hmm(x: Tensor, p: Tensor, A: Tensor) -> None:
    A = pyro.param("A", A, constraint=simplex)
    p = pyro.param("p", p, constraint=constraints.unit_interval)
    z = None
    for t in pyro_em.markov(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(stationary(A) if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Bernoulli(p[z]), obs=x[t])


def switching_mean(y: Tensor) -> None:
    """Two means, one variance."""
    A = pyro.param("A", _sticky(2), constraint=simplex)
    mu = pyro.param("mu", torch.tensor([3.0, 9.0]))
    sd = pyro.param("sd", torch.tensor(2.0), constraint=positive)
    z = None
    for t in pyro_em.markov(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(stationary(A) if z is None else A[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z], sd), obs=y[t])


def switching_autoregression(y: Tensor, order: int = 4) -> None:
    """y_t - mu[z_t] = Σ_i phi_i (y_{t-i} - mu[z_{t-i}]) + e, given the first `order` values (Hamilton 1989)."""
    A = pyro.param("A", torch.tensor([[0.75, 0.25], [0.1, 0.9]]), constraint=simplex)
    mu = pyro.param("mu", torch.tensor([-0.3, 1.2]))
    phi = pyro.param("phi", torch.zeros(order))
    sd = pyro.param("sd", torch.tensor(0.8), constraint=positive)
    z: list[Any] = []
    for t in pyro_em.markov(len(y), history=order):
        state = pyro.sample(f"z_{t}", dist.Categorical(A[z[-1]] if z else stationary(A)))
        if len(z) >= order:
            back = sum(phi[i] * (y[t - 1 - i] - mu[z[-1 - i]]) for i in range(order))
            pyro.sample(f"y_{t}", dist.Normal(mu[state] + back, sd), obs=y[t])
        z = [*z, state]


def stationary_earthquakes() -> Found:
    """Quantities of `hmm_earthquakes` in the convention of the book."""
    counts = read("earthquakes", "count")[:, 0]
    two, three, four = (
        pyro_em.fit(poisson_hmm, counts, torch.tensor(rate), tol=1e-6, accelerate="squarem")
        for rate in ([15.0, 25.0], [13.0, 20.0, 30.0], [10.0, 15.0, 21.0, 31.0])
    )
    return {
        "stationary loglik K2": two.log_likelihood,
        "stationary K2 lambda": two.params["lam"],
        "stationary K2 Gamma diag": two.params["A"].diagonal(),
        "stationary loglik K3": three.log_likelihood,
        "stationary K3 lambda": three.params["lam"],
        "stationary loglik K4": four.log_likelihood,
    }


GEYSER_3 = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([[0.5, 0.4, 0.1], [0.08, 0.13, 0.79], [0.07, 0.93, 0.0]])
GEYSER_HIGHER = torch.tensor([0.97, 1.0, 0.1]), torch.tensor([[0.48, 0.52, 0.0], [0.08, 0.18, 0.74], [0.0, 1.0, 0.0]])


def geyser(p: Tensor, A: Tensor) -> Any:
    """Long eruptions of Old Faithful; exact zeros and ones of the start stay what they are."""
    x = read("geyser_binary", "long")[:, 0]
    return pyro_em.fit(bernoulli_hmm, x, p.double(), A.double(), tol=1e-6, accelerate="anderson")


def hmm_geyser_bernoulli() -> Found:
    """With two states a short eruption is always followed by a long one.

    With three the published value is a maximum with two states of long eruptions only; another is higher
    (tests/test_reference_fits.py). From starts inside of the simplex EM takes some hundred updates to its boundary.
    """
    x = read("geyser_binary", "long")[:, 0]
    two = pyro_em.fit(bernoulli_hmm, x, torch.tensor([0.3, 0.9]), torch.tensor([[0.2, 0.8], [0.8, 0.2]]), tol=1e-5)
    three = geyser(*GEYSER_3)
    return {
        "stationary loglik K2": two.log_likelihood,
        "K2 p": two.params["p"],
        "K2 Gamma": two.params["A"],
        "stationary loglik K3": three.log_likelihood,
    }


def ms_fedfunds_const() -> Found:
    y = read("fedfunds", "fedfunds")[:, 0]
    result = pyro_em.fit(switching_mean, y, tol=1e-6)
    A, errors = result.params["A"], result.standard_errors()
    return {
        "loglik": result.log_likelihood,
        "p00, p10": torch.stack([A[0, 0], A[1, 0]]),
        "mu": result.params["mu"],
        "sigma": result.params["sd"],
        "SE p00,p10,mu0,mu1": torch.stack([errors["A"][0, 0], errors["A"][1, 0], *errors["mu"]]),
    }


def ms_hamilton_gnp() -> Found:
    y = read("hamilton_rgnp", "rgnp")[:, 0]
    result = pyro_em.fit(switching_autoregression, y, tol=1e-6, accelerate="squarem")
    A, errors = result.params["A"], result.standard_errors()
    return {
        "loglik": result.log_likelihood,
        "p00 (recession stay), p10=P(1->0)": torch.stack([A[0, 0], A[1, 0]]),
        "mu0, mu1": result.params["mu"],
        "sigma^2": result.params["sd"] ** 2,
        "phi1..4": result.params["phi"],
        "SE (p00,p10,mu0,mu1)": torch.stack([errors["A"][0, 0], errors["A"][1, 0], *errors["mu"]]),
    }
