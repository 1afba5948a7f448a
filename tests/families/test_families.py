"""Families: every law over one table with each family once, then the boundary and the conjugate pairs.

The oracles are torch's own `log_prob`, its derivatives, and a numerical maximisation of Σ w log p in
unconstrained coordinates, started away from the answer.
"""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em.charts import chart
from pyro_em.families import FAMILIES, family_of
from tests.families.cases import (
    CASES,
    CELLS,
    CLOSED,
    SIZE,
    VALUES,
    Arguments,
    constraint_of,
    draw,
    law,
    log_prob,
    maximise,
    moments,
    objective,
    positive,
    problem,
)

# Responses with a state inside or with missing entries, whose statistics are none of the value alone: they have tests
# of their own.
ELSEWHERE = {"GaussianHMM", "LinearHMM", "GaussianChain", "IncompleteNormal", "GridNormal"}


def test_every_family_is_in_the_table_once() -> None:
    assert {cls for cls, _ in CASES.values()} == {cls for cls in FAMILIES if cls.__name__ not in ELSEWHERE}
    tested = {(CASES[name][0], argument) for name, argument in CLOSED}
    others = {cls: family for cls, family in FAMILIES.items() if cls.__name__ not in ELSEWHERE}
    assert tested == {(cls, argument) for cls, family in others.items() for argument in family.closed}
    for cls, family in FAMILIES.items():
        if cls.__name__ in ELSEWHERE:
            continue
        assert family_of(cls) is family
        assert family.closed <= set(family.arguments)
        assert family.event_dim == law(cls, next(m for c, m in CASES.values() if c is cls)()).event_dim
    assert family_of(dist.Gumbel) is None


def test_families_without_a_value_kernel_say_so() -> None:
    for name, (cls, make) in CASES.items():
        assert (FAMILIES[cls].value_kernel(make()) is not None) == (name in VALUES), name


@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_torchs_inside_the_support(name: str) -> None:
    cls, make = CASES[name]
    args = make()
    value = draw(cls, args)[:, None]
    expected = log_prob(cls, args, value)
    actual = FAMILIES[cls].log_prob(args, value)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_differentiable_in_its_arguments(name: str) -> None:
    cls, make = CASES[name]
    args = make()
    value = draw(cls, args)[:, None]
    # Pyro's Binomial takes its coefficient for a constant when differentiated in the total count.
    names = [
        key for key in args if (cls, key) not in ((dist.Binomial, "total_count"), (dist.BetaBinomial, "total_count"))
    ]
    leaves = {key: args[key].clone().requires_grad_() for key in names}
    expected = torch.autograd.grad(log_prob(cls, {**args, **leaves}, value).sum(), list(leaves.values()))
    actual = torch.autograd.grad(FAMILIES[cls].log_prob({**args, **leaves}, value).sum(), list(leaves.values()))
    for key, mine, theirs in zip(names, actual, expected, strict=True):
        constraint = dist.constraints.real if cls is dist.Uniform else constraint_of(cls, args, key)
        own = chart(constraint, args[key])
        torch.testing.assert_close(
            own.pull_back(args[key], mine), own.pull_back(args[key], theirs), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize(("name", "argument"), CLOSED)
def test_kernel_is_the_weighted_log_likelihood_up_to_a_constant(name: str, argument: str) -> None:
    _, family, args, value, weights, center = problem(name)
    kernel = family.kernel(argument, moments(family, weights, value, args, center), args, center)
    assert kernel is not None
    canonical = family.link(argument).to_canonical
    other = CASES[name][1]()[argument]
    actual = kernel.value(canonical(other)) - kernel.value(canonical(args[argument]))
    expected = objective(family, weights, value, {**args, argument: other}) - objective(family, weights, value, args)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "argument"), CLOSED)
def test_kernel_gradient_is_the_score(name: str, argument: str) -> None:
    cls, family, args, value, weights, center = problem(name)
    kernel = family.kernel(argument, moments(family, weights, value, args, center), args, center)
    assert kernel is not None
    leaf = args[argument].clone().requires_grad_()
    canonical = family.link(argument).to_canonical(leaf)
    (actual,) = torch.autograd.grad(canonical, leaf, kernel.gradient(canonical.detach()))
    (expected,) = torch.autograd.grad(objective(family, weights, value, {**args, argument: leaf}).sum(), leaf)
    own = chart(constraint_of(cls, args, argument), args[argument])
    torch.testing.assert_close(
        own.pull_back(args[argument], actual), own.pull_back(args[argument], expected), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("name", "argument"), CLOSED)
def test_kernel_argmax_is_the_numerical_maximum(name: str, argument: str) -> None:
    cls, family, args, value, weights, center = problem(name)
    kernel = family.kernel(argument, moments(family, weights, value, args, center), args, center)
    assert kernel is not None
    own, link = chart(constraint_of(cls, args, argument), args[argument]), family.link(argument)

    def function(free: Tensor) -> Tensor:
        return objective(family, weights, value, {**args, argument: own.from_free(free)}).sum()

    best = own.from_free(maximise(function, own.to_free(args[argument])))
    closed = kernel.argmax()
    torch.testing.assert_close(closed, link.to_canonical(best), rtol=1e-8, atol=1e-8)
    back = link.to_canonical(link.from_canonical(closed))
    torch.testing.assert_close(back, closed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("argument", ["covariance_matrix", "scale_tril", "precision_matrix"])
def test_diagonal_kernel_is_the_likelihood_on_diagonal_matrices(argument: str) -> None:
    _, family, args, value, weights, center = problem("MultivariateNormal(covariance_matrix)")
    first, second = positive(CELLS, SIZE), positive(CELLS, SIZE)

    def at(diagonal: Tensor) -> Arguments:
        return {"loc": args["loc"], argument: torch.diag_embed(diagonal)}

    sums = moments(family, weights, value, args, center)
    kernel = family.diagonal_kernel(argument, sums, at(first), center)
    assert kernel is not None
    actual = (kernel.value(first) - kernel.value(second)).sum(-1)
    expected = objective(family, weights, value, at(first)) - objective(family, weights, value, at(second))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert family.diagonal_kernel("loc", sums, at(first), center) is None


@pytest.mark.parametrize("name", VALUES)
def test_value_kernel_is_the_density_up_to_a_constant(name: str) -> None:
    cls, make = CASES[name]
    family, args = FAMILIES[cls], make()
    kernel = family.value_kernel(args)
    assert kernel is not None
    # Uniform: two points inside both cells' bounds.
    first, second = (torch.full((CELLS,), v) for v in (2.2, 2.4)) if cls is dist.Uniform else draw(cls, args, 2)
    first, second = (v.expand(law(cls, args).shape()) for v in (first, second))
    actual = kernel.value(first) - kernel.value(second)
    expected = family.log_prob(args, first) - family.log_prob(args, second)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    leaf = first.clone().requires_grad_()
    # The sum with 0·leaf gives Uniform, which does not depend on its value inside, a derivative too.
    (score,) = torch.autograd.grad((family.log_prob(args, leaf) + 0 * leaf.sum()).sum(), leaf)
    own = chart(dist.constraints.real if cls is dist.Uniform else law(cls, args).support, first)
    torch.testing.assert_close(
        own.pull_back(first, kernel.gradient(first)), own.pull_back(first, score), rtol=1e-9, atol=1e-9
    )


def test_zero_inflation_at_its_limits() -> None:
    """Without inflation it is the Poisson, however large the rate; log p(0) of a large rate keeps its digits."""
    family, x = FAMILIES[dist.ZeroInflatedPoisson], torch.tensor([0.0, 2.0])
    rate = torch.tensor([[0.5], [900.0]])
    none = family.log_prob({"rate": rate, "gate": torch.zeros(())}, x)
    torch.testing.assert_close(none, FAMILIES[dist.Poisson].log_prob({"rate": rate}, x), rtol=1e-15, atol=0)
    leaf = torch.tensor(0.0, requires_grad=True)
    (slope,) = torch.autograd.grad(family.log_prob({"rate": rate[0], "gate": leaf}, x).sum(), leaf)
    assert bool(slope.isfinite())
    far = family.log_prob({"rate": torch.tensor(900.0), "gate_logits": torch.tensor(-50.0)}, x[0])
    torch.testing.assert_close(far, torch.nn.functional.logsigmoid(torch.tensor(-50.0)), rtol=1e-14, atol=0)
    certain = family.log_prob({"rate": rate[0], "gate": torch.ones(())}, x)
    assert certain.tolist() == [0.0, -torch.inf]
