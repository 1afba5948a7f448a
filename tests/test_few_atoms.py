"""Crossed effects of so many rows that no table at all atoms is made: as with these, and against a sparse LU."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import linear_mixed
from pyro_em import settings
from pyro_em.all_atoms import has_few_atoms, with_all_atoms
from pyro_em.e_step.auto import chosen
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.errors import ResourceError
from pyro_em.evidence import gaussian_recognition
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind


def _data(subjects: int, items: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    i, j = torch.randint(subjects, (rows,), generator=generator), torch.randint(items, (rows,), generator=generator)
    a, b, e = torch.randn(subjects + items + rows, generator=generator, dtype=torch.float64).split(
        [subjects, items, rows]
    )
    return i, j, 1 + 0.8 * a[i] + 0.5 * b[j] + 0.6 * e


def _evidence(i: Tensor, j: Tensor, y: Tensor, mean: float, scales: Tensor) -> float:
    """log p(y) = -½ (n log 2π + log|V| + rᵀ V⁻¹ r), V = s² I + Z D Zᵀ, by an LU factorisation of J = D⁻¹ + ZᵀZ/s²."""
    first, second, noise = scales.tolist()
    n, I, J = len(y), int(i.max()) + 1, int(j.max()) + 1
    rows = np.arange(n)
    z = sparse.hstack(
        [sparse.csc_matrix((np.ones(n), (rows, k.numpy())), (n, size)) for k, size in ((i, I), (j, J))]
    ).tocsc()
    d = np.concatenate([np.full(I, first**2), np.full(J, second**2)])
    lu = splu((sparse.diags(1 / d) + z.T @ z / noise**2).tocsc())
    r = y.numpy() - mean
    log_det = n * np.log(noise**2) + np.log(d).sum() + np.log(np.abs(lu.U.diagonal())).sum()
    pulled = z.T @ r / noise**2
    return float(-0.5 * (n * np.log(2 * np.pi) + log_det + r @ r / noise**2 - pulled @ lu.solve(pulled)))


def test_many_effects_and_rows_against_a_sparse_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """41 atoms of 6,000 rows would be more than are made here; neither the fit nor its last check has them."""
    i, j, y = _data(1500, 40, 6000)
    monkeypatch.setattr(gaussian_recognition, "FEW", 2**20)
    monkeypatch.setattr(settings, "max_table_bytes", 8 * 41 * 6000)
    result = pyro_em.fit(linear_mixed.crossed, i, j, y, max_iter=12, tol=0)
    assert result.problem is not None and has_few_atoms(result.problem)
    assert result.plan.engine.startswith("pooled")
    names = ("first", "second", "within")
    scales = torch.stack([result.params[n].reshape(()) for n in names])
    found = _evidence(i, j, y, float(result.params["mean"]), scales)
    assert result.log_likelihood == pytest.approx(found, rel=1e-11)
    with pytest.raises(ResourceError, match="or raise"):
        pyro_em.fit(linear_mixed.crossed, i, j, y, m_step="gradient")


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # few updates are far from the maximum
def test_it_is_as_with_all_atoms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits, entropies and numeric M-steps, which need Q, included."""
    data = _data(12, 5, 80)

    def curved(i: Tensor, j: Tensor, y: Tensor) -> None:
        mean = pyro.param("mean", torch.tensor(0.2))
        scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
        with pyro.plate("subjects", 12):
            a = pyro.sample("a", dist.Normal(0.0, scale[0]))
        with pyro.plate("items", 5):
            b = pyro.sample("b", dist.Normal(0.0, scale[1]))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean**3 + a[..., i] + b[..., j], scale[2]), obs=y)

    for model, engine in ((linear_mixed.crossed, "pooled"), (curved, "interpreted")):
        plain = pyro_em.fit(model, *data, max_iter=4, tol=0)
        with monkeypatch.context() as patch:
            patch.setattr(gaussian_recognition, "FEW", 0)
            few = pyro_em.fit(model, *data, max_iter=4, tol=0)
            bound = bind(model, data, {}, with_prior=False)
            assert has_few_atoms(bound)
            problem, _, own = chosen(bound, "auto", "em")
            assert isinstance(own, Interpreted) is not has_few_atoms(problem)
        assert few.plan.engine.startswith(engine) and plain.plan.engine.startswith(engine)
        assert few.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-13)
        for name, value in plain.params.items():
            torch.testing.assert_close(few.params[name], value, rtol=1e-12, atol=1e-13)
        assert few.posterior().entropy() == pytest.approx(plain.posterior().entropy(), rel=1e-9)
        errors, expected = few.standard_errors(), plain.standard_errors()
        for name, value in expected.items():
            torch.testing.assert_close(errors[name], value, rtol=1e-8, atol=1e-10, equal_nan=True)


def test_a_problem_that_has_its_atoms_is_left_as_it_is() -> None:
    """No elimination is made for it once more, and no table."""
    i, j, y = _data(5, 3, 30)
    problem = bind(linear_mixed.crossed, (i, j, y), {}, with_prior=False)
    assert problem.continuous is not None and not has_few_atoms(problem)
    assert with_all_atoms(problem) is problem


def common_factors(y: Tensor) -> None:
    """Four factors of all rows, whose loadings are solved for; the noise has no closed form."""
    W = pyro.param("W", lambda: torch.ones(4, dtype=y.dtype) / 2)
    noise = pyro.param("noise", torch.tensor(0.5, dtype=y.dtype))
    z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=y.dtype), 1.0).to_event(1), infer={"em": "latent"})
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((W * z).sum(-1), 1 + noise**2), obs=y)


def test_rules_are_chosen_at_atoms_with_the_moments_of_the_posterior() -> None:
    """A problem is bound at two drawn values: there four loadings would be collinear, which they are not."""
    y = torch.tensor([0.3, 1.0, -0.4], dtype=torch.float64)
    problem = bind(common_factors, (y,), {}, with_prior=False)
    assert problem.continuous is not None and problem.continuous.sketch
    assert next(iter(problem.continuous.values.values())).shape[0] == 2
    m_step = MStep(problem, "auto", "em")
    own = m_step.problem.continuous
    assert own is not None and not own.sketch and not m_step.collinear
    (part,) = own.eliminate(problem.start)
    torch.testing.assert_close(own.values["z"], part.atoms.values["z"])
    assert not has_few_atoms(problem)
