"""G12: latents that quadrature cannot integrate, and rules that cannot be, are refused with the site and a remedy."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

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


def test_kinks_are_told_at_once() -> None:
    """Newton's steps towards a kink are halved time and again: 40 s of them once. Away from it all is smooth."""
    runs = []

    def model(x: Tensor) -> None:
        runs.append(x)
        s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Laplace(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), s).expand([len(x), 4]).to_event(1), obs=x)

    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    rules = {"z": Quadrature(41)}
    with pytest.raises(Refusal, match=r"'z'.*not smooth at its mode.*StudentT"):
        pyro_em.fit(model, x, e_step=rules)
    assert len(runs) < 400
    result = pyro_em.fit(model, x + 50, e_step=rules, max_iter=0)
    z = torch.linspace(40, 60, 8001)
    joint = dist.Laplace(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob((x + 50).unsqueeze(-1)).sum(1)
    expected = float((joint.logsumexp(-1) + (z[1] - z[0]).log()).sum())
    assert result.log_likelihood == pytest.approx(expected, rel=1e-10)


class _Bend(dist.TorchDistribution):  # type: ignore[misc]
    """Laplace's density (but for its constant) with a bend of width ε in place of the kink."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real

    def __init__(self, width: float, rows: int) -> None:
        self.width = width
        super().__init__(torch.Size([rows]))

    def log_prob(self, value: Tensor) -> Tensor:
        return -(value.square() + self.width**2).sqrt()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, *self.batch_shape)


@pytest.mark.parametrize("width", [1e-2, 1e-5, 1e-8])
def test_narrow_bends_are_no_kinks(width: float) -> None:
    """Their modes are found however narrow they are; that the nodes there do not tell the rest is another matter."""

    def model(x: Tensor) -> None:
        s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", _Bend(width, len(x)))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), s).expand([len(x), 4]).to_event(1), obs=x)

    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Refusal, match="41 quadrature nodes leave an error"):
        pyro_em.fit(model, x, e_step={"z": Quadrature(41)}, max_iter=0)


def test_matrices_in_float32_are_refused_by_name() -> None:
    """They were said to read several elements."""

    def model(y: Tensor) -> None:
        L = pyro.param("L", torch.eye(2, dtype=torch.float32), constraint=constraints.lower_cholesky)
        with pyro.plate("people", len(y)):
            b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2, dtype=torch.float32), scale_tril=L))
            pyro.sample("y", dist.Bernoulli(logits=b[..., 0] + b[..., 1]), obs=y)

    with pytest.raises(Refusal, match=r"float32[\s\S]*set_default_dtype"):
        pyro_em.fit(model, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float32), e_step={"b": Quadrature(7)})
