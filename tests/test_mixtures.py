"""G6 on random mixtures: whatever units the M-step is made of, one update ends at the argmax of Q.

Each seed is one model (tests/mixtures.py). Q is that of the enumerated posterior at the start, differentiated
automatically: its gradient in the parameters that may move is zero, L-BFGS finds nothing higher, and what was told to
stay has stayed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import pyro_em
from tests.laws import to_constrained, to_free
from tests.mixtures import Mixture
from tests.oracles import constraints, enumerate_model, log_prior
from tests.random_mixtures import random_mixture

SEEDS = range(40)
CERTIFICATE = 1e-10
# Collinear designs and separated data are drawn too; rightly warned of, and not at issue.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.EMWarning")


@cache
def _case(seed: int) -> tuple[Mixture, dict[str, Tensor], Any]:
    mixture = random_mixture(seed)
    data = mixture.simulate(seed)
    result = pyro_em.fit(
        mixture.model,
        data,
        algorithm="map-em" if mixture.with_prior else "em",
        init=mixture.start,
        roles={name: "parameter" for name, own in mixture.parameters.items() if own.prior is not None},
        m_step=dict.fromkeys(mixture.fixed, "fixed"),
        weights={} if mixture.weights is None else {"rows": mixture.weights},
        max_iter=1,
        tol=0,
    )
    return mixture, data, result


@pytest.mark.parametrize("seed", SEEDS)
def test_one_update_is_the_argmax(seed: int) -> None:
    mixture, data, result = _case(seed)
    truth = enumerate_model(mixture.model, (data,), mixture.start, "rows", mixture.weights)
    support = constraints(mixture.model, (data,), mixture.start)
    free = to_free({n: v for n, v in result.params.items() if n not in mixture.fixed}, support)
    sizes = [u.numel() for u in free.values()]

    def q(u: Tensor) -> Tensor:
        moved = {n: part.reshape(free[n].shape) for n, part in zip(free, u.split(sizes), strict=True)}
        params = {n: mixture.start[n] for n in mixture.fixed} | to_constrained(moved, support)
        value = truth.expected_log_joint(params)
        return value + log_prior(mixture.model, (data,), params) if mixture.with_prior else value

    def negative(u: Any) -> tuple[float, Any]:
        leaf = torch.tensor(u, requires_grad=True)
        value = q(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return -float(value.detach()), -gradient.numpy()

    reached = torch.cat([u.reshape(-1) for u in free.values()]).numpy()
    rows = 48.0 if mixture.weights is None else float(mixture.weights.sum())
    top, slope = negative(reached)
    slope = np.concatenate(
        [_nearest(mixture, n, result.params[n], g) for n, g in zip(free, _split(slope, sizes), strict=True)]
    )
    assert np.abs(slope).max() <= CERTIFICATE * rows, mixture.words
    near = reached + 0.05 * np.random.default_rng(seed).normal(size=reached.shape)
    found = minimize(negative, near, jac=True, method="L-BFGS-B", options={"maxiter": 40})
    assert -float(found.fun) <= -top + 1e-12 * (abs(top) + rows), mixture.words
    for name in mixture.fixed:
        torch.testing.assert_close(result.params[name], mixture.start[name], rtol=1e-14, atol=0.0)


def _split(x: Any, sizes: list[int]) -> list[Any]:
    return np.split(x, np.cumsum(sizes)[:-1])


def _nearest(mixture: Mixture, name: str, value: Tensor, slope: Any) -> Any:
    """At the kink of a Laplace prior the subgradient nearest to 0; |x| has derivative 0 there for torch."""
    if mixture.parameters[name].kink is None:
        return slope
    rate, center = (x.expand(value.shape).numpy().reshape(-1) for x in mixture.parameters[name].kink)
    soft = np.sign(slope) * np.maximum(np.abs(slope) - rate, 0.0)
    return np.where(value.numpy().reshape(-1) == center, soft, slope)


def test_the_generator_covers_what_it_promises() -> None:
    cases = [_case(seed) for seed in SEEDS]
    mixtures = [mixture for mixture, _, _ in cases]
    words = [word for mixture in mixtures for word in mixture.words]
    sites = {word for word in words if word.isupper()}
    assert len(sites) == 12, "every family"
    for word, least in {"tie": 10, "gate": 5, "hyperparameter": 3, "exp": 5, "softplus": 3, "cumsum": 5}.items():
        assert words.count(word) >= least, word
    assert sum(m.weights is not None for m in mixtures) >= 8
    assert sum(any(site.mask is not None for site in m.sites) for m in mixtures) >= 8
    assert sum(bool(m.fixed) for m in mixtures) >= 8
    kinks = [(result.params[n], p.kink[1]) for m, _, result in cases for n, p in m.parameters.items() if p.kink]
    on, off = sum(int((v == c).sum()) for v, c in kinks), sum(int((v != c).sum()) for v, c in kinks)
    assert min(on, off) >= 3, "coefficients at the kink of their prior, and away from it"
    routes = {row.route for _, _, result in cases for row in result.plan.m_step}
    assert {"closed", "newton", "numeric", "fixed"} <= routes
    engines = {result.plan.engine.split()[0] for _, _, result in cases}
    assert {"predicted", "grouped", "interpreted"} <= engines
