"""Results, posteriors, EM objects and errors copied, pickled, and made in other processes; cells run twice.

What a copy says of the data is what the original says: its problem is bound again from the model and the data.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

import pyro_em

X = torch.cat([torch.linspace(-3, -1, 12), torch.linspace(1, 3, 8)]).double()
ROWS = torch.stack([X, X.flip(0) + X, X.square()], -1)


def mixture(x: Tensor) -> None:
    w = pyro.param("w", torch.ones(2).double() / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]).double())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def chain(x: Tensor) -> None:
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]).double(), constraint=constraints.simplex)
    z: Any = 0
    for t in pyro_em.markov(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(2.0 * z - 1.0, 1.0), obs=x[t])


def level(x: Tensor) -> None:
    """A loop whose states are integrated out by a Kalman filter."""
    tau = pyro.param("tau", torch.ones(()).double(), constraint=constraints.positive)
    s: Any = 0.0
    for t in pyro.markov(range(len(x))):
        s = pyro.sample(f"s_{t}", dist.Normal(s, tau))
        pyro.sample(f"x_{t}", dist.Normal(s, 1.0), obs=x[t])


def factor(x: Tensor) -> None:
    loading = pyro.param("loading", torch.ones(3).double())
    sd = pyro.param("sd", torch.ones(3).double(), constraint=constraints.interval(0.01, 10.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(u.unsqueeze(-1) * loading, sd).to_event(1), obs=x)


def line(x: Tensor) -> None:
    """No latents, and a prior; all rows become a few in the fit."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x.detach() @ slope if x.dim() > 1 else slope[0] + slope[1] * X, 1.0), obs=x)


class Module(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.tensor([-1.0, 1.0]).double())
        self.net = torch.nn.Linear(1, 1).double()

    def forward(self, x: Tensor) -> None:
        pyro.module("net", self.net)
        sd = torch.nn.functional.softplus(self.net(torch.ones(1, 1).double())).squeeze()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4).double())).long()
            pyro.sample("x", dist.Normal(self.loc[z], sd), obs=x)


MODELS: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "mixture": (mixture, X, {}),
    "with weights": (mixture, X, {"weights": {"data": torch.linspace(0.5, 2.0, 20).double()}}),
    "with missing cells": (mixture, torch.where(X > 2, torch.nan, X), {"missing": "nan"}),
    "chain": (chain, X, {}),
    "level": (level, X, {}),
    "factor": (factor, ROWS, {}),
    "line": (line, X, {"algorithm": "map-em"}),
    "module": (Module(), X, {}),
}


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def _fit(name: str) -> pyro_em.FitResult:
    model, data, options = MODELS[name]
    pyro.clear_param_store()
    return pyro_em.fit(model, data, max_iter=5, tol=0, seed=0, **options)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
@pytest.mark.parametrize("again", [pickled, copy.deepcopy])
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_result_says_the_same(name: str, again: Callable[[Any], Any]) -> None:
    result = _fit(name)
    other = again(result)
    assert other is not result and other.params.keys() == result.params.keys()
    assert all(torch.equal(other.params[n], value) for n, value in result.params.items())
    assert str(other.summary()) == str(result.summary()) and str(other.plan) == str(result.plan)
    assert other.outcome is result.outcome and other.history == result.history
    errors, expected = other.standard_errors(), result.standard_errors()
    assert all(torch.allclose(errors[n], value, rtol=1e-10, atol=0) for n, value in expected.items())
    posterior = again(result.posterior())
    assert posterior.log_evidence == pytest.approx(float(result.log_likelihood or 0.0), rel=1e-12)
    assert posterior.latents == result.posterior().latents
    for latent in posterior.latents:
        assert torch.allclose(posterior.mean(latent), result.posterior().mean(latent), rtol=1e-12)


def test_a_copy_goes_on_by_itself() -> None:
    em = pyro_em.EM(mixture)
    first = em.step(X)
    for again in (pickled, copy.deepcopy):
        assert again(em).evaluate_loss(X) == em.evaluate_loss(X) < first
    result = _fit("mixture")
    other = copy.deepcopy(result)
    other.params["loc"] += 1
    assert not torch.equal(other.params["loc"], result.params["loc"])


ERRORS = [
    pyro_em.InputError("text"),
    pyro_em.Refusal("x", "reason.", "remedy."),
    pyro_em.ResourceError("text"),
    pyro_em.NonFiniteError("x", "text"),
    pyro_em.MonotonicityError(3, 2.0, 1.0),
    pyro_em.CheckpointError("text"),
    pyro_em.DegenerateLikelihoodError("x", 1, "reason.", "remedy."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_errors_cross_processes(error: Exception) -> None:
    error.iteration = 4  # type: ignore[attr-defined]
    other = pickled(error)
    assert type(other) is type(error) and str(other) == str(error) and vars(other) == vars(error)


def _collapse(seed: int) -> pyro_em.FitResult:
    """In a worker: a fit, or its error with the last finite result on it."""
    return pyro_em.fit(mixture, X + seed) if seed < 2 else pyro_em.fit(mixture, X.where(X < 2, torch.nan))


@pytest.fixture(scope="module")
def another_process() -> Iterator[Pool]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def test_fits_in_processes_that_are_spawned(another_process: Pool) -> None:
    """As joblib and multiprocessing start them: the model comes by name, the result and the error come back."""
    found = another_process.map(_collapse, [0, 1])
    with pytest.raises(pyro_em.InputError, match=r"'x': the observation in row .* is NaN"):
        another_process.apply(_collapse, (2,))
    for seed, result in enumerate(found):
        expected = pyro_em.fit(mixture, X + seed)
        assert all(torch.equal(result.params[n], value) for n, value in expected.params.items())
        assert torch.equal(result.log_prob(), expected.log_prob())


def _resumed(path: Path, model: Callable[[Tensor], None], x: Tensor) -> None:
    """In a worker: seven more updates of a fit that another process has saved."""
    torch.set_default_dtype(torch.float64)  # as in the other process
    saved = pyro_em.load(path)
    pyro_em.fit(model, x, init=saved.params, max_iter=7, tol=0).save(path)


@pytest.mark.parametrize(("model", "x"), [(mixture, X), (chain, X), (level, X), (factor, ROWS)])
def test_a_fit_goes_on_in_another_process(
    another_process: Pool, tmp_path: Path, model: Callable[[Tensor], None], x: Tensor
) -> None:
    """Where one fit would have gone, which knows the size of its log-likelihood in the seventh update, and has made
    its recording: a chain takes its emissions by another sum before, which may differ by a rounding."""
    pyro_em.fit(model, x, max_iter=6, tol=0).save(tmp_path / "fit.em")
    another_process.apply(_resumed, (tmp_path / "fit.em", model, x))
    pyro.clear_param_store()
    whole = pyro_em.fit(model, x, max_iter=13, tol=0)
    resumed = pyro_em.load(tmp_path / "fit.em", model=model, args=(x,))
    assert resumed.log_likelihood == whole.log_likelihood
    assert resumed.history["objective"] == whole.history["objective"][6:]
    for name, value in whole.params.items():
        assert (resumed.params[name] - value).abs().max() <= (2e-16 if model is chain else 0.0)


def test_a_cell_that_is_run_again_with_other_data() -> None:
    """What a first fit left (param store, recordings, caches) is not read by the next, other shapes included."""
    for data in (X, X[:7] * 2, X, X + 3, X.float()):
        fresh = pyro_em.fit(mixture, data, max_iter=8, tol=0)
        pyro.clear_param_store()
        again = pyro_em.fit(mixture, data, max_iter=8, tol=0)
        assert fresh.history["objective"] == again.history["objective"]
        assert all(torch.equal(fresh.params[n], again.params[n]) for n in fresh.params)
