"""Sequences against hmmlearn and statsmodels: log-likelihoods and parameters of the first 20 iterates, to 1e-8.

hmmlearn (priors off) from the same start on two sequences of unequal length: Gaussian full and diagonal, categorical,
Poisson. statsmodels for Markov-switching (auto)regressions: its EM divides expected transitions by the wrong count
(all smoothed states, not those that are left), so that update is formed here from its smoothed pairs of states.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hmmlearn import hmm
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from tests import published_sequences
from tests.published import read

simplex, positive = constraints.simplex, constraints.positive
ITERATIONS = 20
LENGTHS = (120, 77)
PI, A = np.array([0.5, 0.3, 0.2]), np.array([[0.7, 0.2, 0.1], [0.15, 0.7, 0.15], [0.1, 0.3, 0.6]])
Arrays = dict[str, Any]
Iterates = list[dict[str, Tensor]]


def chain(data: Tensor, seen: Tensor, kind: str, start: Arrays) -> None:
    """Sequences (T, N) of one kind of emissions, masked beyond their ends."""
    pi = pyro.param("pi", torch.tensor(PI), constraint=simplex)
    table = pyro.param("A", torch.tensor(A), constraint=simplex)
    own = {name: torch.tensor(value) for name, value in start.items()}
    if kind == "poisson":
        rate = pyro.param("rate", own["rate"], constraint=positive)
    elif kind == "categorical":
        B = pyro.param("B", own["B"], constraint=simplex)
    else:
        mu = pyro.param("mu", own["mu"])
        shape = constraints.positive_definite if kind == "full" else positive
        spread = pyro.param("spread", own["spread"], constraint=shape)
    with pyro.plate("sequences", data.shape[1]):
        z = None
        for t in pyro_em.markov(len(data)):
            with poutine.mask(mask=seen[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else table[z]))
                if kind == "poisson":
                    emission: Any = dist.Poisson(rate[z])
                elif kind == "categorical":
                    emission = dist.Categorical(B[z])
                elif kind == "full":
                    emission = dist.MultivariateNormal(mu[z], spread[z])
                else:
                    emission = dist.Normal(mu[z], spread[z]).to_event(1)
                pyro.sample(f"x_{t}", emission, obs=data[t])


def _simulated(kind: str) -> Tensor:
    rng = np.random.default_rng(3)
    z = np.arange(max(LENGTHS))[:, None] // np.array([7, 9]) % 3
    if kind == "poisson":
        return torch.as_tensor(rng.poisson(3.0 * z + 1.0)).double()
    if kind == "categorical":
        return torch.as_tensor((z + rng.integers(0, 2, z.shape)) % 4)
    return torch.as_tensor(1.5 * z[..., None] + rng.normal(size=(*z.shape, 2)))


MEANS = np.array([[-1.0, 0.0], [0.5, 1.0], [2.0, -1.0]])
KINDS: dict[str, tuple[Arrays, Callable[[], Any], dict[str, str]]] = {
    "full": (
        {"mu": MEANS, "spread": np.eye(2)[None].repeat(3, 0) + 0.3},
        lambda: hmm.GaussianHMM(3, "full", covars_prior=0.0, min_covar=0.0, n_iter=1, init_params=""),
        {"mu": "means_", "spread": "covars_"},
    ),
    "diagonal": (
        {"mu": MEANS, "spread": np.ones((3, 2))},
        lambda: hmm.GaussianHMM(3, "diag", covars_prior=0.0, min_covar=0.0, n_iter=1, init_params=""),
        {"mu": "means_", "spread": "covars_"},
    ),
    "categorical": (
        {"B": np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.4, 0.1], [0.2, 0.1, 0.2, 0.5]])},
        lambda: hmm.CategoricalHMM(3, n_features=4, n_iter=1, init_params=""),
        {"B": "emissionprob_"},
    ),
    "poisson": (
        {"rate": np.array([1.0, 3.0, 6.0])},
        lambda: hmm.PoissonHMM(3, lambdas_prior=0.0, lambdas_weight=0.0, n_iter=1, init_params=""),
        {"rate": "lambdas_"},
    ),
}


def _iterates(model: Any, *args: Any, iterations: int = ITERATIONS, **options: Any) -> tuple[Iterates, Any]:
    """Parameters at the start and after every update."""
    found: Iterates = []

    def note(step: Any) -> None:
        found.append({name: value.clone() for name, value in step.params.items()})

    result = pyro_em.fit(model, *args, max_iter=iterations, tol=0, callbacks=[note], **options)
    assert len(found) == iterations + 1
    return found, result


@pytest.mark.parametrize("kind", KINDS)
def test_hmmlearn(kind: str) -> None:
    logging.getLogger("hmmlearn").setLevel(logging.ERROR)  # one iteration never converges
    start, make, names = KINDS[kind]
    data = _simulated(kind)
    seen = torch.arange(len(data)).unsqueeze(-1) < torch.tensor(LENGTHS)
    rows = np.concatenate([data[:n, i].reshape(n, -1).numpy() for i, n in enumerate(LENGTHS)])
    rows = rows.astype(int) if kind in ("poisson", "categorical") else rows
    found, result = _iterates(chain, data, seen, kind, start)
    state: Arrays = {"pi": PI, "A": A, **start}
    for k in range(ITERATIONS + 1):
        for name, value in found[k].items():
            np.testing.assert_allclose(value.numpy(), state[name], rtol=0, atol=1e-8, err_msg=f"{name} after {k}")
        peer = make()
        peer.startprob_, peer.transmat_ = state["pi"], state["A"]
        for name, attribute in names.items():
            setattr(peer, attribute, state[name] ** 2 if kind == "diagonal" and name == "spread" else state[name])
        if kind == "poisson":
            peer.n_features, peer.lambdas_ = 1, state["rate"].reshape(3, 1)
        assert result.history["log_likelihood"][k] == pytest.approx(peer.score(rows, list(LENGTHS)), abs=1e-8)
        assert result.num_observations == sum(LENGTHS)
        peer.fit(rows, list(LENGTHS))
        state = {"pi": peer.startprob_, "A": peer.transmat_}
        state |= {name: np.asarray(getattr(peer, attribute)) for name, attribute in names.items()}
        if kind == "diagonal":
            state["spread"] = np.sqrt(np.stack([np.diag(c) for c in state["spread"]]))
        if kind == "poisson":
            state["rate"] = state["rate"].reshape(3)


def switching(y: Tensor, known: Tensor) -> None:
    """y_t = a[z_t] + b[z_t] y_{t-1} + e, e ~ N(0, sd[z_t]²); the state two steps before is of known distribution."""
    table = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=simplex)
    a, b = pyro.param("a", torch.tensor([-0.5, 1.0])), pyro.param("b", torch.tensor([0.2, 0.0]))
    sd = pyro.param("sd", torch.tensor([1.0, 1.5]), constraint=positive)
    z = pyro.sample("first", dist.Categorical(known))
    z = pyro.sample("second", dist.Categorical(table[z]))
    for t in pyro_em.markov(len(y) - 1):
        z = pyro.sample(f"z_{t}", dist.Categorical(table[z]))
        pyro.sample(f"y_{t}", dist.Normal(a[z] + b[z] * y[t], sd[z]), obs=y[t + 1])


def test_statsmodels_switching_regression() -> None:
    """Markov-switching autoregression; everything switches."""
    MarkovRegression = pytest.importorskip("statsmodels.api").tsa.MarkovRegression
    rng = np.random.default_rng(0)
    z, y = np.arange(150) // 12 % 2, np.zeros(150)
    for t in range(1, 150):
        y[t] = 2.0 * z[t] + (0.4 - 0.3 * z[t]) * y[t - 1] + rng.normal() * (0.7 + 0.5 * z[t])
    known = np.array([0.6, 0.4])
    peer = MarkovRegression(y[1:], 2, exog=y[:-1, None], switching_variance=True)
    peer.initialize_known(known)  # it makes two steps before the first datum
    found, result = _iterates(switching, torch.tensor(y), torch.tensor(known))
    for k in range(ITERATIONS):
        own, after = found[k], found[k + 1]
        params = np.concatenate([own["A"][:, 0], np.stack([own["a"], own["b"]]).reshape(-1), own["sd"] ** 2])
        assert result.history["log_likelihood"][k] == pytest.approx(peer.loglike(params), abs=1e-8)
        smoothed, updated = peer._em_iteration(params)
        joint = smoothed.smoothed_joint_probabilities  # to, from, step
        earliest = known[:, None] * own["A"].numpy()
        earliest = earliest / earliest.sum(0) * joint[:, :, 0].sum(0)
        pairs = joint.sum(-1).T + earliest
        np.testing.assert_allclose(after["A"].numpy(), pairs / pairs.sum(1, keepdims=True), rtol=0, atol=1e-8)
        updated = updated[peer.parameters["exog"]], updated[peer.parameters["variance"]]
        ours = np.stack([after["a"], after["b"]]).reshape(-1)
        np.testing.assert_allclose(ours, updated[0], rtol=0, atol=1e-8)
        np.testing.assert_allclose(after["sd"].numpy() ** 2, updated[1], rtol=0, atol=1e-8)


def test_statsmodels_hamilton() -> None:
    """The evidence of Hamilton's model (five states back, stationary start) at each of the first iterates."""
    MarkovAutoregression = pytest.importorskip("statsmodels.api").tsa.MarkovAutoregression
    y = read("hamilton_rgnp", "rgnp")[:, 0]
    peer = MarkovAutoregression(y.numpy(), 2, order=4, switching_ar=False)
    found, result = _iterates(published_sequences.switching_autoregression, y, iterations=4)
    for k, own in enumerate(found):
        params = np.concatenate([own["A"][:, 0], own["mu"], own["sd"].reshape(1) ** 2, own["phi"]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = peer.loglike(params)
        assert result.history["log_likelihood"][k] == pytest.approx(expected, abs=1e-8)
