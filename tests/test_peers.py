"""Other people's EM, and other ways to the same place.

em = scikit-learn's GaussianMixture and hmmlearn's HMMs, from the same start, at each of the first 20
iterations, to 1e-8. map-em = Pyro's AutoDelta optimised for long. The limit of gem = the limit of em.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from hmmlearn.hmm import CategoricalHMM, GaussianHMM
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

import pyro_em
from tests.problems import BY_NAME, PROBLEMS, Problem

ITERATIONS = 20
Arrays = dict[str, np.ndarray[Any, Any]]


def _iterates(problem: Problem) -> list[dict[str, Tensor]]:
    """Parameters after 1, ..., 20 updates, each reached from the start."""
    return [
        pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=k, tol=0).params
        for k in range(1, ITERATIONS + 1)
    ]


def _compare(problem: Problem, step: Callable[[Arrays], Arrays]) -> None:
    """Walk the peer with `step` from the problem's start and compare every iterate."""
    state = {n: v.numpy() for n, v in problem.init.items()}
    for k, found in enumerate(_iterates(problem), start=1):
        state = step(state)
        for name, value in found.items():
            np.testing.assert_allclose(value.numpy(), state[name], rtol=0, atol=1e-8, err_msg=f"{name} after {k}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gmm_full", "full"), ("gmm_diagonal", "diag"), ("gmm_spherical", "spherical"), ("gmm_tied", "tied")],
)
def test_scikit_learn_mixture(name: str, kind: str) -> None:
    problem = BY_NAME[name]
    x = problem.args[0].numpy()
    weights, spread = ("pi" if name == "gmm_full" else "w"), ("S" if kind in ("full", "tied") else "sd")

    def step(state: Arrays) -> Arrays:
        """One update: a fit of one iteration from given parameters (scikit-learn starts from precisions)."""
        inverse = np.linalg.inv(state[spread]) if spread == "S" else state[spread] ** -2.0
        peer = GaussianMixture(
            len(state["mu"]),
            covariance_type=kind,
            reg_covar=0.0,
            max_iter=1,
            tol=0.0,
            weights_init=state[weights] / state[weights].sum(),
            means_init=state["mu"],
            precisions_init=inverse,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one iteration never converges
            peer.fit(x)
        covariances = peer.covariances_ if spread == "S" else np.sqrt(peer.covariances_)
        return {weights: peer.weights_, "mu": peer.means_, spread: covariances}

    _compare(problem, step)


def test_hmmlearn_gaussian() -> None:
    problem = BY_NAME["gaussian_hmm"]
    series = problem.args[0].numpy()
    x, lengths = series.reshape(-1, 1), [series.shape[1]] * len(series)

    def step(state: Arrays) -> Arrays:
        peer = GaussianHMM(2, "diag", covars_prior=0.0, n_iter=1, init_params="", params="stmc")
        peer.startprob_, peer.transmat_ = state["pi"], state["A"]
        peer.means_, peer.covars_ = state["mu"][:, None], state["sd"][:, None] ** 2
        peer.fit(x, lengths)
        sd = np.sqrt(peer.covars_[:, 0, 0])
        return {"pi": peer.startprob_, "A": peer.transmat_, "mu": peer.means_[:, 0], "sd": sd}

    _compare(problem, step)


def test_hmmlearn_categorical() -> None:
    problem = BY_NAME["categorical_hmm"]
    words = problem.args[0].numpy()
    x, lengths = words.reshape(-1, 1).astype(int), [words.shape[1]] * len(words)

    def step(state: Arrays) -> Arrays:
        peer = CategoricalHMM(2, n_features=3, n_iter=1, init_params="", params="ste")
        peer.startprob_, peer.transmat_, peer.emissionprob_ = state["pi"], state["A"], state["B"]
        peer.fit(x, lengths)
        return {"pi": peer.startprob_, "A": peer.transmat_, "B": peer.emissionprob_}

    _compare(problem, step)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.priors and p.rows is None], ids=lambda p: p.name)
def test_auto_delta(problem: Problem) -> None:
    """AutoDelta is textbook MAP (constrained space, no Jacobian); `pyro.param`s are optimised along with it.

    Pyro does not enumerate models in long format: `z[group]` indexes the dim of its states.
    """
    found = pyro_em.fit(
        problem.model, *problem.args, algorithm="map-em", init=problem.start(), max_iter=50_000, tol=1e-10
    )
    pyro.clear_param_store()
    latents = list(problem.oracle(problem.init).latents)
    model = config_enumerate(problem.model, "parallel")
    sites = poutine.block(model, hide=latents)
    guide = AutoDelta(sites, init_loc_fn=init_to_value(values=problem.start()))
    elbo = TraceEnum_ELBO(max_plate_nesting=2)

    def loss() -> Tensor:
        return elbo.differentiable_loss(model, guide, *problem.args)

    loss()  # creates the parameters
    for name, value in problem.start().items():
        if name in pyro.get_param_store():
            pyro.get_param_store()[name] = value
    leaves = [p.unconstrained() for p in pyro.get_param_store().values()]
    for optimiser, steps in (
        (torch.optim.Adam(leaves, lr=0.05), 50),
        (torch.optim.LBFGS(leaves, max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe"), 1),
        # The loss resolves parameters to sqrt(eps) only; its gradient, without a line search, to eps.
        (torch.optim.LBFGS(leaves, max_iter=100, tolerance_change=0, tolerance_grad=1e-11), 1),
    ):

        def closure(optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = loss()
            value.backward()
            return value

        for _ in range(steps):
            optimiser.step(closure)

    medians = {**guide.median(*problem.args)}
    medians |= {n: pyro.param(n).detach() for n in problem.init if n not in medians}
    for name, value in found.params.items():
        torch.testing.assert_close(value, medians[name].detach(), rtol=0.0, atol=1e-8)
    assert found.log_posterior == pytest.approx(-float(loss().detach()), rel=1e-10)


GEM_PROBLEMS = ["gmm_diagonal", "poisson_mixture", "linkage", "coins", "module_mixture"]


@pytest.mark.parametrize("name", GEM_PROBLEMS)
def test_gem_ends_where_em_ends(name: str) -> None:
    problem = BY_NAME[name]
    em, gem = (
        pyro_em.fit(
            problem.model, *problem.args, init=problem.start(), max_iter=20_000, tol=1e-7,
            **problem.fit_options(algorithm),
        )
        for algorithm in ("em", "gem")
    )  # fmt: skip
    assert em.converged
    assert gem.converged
    assert gem.log_likelihood == pytest.approx(em.log_likelihood, rel=1e-10)
    for site, value in em.params.items():
        torch.testing.assert_close(gem.params[site], value, rtol=1e-4, atol=1e-4)
