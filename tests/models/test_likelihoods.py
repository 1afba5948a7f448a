"""What the models score: log p(data | parameters) against published fits, scipy, and closed formulas.

Log-likelihoods come from Pyro's own TraceEnum_ELBO, whose value (if not always its gradient) is exact here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy import stats
from torch import Tensor

from models import censored, dawid_skene, genetics, gmm, hmm, poisson_mixture, semi_supervised
from models import zip as zero_inflated


def no_guide(*args: Any, **kwargs: Any) -> None:
    """All latents are enumerated."""


def log_likelihood(
    model: Callable[..., None], *args: Any, params: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """log p(data) at `params`, or at the model's start."""
    pyro.clear_param_store()
    with torch.no_grad():
        if params is not None:
            model(*args, **kwargs)
            store = pyro.get_param_store()
            assert set(params) == set(store.keys())
            for name, value in params.items():
                store[name] = torch.as_tensor(value)
        elbo = TraceEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False)
        return -elbo.loss(config_enumerate(model), no_guide, *args, **kwargs)


def individuals(problem: Literal["abo", "linkage"]) -> Tensor:
    values, counts = genetics.load(problem)
    return values.repeat_interleave(counts.long())


# Model, data, published maximum likelihood estimates, published log-likelihood and tolerance. Near a maximum
# the rounding of printed estimates enters squared: the tolerance is a unit in the last printed digit.
PUBLISHED: dict[str, tuple[Callable[..., None], Callable[[], tuple[Tensor, ...]], dict[str, Any], float, float]] = {
    # Benaglia et al. 2009, mixtools
    "waiting": (
        gmm.univariate,
        lambda: (gmm.load()[:, 1],),
        {"weights": [0.360887, 0.639113], "loc": [54.6149, 80.0911], "scale": [5.87126, 5.86771]},
        -1034.00175,
        1e-5,
    ),
    # Hasselblad 1969, in the tests of the R package SQUAREM
    "deaths": (
        poisson_mixture.model,
        lambda: (poisson_mixture.load(),),
        {"weights": [0.359885397, 0.640114603], "rate": [1.2560951, 2.6634044]},
        -1989.94586,
        1e-5,
    ),
    # McLachlan and Krishnan 2008
    "abo": (
        genetics.abo,
        lambda: (individuals("abo"),),
        {"frequency": [0.264444314, 0.093168812, 0.642386874]},
        -492.535316,
        1e-6,
    ),
    # Zeileis, Kleiber and Jackman 2008, pscl
    "biochemists": (
        zero_inflated.regression,
        zero_inflated.load_regression,
        {
            "zero_coef": [-0.57706, 0.109747, -0.354013, 0.217101, 0.001272, -0.134114],
            "count_coef": [0.640838, -0.209145, 0.103751, -0.14332, -0.006166, 0.018098],
        },
        -1604.772853,
        1e-5,
    ),
    # Schmee and Hahn 1979, in the R package MASS
    "motorettes": (
        censored.regression,
        censored.load,
        {"coefficients": [-6.01925, 4.311247], "scale": 0.259183},
        -12.965455,
        1e-4,
    ),
    # Tobin 1958, in the R package survival
    "durable goods": (
        censored.regression,
        censored.load_tobin,
        {"coefficients": [15.144866, -0.129059, -0.045542], "scale": 5.57254},
        -28.940133,
        1e-4,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_log_likelihood(name: str) -> None:
    model, data, params, expected, tolerance = PUBLISHED[name]
    value = log_likelihood(model, *data(), params=params)
    assert value == pytest.approx(expected, abs=tolerance)


def test_linkage_likelihood_is_that_of_the_observed_cells() -> None:
    counts = genetics.load("linkage")[1]
    for t in (0.1, 0.6268214978, 0.9):
        cells = torch.tensor([0.5 + t / 4, (1 - t) / 4, (1 - t) / 4, t / 4])
        value = log_likelihood(genetics.linkage, individuals("linkage"), params={"t": t})
        assert value == pytest.approx((counts * cells.log()).sum().item(), abs=1e-10)


def test_gaussian_mixture_is_scipys() -> None:
    data = gmm.load_iris()
    value = log_likelihood(gmm.model, data, num_components=3)
    start = {name: value.detach().numpy() for name, value in pyro.get_param_store().items()}
    density = sum(
        w * stats.multivariate_normal(m, c).pdf(data.numpy())
        for w, m, c in zip(start["weights"], start["loc"], start["covariance"], strict=True)
    )
    assert value == pytest.approx(np.log(density).sum(), abs=1e-10)


def test_covariance_structures_agree_where_they_coincide() -> None:
    data = gmm.load()
    # At the start every structure holds one covariance for all components.
    for group in (
        ("model", "scale_tril", "tied"),
        ("diagonal", "shared_diagonal"),
        ("spherical", "shared_spherical"),
    ):
        values = [log_likelihood(getattr(gmm, structure), data) for structure in group]
        assert values == pytest.approx([values[0]] * len(values), abs=1e-10)


def test_too_few_rows_for_the_components() -> None:
    with pytest.raises(ValueError, match="4 components need at least as many rows; the data have 3"):
        gmm.model(torch.randn(3, 2), num_components=4)


@pytest.mark.parametrize("emission", ["gaussian", "categorical", "poisson"])
def test_padding_has_no_influence(emission: str) -> None:
    model = getattr(hmm, emission)
    data = hmm.simulate(6, 2, emission=emission)
    lengths = torch.tensor([6, 4])
    whole = log_likelihood(model, data, lengths=lengths)
    start = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    apart = sum(log_likelihood(model, data[i, :n], params=start) for i, n in enumerate(lengths.tolist()))
    assert whole == pytest.approx(apart, abs=1e-10)
    padded = data.clone()
    padded[1, 4:] = 2
    assert log_likelihood(model, padded, lengths=lengths) == whole


def test_empty_slots_have_no_influence() -> None:
    ratings, raters = dawid_skene.load()
    model = dawid_skene.model
    empty = torch.full((len(ratings), 1), -1)
    longer = torch.cat([ratings, empty], 1), torch.cat([raters, torch.tensor([2])])
    assert log_likelihood(model, *longer) == pytest.approx(log_likelihood(model, ratings, raters), abs=1e-10)


def test_dawid_skene_slots_are_the_judgements_of_the_file() -> None:
    ratings, raters = dawid_skene.load()
    assert ratings.shape == (45, 7) and raters.tolist() == [0, 0, 0, 1, 2, 3, 4]
    # Table 1 of the paper, patient 2: observer 1 gave 3 3 3, the others 4 3 3 4.
    assert (ratings[1] + 1).tolist() == [3, 3, 3, 4, 3, 3, 4]


def test_zero_inflated_likelihood_and_structural_zeros() -> None:
    data = torch.tensor([0.0, 0.0, 3.0])
    params = {"inflation": 0.25, "rate": 2.0}
    counts = stats.poisson(2.0).pmf([0, 0, 3])
    expected = np.log([0.25 + 0.75 * counts[0]] * 2 + [0.75 * counts[2]]).sum()
    assert log_likelihood(zero_inflated.model, data, params=params) == pytest.approx(expected, abs=1e-12)
    # A structural zero cannot be 3: given z = 1 the log-probabilities are exactly 0, 0 and -inf.
    conditioned = poutine.condition(zero_inflated.model, {"z": torch.ones(3)})
    nodes = poutine.trace(conditioned).get_trace(data)
    nodes.compute_log_prob()
    assert nodes.nodes["x"]["log_prob"].tolist() == [0.0, 0.0, -float("inf")]


def test_a_known_label_is_certain() -> None:
    data, labels = torch.randn(6, 2), torch.tensor([0, 1, 2, -1, -1, -1])
    value = log_likelihood(semi_supervised.model, data, labels)
    start = {name: value.detach() for name, value in pyro.get_param_store().items()}
    normal = torch.distributions.Normal(start["loc"], start["scale"])
    joint = start["weights"].log() + normal.log_prob(data.unsqueeze(1)).sum(-1)  # (N, K)
    expected = joint[torch.arange(3), labels[:3]].sum() + joint[3:].logsumexp(-1).sum()
    assert value == pytest.approx(expected.item(), abs=1e-12)
