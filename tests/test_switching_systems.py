"""Linear-Gaussian systems whose class changes with the step: refused under em with a remedy, which is tried here.

The oracle of the evidence is a dense joint normal for every path of the classes (dense.py).
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.errors import InputError, Refusal
from tests.dense import dense
from tests.mixed_chains import positive, simplex


def switching(y: Tensor, loop: Any) -> None:
    """The class changes with the step: the state's posterior is a mixture of 2^T normals."""
    A = pyro.param("A", torch.tensor([[0.9, 0.1], [0.2, 0.8]]), constraint=simplex)
    a, q = pyro.param("a", torch.tensor([0.9, 0.1])), pyro.param("q", torch.tensor([0.5, 1.0]), constraint=positive)
    k, x = 0, torch.tensor(0.0)
    for t in loop(len(y)):
        k = pyro.sample(f"k_{t}", dist.Categorical(A[k]))
        x = pyro.sample(f"x_{t}", dist.Normal(a[k] * x, q[k]))
        pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])


def guide(y: Tensor, loop: Any) -> None:
    """A normal for the state of every step; the classes are summed out given the states."""
    loc, scale = pyro.param("loc", y.clone()), pyro.param("scale", torch.full((len(y),), 0.4), constraint=positive)
    for t in loop(len(y)):
        pyro.sample(f"x_{t}", dist.Normal(loc[t], scale[t]))


def _steps(T: int) -> Any:
    return pyro.markov(range(T))


@pytest.mark.parametrize("loop", [pyro_em.markov, _steps])
def test_a_system_that_switches_is_refused(loop: Any) -> None:
    with pytest.raises(Refusal, match=r"'x_0'.*switches with the discrete latent 'k_0'.*algorithm='svi'"):
        pyro_em.fit(switching, torch.randn(40), loop)


@pytest.mark.parametrize("q", [guide, None])
def test_a_system_that_switches_is_fitted_by_svi(q: Any) -> None:
    """With a natural guide, and an automatic one: a bound on the evidence of all paths, and near it."""
    y = torch.tensor([0.4, 0.1, 1.5, -0.9])
    options: dict[str, Any] = {"algorithm": "svi", "guide": q, "optim": pyro.optim.Adam({"lr": 0.03}), "seed": 0}
    found = pyro_em.fit(switching, y, pyro_em.markov, max_iter=150, **options)
    params = {name: found.params[name] for name in ("A", "a", "q")}
    truth = float(dense(switching, (y, _steps), params).log_evidence.detach())
    assert truth - 0.25 < found.elbo < truth + 0.05  # of 100 draws
    assert not found.exact and found.log_likelihood is None
    routes = {row.name.split(" ")[0]: row.route for row in found.plan.e_step}
    assert routes["k_0"] == "enumerate" and routes["x_0"] == "guide"
    one, other = (pyro_em.fit(switching, y, loop, max_iter=2, **options) for loop in (pyro_em.markov, _steps))
    assert one.history["objective"] == other.history["objective"]


def test_a_guide_of_other_sites_is_refused() -> None:
    def other(y: Tensor, loop: Any) -> None:
        pyro.sample("z_0", dist.Normal(0.0, 1.0))

    with pytest.raises(InputError, match=r"its site 'z_0' is no latent.*k_0, x_0, k_1, x_1"):
        pyro_em.fit(switching, torch.zeros(2), pyro_em.markov, algorithm="svi", guide=other)
