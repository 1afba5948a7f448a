"""Every iterate of classic EM runs: parameters to 1e-8, log-likelihood to 1e-9.

`cases/trajectories.json` holds, for each case, the start and the exact values after given numbers of
updates. Its numbers carry 12 significant digits, so a number v is known to 5e-12 |v| only; where that is more,
it is the tolerance, as no test can ask for digits which are not there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_em
from models import linear_mixed
from tests import classics, published_state_space, zoo_latent, zoo_missing
from tests.published import CASES, read

TRAJECTORIES: dict[str, Any] = json.loads((CASES / "trajectories.json").read_text())


def _tensors(row: dict[str, Any]) -> dict[str, Tensor]:
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in row.items() if k not in ("it", "loglik")}


Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and the two translations between its parameters and the quantities of the published case."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    to_model: Callable[[Values], Values] = lambda row: row
    to_case: Callable[[Values], Values] = lambda params: params
    options: dict[str, Any] = field(default_factory=dict)
    constant: float = 0.0  # the case's log-likelihood minus that of the model

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(TRAJECTORIES[self.name]["trace"])


def _data(name: str) -> Any:
    return TRAJECTORIES[name]["data"]


def _counted(name: str, plate: str, values: str, counts: str) -> tuple[Tensor, dict[str, Any]]:
    data = _data(name)
    return torch.tensor(data[values], dtype=torch.float64), {"weights": {plate: torch.tensor(data[counts])}}


def _alleles(row: Values) -> Values:
    return {"freq": torch.stack([row["pA"], row["pB"], row["pO"]])}


def _alleles_back(params: Values) -> Values:
    return dict(zip(("pA", "pB", "pO"), params["freq"], strict=True))


def _univariate(row: Values) -> Values:
    return {"pi": row["pi"], "mu": row["mu"].reshape(-1), "sd": row["S"].reshape(-1).sqrt()}


def _univariate_shared(row: Values) -> Values:
    params = _univariate(row)
    return params | {"sd": params["sd"][0]}


def _univariate_back(params: Values) -> Values:
    variance = params["sd"].square().expand(2)
    return {"pi": params["pi"], "mu": params["mu"].reshape(-1, 1), "S": variance.reshape(-1, 1, 1)}


def _rates(row: Values) -> Values:
    return {"pi": row["pi"], "rate": 1 / row["scale"]}


def _rates_back(params: Values) -> Values:
    return {"pi": params["pi"], "scale": 1 / params["rate"]}


def _stopping(row: Values) -> Values:
    T = torch.cat([row["A"], row["end"].unsqueeze(-1)], -1)
    return {"pi": row["pi"], "T": T} | ({"rate": 1 / row["scale"]} if "scale" in row else {"B": row["B"]})


def _stopping_back(params: Values) -> Values:
    emission = {"scale": 1 / params["rate"]} if "rate" in params else {"B": params["B"]}
    return {"pi": params["pi"], "A": params["T"][:, :-1], "end": params["T"][:, -1]} | emission


def _only_R(params: Values) -> Values:
    return {"R": params["R"]}


def _intercept(row: Values) -> Values:
    return {"mean": row["b"][0], "between": row["D"][0, 0].sqrt(), "within": row["s2"].sqrt()}


def _intercept_back(params: Values) -> Values:
    between, within = params["between"] ** 2, params["within"] ** 2
    return {"b": params["mean"].reshape(1), "D": between.reshape(1, 1), "s2": within}


def _slopes(row: Values) -> Values:
    return {"beta": row["b"], "D": row["D"], "s2": row["s2"]}


def _slopes_back(params: Values) -> Values:
    return {"b": params["beta"], "D": params["D"], "s2": params["s2"]}


@cache
def _cases() -> dict[str, Case]:
    cells = torch.arange(4)
    linkage = torch.tensor(_data("C01_linkage"), dtype=torch.float64)
    coefficient = float(torch.lgamma(linkage.sum() + 1) - torch.lgamma(linkage + 1).sum())
    groups = torch.tensor(_data("C02_ABO"), dtype=torch.float64)
    heads = torch.tensor(_data("C03_coins"))
    days, day_counts = _counted("C05_london_times", "days", "k", "n")
    toby, toby_counts = _counted("C10_stouffer_toby", "patterns", "pattern", "count")
    pleural, pleural_counts = _counted("C11_pleural", "patterns", "pattern", "count")
    waiting = read("faithful", "waiting")[:, 0]
    iris = read("iris", "SepalLength", "SepalWidth", "PetalLength", "PetalWidth")
    cones = torch.tensor(_data("C08_icecream")) - 1
    quakes = torch.tensor(_data("C09_quakes2"), dtype=torch.float64)
    times, sequences = torch.tensor(_data("C19_expmix")), torch.tensor(_data("C21_exphmm"))
    row_weights = torch.tensor([1.0, 2, 0, 0, 5, 1, 2, 1, 1, 2, 0])
    sequence_weights = torch.tensor([1.0, 2.3])

    schools = {name: torch.tensor(values) for name, values in _data("C18_eight_schools").items()}

    def coin(row: Values) -> Values:
        return {"p": row["p"]}

    m = classics

    def normal(name: str) -> Case:
        rows = [[math.nan if cell is None else cell for cell in row] for row in _data(name)]
        return Case(name, zoo_missing.normal, (torch.tensor(rows),), options={"missing": "nan"})

    cases = [
        Case("C01_linkage", m.linkage, (cells,), options={"weights": {"cells": linkage}}, constant=coefficient),
        Case("C02_ABO", m.blood_group, (cells,), _alleles, _alleles_back, {"weights": {"people": groups}}),
        Case("C03_coins", m.coins, (heads,), coin),
        Case("C04_coins_MAP", m.coins_map, (heads,), coin, options={"algorithm": "map-em"}),
        Case("C05_london_times", m.poisson_mixture, (days,), options=day_counts),
        normal("C06_murray_saddle"),
        Case("C08_icecream", m.icecream_hmm, (cones,), _stopping, _stopping_back),
        Case("C09_quakes2", m.poisson_hmm, (quakes,)),
        Case("C10_stouffer_toby", m.latent_class, (toby,), options=toby_counts),
        Case("C11_pleural", m.latent_class, (pleural,), options=pleural_counts),
        Case("C12_waiting_equalvar", m.normal_mixture, (waiting, 2, True), _univariate_shared, _univariate_back),
        Case("C13_waiting_free", m.normal_mixture, (waiting,), _univariate, _univariate_back),
        Case("C14_iris3", m.gaussian_mixture, (iris, 3)),
        Case("C19_expmix", m.exponential_mixture, (times,), _rates, _rates_back),
        Case(
            "C20_expmix_w",
            m.exponential_mixture,
            (times,),
            _rates,
            _rates_back,
            {"weights": {"rows": row_weights}},
        ),
        Case("C21_exphmm", m.exponential_hmm, (sequences,), _stopping, _stopping_back),
        Case(
            "C22_exphmm_w",
            m.exponential_hmm,
            (sequences,),
            _stopping,
            _stopping_back,
            {"weights": {"sequences": sequence_weights}},
        ),
        normal("C24_johnson_wichern"),
    ]
    nile = read("nile", "flow")[:, 0]
    cases += [
        Case("C15_nile", published_state_space.local_level, (nile, 1000.0, 1e6)),
        Case("C23_robot_lds", published_state_space.robot_arm, published_state_space.robot(), to_case=_only_R),
        Case("C16_dyestuff", linear_mixed.model, linear_mixed.load(), _intercept, _intercept_back),
        Case("C17_sleepstudy", zoo_latent.random_slopes, linear_mixed.load_sleepstudy(), _slopes, _slopes_back),
        Case("C18_eight_schools", zoo_latent.eight_schools, (schools["y"], schools["sigma"])),
    ]
    return {case.name: case for case in cases}


# Iterates that are checked below in another way: one would take a minute, and one is no exact number in the file.
UNREACHED = {("C15_nile", 5000), ("C23_robot_lds", 20)}
POINTS = [(name, row["it"]) for name, case in TRAJECTORIES.items() for row in case["trace"]]
POINTS = [point for point in POINTS if point not in UNREACHED]


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # C09: the initial probability reaches 0
@pytest.mark.parametrize(("name", "iterations"), POINTS, ids=[f"{n}-{i}" for n, i in POINTS])
def test_iterate(name: str, iterations: int) -> None:
    case = _cases()[name]
    start = case.to_model(_tensors(case.rows[0]))
    row = next(r for r in case.rows if r["it"] == iterations)

    result = pyro_em.fit(case.model, *case.args, init=start, max_iter=iterations, tol=0, **case.options)

    assert result.num_iterations == iterations
    assert result.log_likelihood + case.constant == pytest.approx(row["loglik"], rel=5e-12, abs=1e-9)
    found = case.to_case(result.params)
    for quantity, value in _tensors(row).items():
        if quantity in found:
            torch.testing.assert_close(found[quantity], value, atol=1e-8, rtol=5e-12, msg=quantity)
    assert set(found) <= set(row)


def test_the_end_of_a_slow_run() -> None:
    """C15 after 5000 updates, which is the fixed point: the map contracts by ρ an update, and ρ^4900 is nothing.

    With the stored values θ, one update M(θ) and its Jacobian J, the fixed point is θ + (I - J)^-1 (M(θ) - θ).
    """
    case = _cases()["C15_nile"]
    stored = {row["it"]: _tensors(row) for row in case.rows}
    theta = torch.stack([stored[5000]["q"], stored[5000]["r"]])

    def update(at: Tensor) -> tuple[Tensor, float]:
        result = pyro_em.fit(case.model, *case.args, init={"q": at[0], "r": at[1]}, max_iter=1, tol=0)
        return torch.stack([result.params["q"], result.params["r"]]), result.history["log_likelihood"][0]

    moved, evidence = update(theta)
    h = 1e-4 * theta
    jacobian = torch.stack([(update(theta + d)[0] - update(theta - d)[0]) / (2 * d.sum()) for d in torch.diag(h)], -1)
    row = next(r for r in case.rows if r["it"] == 5000)
    assert evidence == pytest.approx(row["loglik"], rel=5e-12, abs=1e-9)
    fixed = theta + torch.linalg.solve(torch.eye(2) - jacobian, moved - theta)
    torch.testing.assert_close(fixed, theta, atol=1e-8, rtol=5e-12)
    rho = float(torch.linalg.eigvals(jacobian).abs().max())
    assert 0.9 < rho < 0.98
    # The first 100 updates are checked above.
    left = (theta - torch.stack([stored[100]["q"], stored[100]["r"]])).abs().max()
    assert float(left) * rho**4900 < 1e-30


def test_the_robot_after_20_updates() -> None:
    """C23 against 40-digit arithmetic with covariances kept symmetric.

    The file's R is not symmetric there (by 5e-6): without that care rounding grows from step to step.
    """
    case = _cases()["C23_robot_lds"]
    result = pyro_em.fit(case.model, *case.args, init=case.to_model(_tensors(case.rows[0])), max_iter=20, tol=0)
    R = torch.tensor([[19.20673804918, -7.117856733838], [-7.117856733838, 10.91623195219]])
    assert result.log_likelihood == pytest.approx(-3204.8085407908, rel=5e-12)
    torch.testing.assert_close(result.params["R"], R, atol=1e-8, rtol=0.0)


def test_every_case_has_a_model() -> None:
    assert set(_cases()) == set(TRAJECTORIES)


def test_map_objective_adds_the_log_prior() -> None:
    """C04 lists the log-likelihood only; the objective is that plus log Beta(p | 2, 2) = log 6 p (1 - p)."""
    case = _cases()["C04_coins_MAP"]
    result = pyro_em.fit(
        case.model,
        *case.args,
        init=case.to_model(_tensors(case.rows[0])),
        max_iter=10,
        tol=0,
        algorithm="map-em",
    )
    p = result.params["p"]
    prior = float((math.log(6.0) + p.log() + torch.log1p(-p)).sum())
    assert result.log_posterior == pytest.approx(case.rows[3]["loglik"] + prior, abs=1e-9)
