"""G12: latents that quadrature cannot integrate, and rules that cannot be, are refused with the site and a remedy."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em import Quadrature
from pyro_em.errors import InputError, Refusal
from tests import zoo_quadrature as zoo

ANSWERS = (torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) < 0.5).double()


def _moving_prior(y: Tensor) -> None:
    s = pyro.param("s", torch.tensor(1.0))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, s))
        pyro.sample("y", dist.Poisson(theta.exp()), obs=y.abs().round())


def _unequal_priors(y: Tensor) -> None:
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(y, 1.0))
        pyro.sample("y", dist.Poisson((a * theta).exp()), obs=y.abs().round())


def _student(y: Tensor) -> None:
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.StudentT(4.0))
        pyro.sample("y", dist.Poisson((a * theta).exp()), obs=y.abs().round())


@pytest.mark.parametrize(
    ("model", "message"),
    [(_moving_prior, "depends on parameters"), (_unequal_priors, "from element to element"), (_student, "StudentT")],
)
def test_fixed_grids_that_are_refused(model: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        pyro_em.fit(model, torch.linspace(0.5, 2.0, 6), e_step={"theta": Quadrature(61, adaptive=False)})


def _coupled(y: Tensor) -> None:
    pyro.param("a", torch.tensor(1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((z - z.roll(1)).exp(), 1.0), obs=y)


def _positive(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Gamma(pyro.param("a", torch.tensor(1.0)), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def _many(y: Tensor) -> None:
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(5), a).to_event(1))
        pyro.sample("y", dist.Poisson(z.sum(-1).exp()), obs=y.abs().round())


def _half_named(y: Tensor) -> None:
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("rows", len(y)):
        z, v = pyro.sample("z", dist.Normal(0.0, a)), pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Poisson((z + v).exp()), obs=y.abs().round())


def _other_plates(y: Tensor) -> None:
    a = pyro.param("a", torch.tensor(1.0))
    common = pyro.sample("z", dist.Normal(0.0, a))
    with pyro.plate("rows", len(y)):
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Poisson((common + v).exp()), obs=y.abs().round())


REFUSED = [
    (_coupled, ("z",), r"'y'.*several elements"),
    (_positive, ("z",), r"'z'.*real"),
    (_many, ("z",), r"'z'.*5 dimensions"),
    (_half_named, ("z",), r"'v'.*'z'.*no rule"),
    (_other_plates, ("z", "v"), r"'v'.*'z'.*other plates"),
]


@pytest.mark.parametrize(("model", "sites", "message"), REFUSED, ids=[m.__name__ for m, *_ in REFUSED])
def test_refused(model: Any, sites: tuple[str, ...], message: str) -> None:
    with pytest.raises(Refusal, match=message) as error:
        pyro_em.fit(model, torch.linspace(0.5, 2.0, 6), e_step=dict.fromkeys(sites, Quadrature()))
    assert error.value.remedy


BAD: list[tuple[Any, str]] = [
    ("quadrature", "'quadrature'.*pyro_em.Quadrature"),
    ({"theta": 21}, "pyro_em.Quadrature"),
    ({"z": Quadrature()}, r"no continuous latent 'z'.*'theta'"),
    ({"z": Quadrature(61, adaptive=False), "theta": Quadrature()}, "no continuous latent 'z'"),
]


@pytest.mark.parametrize(("e_step", "message"), BAD)
def test_bad_options(e_step: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pyro_em.fit(zoo.ability, ANSWERS, e_step=e_step)


@pytest.mark.parametrize(
    "options",
    [
        {"num_nodes": 0},
        {"num_nodes": 2.5},
        {"num_nodes": 500},
        {"tolerance": -1.0},
        {"num_nodes": 1, "adaptive": False},
    ],
)
def test_bad_rules(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Quadrature"):
        Quadrature(**options)
