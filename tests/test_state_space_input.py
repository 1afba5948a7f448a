"""State-space models and bad input: every refusal names the site, and where; switching systems are offered by SVI."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.charts import chart
from pyro_em.errors import DegenerateLikelihoodError, InputError, NonFiniteError, Refusal
from pyro_em.problem import bind
from tests.dense import dense
from tests.loop_chains import BY_NAME
from tests.state_space_cases import CASES, trend


def test_an_outlier_of_ten_thousand_standard_deviations_stays_finite() -> None:
    y = CASES[2].data.clone()
    y[0, 5] += 1e4
    result = pyro_em.fit(trend, y, max_iter=50, tol=0)
    assert all(bool(value.isfinite().all()) for value in result.params.values())
    assert (np.diff(result.history["objective"]) >= -1e-7).all()


def test_bad_input_is_named() -> None:
    y = CASES[2].data.clone()
    y[0, 3] = torch.nan
    with pytest.raises(InputError, match="'y'"):
        pyro_em.fit(trend, y)

    def silent(y: Tensor) -> None:
        q = pyro.param("q", torch.tensor([1.0]), constraint=constraints.positive)
        start = dist.Normal(torch.zeros(1), 0.0, validate_args=False).to_event(1)
        still = dist.Normal(torch.zeros(1), q * 0, validate_args=False).to_event(1)
        pyro.sample("y", dist.LinearHMM(start, torch.eye(1), still, torch.eye(1), still, duration=y.shape[1]), obs=y[0])

    with pytest.raises(NonFiniteError, match=r"'y'.*step 0"):
        pyro_em.fit(silent, CASES[2].data)


def _switching(y: Tensor, in_states: bool) -> None:
    """A regime at every step that moves the states, or else only what is seen of them."""
    P = pyro.param("P", torch.tensor([[0.9, 0.1], [0.1, 0.9]]), constraint=constraints.simplex)
    a = pyro.param("a", torch.tensor([0.9, 0.1]))
    s, x = torch.tensor(0), torch.zeros(())
    for t in pyro.markov(range(len(y))):
        s = pyro.sample(f"s_{t}", dist.Categorical(P[s]))
        x = pyro.sample(f"x_{t}", dist.Normal(a[s] * x if in_states else 0.5 * x, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x if in_states else a[s] * x, 1.0), obs=y[t])


@pytest.mark.parametrize(("in_states", "site"), [(True, "x_0"), (False, "y_0")])
def test_switching_systems_are_refused(in_states: bool, site: str) -> None:
    with pytest.raises(Refusal, match=rf"'{site}'.*switches.*svi"):
        pyro_em.fit(_switching, torch.randn(5), in_states)


FAST = pyro.optim.Adam({"lr": 0.05})


def _guide(y: Tensor, in_states: bool) -> None:
    """The states, each by itself; the discrete latents are left to enumeration."""
    for t in pyro.markov(range(len(y))):
        loc = pyro.param(f"loc_{t}", torch.tensor(0.0))
        scale = pyro.param(f"scale_{t}", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample(f"x_{t}", dist.Normal(loc, scale))


def test_switching_systems_are_offered_by_svi() -> None:
    """The ELBO climbs, and stays below the log-evidence, that of 2³ joint normals, but for the noise of its draws."""
    y = torch.tensor([0.5, 3.5, 4.0])
    result = pyro_em.fit(_switching, y, True, algorithm="svi", guide=_guide, max_iter=200, seed=0, optim=FAST)
    assert not result.exact
    first, last = (np.array(result.history["objective"])[part] for part in (slice(50), slice(-100, None)))
    assert last.mean() > first.mean() + 3 * last.std() / 10
    names = ("P", "a")
    truth = dense(_switching, (y, True), {n: result.params[n] for n in names}).log_evidence
    assert last.mean() < float(truth.detach()) + 3 * last.std() / 10


def _level(y: Tensor, still: bool = False, blind: bool = False) -> None:
    q = pyro.param("q", torch.tensor(1.0), constraint=constraints.positive)
    r = pyro.param("r", torch.tensor(1.0), constraint=constraints.positive)
    x = torch.tensor(0.0)
    for t in pyro_em.markov(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, 0 * q if still else q, validate_args=False))
        pyro.sample(f"y_{t}", dist.Normal(x, 0 * r if blind else r, validate_args=False), obs=y[t])


def test_loops_and_bad_input() -> None:
    """States or observations without noise are fine, both at once have no density; no step at all; an outlier."""
    y = torch.tensor([0.3, 0.1, -0.4, 0.2])
    for still, blind in ((True, False), (False, True)):
        result = pyro_em.fit(_level, y, still, blind, max_iter=2, tol=0)
        assert np.isfinite(result.log_likelihood)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(y if still else torch.diff(y, prepend=torch.zeros(1)))
        assert result.history["log_likelihood"][0] == pytest.approx(float(expected.sum()), rel=1e-12)
    with pytest.raises(NonFiniteError, match=r"'y'.*step 0"):
        pyro_em.fit(_level, y, True, True)
    with pytest.raises(InputError, match="0 steps"):
        pyro_em.fit(_level, y[:0])
    with pytest.raises(InputError, match=r"'y_1:4'.*NaN"):
        pyro_em.fit(_level, torch.where(torch.arange(4) == 2, torch.nan, y))
    wild = torch.where(torch.arange(4) == 2, 1e4, y)
    result = pyro_em.fit(_level, wild, max_iter=30, tol=0)
    assert all(bool(value.isfinite()) for value in result.params.values())
    assert (np.diff(result.history["objective"]) >= 0).all()


def test_a_series_of_no_steps() -> None:
    with pytest.raises(InputError, match="'y': the series has no steps"):
        pyro_em.fit(trend, CASES[2].data[:, :0])


@pytest.mark.parametrize("accelerate", [None, "squarem", "anderson"])
def test_noises_that_become_singular_end_in_a_sentence(accelerate: str | None) -> None:
    """Four steps of three series do not determine a system of two states: its likelihood is unbounded."""
    problem = BY_NAME["system"]
    init = {**problem.start(), "A": torch.tensor([[0.5, 0.4], [-0.3, 0.2]])}
    with pytest.raises(DegenerateLikelihoodError, match="noise has become singular") as caught:
        pyro_em.fit(problem.model, *problem.args, init=init, accelerate=accelerate, max_iter=4000, tol=1e-9)
    assert caught.value.site == "y"
    result = caught.value.result
    assert np.isfinite(result.log_likelihood)
    assert (np.diff(result.history["objective"]) >= -1e-9).all()


def test_a_collapse_is_said_where_the_reference_has_lost_its_digits() -> None:
    """From this start an extrapolated step lands at noises of which the reference finds another likelihood."""
    problem, g = BY_NAME["system"], torch.Generator().manual_seed(12)
    records, init = bind(problem.model, problem.args, {}, with_prior=False).parameters, {}
    for name, value in problem.start().items():
        own = chart(records[name].constraint, value)
        free = own.to_free(value)
        init[name] = own.from_free(free + torch.randn(free.shape, generator=g))
    with pytest.raises(DegenerateLikelihoodError, match="noise has become singular"):
        pyro_em.fit(problem.model, *problem.args, init=init, accelerate="squarem", max_iter=300)


def test_a_walk_that_strays_far_keeps_its_noise() -> None:
    """The noises are 1e-7 of the variance of the states, which is no reason to refuse them: a drift may be any size."""
    g = torch.Generator().manual_seed(0)
    noise = torch.linalg.cholesky(torch.tensor([[1.0, 0.3], [0.3, 1.0]]))
    x = (torch.randn(60, 2, generator=g) @ noise.T + torch.tensor([300.0, 3.0])).cumsum(0)
    y = x + 2 * torch.randn(60, 2, generator=g)
    assert float(x[:, 0].var()) > 2e7
    drift = torch.tensor([300.0, 0.0])
    far = pyro_em.fit(_drifting, y, init={"c": drift}, max_iter=30, tol=0)
    near = pyro_em.fit(_drifting, y - drift * torch.arange(1.0, 61.0)[:, None], max_iter=30, tol=0)
    np.testing.assert_allclose(far.history["objective"], near.history["objective"], rtol=1e-11)
    torch.testing.assert_close(far.params["c"] - drift, near.params["c"], rtol=0.0, atol=1e-6)
    for name in "QR":
        torch.testing.assert_close(far.params[name], near.params[name], rtol=1e-6, atol=0.0)


@pytest.mark.filterwarnings("ignore::pyro_em.errors.EMWarning")
def test_a_noise_that_no_step_tells_about_stays_where_it_is() -> None:
    """Series of one step have no transition."""
    y = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0))
    start = BY_NAME["system"].start()
    result = pyro_em.fit(BY_NAME["system"].model, y, init=start, max_iter=2, tol=0)
    assert torch.equal(result.params["Q"], start["Q"])


def _drifting(y: Tensor) -> None:
    c = pyro.param("c", torch.zeros(2))
    Q, R = (pyro.param(n, torch.eye(2), constraint=constraints.positive_definite) for n in "QR")
    first, seen = (dist.MultivariateNormal(torch.zeros(2), s) for s in (torch.eye(2), R))
    step = dist.MultivariateNormal(c, Q)
    pyro.sample("y", dist.GaussianHMM(first, torch.eye(2), step, torch.eye(2), seen, duration=len(y)), obs=y)
