"""Bad input that is not a bad option (test_options.py): each row of the policy, and that it leaves no trace.

A sentence says what, where and why; the caller's param store and random state are untouched; a collapse keeps the
last finite result. What is merely unusual (dtypes, strides, gradients, threads) gives the ordinary result.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.errors import DegenerateLikelihoodError, InputError, Refusal, ResourceError
from tests import classics
from tests.problems import BY_NAME

Y = torch.tensor([0.3, 0.5, -0.2, 2.5, 2.9, 3.1, 2.2], dtype=torch.float64)
START = {"pi": [0.5, 0.5], "mu": [0.0, 3.0], "sd": [1.0, 1.0]}
PLANE = BY_NAME["gmm_full"].args[0]


@contextmanager
def no_trace() -> Iterator[None]:
    """Param store (which is not empty) and random state are afterwards as before."""
    pyro.param("mu", torch.tensor([7.0]))
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)
    yield
    after = dict(pyro.get_param_store().items())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n].detach()) for n in before)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_state)


def _two_means(y: Tensor, size: int, width: int | None = None) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 1.0]) if width is None else torch.zeros(2, width))
    with pyro.plate("rows", size):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        fn = dist.Normal(mu[z], 1.0) if width is None else dist.Normal(mu[z], 1.0).to_event(1)
        pyro.sample("y", fn, obs=y)


def _unrolled(y: Tensor) -> None:
    A = pyro.param("A", torch.full((2, 2), 0.5), constraint=constraints.simplex)
    z: Any = 0
    for t in range(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"y_{t}", dist.Normal(1.0 * z, 1.0), obs=y[t])


class _Drifting:
    """Its data, its noise or its sites are others in every run."""

    def __init__(self, what: str) -> None:
        self.what, self.runs = what, 0

    def __call__(self, y: Tensor) -> None:
        self.runs += 1
        mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
        noise = torch.randn(2) if self.what == "noise" else torch.zeros(2)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(mu[z] + noise[z], 1.0), obs=y + (self.runs if self.what == "data" else 0))
            if self.what == "sites" and self.runs > 3:
                pyro.sample("more", dist.Normal(0.0, 1.0), obs=y)


def _calls_fit(y: Tensor) -> None:
    pyro_em.fit(classics.poisson_mixture, torch.tensor([1.0, 2.0, 9.0]), max_iter=1)
    classics.normal_mixture(y)


ROWS: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "an array": (classics.normal_mixture, (Y.numpy(),), InputError, "'y'.*ndarray, not a torch tensor"),
    "a plate of another size": (_two_means, (Y, 5), InputError, r"'y'.*\(7,\).*'rows' of 5 elements.*\(5,\)"),
    "events of another size": (_two_means, (PLANE, 60, 3), InputError, r"'y'.*\(60, 2\).*\(3,\)"),
    "events without a dim": (_two_means, (torch.tensor(1.0), 1, 3), InputError, r"'y'.*\(\).*\(3,\)"),
    "constant data": (classics.normal_mixture, (torch.full((6,), 2.0),), InputError, "'y': all data are equal"),
    "constant data whose mean is rounded": (
        classics.normal_mixture,
        (torch.full((7,), 0.3),),
        InputError,
        "'y': all data are equal",
    ),
    "one row": (classics.normal_mixture, (Y[:1],), InputError, "'y': all data are equal"),
    "a long loop": (_unrolled, (torch.zeros(200),), ResourceError, r"200 .*'z_0'.*pyro.markov\(range"),
    "noise of its own": (_Drifting("noise"), (Y,), Refusal, "'y': two runs.*random numbers.*argument"),
    "data that change": (_Drifting("data"), (Y,), Refusal, "'y': two runs.*changes its data"),
    "sites that come and go": (_Drifting("sites"), (Y,), Refusal, "'more'.*sites changed between two runs"),
    "a fit inside of a model": (_calls_fit, (Y,), InputError, "inside of a model"),
}


@pytest.mark.parametrize("row", ROWS)
def test_what_cannot_be_used_is_said(row: str) -> None:
    model, args, error, message = ROWS[row]
    with no_trace(), pytest.raises(error, match=f"(?s){message}"):
        pyro_em.fit(model, *args)


COLLAPSES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], str]] = {
    "duplicates": (classics.normal_mixture, (torch.tensor([0.0, 0, 0, 3, 3, 3]),), START, "y"),
    "fewer rows than components": (classics.normal_mixture, (Y[[0, 6]], 3), {}, "y"),
    "a constant column": (
        classics.gaussian_mixture, (torch.stack([PLANE[:, 0], torch.ones(60)], -1), 3), BY_NAME["gmm_full"].init, "x"
    ),
    "fewer rows than dims": (classics.gaussian_mixture, (PLANE[:2], 3), BY_NAME["gmm_full"].init, "x"),
}  # fmt: skip


@pytest.mark.parametrize("row", COLLAPSES)
def test_a_collapse_names_the_component_and_keeps_the_last_finite_result(row: str) -> None:
    model, args, init, site = COLLAPSES[row]
    with no_trace(), pytest.raises(DegenerateLikelihoodError, match=r"collapsed|singular") as error:
        pyro_em.fit(model, *args, init=init or None)
    assert error.value.site == site and error.value.component is not None
    assert error.value.iteration is not None and error.value.remedy
    result = error.value.result
    assert result.num_iterations < error.value.iteration or result.num_iterations == error.value.iteration - 1
    assert not result.converged and np.isfinite(result.log_likelihood)
    assert all(bool(value.isfinite().all()) for value in result.params.values())


def _fit(x: Tensor, model: Any = classics.normal_mixture, **options: Any) -> Any:
    return pyro_em.fit(model, x, **{"max_iter": 6, "tol": 0, **options})


def _same(a: Any, b: Any) -> bool:
    same = a.history["objective"] == b.history["objective"]
    return same and all(torch.equal(a.params[n], b.params[n]) for n in b.params)


def test_equal_starts_are_a_saddle_and_warned_of() -> None:
    with pytest.warns(pyro_em.SymmetricStart, match="latent 'z'.*equal for ever"):
        found = _fit(Y, init={**START, "mu": [1.0, 1.0]})
    assert float(found.params["mu"][0]) == float(found.params["mu"][1])
    assert any("equal for ever" in message for message in found.warnings)


def test_an_empty_component_keeps_its_parameters_and_is_warned_of_once() -> None:
    with pytest.warns(pyro_em.EMWarning) as caught:
        found = _fit(Y, init={**START, "mu": [1.0, 1e4]})
    empty = [w for w in caught if issubclass(w.category, pyro_em.UnidentifiedParameter)]
    assert len(empty) == 1 and "'mu', 'sd'" in str(empty[0].message)
    assert float(found.params["mu"][1]) == 1e4 and float(found.params["sd"][1]) == 1.0
    assert float(found.params["pi"][1]) == 0.0


def test_two_fits_with_the_same_names_do_not_meet() -> None:
    first = _fit(Y)
    _fit(3 * Y)  # leaves other values under these names in the store
    assert _same(first, _fit(Y))


def test_threads_take_turns() -> None:
    data = [Y, Y + 1, 2 * Y, Y[1:]]
    expected, found = [_fit(y) for y in data], {}

    def run(i: int) -> None:
        found[i] = _fit(data[i])

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they meet wherever they can
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(data))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    assert all(_same(found[i], expected[i]) for i in range(len(data)))


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """KeyboardInterrupt in what is within: nothing arrives before it, nor once it is left, however late the timer."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # what arrived until here is raised by the next line at the latest
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("seconds", [1e-6, 0.002, 0.02, 0.05, 0.1, 0.2])
def test_an_interrupt_at_any_time(seconds: float) -> None:
    """SIGINT while tracing, binding, recording or replaying: no trace, or a result that says so and is whole."""
    found: list[Any] = []
    with no_trace(), pytest.raises(KeyboardInterrupt):  # the timer runs within only, so that both always see its end
        with interrupted_after(seconds):
            found.append(_fit(Y, max_iter=10**6, init=START))
        pyro.clear_param_store()
        pyro.param("mu", torch.tensor([7.0]))
        raise KeyboardInterrupt
    for result in found:
        assert result.outcome is pyro_em.Outcome.interrupted
        expected = _fit(Y, max_iter=result.num_iterations, init=START)
        assert all(torch.equal(result.params[n], value) for n, value in expected.params.items())


OPTIMISED = """
import pyro, pyro.distributions as dist, torch, pyro_em
from torch.distributions import constraints
assert False, "assertions must be off"

def model(y):
    rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Poisson(rate[z]), obs=y)

y = torch.tensor([1.0, 5.0, 2.0])
bad = [
    ([1.0, float("nan"), 2.0], {}), ([1.0, 2.0, -3.0], {}), (y, {"init": {"rate": [1.0, float("nan")]}}),
    (y, {"init": {"rate": [-1.0, 1.0]}}), (y, {"tol": -1.0}), (y, {"weights": {"rows": -torch.ones(3)}}),
]
for data, options in bad:
    try:
        pyro_em.fit(model, torch.as_tensor(data), **options)
    except pyro_em.InputError as error:
        print(str(error).splitlines()[0])
    else:
        print("accepted")
print(len(dict(pyro.get_param_store().items())))
"""


def test_checks_do_not_depend_on_assertions() -> None:
    """`python -O` drops assert statements, and Pyro's own validation with them."""
    done = subprocess.run([sys.executable, "-O", "-c", OPTIMISED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    wanted = ("row 1", "row 2", "'rate' is not finite", "'rate' violates", "tol must be", "element 0")
    assert len(lines) == len(wanted) + 1
    for line, words in zip(lines, wanted, strict=False):
        assert words in line
    assert lines[-1] == "0"
