"""Hard and tempered E-steps: classification EM, stochastic EM, deterministic annealing; over the table of problems.

Oracles: enumeration of all assignments, k-means of scikit-learn, and the modes and draws that enumeration gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.anneal import temperatures
from pyro_em.cli import main
from pyro_em.errors import InputError, Refusal
from pyro_em.evidence.assigned import assign
from pyro_em.problem import bind
from tests.oracles import log_prior
from tests.problems import BY_NAME, PROBLEMS

EPS = torch.finfo(torch.float64).eps
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.EMWarning")  # hard assignments empty components

# One problem of every structure: mixtures, several latents, nested plates, chains, weights, labels, numeric M-steps,
# responses seen in part.
CHOSEN = [
    "gmm_full", "factorial", "nested_classes", "categorical_hmm", "linkage", "label_as_site", "censored_mixture",
]  # fmt: skip
LOCAL = [p.name for p in PROBLEMS if p.plate and p.name in CHOSEN and p.name != "nested_classes"]


def _fit(name: str, algorithm: str = "em", **options: Any) -> Any:
    problem = BY_NAME[name]
    chosen = {"init": problem.start(), "max_iter": 8, "tol": 0, **problem.fit_options(algorithm), **options}
    return pyro_em.fit(problem.model, *problem.args, **chosen)


def _classification(name: str, params: dict[str, Tensor]) -> float:
    """Σ_n w_n max_z log p(x_n, z | params), all assignments of a row enumerated."""
    truth = BY_NAME[name].oracle(params)
    assert len(truth.outer) == 1
    return float((truth.log_joint[0].max(0).values * truth.weights).sum())


@pytest.mark.parametrize("name", CHOSEN)
def test_classification_em_climbs_the_classification_likelihood(name: str) -> None:
    result = _fit(name, "cem")
    climbed = np.array(result.history["objective"])
    assert (np.diff(climbed) >= -16 * EPS * np.abs(climbed).max()).all()
    assert not result.exact
    assert result.elbo == climbed[-1]
    if name in LOCAL:
        assert climbed[0] == pytest.approx(_classification(name, BY_NAME[name].start()), rel=1e-12)
        assert climbed[-1] == pytest.approx(_classification(name, result.params), rel=1e-12)
    exact = float(BY_NAME[name].oracle(result.params).log_evidence)
    assert result.log_likelihood == pytest.approx(exact, rel=1e-12)
    assert result.gap >= 0


def test_classification_em_with_one_known_spread_is_k_means() -> None:
    """Equal weights and equal known variances: Lloyd's algorithm, which scikit-learn has."""
    from sklearn.cluster import KMeans

    (x, _), start = BY_NAME["gmm_full"].args, BY_NAME["gmm_full"].start()["mu"]

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", start.clone())
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=x)

    result = pyro_em.fit(model, x, algorithm="cem")
    peer = KMeans(3, init=start.numpy(), n_init=1, algorithm="lloyd", tol=0).fit(x.numpy())
    assert result.converged
    np.testing.assert_allclose(result.params["mu"].numpy(), peer.cluster_centers_, rtol=1e-10)
    assert torch.equal(result.posterior().mode()["z"], torch.as_tensor(peer.labels_).long())
    constant = len(x) * (np.log(3) + np.log(2 * np.pi))
    assert result.elbo == pytest.approx(-peer.inertia_ / 2 - constant, rel=1e-12)


@pytest.mark.parametrize("name", CHOSEN)
def test_stochastic_em_is_reproducible_and_says_what_it_returns(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (_fit(name, "sem", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first.params[n], again.params[n]) for n in first.params)
    assert first.history["objective"] == again.history["objective"]
    assert first.history["objective"] != other.history["objective"]
    assert first.outcome is pyro_em.Outcome.averaged
    assert not first.converged
    assert not first.exact
    assert (first.num_iterations, len(first.history["objective"])) == (8, 10)  # start, 8 updates, their average
    exact = float(BY_NAME[name].oracle(first.params).log_evidence)
    assert first.log_likelihood == first.history["log_likelihood"][-1] == pytest.approx(exact, rel=1e-12)


def test_stochastic_em_returns_the_average_of_the_last_half() -> None:
    seen: list[dict[str, Tensor]] = []
    result = _fit("gmm_diagonal", "sem", seed=0, max_iter=7, callbacks=[lambda step: seen.append(step.params)])
    for name, value in result.params.items():
        torch.testing.assert_close(value, torch.stack([s[name] for s in seen[4:]]).mean(0), rtol=1e-14, atol=0.0)


def test_stochastic_em_wanders_around_the_maximum() -> None:
    """Means over many updates lie within a few Monte Carlo errors of EM's limit."""
    limit = _fit("poisson_mixture", max_iter=5000, tol=1e-9)
    chain: list[Tensor] = []
    result = _fit(
        "poisson_mixture", "sem", seed=0, max_iter=250, callbacks=[lambda step: chain.append(step.params["lam"])]
    )
    spread = torch.stack(chain[125:]).std(0)
    assert ((result.params["lam"] - limit.params["lam"]).abs() < spread).all()
    assert result.log_likelihood > limit.log_likelihood - 1.0


@pytest.mark.parametrize("name", ["gmm_diagonal", "factorial", "categorical_hmm"])
def test_draws_have_posterior_frequencies(name: str) -> None:
    problem = BY_NAME[name]
    bound = bind(problem.model, problem.args, {}, with_prior=False)
    params = problem.start()
    evidence, run = bound.evidence(params)
    with torch.no_grad():
        factors = bound.factors(run)
    torch.manual_seed(0)
    draws = [assign(bound.graph, factors, "sample")[1] for _ in range(400)]
    for site in bound.graph.latents:
        found = torch.stack([d[site] for d in draws])
        assert ((found == 0) | (found == 1)).all()
        expected = evidence.weights[site]
        error = (expected * (1 - expected) / 400).sqrt()
        assert ((found.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("temperature", [3.0, 0.4])
def test_tempered_values_and_weights_are_those_of_enumeration(name: str, temperature: float) -> None:
    problem = BY_NAME[name]
    weights = {} if problem.weights is None else {problem.plate: problem.weights}
    bound = bind(problem.model, problem.args, {}, with_prior=False, weights=weights)
    _, run = bound.evidence(problem.start())
    with torch.no_grad():
        factors = bound.factors(run)
    value, _ = assign(bound.graph, factors, "sum", temperature)
    if name in LOCAL:
        truth = problem.oracle(problem.start())
        expected = temperature * torch.logsumexp(truth.log_joint[0] / temperature, 0)
        assert value == pytest.approx(float((expected * truth.weights).sum()), rel=1e-12)
    # q maximises E_q log p(x,z) + T H(q), so that its value lies between the mode's and the evidence's at T < 1
    best, _ = assign(bound.graph, factors, "max")
    whole, _ = assign(bound.graph, factors, "sum")
    assert best <= value
    assert (value >= whole) == (temperature > 1)


@pytest.mark.parametrize("name", CHOSEN)
def test_annealing_climbs_at_each_temperature_and_ends_as_em(name: str) -> None:
    """G1 within every temperature, Fisher's identity for the tempered objective, and an EM limit."""
    schedule = [2.5, 2.5, 2.5, 1.5, 1.5]
    result = _fit(name, temperature=schedule, max_iter=12)
    history = {key: np.array(values) for key, values in result.history.items()}
    assert history["temperature"].tolist() == [*schedule, *[1.0] * 8]
    same = np.diff(history["temperature"]) == 0
    rises = np.diff(history["objective"])[same]
    assert (rises >= -16 * EPS * np.abs(history["objective"]).max()).all()
    assert result.exact
    assert result.num_iterations == 12
    assert history["objective"][-1] == result.log_likelihood
    np.testing.assert_array_equal(history["objective"][5:], history["log_likelihood"][5:])
    reached: list[dict[str, Tensor]] = []
    _fit(name, temperature=schedule, max_iter=12, callbacks=[lambda step: reached.append(step.params)])
    onward = _fit(name, init=reached[5], max_iter=7)
    assert onward.log_likelihood == pytest.approx(result.log_likelihood, rel=1e-12)


def test_annealing_with_priors_and_numeric_updates() -> None:
    problem = BY_NAME["gmm_map"]
    result = _fit("gmm_map", "map-em", temperature=2.0, max_iter=400, tol=1e-7)
    assert result.converged
    total = result.log_likelihood + float(log_prior(problem.model, problem.args, result.params))
    assert result.log_posterior == pytest.approx(total, rel=1e-12)
    result = _fit("beta_mixture", "gem", temperature=[1.5, 1.5], max_iter=4)
    assert result.history["temperature"] == [1.5, 1.5, 1.0, 1.0, 1.0]


def test_annealing_leaves_a_bad_start() -> None:
    """Three well separated groups, two centres started in one of them: EM stays in a poor mode, annealing does not."""
    rng = np.random.default_rng(0)
    x = torch.as_tensor(np.concatenate([rng.normal(c, 0.5, 40) for c in (-6.0, 0.0, 6.0)]))

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([-6.2, -5.8, 3.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(mu[z], 0.5), obs=x)

    plain, better = pyro_em.fit(model, x), pyro_em.fit(model, x, temperature=60.0)
    assert plain.converged
    assert better.converged
    assert better.log_likelihood > plain.log_likelihood + 100


def test_schedules() -> None:
    assert list(temperatures([2.0, 1.0, 3.0])) == [2.0, 1.0, 3.0]
    assert list(temperatures(torch.tensor([2.0]))) == [2.0]
    assert list(temperatures(lambda k: max(1.0, 3.0 - k))) == [3.0, 2.0]
    for first in (4.0, 0.3):
        cooled = list(temperatures(first))
        assert cooled[0] == pytest.approx(first)
        assert np.abs(np.array(cooled) - 1).min() >= 0.01
        np.testing.assert_allclose(np.array(cooled) - 1, (first - 1) * 0.9 ** np.arange(len(cooled)))
    assert list(temperatures(1.0)) == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.0}, "iteration 0 it is 0.0"),
    ({"temperature": -1.0}, "positive"),
    ({"temperature": float("nan")}, "nan"),
    ({"temperature": [2.0, float("inf")]}, "iteration 1 it is inf"),
    ({"temperature": [2.0, "hot"]}, "iteration 1 it is 'hot'"),
    ({"temperature": True}, "not True"),
    ({"temperature": "hot"}, "not 'hot'"),
    ({"temperature": lambda k: 2.0 - 3.0 * k}, "iteration 1 it is -1.0"),
    ({"algorithm": "cem", "temperature": 2.0}, "temperature belongs to the exact algorithms.*'cem'"),
    ({"algorithm": "sem", "accelerate": "squarem"}, "accelerate belongs.*'sem'"),
    ({"algorithm": "svi", "temperature": 2.0}, "temperature belongs.*'svi'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:30])
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    problem, state = BY_NAME["poisson_mixture"], torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        pyro_em.fit(problem.model, *problem.args, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert not dict(pyro.get_param_store().items())


def test_plans_say_what_takes_the_place_of_the_posterior() -> None:
    problem = BY_NAME["poisson_mixture"]
    plans = {a: pyro_em.plan(problem.model, *problem.args, algorithm=a) for a in ("cem", "sem")}
    assert "E-step by the most probable states, climbing log p(x,z|θ)" in str(plans["cem"])
    assert "E-step by one posterior draw of the states" in str(plans["sem"])
    assert "interpreted (one draw of the states takes the place of the posterior)" in str(plans["sem"])
    assert not plans["cem"].exact
    annealed = pyro_em.plan(problem.model, *problem.args, temperature=2.0)
    assert annealed.engine.startswith("plated")
    assert "other temperatures" in str(annealed)
    result = _fit("poisson_mixture", "cem")
    with pytest.raises(InputError, match=r"'cem'.*init=result\.params"):
        result.standard_errors()
    assert "cem" in result.summary()


def test_what_cannot_be_assigned_is_refused() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            b = pyro.sample("b", dist.Normal(0.0, pyro.param("sd", torch.tensor(1.0))))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    with pytest.raises(Refusal, match="'b'"):
        pyro_em.fit(model, torch.zeros(3), algorithm="cem")


def test_a_stop_by_callback_and_max_iter_zero() -> None:
    for options in ({"algorithm": "sem"}, {"algorithm": "cem"}, {"temperature": [3.0, 2.0, 2.0, 1.5]}):
        stopped = _fit("gmm_diagonal", callbacks=[lambda step: step.iteration == 2], seed=0, **options)
        assert stopped.outcome is pyro_em.Outcome.interrupted
        assert stopped.num_iterations == 2
        start = _fit("gmm_diagonal", max_iter=0, seed=0, **options)
        assert all(torch.equal(start.params[n], v) for n, v in BY_NAME["gmm_diagonal"].start().items())


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    models = Path(__file__).resolve().parent.parent / "models"
    page = ["fit", f"{models}/gmm.py:univariate", "--data", f"{models}/data/faithful.csv", "--columns", "waiting"]
    assert main([*page, "--algorithm", "cem", "--temperature", "2"]) == 2
    assert "temperature belongs to the exact algorithms" in capsys.readouterr().err
    for options, words in [(["--temperature", "1.05"], "em: "), (["--algorithm", "sem"], "sem: The requested number")]:
        assert main([*page, "--max-iter", "20", *options]) == 0
        assert capsys.readouterr().out.startswith(words)
