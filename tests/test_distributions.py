"""The inverse Wishart against scipy, its own draws, and Pyro's conventions."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import invwishart

from pyro_em.distributions import InverseWishart

SCALE = [[2.0, 0.5, 0.1], [0.5, 1.0, -0.2], [0.1, -0.2, 3.0]]


def test_log_density_is_scipys() -> None:
    law = InverseWishart(7.5, torch.tensor(SCALE))
    draws = law.sample((5,))
    expected = [invwishart(7.5, SCALE).logpdf(draw.numpy()) for draw in draws]
    torch.testing.assert_close(law.log_prob(draws), torch.tensor(expected), rtol=1e-12, atol=1e-12)


def test_inverse_of_a_draw_is_wishart() -> None:
    # Change of variables: d(Σ⁻¹) has Jacobian |Σ|^−(D+1).
    scale = torch.tensor(SCALE)
    law, wishart = InverseWishart(7.5, scale), dist.Wishart(torch.tensor(7.5), precision_matrix=scale)
    sigma = law.sample((4,))
    expected = wishart.log_prob(sigma.inverse()) - 4 * sigma.logdet()
    torch.testing.assert_close(law.log_prob(sigma), expected, rtol=1e-10, atol=1e-10)


def test_draws_have_the_mean_within_monte_carlo_error() -> None:
    law = InverseWishart(torch.tensor([12.0, 20.0]), torch.tensor(SCALE))
    draws = law.rsample((20_000,))
    assert draws.shape == (20_000, 2, 3, 3)
    error = (draws.mean(0) - law.mean).abs()
    assert (error < 5 * draws.std(0) / 20_000**0.5).all()


def test_mode_is_stationary() -> None:
    law = InverseWishart(6.0, torch.tensor(SCALE))
    mode = law.mode.requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(mode), mode)
    assert gradient.abs().max() < 1e-12


def test_mean_does_not_exist_with_few_degrees_of_freedom() -> None:
    assert InverseWishart(4.0, torch.tensor(SCALE)).mean.isnan().all()


def test_draws_are_differentiable_in_both_arguments() -> None:
    df, scale = torch.tensor(8.0, requires_grad=True), torch.tensor(SCALE, requires_grad=True)
    InverseWishart(df, scale).rsample((3,)).sum().backward()
    assert df.grad is not None and df.grad.abs() > 0
    assert scale.grad is not None and scale.grad.isfinite().all()


def test_expand_and_shapes() -> None:
    law = InverseWishart(torch.tensor([5.0, 6.0]), torch.tensor(SCALE))
    wide = law.expand([4, 2])
    assert (wide.batch_shape, wide.event_shape) == ((4, 2), (3, 3))
    sigma = wide.sample()
    assert sigma.shape == (4, 2, 3, 3)
    torch.testing.assert_close(wide.log_prob(sigma), law.log_prob(sigma))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        InverseWishart(5.0, torch.ones(2, 3))
    with pytest.raises(ValueError, match="df"):
        InverseWishart(1.0, torch.tensor(SCALE))
    with pytest.raises(ValueError, match="scale_matrix"):
        InverseWishart(5.0, -torch.eye(2))
