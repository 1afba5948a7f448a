"""Kernels with priors that are not conjugate: sums that are concave in log θ, soft thresholds, cubics."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_em.kernels import (
    FlatKernel,
    HalfCauchyKernel,
    IncompatibleKernels,
    Kernel,
    LassoKernel,
    LogNormalKernel,
    PositiveSum,
    PowerKernel,
    QuadraticKernel,
    StudentKernel,
)

CELLS = 5


def positive(*shape: int) -> Tensor:
    return 0.3 + torch.rand(shape) * 3


def flat() -> QuadraticKernel:
    return QuadraticKernel(torch.zeros(CELLS), torch.zeros(CELLS))


def quadratic() -> QuadraticKernel:
    return QuadraticKernel(3 * torch.randn(CELLS), positive(CELLS), torch.randn(CELLS))


POSITIVE: dict[str, Callable[[], Kernel]] = {
    "scale": lambda: PowerKernel(-positive(CELLS), torch.zeros(CELLS), positive(CELLS), 2.0),
    "rate": lambda: PowerKernel(positive(CELLS), positive(CELLS), torch.zeros(CELLS), 1.0),
    "half cauchy": lambda: HalfCauchyKernel(positive(CELLS), positive(CELLS)),
    "log normal": lambda: LogNormalKernel(positive(CELLS), positive(CELLS), torch.randn(CELLS)),
}
PAIRS = [p for p in itertools.combinations(POSITIVE, 2) if p != ("scale", "rate")]
LOCATIONS: dict[str, Callable[[], Kernel]] = {
    "lasso": lambda: LassoKernel(flat(), torch.randn(CELLS), positive(CELLS)),
    "student": lambda: StudentKernel(flat(), torch.randn(CELLS), positive(CELLS), positive(CELLS)),
}


def _is_the_sum_and_its_maximum(kernel: Kernel, parts: list[Kernel], draw: Callable[[], Tensor]) -> None:
    theta = draw().requires_grad_()
    value = kernel.value(theta)
    other = draw()  # up to a constant, which a change of origin drops
    expected = torch.stack([p.value(theta) - p.value(other) for p in parts]).sum(0)
    torch.testing.assert_close(value - kernel.value(other), expected, rtol=1e-11, atol=1e-11)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    torch.testing.assert_close(kernel.gradient(theta.detach()), gradient, rtol=1e-11, atol=1e-11)
    best = kernel.argmax()
    top = kernel.value(best)
    for _ in range(100):
        assert (top - kernel.value(draw()) >= -1e-13).all()
    # The argmax, in its last digit but one, is where the derivative changes its sign.
    step = 1e-7 * best.abs().clamp(min=1e-3)
    assert (kernel.gradient(best - step) > 0).all()
    assert (kernel.gradient(best + step) < 0).all()


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("seed", range(3))
def test_sums_that_are_concave_in_the_logarithm(names: tuple[str, str], seed: int) -> None:
    torch.manual_seed(seed)
    parts = [POSITIVE[name]() for name in names]
    total = parts[0] + parts[1]
    _is_the_sum_and_its_maximum(total, parts, lambda: positive(CELLS) * 3)
    factor = positive(CELLS)
    theta = positive(CELLS)
    torch.testing.assert_close(total.rescale(factor).gradient(theta), factor * total.gradient(factor * theta))
    torch.testing.assert_close((parts[1] + parts[0]).argmax(), total.argmax())
    assert total + FlatKernel() is total
    three = total + POSITIVE[names[0]]()
    assert three.gradient(three.argmax()).abs().max() < 1e-9


def test_half_cauchy_prior_of_a_scale_has_a_closed_form() -> None:
    """v = σ² solves (S₀+2) v² + (S₀ s² − S) v − S s² = 0, where −½S₀ log v − S/2v − log(1+v/s²) has no slope."""
    weight, squares, s = positive(CELLS) * 10, positive(CELLS) * 10, positive(CELLS)
    kernel = PowerKernel(-weight, torch.zeros(CELLS), squares / 2, 2.0) + HalfCauchyKernel(torch.ones(CELLS), s)
    b = weight * s**2 - squares
    v = (-b + (b**2 + 4 * (weight + 2) * squares * s**2).sqrt()) / (2 * (weight + 2))
    torch.testing.assert_close(kernel.argmax(), v.sqrt(), rtol=1e-13, atol=0.0)


def test_equal_priors_merge_and_sums_without_a_maximum_say_so() -> None:
    s, zero, one = positive(CELLS), torch.zeros(CELLS), torch.ones(CELLS)
    both = HalfCauchyKernel(one, s) + HalfCauchyKernel(one, s)
    assert isinstance(both, HalfCauchyKernel)
    assert isinstance(HalfCauchyKernel(one, s) + HalfCauchyKernel(one, 2 * s), PositiveSum)
    assert isinstance(LogNormalKernel(one, s, zero) + LogNormalKernel(one, s, zero), LogNormalKernel)
    assert (PowerKernel(-one, zero, zero, 2.0) + HalfCauchyKernel(one, s)).argmax().tolist() == [0.0] * CELLS
    assert (PowerKernel(5 * one, zero, zero, 1.0) + HalfCauchyKernel(one, s)).argmax().isinf().all()
    blank = (PowerKernel(one, one, zero) + HalfCauchyKernel(one, s)).map(lambda c, ndim: torch.zeros_like(c))
    assert blank.is_empty().all()
    assert blank.argmax().isnan().all()


@pytest.mark.parametrize("name", LOCATIONS)
@pytest.mark.parametrize("seed", range(5))
def test_priors_of_locations(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    prior, likelihood = LOCATIONS[name](), quadratic()
    total = prior + likelihood
    if name == "student":
        _is_the_sum_and_its_maximum(total, [prior, likelihood], lambda: 4 * torch.randn(CELLS))
    else:
        best = total.argmax()
        for _ in range(100):
            assert (total.value(best) >= total.value(4 * torch.randn(CELLS)) - 1e-13).all()
        assert total.gradient(best).abs().max() < 1e-12
    torch.testing.assert_close((likelihood + prior).argmax(), total.argmax(), rtol=0.0, atol=0.0)
    assert not total.is_empty().any()
    torch.testing.assert_close(prior.argmax(), prior.center)  # type: ignore[attr-defined]


def test_soft_threshold_by_hand() -> None:
    center, rate = torch.zeros(3), torch.ones(3)
    kernel = LassoKernel(QuadraticKernel(torch.tensor([4.0, -0.5, -3.0]), 2 * torch.ones(3)), center, rate)
    assert kernel.argmax().tolist() == [1.5, 0.0, -1.0]
    assert kernel.gradient(kernel.argmax()).tolist() == [0.0, 0.0, 0.0]
    assert kernel.gradient(torch.zeros(3)).tolist() == [3.0, 0.0, -2.0]


def test_the_higher_of_two_modes_is_taken() -> None:
    """A likelihood at 10 of precision 1/20 against a Cauchy at 0: both have a mode near themselves."""
    one = torch.ones(())
    for precision, near in [(0.05, 0.0), (0.5, 10.0)]:
        smooth = QuadraticKernel(0 * one, precision * one, 10 * one)
        best = StudentKernel(smooth, 0 * one, one, 0.01 * one).argmax()
        assert float(best) == pytest.approx(near, abs=0.5)


def test_what_has_no_rule_is_refused() -> None:
    lasso, student = LOCATIONS["lasso"](), LOCATIONS["student"]()
    vector = QuadraticKernel(torch.zeros(2, 3), torch.eye(3), torch.zeros(3), vector=True)
    for first, second in [
        (lasso, student),
        (lasso, lasso),
        (lasso, vector),
        (vector, lasso),
        (lasso, POSITIVE["rate"]()),
    ]:
        with pytest.raises(IncompatibleKernels, match="cannot be added"):
            first + second
    assert lasso.rescale(torch.ones(CELLS)) is lasso
    with pytest.raises(IncompatibleKernels, match="multiplied by a factor other than 1"):
        lasso.rescale(2 * torch.ones(CELLS))
