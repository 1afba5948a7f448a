"""Sites of a `pyro_em.markov` body beside and between inner plates: time is in its dim at each of them.

The oracle is the same model with `pyro.markov(range(T))`: every iterate, the posterior and the pointwise likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em
from pyro_em.errors import Refusal

Loop = Callable[..., Iterable[Any]]
simplex, positive = constraints.simplex, constraints.positive
T, N, M = 6, 3, 4


def one_by_one(steps: int, history: int = 1) -> Iterable[int]:
    return pyro.markov(range(steps), history=history)


def draws(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def table() -> Tensor:
    value: Tensor = pyro.param("A", torch.tensor([[0.7, 0.3], [0.2, 0.8]]), constraint=simplex)
    return value


def levels(name: str, *shape: int) -> Tensor:
    value: Tensor = pyro.param(name, torch.linspace(-1.0, 1.0, 2).reshape(2, *(1,) * len(shape)).repeat(1, *shape))
    return value


def beside(loop: Loop, x: Tensor, y: Tensor) -> None:
    """A number beside a plate."""
    A, mu, nu, z = table(), levels("mu"), levels("nu"), torch.tensor(0)
    for t in loop(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])
        with pyro.plate(f"many_{t}", y.shape[1]):
            pyro.sample(f"y_{t}", dist.Normal(nu[z], 1.0), obs=y[t])


def sequences(loop: Loop, x: Tensor, y: Tensor) -> None:
    """The same in a plate of sequences."""
    A, mu, nu, z = table(), levels("mu"), levels("nu"), torch.tensor(0)
    many = pyro.plate("many", y.shape[-1], dim=-1)
    with pyro.plate("sequences", y.shape[1], dim=-2):
        for t in loop(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            with many:
                pyro.sample(f"y_{t}", dist.Normal(nu[z], 1.0), obs=y[t])
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def two_plates(loop: Loop, x: Tensor, y: Tensor, w: Tensor) -> None:
    """Plates of several sizes and depths side by side, and a vector."""
    A, mu, nu, z = table(), levels("mu", 2), levels("nu"), torch.tensor(0)
    for t in loop(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0).to_event(1), obs=x[t])
        with pyro.plate(f"few_{t}", y.shape[1], dim=-1):
            pyro.sample(f"y_{t}", dist.Normal(nu[z], 1.0), obs=y[t])
            with pyro.plate(f"deep_{t}", w.shape[1], dim=-2):
                pyro.sample(f"w_{t}", dist.Poisson(nu[z].exp()), obs=w[t])


def masked(loop: Loop, x: Tensor, y: Tensor, u: Tensor, seen: Tensor) -> None:
    """Gates and covariates of a step, masks of it around both sites and in one of them."""
    gate, mu, nu, z = levels("gate"), levels("mu"), levels("nu"), None
    slope = pyro.param("slope", torch.tensor(0.3))
    for t in loop(len(x)):
        high = torch.tensor(0.5) if z is None else torch.sigmoid(gate[z] + u[t])
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([1 - high, high], -1)))
        with poutine.mask(mask=seen[t]):
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + slope * u[t], 1.0), obs=x[t])
        with pyro.plate(f"many_{t}", y.shape[1]):
            pyro.sample(f"y_{t}", dist.Normal(nu[z], 1.0).mask(seen[t]), obs=y[t])


def read(loop: Loop, x: Tensor, y: Tensor, exposure: Tensor) -> None:
    """What was observed beside the plate is read in it; exposures for each step; a latent in the plate."""
    A, mu, nu, z = table(), levels("mu"), levels("nu"), torch.tensor(0)
    for t in loop(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        count = pyro.sample(f"x_{t}", dist.Poisson(exposure[t] * mu[z].exp()), obs=x[t])
        with pyro.plate(f"many_{t}", y.shape[1]):
            c = pyro.sample(f"c_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(nu[c], 1.0), obs=y[t])
        with pyro.plate(f"more_{t}", y.shape[1]):
            pyro.sample(f"w_{t}", dist.Normal(nu[z] + 0.1 * count, 1.0), obs=-y[t])


def second_order(loop: Loop, x: Tensor, y: Tensor, change: Tensor) -> None:
    """Tables of each step that look two steps back."""
    mu, nu, before, z = levels("mu"), levels("nu"), torch.tensor(0), torch.tensor(0)
    for t in loop(len(x), 2):
        before, z = z, pyro.sample(f"z_{t}", dist.Categorical(Vindex(change)[t, before, z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])
        with pyro.plate(f"many_{t}", y.shape[1]):
            pyro.sample(f"y_{t}", dist.Normal(nu[z], 1.0), obs=y[t])


def partly_known(loop: Loop, x: Tensor, y: Tensor, labels: Tensor, known: Any) -> None:
    """States known at some steps; a mixture of each state beside the plate."""
    A, mu, nu, z = table(), levels("mu", 2), levels("nu"), torch.tensor(0)
    share = pyro.param("share", torch.tensor([[0.6, 0.4], [0.3, 0.7]]), constraint=simplex)
    for t in loop(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]), obs=labels[t], obs_mask=known[t])
        parts = dist.Normal(Vindex(mu)[z] + torch.tensor([0.0, 1.0]), 1.0)
        pyro.sample(f"x_{t}", dist.MixtureSameFamily(dist.Categorical(Vindex(share)[z]), parts), obs=x[t])
        with pyro.plate(f"many_{t}", y.shape[1]):
            pyro.sample(f"y_{t}", dist.Normal(nu[z], 1.0), obs=y[t])


def tied_mixture(loop: Loop, x: Tensor) -> None:
    """States have weights of their own on the same normals (a semi-continuous model)."""
    A, mu, z = table(), pyro.param("mu", torch.tensor([0.0, 3.0])), torch.tensor(0)
    share = pyro.param("share", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=simplex)
    for t in loop(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        parts = dist.MixtureSameFamily(dist.Categorical(share[z]), dist.Normal(mu, 1.0))
        pyro.sample(f"x_{t}", parts, obs=x[t])


def state_space(loop: Loop, x: Tensor, y: Tensor, u: Tensor) -> None:
    """A Gaussian level seen alone and by a plate; what varies with time has a dim of size 1 for the plate."""
    q, r, s = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r", "s"))
    slope, level = pyro.param("slope", torch.tensor(0.1)), torch.tensor(0.0)
    for t in loop(len(x)):
        level = pyro.sample(f"level_{t}", dist.Normal(level, q))
        pyro.sample(f"x_{t}", dist.Normal(level + slope * u[t], r), obs=x[t])
        with pyro.plate(f"many_{t}", y.shape[1]):
            pyro.sample(f"y_{t}", dist.Normal(0.5 * level, s), obs=y[t])


def masked_by_wrapper(loop: Loop, y: Tensor, lengths: Tensor) -> None:
    """The mask is one of the distribution, which Pyro expands over the states."""
    A, mu, z = table(), levels("mu"), torch.tensor(0)
    with pyro.plate("sequences", y.shape[1]):
        for t in loop(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0).mask(t < lengths), obs=y[t])


def masked_by_state(loop: Loop, y: Tensor) -> None:
    """One of the states shows nothing."""
    A, mu, z = table(), pyro.param("mu", torch.tensor(0.3)), torch.tensor(0)
    for t in loop(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        with poutine.mask(mask=z == 0):
            pyro.sample(f"y_{t}", dist.Normal(mu, 1.0), obs=y[t])


def ragged(loop: Loop, y: Tensor, lengths: Tensor) -> None:
    """Sequences of unequal lengths as in Pyro's own examples, and a level that moves by as much at every step."""
    A, mu, z = table(), levels("mu"), torch.tensor(0)
    drift = pyro.param("drift", torch.linspace(-0.1, 0.1, y.shape[1]))
    with pyro.plate("sequences", y.shape[1]):
        for t in loop(len(y)):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z] + drift * t, 1.0), obs=y[t])


counts = torch.arange(T) % 3 * 1.0
tables = torch.softmax(draws(T, 2, 2, 2), -1)
gaps = torch.arange(T) % 3 > 0
CASES: dict[str, tuple[Any, ...]] = {
    "beside": (beside, draws(T), draws(T, M)),
    "as many in the plate as steps": (beside, draws(M + 1), draws(M + 1, M)),
    "sequences": (sequences, draws(T, N, 1), draws(T, N, M)),
    "as many sequences as steps": (sequences, draws(N + 1, N, 1), draws(N + 1, N, M)),
    "two plates": (two_plates, draws(T, 2), draws(T, M), counts.reshape(T, 1, 1).repeat(1, N, M)),
    "masked": (masked, draws(T), draws(T, M), draws(T + 1)[1:], gaps),
    "read": (read, counts, draws(T, M), 0.5 + counts),
    "second order": (second_order, draws(T), draws(T, M), tables),
    "partly known": (partly_known, draws(T), draws(T, M), torch.arange(T) % 2, ~gaps),
    "tied mixture": (tied_mixture, draws(T)),
    "ragged": (ragged, draws(T, N), torch.tensor([6, 2, 3])),
    "masked by a wrapper": (masked_by_wrapper, draws(T, N), torch.tensor([6, 2, 3])),
    "masked by the state": (masked_by_state, draws(T)),
    "state space": (state_space, draws(T, 1), draws(T, M), draws(T + 1, 1)[1:]),
}


@pytest.mark.parametrize("case", CASES)
def test_together_is_one_by_one(case: str) -> None:
    model, *args = CASES[case]
    data = [x.double() if x.is_floating_point() else x for x in args]
    alone, together = (pyro_em.fit(model, loop, *data, max_iter=4, tol=0) for loop in (one_by_one, pyro_em.markov))
    assert together.history["objective"] == pytest.approx(alone.history["objective"], rel=1e-12)
    for name, value in alone.params.items():
        torch.testing.assert_close(together.params[name], value, rtol=1e-8, atol=1e-10)
    posterior, expected = together.posterior(), alone.posterior()
    assert posterior.log_evidence == pytest.approx(expected.log_evidence, rel=1e-12)
    (name, *_) = posterior.latents
    if case != "state space":
        modes = [expected.mode()[f"{name}_{t}"] for t in range(len(data[0]))]
        assert torch.equal(posterior.mode()[name], torch.stack(modes).reshape(posterior.mode()[name].shape))
    for t in (0, 1, len(data[0]) - 1):
        a, b = posterior.mean(f"{name}_{t}"), expected.mean(f"{name}_{t}")
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-9, atol=1e-12)


def test_missing_values_beside_a_plate() -> None:
    model, x, y = CASES["beside"]
    x = x.double()
    x[3] = x[0] = torch.nan
    alone, together = (
        pyro_em.fit(model, loop, x, y.double(), missing="nan", max_iter=3, tol=0)
        for loop in (one_by_one, pyro_em.markov)
    )
    assert together.history["objective"] == pytest.approx(alone.history["objective"], rel=1e-12)


def test_what_cannot_be_told_apart_is_refused_with_the_remedy() -> None:
    """Time joined with a plate by the model itself, and a number for each step that meets drawn sequences."""
    model, x, y, u = CASES["state space"]
    with pytest.raises(Refusal, match=r"'x_1:6'.*time \(5 steps at once\) in several dims.*size 1"):
        pyro_em.fit(model, pyro_em.markov, x[:, 0], y, u[:, 0])

    def panel(loop: Loop, y: Tensor, u: Tensor) -> None:
        A, mu, z = table(), levels("mu"), torch.tensor(0)
        with pyro.plate("sequences", y.shape[1]):
            for t in loop(len(y)):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z] + 0.3 * u[t], 1.0), obs=y[t])

    with pytest.raises(Refusal, match=r"all steps at once.*size of tensor.*\(T, 1\)"):
        pyro_em.fit(panel, pyro_em.markov, y, u[:, 0])
    with pytest.raises(Refusal, match=r"at step 1 alone its log-density is another.*first dim"):
        pyro_em.fit(panel, pyro_em.markov, y[: M + 1], u[: M + 1, 0])
    alone = pyro_em.fit(panel, one_by_one, y, u[:, 0], max_iter=2, tol=0)
    together = pyro_em.fit(panel, pyro_em.markov, y, u, max_iter=2, tol=0)
    assert together.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-12)


def test_the_model_gets_back_what_it_gave() -> None:
    """The value of an observed site has the shape of the data, NaN where it is missing."""
    shapes: set[Any] = set()

    def model(x: Tensor, y: Tensor) -> None:
        A, mu, z = table(), levels("mu"), torch.tensor(0)
        for t in pyro_em.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            value = pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])
            shapes.add((tuple(value.shape), tuple(x[t].shape), bool((value.isnan() == x[t].isnan()).all())))
            with pyro.plate(f"many_{t}", y.shape[1]):
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    x = draws(T)
    x[2] = torch.nan
    pyro_em.fit(model, x, draws(T, M), missing="nan", max_iter=1)
    assert shapes == {((), (), True), ((T - 1,), (T - 1,), True)}
