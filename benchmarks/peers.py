"""The contenders as `Fit`s: exactly n EM updates from the given start, then the log-likelihood on demand.

Each peer is imported when it is asked for, as some are slow to import or change torch's threads. Their
regularisers are off and their stopping rules cannot fire, so that all climb the same likelihood:

    scikit-learn  reg_covar=0, tol=0 (it stops when |change| < tol)
    pomegranate   tol=-inf (it stops when the gain of the total is < tol, by default 0.1); default dtype float64,
                  as its counts are made in the default dtype
    StepMix       abs_tol=rel_tol=0; it takes no start, so its initialisation is overridden

`hand_written` is what a careful programmer would write for this one model: no generality, no checks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import pyro_em
from benchmarks.harness import Fit, LogLikelihood
from benchmarks.problems import LatentClasses, Mixture
from models import gmm, lca
from pyro_em.e_step.auto import choose_engine
from pyro_em.initialise import initial_starts
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from pyro_em.result import FitResult
from pyro_em.store import isolated_rng
from pyro_em.types import Params

RESTARTS, SEED = 20, 0


def _ours(model: Callable[..., None], problem: Mixture | LatentClasses, size: int, updates: int) -> FitResult:
    result = pyro_em.fit(model, problem.data, size, init=problem.start, max_iter=updates, tol=0, progress=False)
    assert result.num_iterations == updates
    return result


def _log_likelihood(result: FitResult) -> LogLikelihood:
    found = result.log_likelihood
    assert found is not None  # exact algorithms always have it
    return lambda: found


def fit_mixture(problem: Mixture, updates: int) -> FitResult:
    """`pyro_em.fit` on `gmm.model` or `gmm.diagonal`."""
    return _ours(gmm.diagonal if problem.diagonal else gmm.model, problem, problem.num_components, updates)


def ours_mixture(problem: Mixture) -> Fit:
    """The same as a contender."""
    return lambda updates: _log_likelihood(fit_mixture(problem, updates))


def ours_latent_classes(problem: LatentClasses) -> Fit:
    """`pyro_em.fit` on `lca.model`."""
    return lambda updates: _log_likelihood(_ours(lca.model, problem, problem.num_classes, updates))


def ours_restarts(problem: Mixture) -> Fit:
    """`pyro_em.fit` with `RESTARTS` starts; the best is returned. An update is one of every start."""

    def fit(updates: int) -> LogLikelihood:
        result = pyro_em.fit(
            gmm.model, problem.data, problem.num_components, init=problem.start, restarts=RESTARTS, seed=SEED,
            max_iter=updates, tol=0, progress=False,
        )  # fmt: skip
        assert len(result.restarts) == RESTARTS
        return _log_likelihood(result)

    return fit


def _starts(problem: Mixture) -> list[Params]:
    """The starts that `fit` draws in `ours_restarts`."""
    with isolated_rng(SEED):
        bound = bind(gmm.model, (problem.data, problem.num_components), {}, with_prior=False)
        return list(initial_starts(bound, MStep(bound, "auto", "em"), problem.start, RESTARTS, SEED))


def engine_mixture(problem: Mixture) -> Fit:
    """The compiled E-step and the M-step in a bare loop: no score, history, stopping rule or final check."""
    model = gmm.diagonal if problem.diagonal else gmm.model

    def fit(updates: int) -> LogLikelihood:
        bound = bind(model, (problem.data, problem.num_components), {}, with_prior=False)
        m_step = MStep(bound, "auto", "em")
        engine, params = choose_engine(bound, m_step), problem.start
        for _ in range(updates):
            params, _ = m_step.update(params, engine.e_step(params))
        return lambda: engine.e_step(params).log_likelihood

    return fit


def scikit_learn_mixture(problem: Mixture) -> Fit:
    """`sklearn.mixture.GaussianMixture`."""
    return _scikit_learn(problem.data, problem.diagonal, [problem.start])


def scikit_learn_restarts(problem: Mixture) -> Fit:
    """One `GaussianMixture` for each of the starts that `ours_restarts` draws."""
    return _scikit_learn(problem.data, problem.diagonal, _starts(problem))


def _scikit_learn(data: Tensor, diagonal: bool, starts: Sequence[Params]) -> Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    rows = data.numpy()
    precisions = [1 / p["scale"] ** 2 if diagonal else torch.linalg.inv(p["covariance"]) for p in starts]

    def fit_one(updates: int, start: Params, precision: Tensor) -> GaussianMixture:
        return GaussianMixture(
            len(start["weights"]),
            covariance_type="diag" if diagonal else "full",
            tol=0.0,
            reg_covar=0.0,
            max_iter=updates,
            weights_init=start["weights"].numpy(),
            means_init=start["loc"].numpy(),
            precisions_init=(0.5 * (precision + precision.mT) if precision.dim() > 2 else precision).numpy(),
        ).fit(rows)

    def fit(updates: int) -> LogLikelihood:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of updates never converges
            found = [fit_one(updates, start, precision) for start, precision in zip(starts, precisions, strict=True)]
        return lambda: max(float(peer.score_samples(rows).sum()) for peer in found)

    return fit


def _pomegranate(make: Callable[[int], torch.nn.Module], weights: Tensor, data: Tensor) -> Fit:
    from pomegranate.gmm import GeneralMixtureModel

    def fit(updates: int) -> LogLikelihood:
        components = [make(k) for k in range(len(weights))]
        peer = GeneralMixtureModel(components, priors=weights.clone(), max_iter=updates, tol=-math.inf)
        peer.fit(data)
        return lambda: float(peer.log_probability(data).sum())

    return fit


def pomegranate_mixture(problem: Mixture) -> Fit:
    """`pomegranate.gmm.GeneralMixtureModel` of `Normal`s."""
    from pomegranate.distributions import Normal

    kind = "diag" if problem.diagonal else "full"

    def make(k: int) -> torch.nn.Module:
        return Normal(problem.loc[k].clone(), problem.spread[k].clone(), covariance_type=kind)

    return _pomegranate(make, problem.weights, problem.data)


def pomegranate_latent_classes(problem: LatentClasses) -> Fit:
    """`pomegranate.gmm.GeneralMixtureModel` of `Bernoulli`s."""
    from pomegranate.distributions import Bernoulli

    return _pomegranate(lambda k: Bernoulli(problem.success[k].clone()), problem.weights, problem.data.double())


def stepmix_latent_classes(problem: LatentClasses) -> Fit:
    """`stepmix.StepMix` with binary items."""
    from sklearn.exceptions import ConvergenceWarning
    from stepmix.stepmix import StepMix

    data = problem.data.double().numpy()

    class Started(StepMix):
        """StepMix from the given start instead of random responsibilities."""

        def _initialize_parameters(self, data: np.ndarray, random_state: object) -> None:
            super()._initialize_parameters(data, random_state)
            self.weights_ = problem.weights.numpy().copy()
            self._mm.set_parameters({"pis": problem.success.numpy().copy()})

    def fit(updates: int) -> LogLikelihood:
        peer = Started(
            problem.num_classes, measurement="binary", n_steps=1, abs_tol=0.0, rel_tol=0.0, max_iter=updates,
            verbose=0, progress_bar=0, random_state=0,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            peer.fit(data)
        return lambda: float(peer.score(data)) * len(data)

    return fit


def hand_written_mixture(problem: Mixture) -> Fit:
    """A full-covariance mixture in plain torch, for this model alone: Φ = [1, x, x_i x_j], two products a chunk."""
    num_features = problem.data.shape[1]
    i, j = torch.triu_indices(num_features, num_features)
    chunk = 8192 if len(i) < 66 else 2048
    scale = torch.where(i == j, -0.5, -1.0).double()

    def coefficients(weights: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(covariance)
        precision = torch.cholesky_inverse(factor)
        h = (precision @ loc.unsqueeze(-1)).squeeze(-1)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        bias = weights.log() - 0.5 * (num_features * math.log(2 * math.pi) + log_det + (h * loc).sum(-1))
        return torch.cat([bias.unsqueeze(1), h, precision[:, i, j] * scale], 1)

    def e_step(x: Tensor, w: Tensor) -> tuple[Tensor, float]:
        sums, likelihood = torch.zeros_like(w), 0.0
        for begin in range(0, x.shape[1], chunk):
            part = x[:, begin : begin + chunk]
            products = [part[a:] * part[a] for a in range(num_features)]
            phi = torch.cat([torch.ones_like(part[:1]), part, *products])
            log_joint = w @ phi
            r = torch.softmax(log_joint, 0)
            likelihood += float((log_joint.amax(0) - r.amax(0).log_()).sum())
            sums.addmm_(r, phi.T)
        return sums, likelihood

    def m_step(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, total, square = sums.split([1, num_features, len(i)], 1)
        loc, second = total / count, square / count
        covariance = second.new_empty(len(sums), num_features, num_features)
        covariance[:, i, j], covariance[:, j, i] = second, second
        return count.squeeze(1) / count.sum(), loc, covariance - loc.unsqueeze(-1) * loc.unsqueeze(-2)

    def fit(updates: int) -> LogLikelihood:
        center = problem.data.mean(0)
        x = (problem.data - center).T.contiguous()
        params = (problem.weights, problem.loc - center, problem.spread)
        for _ in range(updates):
            params = m_step(e_step(x, coefficients(*params))[0])
        return lambda: e_step(x, coefficients(*params))[1]

    return fit
