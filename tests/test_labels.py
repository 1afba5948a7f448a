"""Weights, partially known labels and constraints on the states of single rows, in every way of writing them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy.stats import norm
from torch import Tensor

import pyro_em
from models import robust_mixture, semi_supervised
from pyro_em.errors import InputError, NonFiniteError, Refusal
from tests import zoo_data, zoo_structured
from tests.problems import BY_NAME
from tests.problems_data import allowed_rows, labelled_rows

START = {"w": [0.3, 0.3, 0.4], "mu": [-1.0, 0.5, 2.0], "sd": 1.2}


def _fit(model: Any, args: tuple[Any, ...], **options: Any) -> Any:
    return pyro_em.fit(model, *args, init=START, **{"max_iter": 8, "tol": 0, **options})


def _textbook(y: Tensor, allowed: Tensor, iterations: int, weights: Tensor | None = None) -> dict[str, Any]:
    """EM of a normal mixture with a common scale, row n restricted to the states of allowed[n]; NumPy."""
    x, ok = y.numpy(), allowed.numpy()
    c = np.ones(len(x)) if weights is None else weights.numpy()
    w, mu, sd = np.array(START["w"]), np.array(START["mu"]), START["sd"]
    for _ in range(iterations + 1):
        joint = np.where(ok, w * norm.pdf(x[:, None], mu, sd), 0.0)
        evidence = (c * np.log(joint.sum(1))).sum()
        found = {"w": w, "mu": mu, "sd": sd, "log_likelihood": evidence, "r": joint / joint.sum(1, keepdims=True)}
        r = c[:, None] * found["r"]
        w, mu = r.sum(0) / c.sum(), (r * x[:, None]).sum(0) / r.sum(0)
        sd = np.sqrt((r * (x[:, None] - mu) ** 2).sum() / c.sum())
    return found


def _agrees(result: Any, expected: dict[str, Any]) -> None:
    for name in START:
        np.testing.assert_allclose(result.params[name].numpy(), expected[name], rtol=1e-10, atol=1e-12)
    assert result.log_likelihood == pytest.approx(expected["log_likelihood"], rel=1e-12)


def _allowed_by_labels() -> Tensor:
    _, labels, known = labelled_rows()
    return torch.nn.functional.one_hot(labels, 3).bool() | ~known.unsqueeze(-1)


@pytest.mark.parametrize("model", [zoo_data.label_as_site, zoo_data.label_as_mask, zoo_data.label_as_plate])
def test_known_labels_are_textbook_em_however_they_are_written(model: Any) -> None:
    y, labels, known = labelled_rows()
    expected = _textbook(y, _allowed_by_labels(), 8)
    result = _fit(model, (y, labels, known))
    _agrees(result, expected)
    assert result.plan.engine.startswith("plated")
    assert result.num_observations == len(y)
    assert [row.route for row in result.plan.m_step] == ["closed"] * 3


def test_a_masked_observation_keeps_its_name_and_pyros_evidence() -> None:
    y, labels, known = labelled_rows()
    guess = torch.where(known, labels, -1)  # what stands in place of an unknown label does not matter
    result = _fit(zoo_data.label_as_mask, (y, guess, known))
    posterior = result.posterior()
    assert posterior.latents == ("z",)
    expected = _textbook(y, _allowed_by_labels(), 8)["r"]
    np.testing.assert_allclose(posterior.marginal("z").probs.numpy(), expected, atol=1e-12)
    assert torch.equal(posterior.mode()["z"][known], labels[known])
    assert torch.equal(posterior.sample(5)["z"][:, known], labels[known].expand(5, -1))
    # Pyro's own two sites, z_observed and z_unobserved, at the fitted values in its param store:
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(
        config_enumerate(zoo_data.label_as_mask), lambda *args: None, y, labels, known
    )
    assert -loss == pytest.approx(result.log_likelihood, rel=1e-8)


@pytest.mark.parametrize("make", ["bernoulli", "binomial", "one_hot"])
def test_masked_observations_of_other_discrete_sites(make: str) -> None:
    """The states of every enumerable kind of site can be labels."""
    y, labels, known = labelled_rows()
    two = (labels > 0).long()
    one_hot = make == "one_hot"
    values: Tensor = torch.nn.functional.one_hot(two, 2).double() if one_hot else two.double()

    def model(values: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.4), constraint=torch.distributions.constraints.unit_interval)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        prior = {
            "bernoulli": lambda: dist.Bernoulli(p),
            "binomial": lambda: dist.Binomial(1, p),
            "one_hot": lambda: dist.OneHotCategorical(torch.stack([1 - p, p])),
        }[make]()
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", prior, obs=values, obs_mask=known)
            index = z.argmax(-1) if one_hot else z.long()
            pyro.sample("y", dist.Normal(mu[index], 1.0), obs=y)

    result = pyro_em.fit(model, values, max_iter=3, tol=0)
    p, mu = result.params["p"].numpy(), result.params["mu"].numpy()
    joint = np.array([1 - p, p]) * norm.pdf(y.numpy()[:, None], mu, 1.0)
    expected = np.where(known, joint[np.arange(30), two.numpy()], joint.sum(1))
    assert result.log_likelihood == pytest.approx(np.log(expected).sum(), rel=1e-12)


def test_sets_of_allowed_states() -> None:
    y, allowed = allowed_rows()
    expected = _textbook(y, allowed, 8)
    by_factor = _fit(zoo_data.allowed_by_factor, (y, allowed))
    by_exclusion = _fit(zoo_data.allowed_by_exclusion, (y, allowed))
    _agrees(by_factor, expected)
    _agrees(by_exclusion, expected)
    assert by_exclusion.plan.engine.startswith("plated")
    probs = by_factor.posterior().marginal("z").probs
    assert (probs[~allowed] == 0).all()


def test_a_mask_may_depend_on_a_latent() -> None:
    """models/robust_mixture.py: which of two laws of the data counts depends on a latent that neither reads."""
    x = robust_mixture.simulate(120)
    result = pyro_em.fit(robust_mixture.model, x)
    share, w, loc, scale = (result.params[n].numpy() for n in ("share", "weights", "loc", "scale"))
    low, high = x.numpy().min(0), x.numpy().max(0)
    box = np.prod(1.002 * (high - low))
    inside = sum(w[k] * norm.pdf(x.numpy(), loc[k], scale[k]).prod(1) for k in range(2))
    density = (1 - share) * inside + share / box
    assert result.converged
    assert [row.route for row in result.plan.m_step] == ["closed"] * 4
    assert result.log_likelihood == pytest.approx(np.log(density).sum(), rel=1e-12)
    outlier = result.posterior().marginal("outlier").probs.numpy()
    np.testing.assert_allclose(outlier, share / box / density, atol=1e-12)
    assert np.sort(loc[:, 0]) == pytest.approx([-3.0, 3.0], abs=0.5)  # the background does not pull them
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(robust_mixture.model), lambda x: None, x)
    assert -loss == pytest.approx(result.log_likelihood, rel=1e-8)


def test_ways_of_the_models_folder_agree() -> None:
    """models/semi_supervised.py iterate by iterate."""
    x, labels = semi_supervised.load()
    first = pyro_em.fit(semi_supervised.model, x, labels, max_iter=5, tol=0)
    second = pyro_em.fit(semi_supervised.masked, x, labels, max_iter=5, tol=0)
    allowed = torch.nn.functional.one_hot(labels.clamp(min=0), 3).bool() | (labels < 0).unsqueeze(-1)
    third = pyro_em.fit(semi_supervised.restricted, x, allowed, max_iter=5, tol=0)
    for other in (second, third):
        assert other.log_likelihood == pytest.approx(first.log_likelihood, rel=1e-12)
    x, allowed = semi_supervised.load_restricted()
    result = pyro_em.fit(semi_supervised.restricted, x, allowed)
    assert result.converged
    assert (result.posterior().marginal("z").probs[~allowed] == 0).all()


def test_drawn_starts_respect_the_labels() -> None:
    """k-means clusters come in any order; those with labels get the label's number."""
    y, labels, known = labelled_rows()
    for seed in range(4):
        start = pyro_em.fit(zoo_data.label_as_site, y, labels, known, init="kmeans++", seed=seed, max_iter=0)
        assert (start.params["mu"].diff() > 0).all()  # labels 0, 1, 2 lie in this order


CONTRADICTIONS: list[tuple[Any, str]] = [
    (lambda y, labels, known: (y, labels.index_fill(0, known.nonzero()[2], 7), known), "row 5 .*outside"),
    (lambda y, labels, known: (y, labels.index_fill(0, known.nonzero()[2], -1), known), "row 5 .*outside"),
]


@pytest.mark.parametrize("model", [zoo_data.label_as_site, zoo_data.label_as_mask])
@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS)
def test_a_label_that_is_no_class_is_named(model: Any, change: Any, message: str) -> None:
    y, labels, known = labelled_rows()
    assert int(known.nonzero()[2]) == 5
    with pytest.raises(InputError, match=message):
        _fit(model, change(y, labels, known))
    assert not dict(pyro.get_param_store().items())


def test_contradictory_labels_are_named() -> None:
    y, labels, known = labelled_rows()

    def twice(y: Tensor, first: Tensor, second: Tensor) -> None:
        w = pyro.param("w", torch.ones(3) / 3, constraint=torch.distributions.constraints.simplex)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(w), obs=first, obs_mask=known)
            certain = torch.eye(3).log()
            pyro.sample("second", dist.Categorical(logits=certain[z]), obs=second)
            pyro.sample("y", dist.Normal(z.double(), 1.0), obs=y)

    other = labels.clone()
    other[5] = (labels[5] + 1) % 3
    with pytest.raises(NonFiniteError, match=r"Site 'second': the data in rows 5 of plate .*contradict"):
        pyro_em.fit(twice, y, labels, other)
    none_left = allowed_rows()[1].clone()
    none_left[4] = False
    with pytest.raises(NonFiniteError, match="Site 'allowed': the data in rows 4 "):
        _fit(zoo_data.allowed_by_factor, (y, none_left))
    crooked = torch.ones(30, 3)
    with pytest.raises(InputError, match="'z': the label of row 1 is not one-hot"):
        pyro_em.fit(_one_hot_labels, y, crooked, known)


def _one_hot_labels(y: Tensor, labels: Tensor, known: Tensor) -> None:
    w = pyro.param("w", torch.ones(3) / 3, constraint=torch.distributions.constraints.simplex)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.OneHotCategorical(w), obs=labels, obs_mask=known)
        pyro.sample("y", dist.Normal(z.argmax(-1).double(), 1.0), obs=y)


LABELLED = [
    (zoo_data.label_as_site, labelled_rows()),
    (zoo_data.label_as_mask, labelled_rows()),
    (zoo_data.allowed_by_factor, allowed_rows()),
]


@pytest.mark.parametrize(("model", "args"), LABELLED)
def test_weight_zero_is_a_row_removed(model: Any, args: tuple[Any, ...]) -> None:
    """Estimates, standard errors, criteria and posterior of the other rows."""
    weights = (torch.arange(30) % 4 != 1).double()
    keep = weights > 0
    weighted = _fit(model, args, weights={"rows": weights}, max_iter=500, tol=1e-9)
    removed = _fit(model, tuple(x[keep] for x in args), max_iter=500, tol=1e-9)
    assert weighted.log_likelihood == pytest.approx(removed.log_likelihood, rel=1e-12)
    assert (weighted.bic, weighted.icl) == pytest.approx((removed.bic, removed.icl), rel=1e-12)
    errors, others = weighted.standard_errors(), removed.standard_errors()
    for name in START:
        torch.testing.assert_close(weighted.params[name], removed.params[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(errors[name], others[name], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(weighted.posterior().marginal("z").probs[keep], removed.posterior().marginal("z").probs)


def test_fractional_weights_scale_the_evidence_and_count_in_bic() -> None:
    y, labels, known = labelled_rows()
    weights = torch.rand(30, generator=torch.Generator().manual_seed(1))
    result = _fit(zoo_data.label_as_mask, (y, labels, known), weights={"rows": weights})
    _agrees(result, _textbook(y, _allowed_by_labels(), 8, weights))
    assert result.num_observations == pytest.approx(float(weights.sum()))
    assert result.bic == pytest.approx(-2 * result.log_likelihood + 6 * np.log(float(weights.sum())))


def test_weights_of_plates_side_by_side_and_inside_each_other() -> None:
    y, labels, known = labelled_rows()
    half = torch.full((int(known.sum()),), 0.5)
    result = _fit(zoo_data.label_as_plate, (y, labels, known), weights={"labelled": half})
    _agrees(result, _textbook(y, _allowed_by_labels(), 8, torch.where(known, 0.5, 1.0)))
    assert result.num_observations == 30 - 0.5 * int(known.sum())

    def crossed(table: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=torch.distributions.constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", 5, dim=-2), pyro.plate("columns", 6, dim=-1):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=table)

    table = y.reshape(5, 6)
    rows, columns = torch.tensor([1, 0, 2, 1, 3]), torch.tensor([2, 1, 0, 1, 1, 1])
    weighted = pyro_em.fit(crossed, table, weights={"rows": rows, "columns": columns}, max_iter=5, tol=0)
    joint = np.array([0.4, 0.6]) * norm.pdf(y.numpy()[:, None], np.array([-1.0, 1.0]), 1.0)
    both = (rows.unsqueeze(-1) * columns).reshape(-1).numpy()
    assert weighted.history["log_likelihood"][0] == pytest.approx((both * np.log(joint.sum(1))).sum(), rel=1e-12)
    assert weighted.num_observations == int(rows.sum()) * int(columns.sum())


def test_weights_below_a_latent_are_refused() -> None:
    (passed,) = BY_NAME["nested_classes"].args
    with pytest.raises(Refusal, match=r"which 'kind', coupled.*outside of.*a plate that all of them stand in"):
        pyro_em.fit(zoo_structured.nested_classes, passed, weights={"pupils": torch.ones(3)})
