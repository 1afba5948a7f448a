"""A chain too long to enumerate, against the textbook: scaled forward-backward and Viterbi in NumPy.

The 107 years of the earthquake counts under a Poisson HMM with three states.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import poisson

import pyro_em
from tests import classics
from tests.laws import marginal_probs
from tests.published import read

Array = npt.NDArray[np.float64]
PI = np.array([0.5, 0.3, 0.2])
A = np.array([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.05, 0.25, 0.7]])
RATE = np.array([12.0, 20.0, 30.0])


def forward_backward(
    initial: Array,  # (K,)
    transition: Array,  # (K, K), row to column
    likelihood: Array,  # (T, K)
) -> tuple[float, Array, Array]:
    """Scaled forward-backward of one sequence: log p(x), state posteriors (T, K), summed pairs (K, K)."""
    steps, states = likelihood.shape
    alpha, beta, scale = np.zeros((steps, states)), np.zeros((steps, states)), np.zeros(steps)
    for t in range(steps):
        a = (initial if t == 0 else alpha[t - 1] @ transition) * likelihood[t]
        scale[t] = a.sum()
        alpha[t] = a / scale[t]
    beta[-1] = 1.0
    for t in range(steps - 2, -1, -1):
        beta[t] = transition @ (likelihood[t + 1] * beta[t + 1]) / scale[t + 1]
    pairs = np.zeros((states, states))
    for t in range(steps - 1):
        pairs += alpha[t][:, None] * transition * (likelihood[t + 1] * beta[t + 1]) / scale[t + 1]
    return float(np.log(scale).sum()), alpha * beta, pairs


def viterbi(initial: Array, transition: Array, likelihood: Array) -> list[int]:
    score = np.log(initial) + np.log(likelihood[0])
    back = []
    for row in likelihood[1:]:
        candidates = score[:, None] + np.log(transition)
        back.append(candidates.argmax(0))
        score = candidates.max(0) + np.log(row)
    path = [int(score.argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return path[::-1]


def test_long_chain() -> None:
    counts = read("earthquakes", "count")[:, 0]
    likelihood = poisson.pmf(counts.numpy()[:, None], RATE)
    evidence, states, pairs = forward_backward(PI, A, likelihood)
    start = {"pi": torch.tensor(PI), "A": torch.tensor(A), "lam": torch.tensor(RATE)}

    here = pyro_em.fit(classics.poisson_hmm, counts, 3, init=start, max_iter=0)
    assert here.log_likelihood == pytest.approx(evidence, rel=1e-13)
    posterior = here.posterior()
    found = torch.stack([marginal_probs(posterior, f"z_{t}", torch.Size([3])) for t in range(len(counts))])
    np.testing.assert_allclose(found.numpy(), states, rtol=0, atol=1e-12)
    mode = posterior.mode()
    assert [int(mode[f"z_{t}"]) for t in range(len(counts))] == viterbi(PI, A, likelihood)

    updated = pyro_em.fit(classics.poisson_hmm, counts, 3, init=start, max_iter=1, tol=0).params
    np.testing.assert_allclose(updated["pi"].numpy(), states[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(updated["A"].numpy(), pairs / pairs.sum(1, keepdims=True), rtol=0, atol=1e-12)
    rates = states.T @ counts.numpy() / states.sum(0)
    np.testing.assert_allclose(updated["lam"].numpy(), rates, rtol=1e-12)
