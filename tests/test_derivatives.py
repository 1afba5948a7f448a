"""Vector-Jacobian products, by the two ways and where they differ."""

from __future__ import annotations

import torch

from pyro_em.derivatives import pulled_back


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
