"""Conjugate latents: evidence, moments, scores and M-steps against closed forms and quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate
from torch import Tensor
from torch.distributions.constraints import simplex

import pyro_em
from pyro_em.evidence.conjugate_kinds import BetaKind, GammaKind, InverseGammaKind
from pyro_em.evidence.conjugate_rows import DirichletKind
from tests.conjugate_problems import CASES, Case
from tests.laws import largest_score, to_constrained, to_free
from tests.oracles import constraints

EPS = torch.finfo(torch.float64).eps
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")


NAMES = list(CASES)


def _fit(case: Case, **options: Any) -> Any:
    return pyro_em.fit(case.model, *case.args, init={n: v.clone() for n, v in case.init.items()}, **options)


@pytest.mark.parametrize("name", NAMES)
def test_evidence_and_posterior(name: str) -> None:
    """G2, G5: log p(x), pointwise, and the latent's marginal against the conjugate closed form."""
    case = CASES[name]
    result = _fit(case, max_iter=2, tol=0)
    truth = case.evidence(result.params)
    assert abs(result.log_likelihood - float(truth.sum())) <= 1e-11 * (1 + float(truth.abs().sum()))
    if truth.dim():
        torch.testing.assert_close(result.log_prob(), truth, rtol=1e-10, atol=1e-11)
    posterior, expected = result.posterior(), case.posterior(result.params)
    if expected is not None:
        torch.testing.assert_close(posterior.mean(case.site), expected.mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(posterior.variance(case.site), expected.variance, rtol=1e-10, atol=1e-12)
        x = expected.mean * (0.9 if name == "beta_binomial" else 1.1)
        x = x / x.sum(-1, keepdim=True) if isinstance(expected, dist.Dirichlet) else x
        marginal = posterior.marginal(case.site)
        found = marginal.log_prob(x)
        reference = expected.log_prob(x)
        torch.testing.assert_close(
            found, reference.sum(-1) if reference.dim() > found.dim() else reference, rtol=1e-8, atol=1e-9
        )
        assert posterior.entropy() == pytest.approx(float(expected.entropy().sum()), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_monotone_and_fisher_identity(name: str) -> None:
    """G1, G4."""
    case = CASES[name]
    result = _fit(case, max_iter=8, tol=0)
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -16 * EPS * (np.abs(objective).max() + 10)).all()
    assert objective[-1] > objective[0]
    support = constraints(case.model, case.args, case.init)
    free = {n: u.requires_grad_() for n, u in to_free(case.init, support).items()}
    value = case.evidence(to_constrained(free, support)).sum()
    gradient = dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))
    found = float(result.history["score"][0]) * result.problem.graph.num_observations
    assert found == pytest.approx(largest_score(gradient, case.init, support), rel=1e-7)


def test_the_limit_is_the_maximum_of_the_marginal_likelihood() -> None:
    """G7, with standard errors from the Hessian of the closed form."""
    case = CASES["gamma_poisson"]
    result = _fit(case, tol=1e-9, max_iter=5000, accelerate="squarem")
    at = torch.stack([result.params["alpha"], result.params["beta"]]).log()

    def value(u: Tensor) -> Tensor:
        return case.evidence({"alpha": u[0].exp(), "beta": u[1].exp()}).sum()

    hessian = torch.autograd.functional.hessian(value, at)
    gradient = torch.autograd.functional.jacobian(value, at)
    assert float(gradient.abs().max()) < 1e-6
    errors = result.standard_errors()
    sd = torch.linalg.inv(-hessian).diagonal().sqrt() * at.exp()
    torch.testing.assert_close(torch.stack([errors["alpha"], errors["beta"]]), sd, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", [GammaKind(), InverseGammaKind(), BetaKind()], ids=lambda k: k.name)
def test_atoms_have_the_expectations_of_the_posterior(kind: Any) -> None:
    """Against quadrature, from nearly improper to sharply peaked."""
    tables = {
        "Gamma": [(-0.6, 0.5, 0.0), (2.0, 3.0, 0.0), (80.0, 0.01, 0.0)],
        "InverseGamma": [(-1.5, 0.0, 0.5), (-4.0, 0.0, 3.0), (-60.0, 0.0, 1e4)],
        "Beta": [(-0.3, -0.2), (1.0, 4.0), (60.0, 30.0)],
    }
    coefficients = torch.tensor(tables[kind.name])
    low, high = kind.atoms(coefficients)
    q = kind.distribution(coefficients)
    statistics = {
        "Gamma": (lambda x: x, np.log),
        "InverseGamma": (lambda x: 1 / x, np.log),
        "Beta": (np.log, np.log1p),
    }[kind.name]
    for i, scale in enumerate(kind.center(coefficients).tolist()):
        own = type(q)(*[getattr(q, a)[i] for a in q.arg_constraints])
        for j, statistic in enumerate(statistics):
            sign = -1.0 if kind.name == "Beta" and j == 1 else 1.0

            def density(
                u: float, own: Any = own, statistic: Any = statistic, sign: float = sign, s: float = scale
            ) -> float:
                # u = log(z / scale), or the logit of z for Beta
                x = s * np.exp(u) if kind.name != "Beta" else 1 / (1 + np.exp(-u))
                jacobian = x if kind.name != "Beta" else x * (1 - x)
                if not 0 < x < (1 if kind.name == "Beta" else np.inf) or jacobian == 0:
                    return 0.0
                return float(statistic(sign * x) * np.exp(float(own.log_prob(torch.as_tensor(x)))) * jacobian)

            width = (34.0 if kind.name == "Beta" else 60.0) if i == 0 else 20.0
            truth, _ = integrate.quad(density, -width, width, points=[-1.0, 0.0, 1.0, 2.0], limit=400, epsabs=1e-12)
            found = np.mean([statistic(sign * float(a[i])) for a in (low, high)])
            assert found == pytest.approx(truth, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "alpha", [[0.02, 0.5, 3.0], [1.0, 1.0, 1.0], [2e3, 5.0, 0.3], [1e7, 3e7, 2e7], [0.01, 0.01, 0.02]], ids=str
)
def test_atoms_on_a_simplex(alpha: list[float]) -> None:
    """Both lie on it, and their mean logarithms are those of the Dirichlet distribution."""
    a = torch.tensor(alpha)
    atoms = DirichletKind(3).atoms(torch.stack([a - 1, torch.zeros(3)], -1))
    for atom in atoms:
        assert float(atom.sum()) == pytest.approx(1.0, abs=4 * EPS)
    expected = torch.digamma(a) - torch.digamma(a.sum())
    torch.testing.assert_close((atoms[0].log() + atoms[1].log()) / 2, expected, rtol=1e-12, atol=1e-12)


def test_units_do_not_matter() -> None:
    """Rates of 1e-6 and 1e6 a row are found as precisely as rates of one."""
    case = CASES["gamma_poisson"]
    exposure, y = case.args
    for factor in (1e-6, 1e6):
        scaled = pyro_em.fit(
            case.model,
            exposure * factor,
            y,
            init={"alpha": torch.as_tensor(1.7), "beta": torch.as_tensor(0.8 * factor)},
            max_iter=3,
            tol=0,
        )
        plain = _fit(case, max_iter=3, tol=0)
        assert scaled.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-10)


def _refused(model: Callable[..., Any], *args: Any) -> Any:
    with pytest.raises(pyro_em.Refusal) as caught:
        pyro_em.plan(model, *args)
    assert len(caught.value.remedy) > 20
    return caught.value


Y = torch.tensor([1.0, 0.0, 2.0, 4.0, 1.0])

ONES, LABELS = torch.ones(3), torch.tensor([0, 2, 1, 1, 0])
TABLE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])


def _with_prior(prior: Callable[[], Any], child: Callable[[Tensor], Any], data: Tensor) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("rows", len(data)):
            v = pyro.sample("v", prior())
            pyro.sample("y", child(v), obs=data)

    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_with_prior(lambda: dist.LogNormal(0.0, 1.0), dist.Poisson, Y), "Gamma or InverseGamma"),
        (_with_prior(lambda: dist.Exponential(0.5), lambda v: dist.Normal(0.0, v.sqrt()), Y), "Gamma"),
        (_with_prior(lambda: dist.HalfNormal(1.0), lambda v: dist.Normal(0.0, v), Y), "Gamma"),
        (_with_prior(lambda: dist.Gamma(2.0, 1.0), lambda v: dist.Poisson(v**2), Y), "Gamma"),
        (_with_prior(lambda: dist.Gamma(2.0, 1.0), lambda v: dist.Poisson(v + 1.0), Y), "Gamma"),
        (_with_prior(lambda: dist.Gamma(2.0, 1.0), lambda v: dist.Poisson(v * v.roll(1, -1)), Y), "several elements"),
        (_with_prior(lambda: dist.Beta(2.0, 1.0), lambda v: dist.Binomial(9, v**2), Y), "Beta"),
        (_with_prior(lambda: dist.Beta(2.0, 1.0), lambda v: dist.Poisson(v), Y), "Beta"),
        (_with_prior(lambda: dist.Dirichlet(ONES), lambda v: dist.Categorical(v**2), LABELS), "Dirichlet"),
        (_with_prior(lambda: dist.Dirichlet(ONES), lambda v: dist.Categorical(v @ TABLE), LABELS), "Dirichlet"),
        (_with_prior(lambda: dist.Dirichlet(ONES), lambda v: dist.Poisson(v[..., 0]), Y), "Dirichlet"),
    ],
)
def test_what_is_not_conjugate_is_refused(model: Callable[[], None], reason: str) -> None:
    """G12: the latent is named."""
    refusal = _refused(model)
    assert refusal.site in ("v", "y") and "'v'" in str(refusal)
    assert reason in refusal.reason


@pytest.mark.parametrize("second", [dist.Gamma(2.0, 1.0), dist.Beta(2.0, 3.0)], ids=["one kind", "two kinds"])
def test_two_conjugate_latents_in_one_factor_are_refused(second: Any) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            u = pyro.sample("u", dist.Gamma(2.0, 1.0))
            v = pyro.sample("v", second)
            pyro.sample("y", dist.Poisson(u * v), obs=y)

    refusal = _refused(model, Y)
    assert refusal.site == "v" and "'u'" in refusal.reason and "also read" in refusal.reason


def test_two_conjugate_latents_in_factors_of_their_own() -> None:
    """They are two sets, each integrated by its own family, in one plate."""
    trials, counts = torch.tensor([3.0, 0.0, 5.0, 4.0, 1.0]), Y.double()

    def model() -> None:
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(counts)):
            rate = pyro.sample("rate", dist.Gamma(a, 1.0))
            p = pyro.sample("p", dist.Beta(2.0, a))
            pyro.sample("counts", dist.Poisson(rate), obs=counts)
            pyro.sample("trials", dist.Binomial(6, p), obs=trials)

    result = pyro_em.fit(model, max_iter=3, tol=0)
    a = result.params["a"]
    own = dist.GammaPoisson(a, torch.tensor(1.0)).log_prob(counts)
    own = own + dist.BetaBinomial(torch.tensor(2.0), a, 6).log_prob(trials)
    assert result.log_likelihood == pytest.approx(float(own.sum()), rel=1e-12)
    posterior = result.posterior()
    torch.testing.assert_close(posterior.mean("rate"), (a + counts) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(posterior.mean("p"), (2 + trials) / (8 + a), rtol=1e-12, atol=0)


def test_topics_of_single_words_are_refused() -> None:
    """Latent Dirichlet allocation: the topics of a document's words are exchangeable, not independent."""
    document, word = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 3, 2, 1, 0])

    def model() -> None:
        phi = pyro.param("phi", torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]), constraint=simplex)
        with pyro.plate("documents", 2):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", len(word)):
            topic = pyro.sample("topic", dist.Categorical(theta[..., document, :]))
            pyro.sample("word", dist.Categorical(phi[topic]), obs=word)

    with pytest.raises(pyro_em.Refusal, match=r"'theta': its posterior depends .*read by topic"):
        pyro_em.plan(model, roles={"theta": "latent"})
    # As fixed hyperparameters without a data plate have it, the documents' probabilities are parameters otherwise.
    assert pyro_em.fit(model, max_iter=3, tol=0).plan.route("theta") == "closed"


def test_rows_of_probabilities_in_one_event() -> None:
    """Two rows of an event are two Dirichlet posteriors."""
    counts = torch.tensor([[[3.0, 1.0, 0.0], [2.0, 2.0, 5.0]], [[0.0, 4.0, 1.0], [1.0, 0.0, 0.0]]])

    def model() -> None:
        alpha = pyro.param("alpha", torch.tensor([1.0, 2.0, 0.5]), constraint=dist.constraints.positive)
        with pyro.plate("rows", 2):
            theta = pyro.sample("theta", dist.Dirichlet(alpha).expand([2]).to_event(1))
            multinomial = dist.Multinomial(9, theta)  # the largest total
            pyro.sample("y", multinomial.to_event(1), obs=counts)

    result = pyro_em.fit(model, max_iter=2, tol=0)
    own = dist.Dirichlet(result.params["alpha"] + counts)
    posterior = result.posterior()
    torch.testing.assert_close(posterior.mean("theta"), own.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(posterior.variance("theta"), own.variance, rtol=1e-10, atol=0)
    marginal = posterior.marginal("theta")
    assert marginal.batch_shape == (2,) and marginal.event_shape == (2, 3)
    torch.testing.assert_close(marginal.log_prob(own.mean), own.log_prob(own.mean).sum(-1), rtol=1e-10, atol=0)
    assert posterior.sample(4)["theta"].shape == (4, 2, 2, 3)
    expected = dist.DirichletMultinomial(result.params["alpha"], counts.sum(-1)).log_prob(counts)
    assert result.log_likelihood == pytest.approx(float(expected.sum()), rel=1e-12)


def test_the_plan_names_the_family() -> None:
    case = CASES["beta_binomial"]
    plan = pyro_em.plan(case.model, *case.args)
    assert plan.route("p") == "conjugate"
    assert "Beta" in str(plan)


def test_modes_at_the_end_of_the_range_and_of_flat_posteriors() -> None:
    """Uniform priors: no success in ten is most probable at 0, and without data every value is a mode."""
    y, seen = torch.tensor([0.0, 4.0, 10.0, 5.0]), torch.tensor([True, True, True, False])

    def model() -> None:
        with pyro.plate("rows", 4):
            p = pyro.sample("p", dist.Uniform(0.0, 1.0))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("y", dist.Binomial(10, p), obs=y)

    mode = pyro_em.fit(model, roles={"p": "latent"}, max_iter=0).posterior().mode()["p"]
    torch.testing.assert_close(mode, torch.tensor([0.0, 0.4, 1.0, 0.5]))
    flat = torch.tensor([[-1e-17, 1.0], [2.0, 1.0]])
    torch.testing.assert_close(DirichletKind(2).mode(flat), torch.tensor([0.0, 1.0]))
