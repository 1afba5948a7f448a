"""Bad options, starts and data: each a clear `InputError` before the first iteration, and no trace of the fit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import pyro_em
from pyro_em.errors import EMWarning, InputError
from pyro_em.store import isolated_rng
from tests import classics, zoo, zoo_structured
from tests.problems import BY_NAME

NAN = float("nan")
GMM = BY_NAME["gmm_full"]
COVARIANCES = GMM.start()["S"]


def _t(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _untouched(before: dict[str, torch.Tensor], state: torch.Tensor) -> bool:
    after = dict(pyro.get_param_store().items())
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n].detach()) for n in before)
    return same and torch.equal(torch.get_rng_state(), state)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "EM"}, "'EM'.*'em', 'map-em', 'gem', 'svi'"),
    ({"algorithm": "vb"}, "'vb'.*'em'"),
    ({"max_iter": -1}, "max_iter"),
    ({"max_iter": 2.5}, "max_iter"),
    ({"max_iter": True}, "max_iter"),
    ({"tol": -1e-9}, "tol"),
    ({"tol": NAN}, "tol"),
    ({"tol": float("inf")}, "tol"),
    ({"tol": "small"}, "tol"),
    ({"restarts": 0}, "restarts"),
    ({"restarts": 1.5}, "restarts"),
    ({"restarts": True}, "restarts"),
    ({"m_step": "newton"}, "'newton'.*auto, closed, gradient, fixed"),
    ({"m_step": {"S": "newton"}}, "'newton'"),
    ({"m_step": {"sigma": "fixed"}}, "'sigma'.*pi, mu, S"),
    ({"roles": {"sigma": "parameter"}}, "'sigma'"),
    ({"roles": {"z": "parameter"}}, "'z' is discrete"),
    ({"weights": {"people": torch.ones(60)}}, "'people'.*'rows'"),
    ({"weights": {"rows": torch.ones(59)}}, r"60 elements.*\(59,\)"),
    ({"weights": {"rows": torch.ones(60).index_fill(0, torch.tensor(3), -1.0)}}, "element 3"),
    ({"weights": {"rows": torch.ones(60).index_fill(0, torch.tensor(3), NAN)}}, "element 3"),
    ({"weights": {"rows": torch.zeros(60)}}, "all weights"),
    ({"init": "kmeans"}, "'kmeans'.*'kmeans\\+\\+'"),
    ({"init": {"sigma": torch.eye(2)}}, "'sigma'.*pi, mu, S"),
    ({"init": {"mu": torch.zeros(3)}}, r"'mu' has shape \(3, 2\)"),
    ({"init": {"mu": torch.full((3, 2), NAN)}}, "'mu' is not finite"),
    ({"init": {"pi": _t([0.2, 0.3, 0.6])}}, "'pi' violates"),
    ({"init": {"pi": _t([-0.2, 0.6, 0.6])}}, "'pi' violates"),
    ({"init": {"S": -COVARIANCES}}, "'S' violates"),
    ({"init": {"S": COVARIANCES + torch.tensor([[0.0, 0.5], [0.0, 0.0]])}}, "'S' violates"),
    ({"algorithm": "svi", "weights": {"rows": torch.ones(60)}}, "weights.*svi"),
    ({"algorithm": "svi", "m_step": "closed"}, "m_step.*svi"),
    ({"algorithm": "svi", "max_iter": -1}, "max_iter"),
    ({"algorithm": "svi", "restarts": 0}, "restarts"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    pyro.param("mu", torch.tensor([7.0]))
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        pyro_em.fit(GMM.model, *GMM.args, seed=0, **options)
    assert _untouched(before, state)


def _with(value: float) -> torch.Tensor:
    return _t([0.5, 1.5, value, 2.5])


DATA: list[tuple[Any, torch.Tensor, str]] = [
    (classics.normal_mixture, _with(NAN), "'y'.*row 2"),
    (classics.normal_mixture, _with(float("inf")), "'y'.*row 2"),
    (classics.normal_mixture, _with(NAN)[:0], "empty"),
    (classics.poisson_mixture, _t([1.0, 2.0, -1.0]), "row 2.*support"),
    (classics.poisson_mixture, _t([1.0, 2.5, 1.0]), "row 1.*support"),
    (classics.exponential_mixture, _t([[1.0, 2.0], [-1.0, 2.0]]), "row.*1.*support"),
    (zoo.zero_inflated_poisson, _t([1.0, NAN]), "row 1"),
    (zoo_structured.categorical_hmm, torch.tensor([[0, 1], [3, 0]]), "row 1.*support"),
    (zoo.beta_mixture, _t([0.5, 1.5]), "row 1.*support"),
]


@pytest.mark.parametrize(("model", "data", "message"), DATA)
@pytest.mark.parametrize("algorithm", ["em", "svi"])
def test_data_that_cannot_be(model: Any, data: torch.Tensor, message: str, algorithm: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        pyro_em.fit(model, data, algorithm=algorithm, seed=0)
    assert _untouched({}, state)


def test_planning_says_the_same() -> None:
    with pytest.raises(InputError, match="'EM'"):
        pyro_em.plan(GMM.model, *GMM.args, algorithm="EM")
    with pytest.raises(InputError, match="'sigma'"):
        pyro_em.plan(GMM.model, *GMM.args, roles={"sigma": "latent"})
    assert not dict(pyro.get_param_store().items())


@pytest.mark.parametrize("value", [torch.tensor([0.2, 0.3, 0.5]), [0.2, 0.3, 0.5], (0.2, 0.3, 0.5)])
def test_starts_may_be_anything_that_makes_a_tensor(value: Any) -> None:
    init = {**GMM.start(), "pi": value}
    result = pyro_em.fit(GMM.model, *GMM.args, init=init, max_iter=0)
    torch.testing.assert_close(result.params["pi"], _t([0.2, 0.3, 0.5]))


def test_exact_zeros_in_a_start_stay_exact() -> None:
    init = {**GMM.start(), "pi": _t([0.5, 0.5, 0.0])}
    with pytest.warns(EMWarning):  # nothing informs the empty component, and pi is on its boundary
        result = pyro_em.fit(GMM.model, *GMM.args, init=init, max_iter=3, tol=0)
    assert float(result.params["pi"][2]) == 0.0


def test_a_zero_that_the_data_need_is_named() -> None:
    """Structural zero meets an observation that needs it."""
    start = {"pi": _t([0.5, 0.5]), "lam": _t([0.0, 0.0])}
    with pytest.raises(pyro_em.NonFiniteError, match=r"Site 'count'.*row"):
        pyro_em.fit(classics.poisson_mixture, _t([0.0, 3.0, 0.0]), init=start)
    assert not dict(pyro.get_param_store().items())


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="it is in use, and has a state of its own")
def test_without_an_accelerator_none_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would note the seed of a fit for whoever uses one first; the draws are those of the seed all the same."""

    def seeded(seed: int) -> None:
        raise AssertionError(seed)

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    with isolated_rng(5):
        drawn = torch.rand(3), np.random.random(), random.random()
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert drawn[1:] == (np.random.RandomState(5).random_sample(), random.Random(5).random())
