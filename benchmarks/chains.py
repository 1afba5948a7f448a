"""Hidden Markov models: data, start, our `pyro_em.markov` model and hmmlearn, for the workloads of sequences.

States are kept with probability 0.9; the start keeps them with 0.7, and is off the true means by noise (off the
true table by a third of uniform). hmmlearn's priors and floors are off, so that both climb the likelihood itself.
It has two implementations, in log-space (its default) and by scaling. Letters: steps T, sequences S, states K,
features D, symbols V.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from benchmarks.harness import Fit, LogLikelihood
from pyro_em.result import FitResult
from pyro_em.types import Params


@dataclass(frozen=True)
class Chain:
    """`emission` is the start of the means (K, D), or of the table of symbols (K, V) for integer data."""

    data: Tensor  # (T, S, D), or (T, S) of symbols
    transition: Tensor  # (K, K)
    emission: Tensor

    @property
    def num_states(self) -> int:
        """K."""
        return len(self.transition)

    @property
    def symbols(self) -> bool:
        """Whether the data are symbols."""
        return self.data.dim() == 2

    @property
    def start(self) -> Params:
        """For `model`."""
        states = self.num_states
        emission = self.emission.clone()  # Pyro turns an initial value into a leaf of its own
        own = {"probs": emission} if self.symbols else {"loc": emission, "scale": torch.full_like(emission, 1.5**0.5)}
        return {
            "initial": torch.full((states,), 1 / states, dtype=torch.float64),
            "transition": self.transition.clone(),
            **own,
        }

    def work(self) -> dict[str, int]:
        """Operations and exponentials of one update: emissions by products (by look-up for symbols), messages."""
        rows = self.data.shape[0] * self.data.shape[1]
        features = 0 if self.symbols else 1 + 2 * self.data.shape[2]
        states = self.num_states
        exps = 0 if self.symbols else rows * states
        return {"flops": rows * (4 * states * features + 6 * states**2), "exps": exps}


def chain(steps: int, sequences: int, states: int, features: int = 0, symbols: int = 0) -> Chain:
    """Simulated sequences and a start not far from the truth."""
    rng = np.random.default_rng(0)

    def table(stay: float) -> np.ndarray:
        return np.full((states, states), (1 - stay) / (states - 1)) + (stay - (1 - stay) / (states - 1)) * np.eye(
            states
        )

    z = np.empty((steps, sequences), dtype=int)
    z[0] = rng.integers(states, size=sequences)
    moves, elsewhere = rng.random((steps, sequences)) > 0.9, rng.integers(1, states, (steps, sequences))
    for t in range(1, steps):
        z[t] = (z[t - 1] + moves[t] * elsewhere[t]) % states
    if symbols:
        truth = rng.dirichlet(np.full(symbols, 0.3), size=states)
        level = rng.random((steps, sequences, 1))
        data = torch.as_tensor((level > truth.cumsum(1)[z][..., :-1]).sum(-1))
        emission = 0.7 * truth + 0.3 / symbols
    else:
        truth = 2.0 * rng.normal(size=(states, features))
        data = torch.as_tensor(truth[z] + rng.normal(size=(steps, sequences, features)))
        emission = truth + 0.4 * rng.normal(size=truth.shape)
    return Chain(data, torch.as_tensor(table(0.7)), torch.as_tensor(emission))


def model(problem: Chain) -> None:
    """z_0 ~ initial, z_t | z_{t-1} ~ transition[z_{t-1}]; x_t | z_t diagonal normal, or categorical."""
    start = problem.start
    initial = pyro.param("initial", start["initial"], constraint=constraints.simplex)
    transition = pyro.param("transition", start["transition"], constraint=constraints.simplex)
    if problem.symbols:
        probs = pyro.param("probs", start["probs"], constraint=constraints.simplex)
    else:
        loc = pyro.param("loc", start["loc"])
        scale = pyro.param("scale", start["scale"], constraint=constraints.positive)
    with pyro.plate("sequences", problem.data.shape[1]):
        z = None
        for t in pyro_em.markov(len(problem.data)):
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
            fn = dist.Categorical(probs[z]) if problem.symbols else dist.Normal(loc[z], scale[z]).to_event(1)
            pyro.sample(f"x_{t}", fn, obs=problem.data[t])


def fit(problem: Chain, updates: int) -> FitResult:
    """`pyro_em.fit`."""
    result = pyro_em.fit(model, problem, max_iter=updates, tol=0, progress=False)
    assert result.num_iterations == updates and result.log_likelihood is not None
    return result


def ours(problem: Chain) -> Fit:
    """The same as a contender."""

    def timed(updates: int) -> LogLikelihood:
        found = fit(problem, updates).log_likelihood
        assert found is not None
        return lambda: found

    return timed


def _hmmlearn(problem: Chain, implementation: Literal["log", "scaling"]) -> Fit:
    from hmmlearn.hmm import CategoricalHMM, GaussianHMM

    logging.getLogger("hmmlearn").setLevel(logging.ERROR)  # it reports every fit that was told not to converge
    steps, sequences = problem.data.shape[:2]
    rows = problem.data.transpose(0, 1).reshape(steps * sequences, -1).numpy()
    lengths = [steps] * sequences
    options = {"n_iter": 0, "tol": -np.inf, "init_params": "", "implementation": implementation}

    def fit(updates: int) -> LogLikelihood:
        if problem.symbols:
            peer = CategoricalHMM(problem.num_states, **{**options, "n_iter": updates})
            peer.n_features, peer.emissionprob_ = problem.emission.shape[1], problem.emission.numpy().copy()
        else:
            peer = GaussianHMM(
                problem.num_states, "diag", covars_prior=0, min_covar=0, **{**options, "n_iter": updates}
            )
            peer.means_, peer.covars_ = problem.emission.numpy().copy(), np.full(problem.emission.shape, 1.5)
        peer.startprob_ = np.full(problem.num_states, 1 / problem.num_states)
        peer.transmat_ = problem.transition.numpy().copy()
        peer.fit(rows, lengths)
        return lambda: float(peer.score(rows, lengths))

    return fit


def hmmlearn_log(problem: Chain) -> Fit:
    """hmmlearn's default."""
    return _hmmlearn(problem, "log")


def hmmlearn_scaling(problem: Chain) -> Fit:
    """hmmlearn with implementation="scaling"."""
    return _hmmlearn(problem, "scaling")
