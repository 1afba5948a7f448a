"""G8: what must not matter does not matter, and what must matter matters by exactly the right amount.

Row order, component labels, the unit of the data, weights against repeats, masks against absence.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

import pyro_em
from models import gmm
from tests import classics, zoo_structured
from tests.problems import BY_NAME

BY_COMPONENT = ("w", "pi", "mu", "sd", "S", "L", "P", "rate", "lam", "p", "var")
MIXTURES = [
    "gmm_full",
    "gmm_diagonal",
    "gmm_scale_tril",
    "gmm_precision",
    "poisson_mixture",
    "exponential_mixture",
    "lognormal_mixture",
    "multinomial_mixture",
    "gmm_map",
    "poisson_map",
]


def _fit(name: str, args: tuple[Any, ...] | None = None, init: dict[str, Tensor] | None = None, **options: Any) -> Any:
    problem = BY_NAME[name]
    algorithm = "map-em" if problem.priors else "em"
    chosen: dict[str, Any] = {"max_iter": 15, "tol": 0, "algorithm": algorithm} | options
    return pyro_em.fit(problem.model, *(args or problem.args), init=init or problem.start(), **chosen)


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for site in found:
        torch.testing.assert_close(found[site], expected[site], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MIXTURES)
def test_row_order(name: str) -> None:
    data, *rest = BY_NAME[name].args
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    plain, shuffled = _fit(name), _fit(name, (data[order], *rest))
    _same(shuffled.params, plain.params)
    assert shuffled.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-12)
    torch.testing.assert_close(shuffled.log_prob(data[order], *rest), plain.log_prob(data, *rest)[order])


@pytest.mark.parametrize("name", MIXTURES)
def test_component_labels(name: str) -> None:
    plain = _fit(name)
    relabelled = _fit(name, init={n: v.flip(0) if n in BY_COMPONENT else v for n, v in BY_NAME[name].start().items()})
    _same(relabelled.params, {n: v.flip(0) if n in BY_COMPONENT else v for n, v in plain.params.items()})
    assert relabelled.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-12)


@pytest.mark.parametrize(("scale", "shift"), [(1e3, 0.0), (-0.01, 5.0), (2.54, -300.0)])
def test_unit_of_the_data(scale: float, shift: float) -> None:
    """x -> a x + b in D dimensions: log p moves by -N D log|a|, the parameters by the same map."""
    problem = BY_NAME["gmm_full"]
    (x, K), start = problem.args, problem.start()
    rows, D = x.shape
    moved = {"pi": start["pi"], "mu": scale * start["mu"] + shift, "S": scale**2 * start["S"]}
    plain, rescaled = _fit("gmm_full"), _fit("gmm_full", (scale * x + shift, K), moved)
    expected = plain.log_likelihood - rows * D * math.log(abs(scale))
    assert rescaled.log_likelihood == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(rescaled.params["pi"], plain.params["pi"], rtol=1e-7, atol=0.0)
    torch.testing.assert_close((rescaled.params["mu"] - shift) / scale, plain.params["mu"], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(rescaled.params["S"] / scale**2, plain.params["S"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MIXTURES)
def test_integer_weights_are_repeats(name: str) -> None:
    data, *rest = BY_NAME[name].args
    weights = torch.arange(len(data)) % 3
    repeated = _fit(name, (data.repeat_interleave(weights, 0), *rest))
    weighted = _fit(name, weights={BY_NAME[name].plate: weights.double()})
    _same(weighted.params, repeated.params)
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, rel=1e-12)


def test_weights_of_sequences_are_repeats() -> None:
    (words,) = BY_NAME["categorical_hmm"].args
    weights = torch.tensor([1, 2, 0, 1, 3, 1, 0, 2])
    repeated = _fit("categorical_hmm", (words.repeat_interleave(weights, 0),))
    weighted = _fit("categorical_hmm", weights={"sequences": weights.double()})
    _same(weighted.params, repeated.params)


def test_weights_of_an_outer_plate_are_repeats() -> None:
    (passed,) = BY_NAME["nested_classes"].args
    weights = torch.tensor([1, 2, 0, 1, 3, 1, 0, 2, 1])
    repeated = _fit("nested_classes", (passed.repeat_interleave(weights, 0),))
    weighted = _fit("nested_classes", weights={"schools": weights.double()})
    _same(weighted.params, repeated.params)


def test_a_common_scale_multiplies_the_log_evidence() -> None:
    """`poutine.scale` is an annealing or a weight common to all rows: the maximum stays where it is."""
    problem = BY_NAME["poisson_mixture"]
    plain = _fit("poisson_mixture")
    scaled = pyro_em.fit(poutine.scale(problem.model, 2.5), *problem.args, init=problem.start(), max_iter=15, tol=0)
    assert scaled.log_likelihood == pytest.approx(2.5 * plain.log_likelihood, rel=1e-12)
    _same(scaled.params, plain.params)


def test_full_mask_is_no_mask() -> None:
    (patterns,) = BY_NAME["latent_class_counts"].args
    masked = _fit("latent_class_counts", (patterns, 2, torch.ones_like(patterns, dtype=torch.bool)))
    plain = _fit("latent_class_counts")
    _same(masked.params, plain.params)
    assert masked.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-12)


def test_masked_rows_are_absent_rows() -> None:
    """A row without any observed cell says nothing: log p = 0, and it does not move the weights."""
    (patterns,) = BY_NAME["latent_class_counts"].args
    keep = torch.arange(len(patterns)) % 4 != 1
    mask = keep.unsqueeze(-1).expand_as(patterns)
    masked = _fit("latent_class_counts", (patterns, 2, mask), max_iter=1)
    dropped = _fit("latent_class_counts", (patterns[keep],), max_iter=1)
    torch.testing.assert_close(masked.params["P"], dropped.params["P"], rtol=1e-12, atol=1e-12)
    start = BY_NAME["latent_class_counts"].start()["w"]
    share = keep.double().mean()
    torch.testing.assert_close(masked.params["w"], share * dropped.params["w"] + (1 - share) * start)
    first = masked.history["objective"][0], dropped.history["objective"][0]
    assert first[0] == pytest.approx(first[1], rel=1e-12)


def test_masked_tail_is_a_shorter_sequence() -> None:
    """A ragged HMM equals the one whose sequences end where the mask begins, evaluated one by one."""
    series, lengths = BY_NAME["ragged_hmm"].args
    start = BY_NAME["ragged_hmm"].start()
    whole = _fit("ragged_hmm", max_iter=0)
    for n, length in enumerate(lengths.tolist()):
        alone = _fit("ragged_hmm", (series[n : n + 1, :length], lengths[n : n + 1]), start, max_iter=0)
        found = whole.log_prob(series, lengths)[n]
        assert float(found) == pytest.approx(alone.log_likelihood, rel=1e-12)


def test_ways_of_writing_one_model() -> None:
    """A diagonal Gaussian as independent normals, and as MultivariateNormal with a diagonal scale_tril."""
    problem = BY_NAME["gmm_diagonal"]

    def multivariate(x: Tensor) -> None:
        w = pyro.param("w", classics.uniform(2), constraint=classics.simplex)
        mu = pyro.param("mu", torch.zeros(2, 2))
        sd = pyro.param("sd", torch.ones(2, 2), constraint=classics.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=torch.diag_embed(sd[z])), obs=x)

    as_normals = _fit("gmm_diagonal")
    as_multivariate = pyro_em.fit(multivariate, *problem.args, init=problem.start(), max_iter=15, tol=0)
    _same(as_multivariate.params, as_normals.params, 1e-6)  # its diagonal may need a numeric M-step
    assert as_multivariate.log_likelihood == pytest.approx(as_normals.log_likelihood, rel=1e-10)


def test_enumeration_may_be_asked_for_by_the_user() -> None:
    """`config_enumerate` changes nothing: discrete latents are enumerated anyway."""
    problem = BY_NAME["poisson_mixture"]
    asked = pyro.infer.config_enumerate(problem.model, "parallel")
    found = pyro_em.fit(asked, *problem.args, init=problem.start(), max_iter=15, tol=0)
    _same(found.params, _fit("poisson_mixture").params, 0.0)


def test_module_and_function_agree() -> None:
    """A PyroModule with PyroParams and a function with pyro.param: one program, the same iterates."""
    (line,) = BY_NAME["module_mixture"].args
    start = {"pi" if n == "w" else n: v for n, v in BY_NAME["module_mixture"].start().items()}
    module = pyro_em.fit(
        zoo_structured.ModuleMixture(), line, init=BY_NAME["module_mixture"].start(), max_iter=15, tol=0
    )
    function = pyro_em.fit(classics.normal_mixture, line, init=start, max_iter=15, tol=0)
    _same({"pi" if n == "w" else n: v for n, v in module.params.items()}, function.params)


def test_features_may_be_in_units_far_apart() -> None:
    """A variance is compared with that of its own feature's data: millions beside tenths are no collapse."""
    rows = gmm.load_iris()
    units = torch.tensor([1e7, 1.0, 1.0, 1e-3])
    plain = pyro_em.fit(gmm.diagonal, rows, 3)
    scaled = pyro_em.fit(gmm.diagonal, rows * units, 3)
    assert scaled.converged
    expected = plain.log_likelihood - len(rows) * float(units.log().sum())
    assert scaled.log_likelihood == pytest.approx(expected, rel=1e-9)
