"""What users of mixed models and factor models bring: units far from the start, a response without a single value,
effects that are not there, weights where they cannot be.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em

positive = constraints.positive
GENERATOR = torch.Generator().manual_seed(4)
GROUP = torch.arange(48) % 6
ARM = torch.arange(48) % 2


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def _param(name: str, value: float | list[float], constraint: constraints.Constraint = constraints.real) -> Tensor:
    return pyro.param(name, torch.tensor(value, dtype=torch.float64), constraint=constraint)


X, EFFECTS, NOISE = _normal(48), _normal(6, 2), _normal(48)


def slopes(x: Tensor, group: Tensor, y: Tensor) -> None:
    beta, s = _param("beta", [0.0, 0.0]), _param("s", 1.0, positive)
    D = pyro.param("D", torch.eye(2).double(), constraint=constraints.positive_definite)
    with pyro.plate("groups", 6):
        b = pyro.sample("b", dist.MultivariateNormal(beta, D))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[group, 0] + b[group, 1] * x, s), obs=y)


def arms(group: Tensor, arm: Tensor, y: Tensor) -> None:
    """Error scales of their own: the model is interpreted."""
    mean, tau = _param("mean", 0.0), _param("tau", 1.0, positive)
    s = _param("s", [1.0, 1.0], positive)
    with pyro.plate("groups", 6):
        b = pyro.sample("b", dist.Normal(torch.zeros_like(tau), tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean + b[group], s[arm]), obs=y)


def two_responses(first: Tensor, second: Tensor | None) -> None:
    loading, s = _param("loading", [1.0, 1.0]), _param("s", [1.0, 1.0], positive)
    with pyro.plate("rows", len(first)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(s[0]), 1.0))
        pyro.sample("first", dist.Normal(z.unsqueeze(-1) * loading, s).to_event(1), obs=first)
        if second is not None:
            pyro.sample("second", dist.Normal(_param("k", 0.5) * z, _param("t", 1.0, positive)), obs=second)


@pytest.mark.parametrize("unit", [1e-9, 1e6])
def test_the_unit_of_the_data_may_be_far_from_that_of_the_start(unit: float) -> None:
    y = 1.0 + EFFECTS[GROUP, 0] + EFFECTS[GROUP, 1] * X + 0.3 * NOISE
    plain = pyro_em.fit(slopes, X, GROUP, y, tol=1e-9)
    pyro.clear_param_store()
    other = pyro_em.fit(slopes, X, GROUP, unit * y, tol=1e-9 / unit)  # slopes in beta are in the inverse unit
    assert other.log_likelihood == pytest.approx(plain.log_likelihood - 48 * math.log(unit), rel=1e-9)
    assert torch.allclose(other.params["D"] / unit**2, plain.params["D"], rtol=1e-5)


@pytest.mark.parametrize("there", [0.0, 1.5])
def test_a_variance_of_zero_is_reported_by_the_interpreted_engine(there: float) -> None:
    y = 1.0 + there * EFFECTS[GROUP, 0] + torch.tensor([0.5, 1.5]).double()[ARM] * NOISE
    means = torch.zeros(6).double().index_add(0, GROUP, y - there * EFFECTS[GROUP, 0]) / 8
    y = y - 0.9 * means[GROUP]  # groups that differ by less than chance
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = pyro_em.fit(arms, GROUP, ARM, y)
    assert "interpreted" in result.plan.engine
    told = [str(w.message) for w in caught if w.category is pyro_em.BoundaryEstimate]
    assert bool(told) == (there == 0.0)
    assert all("at least as high with 'tau' at 0" in text for text in told)


def test_a_response_that_is_wholly_missing_says_nothing() -> None:
    z = _normal(30)
    first = z.unsqueeze(-1) * torch.tensor([1.0, 0.5]).double() + 0.3 * _normal(30, 2)
    alone = pyro_em.fit(two_responses, first, None, max_iter=20, tol=0)
    pyro.clear_param_store()
    with pytest.warns(pyro_em.UnidentifiedParameter, match="'t'"), warnings.catch_warnings():
        warnings.simplefilter("ignore", pyro_em.errors.CollinearDesign)
        both = pyro_em.fit(two_responses, first, torch.full((30,), torch.nan), missing="nan", max_iter=20, tol=0)
    assert both.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-12)
    assert torch.allclose(both.params["loading"], alone.params["loading"], rtol=1e-10)
    assert both.params["t"] == 1.0 and both.params["k"] == 0.5


def test_weights_of_groups_whose_rows_stand_elsewhere_are_refused() -> None:
    y = EFFECTS[GROUP, 0] + NOISE
    with pytest.raises(pyro_em.Refusal, match="'y', coupled to it by latents, stands outside of") as caught:
        pyro_em.fit(slopes, X, GROUP, y, weights={"groups": torch.arange(6)})
    assert caught.value.site == "b" and "mask" in caught.value.remedy


def test_data_that_are_wholly_missing_are_an_error() -> None:
    nothing = torch.full((30,), torch.nan)
    with pytest.raises(pyro_em.InputError, match="Every value of 'first', 'second' is missing"):
        pyro_em.fit(two_responses, nothing.unsqueeze(-1).expand(30, 2), nothing, missing="nan")


def test_a_start_without_spread_is_named() -> None:
    """It was called a model that is not Gaussian, after a whole fit."""
    with pytest.raises(pyro_em.InputError, match=r"'b': its argument 'scale' is 0, and .* greater than 0"):
        pyro_em.fit(arms, GROUP, ARM, EFFECTS[GROUP, 0] + NOISE, init={"tau": torch.tensor(0.0)})


def grouped(group: Tensor, y: Tensor, reads: str, fixed: bool) -> None:
    """Effects of groups, as latents or as parameters, and the ways in which a model may read them."""
    tau, zero = _param("tau", 1.0, positive), torch.zeros(4).double()
    with pyro.plate("groups", 4):
        b = None if fixed else pyro.sample("b", dist.Normal(zero, tau))
    b = _param("b", zero.tolist()) if b is None else b
    known, loc = group >= 0, Vindex(b)[..., group] if reads == "vindex" else b[group]
    loc = {"where": torch.where(known, loc, 0.5), "times": loc * known}.get(reads, loc)
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=known | (reads != "masked")):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("reads", ["vindex", "plain", "masked", "where", "times"])
def test_a_group_below_zero_is_an_error_where_it_matters(reads: str, fixed: bool) -> None:
    group, y = torch.arange(12) % 4, EFFECTS[torch.arange(12) % 4, 0] + NOISE[:12]
    coded = torch.where(torch.isin(torch.arange(12), torch.tensor([3, 7])), -1, group)
    if reads in ("vindex", "plain"):
        with pytest.raises(pyro_em.InputError, match=r"'y': row 3 \(and 1 more\) takes its entry of 'b' .* below 0"):
            pyro_em.fit(grouped, coded, y, reads, fixed)
        return
    found = pyro_em.fit(grouped, coded, y, reads, fixed, max_iter=5, tol=0)
    pyro.clear_param_store()
    kept = pyro_em.fit(grouped, coded[coded >= 0], y[coded >= 0], reads, fixed, max_iter=5, tol=0)
    alone = dist.Normal(0.5 if reads == "where" else 0.0, 1.0).log_prob(y[coded < 0]).sum() * (reads != "masked")
    assert found.log_likelihood == pytest.approx(kept.log_likelihood + float(alone), rel=1e-12)
    assert all(torch.allclose(found.params[n], kept.params[n], rtol=1e-12) for n in found.params)


def written_out(group: Tensor, y: Tensor, prior: Callable[[Tensor, Tensor], dist.Distribution]) -> None:
    mu, tau = _param("mu", 0.3), _param("tau", 1.0, positive)
    with pyro.plate("groups", 6):
        b = pyro.sample("b", prior(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[group], 1.0), obs=y)


@pytest.mark.parametrize("accelerate", [None, "squarem"])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_prior_may_be_written_out_for_every_group(fixed: bool, accelerate: str | None) -> None:
    """Zeros or an expanded mean for every group ended in an error of shapes."""
    y, ones = 1.0 + EFFECTS[GROUP, 0] + NOISE, torch.ones(6).double()
    found = []
    for mean, spread in ((None, None), (ones, None), (None, ones), (ones, ones)):

        def prior(mu: Tensor, tau: Tensor, mean: Tensor | None = mean, spread: Tensor | None = spread) -> dist.Normal:
            mu = torch.zeros_like(mu) if fixed else mu
            return dist.Normal(mu if mean is None else mu * mean, tau if spread is None else tau * spread)

        pyro.clear_param_store()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pyro_em.UnidentifiedParameter)
            found.append(pyro_em.fit(written_out, GROUP, y, prior, tol=1e-9, accelerate=accelerate))
    assert fixed or found[0].params["mu"] == pytest.approx(float(y.mean()), rel=1e-6)
    for other in found[1:]:
        assert other.converged and other.log_likelihood == pytest.approx(found[0].log_likelihood, rel=1e-12)
        assert all(torch.allclose(other.params[n], found[0].params[n], rtol=1e-6) for n in other.params)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_spread_of_latents_that_no_data_read_is_not_said_to_vanish(steps: int) -> None:
    """The slope of the last step of a trend moves nothing: of a trend of one step no datum says how slopes spread."""

    def trend(y: Tensor) -> None:
        level, slope = torch.zeros(()).double(), torch.zeros(()).double()
        level_sd, slope_sd = _param("level_sd", 0.7, positive), _param("slope_sd", 0.5, positive)
        with pyro.plate("series", y.shape[1]):
            for t in pyro.markov(range(len(y))):
                level = pyro.sample(f"level_{t}", dist.Normal(level + slope, level_sd))
                slope = pyro.sample(f"slope_{t}", dist.Normal(slope, slope_sd))
                pyro.sample(f"y_{t}", dist.Normal(level, 1.0), obs=y[t])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = pyro_em.fit(trend, 3 * _normal(steps, 20), max_iter=50)
    told = [str(w.message) for w in caught if issubclass(w.category, pyro_em.EMWarning)]
    if steps == 2:
        assert result.params["slope_sd"] != 0.5
        assert not any("No data inform" in text for text in told)
        return
    assert {w.category for w in caught} == {pyro_em.UnidentifiedParameter}
    assert len(told) == 1 and "No data inform 'slope_sd'" in told[0]
    assert result.params["slope_sd"] == pytest.approx(0.5, abs=1e-12)


def test_effects_whose_covariate_is_zero_in_every_row_are_named() -> None:
    """No row says which group it belongs to then: this ended in an error of shapes."""

    def model(y: Tensor, x: Tensor) -> None:
        with pyro.plate("groups", 6):
            b = pyro.sample("b", dist.Normal(torch.zeros(()).double(), _param("tau", 0.5, positive)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x * b[GROUP], _param("s", 1.0, positive)), obs=y)

    y = _normal(48)
    with pytest.raises(pyro_em.Refusal, match="moves with none of them") as caught:
        pyro_em.fit(model, y, torch.zeros(48).double())
    assert caught.value.site == "y" and "covariate" in str(caught.value)
    x = torch.zeros(48).double()
    x[3], y[3] = 1.0, 9.0  # one row does
    assert pyro_em.fit(model, y, x, max_iter=2, tol=0).log_likelihood < 0


@pytest.mark.parametrize("swings", [0.0, 2.0])
def test_a_noise_of_a_state_space_model_that_vanishes_is_reported(swings: float) -> None:
    """A level that does not move, estimated from noise with less drift than chance has; its first state shares the
    scale."""

    def level(y: Tensor) -> None:
        at, level_sd, s = torch.zeros(()).double(), _param("level_sd", 0.5, positive), _param("s", 1.0, positive)
        for t in pyro_em.markov(len(y)):
            at = pyro.sample(f"x_{t}", dist.Normal(at, level_sd))
            pyro.sample(f"y_{t}", dist.Normal(at, s), obs=y[t])

    y = torch.tensor([1.0, -1.0]).double().repeat(15) + 0.1 * _normal(30) + swings * _normal(30).cumsum(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = pyro_em.fit(level, y, accelerate="anderson")
    told = [str(w.message) for w in caught if w.category is pyro_em.BoundaryEstimate]
    assert result.plan.engine.startswith("inside") and bool(told) == (swings == 0.0)
    assert all("at least as high with 'level_sd' at 0" in text for text in told)
