"""Kernels: every law over one table of kernels, then the edges of each."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_em.kernels import (
    BetaKernel,
    DirectionKernel,
    DirichletKernel,
    FlatKernel,
    IncompatibleKernels,
    Kernel,
    PowerKernel,
    QuadraticKernel,
    ResultantKernel,
    SimplexKernel,
    WishartKernel,
)

CELLS = 4


def positive(*shape: int) -> Tensor:
    return 0.3 + torch.rand(shape) * 3


def spd(*shape: int, size: int = 3) -> Tensor:
    root = torch.randn(*shape, size, size + 2)
    return root @ root.mT + 0.1 * torch.eye(size)


def rows(*shape: int, size: int = 3) -> Tensor:
    return torch.distributions.Dirichlet(torch.ones(size)).sample(shape)


def _dirichlet(count: Tensor) -> DirichletKernel:
    """Sums of logarithms of eight rows each: of one row alone the concentration would be infinite."""
    return DirichletKernel(count, count.unsqueeze(-1) * rows(8, CELLS).log().mean(0))


def _resultant(count: Tensor) -> ResultantKernel:
    """Of directions whose mean resultant length is inside of the unit interval."""
    return ResultantKernel(count, count * torch.rand(CELLS))


# name -> (a random kernel over CELLS blocks, a random feasible θ of that shape)
KERNELS: dict[str, tuple[Callable[[], Kernel], Callable[[], Tensor]]] = {
    "power, positive A": (
        lambda: PowerKernel(positive(CELLS), positive(CELLS), positive(CELLS), 1.0),
        lambda: positive(CELLS),
    ),
    "power, negative A": (
        lambda: PowerKernel(-positive(CELLS), positive(CELLS), positive(CELLS), 2.0),
        lambda: positive(CELLS),
    ),
    "power, rate": (
        lambda: PowerKernel(positive(CELLS), positive(CELLS), torch.zeros(()), 1.0),
        lambda: positive(CELLS),
    ),
    "power, scale": (
        lambda: PowerKernel(-positive(CELLS), torch.zeros(()), positive(CELLS), 2.0),
        lambda: positive(CELLS),
    ),
    "beta": (lambda: BetaKernel(positive(CELLS), positive(CELLS)), lambda: torch.rand(CELLS)),
    "simplex": (lambda: SimplexKernel(positive(CELLS, 3)), lambda: rows(CELLS)),
    "concentrations": (lambda: _dirichlet(positive(CELLS)), lambda: positive(CELLS, 3)),
    "quadratic": (
        lambda: QuadraticKernel(torch.randn(CELLS), positive(CELLS), torch.randn(CELLS)),
        lambda: torch.randn(CELLS),
    ),
    "quadratic, vectors": (
        lambda: QuadraticKernel(torch.randn(CELLS, 3), spd(CELLS), torch.randn(3), vector=True),
        lambda: torch.randn(CELLS, 3),
    ),
    "direction": (
        lambda: DirectionKernel(torch.randn(CELLS), torch.randn(CELLS), torch.randn(CELLS)),
        lambda: 3 * torch.randn(CELLS),
    ),
    "resultant": (lambda: _resultant(positive(CELLS)), lambda: positive(CELLS)),
    "wishart": (lambda: WishartKernel(positive(CELLS), spd(CELLS)), lambda: spd(CELLS)),
    "wishart, precision": (
        lambda: WishartKernel(positive(CELLS), spd(CELLS), inverse=True),
        lambda: spd(CELLS),
    ),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def difference(kernel: Kernel, theta: Tensor, other: Tensor) -> Tensor:
    return kernel.value(theta) - kernel.value(other)


@every_kernel
def test_value_has_one_number_per_block(name: str) -> None:
    make, draw = KERNELS[name]
    assert make().value(draw()).shape == (CELLS,)


@every_kernel
def test_gradient_is_the_derivative_of_the_value(name: str) -> None:
    make, draw = KERNELS[name]
    kernel, theta = make(), draw().requires_grad_()
    (expected,) = torch.autograd.grad(kernel.value(theta).sum(), theta)
    if kernel.event_dim == 2:
        expected = (expected + expected.mT) / 2
    torch.testing.assert_close(kernel.gradient(theta.detach()), expected, rtol=1e-11, atol=1e-11)


@every_kernel
def test_argmax_beats_random_feasible_points(name: str) -> None:
    make, draw = KERNELS[name]
    kernel = make()
    best = kernel.argmax()
    for _ in range(50):
        other = draw()
        assert (difference(kernel, best, other) >= 0).all()
        # Feasible sets are convex: this point is between, and close to the maximum.
        assert (difference(kernel, best, best + 1e-3 * (other - best)) >= -1e-13).all()


@every_kernel
def test_gradient_vanishes_at_the_argmax(name: str) -> None:
    make, _ = KERNELS[name]
    kernel = make()
    best = kernel.argmax()
    gradient = kernel.gradient(best)
    if isinstance(kernel, SimplexKernel):  # zero along the simplex only
        gradient = gradient - (best * gradient).sum(-1, keepdim=True)
    scale = sum(float(c.abs().max()) for c in kernel.coefficients)
    assert gradient.abs().max() < 1e-12 * (1 + scale / float(best.abs().min()) ** 2)


@every_kernel
def test_sum_of_kernels_is_the_sum_of_functions(name: str) -> None:
    make, draw = KERNELS[name]
    first, second = make(), make()
    if isinstance(second, QuadraticKernel):
        second = second.rebase(second.origin + 1.7)
    theta, other = draw(), draw()
    expected = difference(first, theta, other) + difference(second, theta, other)
    torch.testing.assert_close(difference(first + second, theta, other), expected, rtol=1e-12, atol=1e-11)


@every_kernel
def test_flat_kernel_is_neutral(name: str) -> None:
    kernel = KERNELS[name][0]()
    assert kernel + FlatKernel() is kernel
    assert FlatKernel() + kernel is kernel


@every_kernel
def test_rescale_substitutes_the_argument(name: str) -> None:
    make, draw = KERNELS[name]
    kernel, theta, other = make(), draw(), draw()
    factor = positive(*theta.shape) if kernel.event_dim < 2 else positive(CELLS, 1, 1)
    if isinstance(kernel, BetaKernel | DirichletKernel | DirectionKernel | ResultantKernel):
        factor = torch.ones(())
    if isinstance(kernel, SimplexKernel):
        factor = positive(CELLS, 1)
    expected = difference(kernel, factor * theta, factor * other)
    actual = difference(kernel.rescale(factor), theta, other)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@every_kernel
def test_collect_sums_cells_onto_entries(name: str) -> None:
    make, draw = KERNELS[name]
    kernel, index = make(), torch.tensor([0, 1, 0, 1])
    entries, other = draw()[:2], draw()[:2]

    def scatter(coefficient: Tensor, ndim: int) -> Tensor:
        return coefficient.new_zeros((2, *coefficient.shape[1:])).index_add(0, index, coefficient)

    scatter.keeps = scatter.separates = lambda _: False  # type: ignore[attr-defined]
    total = kernel.collect(scatter, at=entries[index], onto=entries)
    cells = difference(kernel, entries[index], other[index])
    expected = torch.zeros(2).index_add(0, index, cells)
    torch.testing.assert_close(difference(total, entries, other), expected, rtol=1e-11, atol=1e-11)


@every_kernel
def test_zero_coefficients_are_empty_and_others_are_not(name: str) -> None:
    kernel = KERNELS[name][0]()
    assert not kernel.is_empty().any()
    blank = kernel.map(lambda c, ndim: torch.zeros_like(c))
    assert blank.is_empty().shape == (CELLS,)
    assert blank.is_empty().all()
    if isinstance(blank, QuadraticKernel):
        torch.testing.assert_close(blank.argmax(), blank.origin.expand(blank.linear.shape))
    else:
        assert blank.argmax().isnan().all()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("power, rate", "beta"),
        ("beta", "simplex"),
        ("quadratic", "power, rate"),
        ("wishart", "wishart, precision"),
    ],
)
def test_kernels_of_different_form_are_refused(first: str, second: str) -> None:
    one, two = KERNELS[first][0](), KERNELS[second][0]()
    with pytest.raises(IncompatibleKernels, match="cannot be added"):
        one + two
    with pytest.raises(IncompatibleKernels, match="cannot be added"):
        two + one


@pytest.mark.parametrize("exponent", [2.0, 0.5, -1.0, -2.0, 1 / 3])
@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("power")])
def test_power_substitutes_the_argument(name: str, exponent: float) -> None:
    make, draw = KERNELS[name]
    kernel, theta, other, factor = make(), draw(), draw(), positive(CELLS)
    assert isinstance(kernel, PowerKernel)
    expected = difference(kernel, factor * theta**exponent, factor * other**exponent)
    moved = kernel.power(exponent, factor)
    torch.testing.assert_close(difference(moved, theta, other), expected, rtol=1e-11, atol=1e-11)
    assert moved.exponent > 0
    # A maximum stays one under a monotone change of coordinate.
    torch.testing.assert_close(factor * moved.argmax() ** exponent, kernel.argmax(), rtol=1e-12, atol=0)
    assert (moved.power(1 / exponent) + kernel).form == kernel.form


def test_power_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="exponent 0"):
        KERNELS["power, rate"][0]().power(0.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("a", "rising", "falling", "expected"),
    [
        (0.0, 2.0, 0.0, 0.0),  # no events: the rate is exactly 0
        (-3.0, 0.0, 0.0, 0.0),  # no spread: the variance is exactly 0
        (-3.0, 2.0, 0.0, 0.0),
        (4.0, 2.0, 0.0, 2.0),
        (-4.0, 0.0, 2.0, 0.5),
        (0.0, 2.0, 8.0, 2.0),
        (4.0, 0.0, 0.0, math.inf),
        (4.0, 0.0, 2.0, math.inf),
        (0.0, 0.0, 2.0, math.inf),
        (-1e8, 1.0, 1.0, 1e-8),  # the naive root cancels to 0
        (1e200, 1e200, 0.0, 1.0),  # a² overflows
        (-1e-200, 0.0, 1e-200, 1.0),  # a² underflows
    ],
)
def test_power_argmax_at_its_edges(a: float, rising: float, falling: float, expected: float) -> None:
    best = PowerKernel(torch.tensor(a), torch.tensor(rising), torch.tensor(falling)).argmax()
    torch.testing.assert_close(best, torch.tensor(expected), rtol=1e-14, atol=0)


def test_gradients_on_the_boundary_are_those_of_the_remaining_terms() -> None:
    zero, one, three = torch.zeros(()), torch.ones(()), torch.tensor(3.0)
    assert PowerKernel(zero, three, zero).gradient(zero) == -3
    assert BetaKernel(zero, three).gradient(zero) == -3
    assert BetaKernel(three, zero).gradient(one) == 3
    gradient = SimplexKernel(torch.tensor([0.0, 2.0])).gradient(torch.tensor([0.0, 1.0]))
    assert gradient.tolist() == [0, 2]
    assert BetaKernel(zero, three).value(zero) == 0
    assert SimplexKernel(torch.tensor([0.0, 2.0])).value(torch.tensor([0.0, 1.0])) == 0


def test_probabilities_reach_zero_and_one_exactly() -> None:
    beta = BetaKernel(torch.tensor([0.0, 5.0, -0.5]), torch.tensor([5.0, 0.0, 3.0]))
    assert beta.argmax().tolist() == [0, 1, 0]
    simplex = SimplexKernel(torch.tensor([-0.5, 3.0, 1.0, 0.0]))
    assert simplex.argmax().tolist() == [0, 0.75, 0.25, 0]


def test_a_prior_below_one_without_data_keeps_the_parameter() -> None:
    assert BetaKernel(torch.tensor(-0.5), torch.tensor(-0.5)).is_empty()
    assert SimplexKernel(torch.tensor([-0.5, -0.5])).is_empty()


def test_probability_kernels_refuse_factors_that_spoil_them() -> None:
    with pytest.raises(IncompatibleKernels, match="factor other than 1"):
        BetaKernel(torch.ones(()), torch.ones(())).rescale(torch.tensor(0.5))
    with pytest.raises(IncompatibleKernels, match="different factors"):
        SimplexKernel(torch.ones(2)).rescale(torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("seed", range(60, 120))
def test_directions_without_information_of_all_lengths(seed: int) -> None:
    """Logits of a class that is all but certain: rows of 1, 1e-18 and 1e-80, each with a direction that is free."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))[:, 0]
    p = torch.softmax(torch.tensor([0.0, -185.0, 0.2, -40.0]), -1)
    design = torch.stack([torch.ones(3), x], -1)
    precision = torch.kron(design.mT @ design, torch.diag(p) - p.unsqueeze(-1) * p)
    wanted = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.5, 0.0, -0.5, 0.0])
    step = QuadraticKernel(precision @ wanted, precision, torch.zeros(8), vector=True).argmax()
    torch.testing.assert_close(precision @ step, precision @ wanted, rtol=1e-9, atol=1e-9)
