"""Short chains (e_step/scan_short.py): one operation, in one recording with what comes before and after it."""

from __future__ import annotations

import pytest
import torch

import pyro_em
from pyro_em import evaluator
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.scanned import compile_scanned
from pyro_em.evaluator import Evaluator
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from pyro_em.recordings import Mapped, Request, Whole
from tests.test_scanned import chain, normal, poisson


def _series(steps: int, chains: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(steps)
    level = (torch.arange(steps) // 7 % 3).double().unsqueeze(-1)
    return level + spread * torch.randn(steps, chains, generator=generator)


@pytest.mark.parametrize(("steps", "chains"), [(40, 1), (25, 4)])
def test_replays_of_short_chains_change_no_bit(steps: int, chains: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, emission in ((_series(steps, chains), normal), (_series(steps, chains).abs().round(), poisson)):
        options = {"max_iter": 30, "tol": 0}
        found = pyro_em.fit(chain, data, emission, **options)
        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "WARM", 10**9)
            expected = pyro_em.fit(chain, data, emission, **options)
        assert found.history["objective"] == expected.history["objective"]
        assert found.history["score"] == expected.history["score"]
        assert all(torch.equal(value, expected.params[key]) for key, value in found.params.items())


def test_one_recording_holds_the_update_and_follows_the_code_out_of_range() -> None:
    """Then a state is so far from all data that the messages leave the range of floats: the blocks do it."""
    problem = bind(chain, (_series(60, 2), normal), {}, with_prior=False)
    m_step, engine, reference = MStep(problem, "auto", "em"), compile_scanned(problem), Interpreted(problem)
    evaluate = Evaluator(engine, m_step)
    params, magnitude, kinds = problem.start, 0.0, []
    for _ in range(12):
        (found,) = evaluate([Request(params, magnitude)])
        assert not isinstance(found, Exception)
        kinds.append(isinstance(found, Mapped))
        expected = reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        updated = found.updated if isinstance(found, Mapped) else m_step.update(params, found)[0]
        for name, value in m_step.update(params, expected)[0].items():
            torch.testing.assert_close(updated[name], value, rtol=1e-9, atol=1e-9)
        params, magnitude = updated, found.magnitude
    assert isinstance(evaluate._recording, Whole) and all(kinds[4:])
    far = {**params, "sd": torch.full((3,), 1e-3), "A": torch.eye(3) * (1 - 3e-9) + 1e-9, "mu": params["mu"] + 0.1}
    (found,) = evaluate([Request(far, magnitude)])
    assert not isinstance(found, Exception) and not isinstance(found, Mapped)
    assert found.log_likelihood == pytest.approx(reference.e_step(far).log_likelihood, rel=1e-12)
