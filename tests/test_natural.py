"""Natural coordinates: inner products with the family's own statistics give its log-density, around any centre."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_em.e_step.natural import NATURAL, log_base_measure
from pyro_em.families import FAMILIES, Family


def _t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


S = _t([[2.0, 0.6], [0.6, 1.0]])
CASES: dict[str, list[tuple[dict[str, Tensor], Tensor]]] = {
    "Normal": [({"loc": _t(3.0), "scale": _t(0.5)}, _t([2.5, 3.2]))],
    "LogNormal": [({"loc": _t(3.0), "scale": _t(0.5)}, _t([12.0, 30.0]))],
    "MultivariateNormal": [
        ({"loc": _t([3.0, -2.0]), name: x}, _t([[2.0, -1.0], [4.0, -3.0]]))
        for name, x in (("covariance_matrix", S), ("precision_matrix", S), ("scale_tril", torch.linalg.cholesky(S)))
    ],
    "Bernoulli": [({"probs": _t(0.3)}, _t([0.0, 1.0])), ({"logits": _t(-0.7)}, _t([0.0, 1.0]))],
    "Binomial": [({"probs": _t(0.3), "total_count": _t(5.0)}, _t([0.0, 4.0]))],
    "Geometric": [({"probs": _t(0.3)}, _t([0.0, 4.0]))],
    "Categorical": [
        ({"probs": _t([1.0, 3.0, 4.0])}, torch.tensor([0, 2])), ({"logits": _t([1.0, 3.0])}, torch.tensor([1]))
    ],
    "OneHotCategorical": [({"probs": _t([1.0, 3.0])}, _t([[0.0, 1.0]]))],
    "Multinomial": [({"probs": _t([1.0, 3.0])}, _t([[2.0, 1.0], [0.0, 3.0]]))],
    "Poisson": [({"rate": _t(2.5)}, _t([0.0, 7.0]))],
    "VonMises": [({"loc": _t(2.5), "concentration": _t(3.0)}, _t([0.1, -3.0, 7.0]))],
    "Exponential": [({"rate": _t(2.5)}, _t([0.1, 7.0]))],
}  # fmt: skip
BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES.values()}


def test_every_family_in_natural_coordinates_has_a_case() -> None:
    assert {type(BY_NAME[name]) for name in CASES} == set(NATURAL)


@pytest.mark.parametrize("center", [None, 1.5])
@pytest.mark.parametrize("name", CASES)
def test_the_inner_product_is_the_log_density(name: str, center: float | None) -> None:
    family = BY_NAME[name]
    for args, value in CASES[name]:
        at = _t(center).expand(args["loc"].shape) if center is not None and family.centered else None
        coefficients, normalizer = NATURAL[type(family)](args, at)
        found = -normalizer
        for own, statistic in zip(coefficients, family.statistics(value, args, at), strict=True):
            terms = own * statistic.dense()
            found = found + (terms.flatten(-statistic.event_dim).sum(-1) if statistic.event_dim else terms)
        base = log_base_measure(family, value, args)
        found = found if base is None else found + base
        assert torch.allclose(found, family.log_prob(args, value), rtol=1e-13, atol=1e-13)
