"""Vector-Jacobian products, by the two ways and where they differ."""

from __future__ import annotations

import pytest
import torch

from pyro_em import derivatives
from pyro_em.derivatives import pulled_back


@pytest.fixture(params=["engine", "public"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's engine, and as where a torch has it under no such name."""
    assert derivatives.ENGINE is not None
    if request.param == "public":
        monkeypatch.setattr(derivatives, "ENGINE", None)


def test_cotangents_that_depend_on_the_inputs_are_constants() -> None:
    """Jᵀc at c(x), not the gradient of f(x)·c(x)."""
    x = torch.tensor([1.0, 2.0, -0.5], requires_grad=True)
    (found,) = pulled_back([x**2], [x], [x.exp()], graph=True)
    assert found is not None
    torch.testing.assert_close(found, 2 * x * x.exp())
    (second,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(second, (2 + 2 * x) * x.exp())


def test_leaves_give_jacobian_vector_products() -> None:
    x, c = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2, requires_grad=True)
    (found,) = pulled_back([x**3], [x], [c], graph=True)
    assert found is not None
    (jvp,) = pulled_back([found], [c], [torch.tensor([1.0, 10.0])])
    torch.testing.assert_close(jvp, 3 * x.detach() ** 2 * torch.tensor([1.0, 10.0]))


def test_outputs_without_gradients_have_no_part() -> None:
    x, fixed = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2)
    (found,) = pulled_back([fixed, x**2], [x], [torch.ones(2), torch.ones(2)])
    assert found is not None
    torch.testing.assert_close(found, 2 * x.detach())
    assert pulled_back([fixed], [x], [torch.ones(2)]) == (None,)
    other = torch.zeros(3, requires_grad=True)
    assert pulled_back([x**2], [x, other], [torch.ones(2)])[1] is None
