"""Short chains (e_step/scan_short.py): one operation, in one recording with what comes before and after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.scanned import compile_scanned
from pyro_em.evaluator import Evaluator
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from pyro_em.recordings import Mapped, Request, Whole
from tests.test_scanned import categorical, chain, diagonal, normal, poisson, rows


def _series(spread: float, steps: int = 40, chains: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(steps)
    level = (torch.arange(steps) // 7 % 3).double().unsqueeze(-1)
    return level + spread * torch.randn(steps, chains, generator=generator)


def _apart() -> Tensor:
    """States so far from one another that products on sums of squares would lose digits."""
    return 60 * _series(0.0) + _series(1.0)


_SEEN = torch.arange(40).unsqueeze(-1) < torch.tensor([40, 23, 1])
_WEIGHTS = {"sequences": torch.tensor([1.0, 0.0, 2.5])}
CASES: dict[str, tuple[Any, ...]] = {
    "normal": (_series(1.0), normal),
    "one chain": (_series(1.0, 60, 1), normal),
    "far apart": (_apart(), normal),
    "diagonal, far apart": (torch.stack([_apart(), _series(1.0)], -1), diagonal),
    "counts": (_series(1.0).abs().round(), poisson),
    "symbols": (_series(1.5).abs().long().clamp(max=3), categorical),
    "ragged": (_series(1.0, 40, 3), normal, {"seen": _SEEN}),
    "ragged, weighted": (_series(1.0, 40, 3).abs().round(), poisson, {"seen": _SEEN}, _WEIGHTS),
}


@pytest.mark.parametrize("name", CASES)
def test_one_recording_holds_the_update(name: str) -> None:
    """Replays change no bit, and are the reference's."""
    data, emission, *more = CASES[name]
    seen, weights = [*more, *({}, None)[len(more) :]]
    problem = bind(chain, (data, emission), seen, with_prior=False, weights=weights)
    m_step, engine, reference = MStep(problem, "auto", "em"), compile_scanned(problem), Interpreted(problem)
    evaluate = Evaluator(engine, m_step)
    params, magnitude, kinds = problem.start, 0.0, []
    if "apart" in name:
        params = {**params, "mu": params["mu"] + 60 * torch.arange(3.0).reshape(-1, *[1] * (params["mu"].dim() - 1))}
    for _ in range(9):
        (found,) = evaluate([Request(params, magnitude)])
        assert not isinstance(found, Exception)
        kinds.append(isinstance(found, Mapped))
        (sums,) = engine.core([engine.before(params, torch.tensor(magnitude))])
        ordinary, expected = engine.expectation(params, sums), reference.e_step(params)
        updated = m_step.update(params, ordinary)[0]
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        if isinstance(found, Mapped):
            assert found.log_likelihood == ordinary.log_likelihood
            assert all(torch.equal(found.updated[key], value) for key, value in updated.items())
        for key, value in m_step.update(params, expected)[0].items():
            torch.testing.assert_close(updated[key], value, rtol=1e-9, atol=1e-9)
        params, magnitude = updated, found.magnitude
    assert isinstance(evaluate._recording, Whole) and engine.compact and all(kinds[3:])
    (stage,) = [engine.before(params, torch.tensor(magnitude))]
    assert any(stage.kind) or "apart" not in name


def test_messages_out_of_range_go_through_blocks() -> None:
    """States that are hardly ever left, of data that change their state at every step: 20 nats each, e^-2000 in all.

    At an even pace that is a matter of the rate, which is found; in a half of the time it is not.
    """
    data = (torch.arange(200) % 3).double().unsqueeze(-1) + 0.01 * _series(1.0, 200, 1)
    kept = {"mu": torch.tensor([0.0, 1.0, 2.0]), "sd": torch.full((3,), 0.1), "A": torch.eye(3) * (1 - 3e-9) + 1e-9}
    for half in (False, True):
        x = torch.cat([data[:100], torch.zeros(100, 1)]) if half else data
        problem = bind(chain, (x, normal), {}, with_prior=False)
        evaluate = Evaluator(engine := compile_scanned(problem), MStep(problem, "auto", "em"))
        for A in (rows(3, 3), kept["A"]):
            params, magnitude = {**problem.start, **kept, "A": A}, 1e6
            for _ in range(5):
                (found,) = evaluate([Request(params, magnitude)])
        assert not isinstance(found, Exception) and engine.compact is not half
        assert found.log_likelihood == pytest.approx(Interpreted(problem).e_step(params).log_likelihood, rel=1e-12)
