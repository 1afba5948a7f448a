"""Loops over time for ArviZ: their steps are one variable with time as a dim, alike in every group."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_em
from models import time_loops
from pyro_em.arviz import to_datatree


@pytest.fixture(scope="module")
def az() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces its own 1.0
        return pytest.importorskip("arviz")


@pytest.mark.parametrize("loop", ["pyro.markov", "pyro_em.markov"])
@pytest.mark.parametrize("states", ["discrete", "normal"])
def test_the_steps_of_a_loop_are_one_variable_in_every_group(states: str, loop: str) -> None:
    """Whatever became of them: sites of their own, steps that are run together, or one site of a Kalman filter. Every
    data set is drawn anew (all had the same noise once)."""

    def model(y: torch.Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(1.0), constraint=torch.distributions.constraints.positive)
        with pyro.plate("series", y.shape[1]):
            x = torch.tensor(0)
            for t in pyro_em.markov(len(y)) if loop == "pyro_em.markov" else pyro.markov(range(len(y))):
                step = dist.Normal(0.5 * x, 1.0) if states == "normal" else dist.Categorical(torch.eye(2)[x] + 0.5)
                x = pyro.sample(f"x_{t}", step)
                pyro.sample(f"y_{t}", dist.Normal(3.0 * x, spread), obs=y[t])

    y = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    result = pyro_em.fit(model, y, max_iter=2, tol=0)
    tree = to_datatree(result, num_draws=5, predictive=40, latent_draws=3)
    assert np.array_equal(tree["observed_data"]["y"], y) and tree["observed_data"]["y"].dims == ("time", "series")
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "series")
    found = tree["posterior_predictive"]
    assert set(found.data_vars) == {"y"} and found["y"].dims == ("chain", "draw", "time", "series")
    drawn = result.predictive(y, num_samples=400)
    for t in range(4):  # 1,200 numbers against 12,000
        assert abs(float(found["y"].sel(time=t).mean()) - float(drawn[f"y_{t}"].mean())) < 0.4
        assert float(found["y"].sel(time=t).std()) == pytest.approx(float(drawn[f"y_{t}"].std()), rel=0.15)
    latent, posterior = tree["latent_posterior"], result.posterior()
    assert tree["latent_draws"]["x"].dims == ("chain", "draw", "time", "series")
    for t in range(4):
        mean = latent["x"].sel(time=t, **({"moment": "mean"} if states == "normal" else {"x_state": 1}))
        np.testing.assert_allclose(mean, posterior.mean(f"x_{t}"), atol=1e-12)


@pytest.mark.parametrize("loop", ["pyro.markov", "pyro_em.markov"])
def test_steps_before_the_loop_and_steps_without_data_keep_their_numbers(loop: str) -> None:
    """`y_0` is written before the loop; the second response begins at 2; a missing step is a latent called as the data.

    Names may have other numbers, and two loops other lengths: time is then a dim for each.
    """

    def model(y: torch.Tensor) -> None:
        mean = pyro.param("mean", torch.tensor([-1.0, 1.0]))
        z = pyro.sample("z_0", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y7_0", dist.Normal(mean[z], 1.0), obs=y[0])
        together = loop == "pyro_em.markov"
        for i in pyro_em.markov(len(y) - 1) if together else pyro.markov(range(len(y) - 1)):
            t = i + 1
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.eye(2)[z] + 0.5))
            pyro.sample(f"y7_{t}", dist.Normal(mean[z], 1.0), obs=y[t])
            if together or i > 0:
                pyro.sample(f"w_{i}", dist.Normal(mean[z], 2.0), obs=-y[t])

    y = torch.randn(6, generator=torch.Generator().manual_seed(1))
    tree = to_datatree(pyro_em.fit(model, y, max_iter=2, tol=0), num_draws=3, predictive=2)
    for group in ("observed_data", "posterior_predictive"):
        found = tree[group]
        assert set(found.data_vars) == {"y7", "w"}
        assert found["y7"].dims[-1:] == ("y7_time",) and found["y7_time"].values.tolist() == [0, 1, 2, 3, 4, 5]
        assert found["w_time"].values.tolist() == [*range(0 if loop == "pyro_em.markov" else 1, 5)]
    assert np.array_equal(tree["observed_data"]["y7"], y)
    assert np.array_equal(tree["observed_data"]["w"].sel(w_time=slice(1, 4)), -y[2:])


def test_missing_steps_that_are_latents_beside_the_data() -> None:
    y = time_loops.simulate(12)
    y[[3, 7]] = torch.nan
    tree = to_datatree(pyro_em.fit(time_loops.autoregression, y, max_iter=2, tol=0), num_draws=3, predictive=2)
    kept = [t for t in range(1, 12) if t not in (3, 7)]
    assert tree["observed_data"]["y_time"].values.tolist() == kept
    assert tree["posterior_predictive"]["y"].shape == (1, 2, len(kept))
    assert tree["latent_posterior"]["y_latent"].sizes["y_latent_time"] == 2


def test_arviz_pairs_a_loops_observed_and_predicted_data(az: Any) -> None:
    """`plot_ppc` (`plot_ppc_dist` in 1.x) takes variables of one name: of a series one panel, its data as they are."""
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    y = time_loops.simulate(25)
    data = pyro_em.fit(time_loops.local_level, y, max_iter=3, tol=0).to_inference_data(num_draws=20, predictive=6)
    if not hasattr(az, "plot_ppc"):
        panel = az.plot_ppc_dist(data).viz["plot"]
        assert set(panel.data_vars) == {"y"}
        return
    panel = az.plot_ppc(data, kind="cumulative", num_pp_samples=6)
    (shown,) = [line for line in panel.get_lines() if line.get_label() == "Observed"]
    assert panel.get_title() == panel.get_title("center") and panel.get_xlabel() == "y"
    assert np.array_equal(np.sort(shown.get_xdata()), np.sort(y))
    plt.close("all")


def test_series_inside_of_one_site_are_drawn_as_long_as_the_data() -> None:
    """`DiscreteHMM` and `GaussianHMM` without `duration`; the first run of such a model ends inside of its site."""
    y = torch.tensor([0.4, -1.0, 0.2, 2.0], dtype=torch.float64)
    start = torch.tensor([0.99, 0.01], dtype=torch.float64)

    def discrete(y: torch.Tensor) -> None:
        rows = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
        A = pyro.param("A", rows, constraint=dist.constraints.simplex)
        means = torch.tensor([-3.0, 3.0], dtype=torch.float64)
        pyro.sample("y", dist.DiscreteHMM(start.log(), A.log(), dist.Normal(means, 1.0)), obs=y)

    def gaussian(y: torch.Tensor) -> None:
        a = pyro.param("a", torch.tensor([[0.5]], dtype=torch.float64))
        one = torch.ones(1, dtype=torch.float64)
        unit, moved = dist.Normal(0 * one, one).to_event(1), dist.Normal(one, one).to_event(1)
        pyro.sample("y", dist.GaussianHMM(unit, a, moved, one.unsqueeze(-1), unit), obs=y.unsqueeze(-1))

    results = {model: pyro_em.fit(model, y, max_iter=1, tol=0) for model in (discrete, gaussian)}
    A, a = results[discrete].params["A"], float(results[gaussian].params["a"])
    expected: dict[object, list[float]] = {discrete: [], gaussian: []}
    share, mean = start, 0.0
    for _ in y:
        share, mean = share @ A, a * mean + 1
        expected[discrete].append(float(3 * (share[1] - share[0])))
        expected[gaussian].append(mean)
    for model, result in results.items():
        drawn = result.predictive(num_samples=3000)["y"].reshape(3000, -1)
        assert drawn.mean(0).tolist() == pytest.approx(expected[model], abs=0.2)
        tree = to_datatree(result, num_draws=2, predictive=2)
        assert tree["observed_data"]["y"].values.reshape(-1).tolist() == y.tolist()
        assert tree["posterior_predictive"]["y"].values.reshape(1, 2, -1).shape == (1, 2, 4)


@pytest.mark.parametrize("loop", ["pyro.markov", "pyro_em.markov"])
def test_missing_cells_are_nan_and_a_plate_may_be_called_time(loop: str) -> None:
    def model(y: torch.Tensor) -> None:
        mean = pyro.param("mean", torch.tensor([-1.0, 1.0]))
        with pyro.plate("time", y.shape[1]):
            z = torch.tensor(0)
            for t in pyro_em.markov(len(y)) if loop == "pyro_em.markov" else pyro.markov(range(len(y))):
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.eye(2)[z] + 0.5))
                pyro.sample(f"y_{t}", dist.Normal(mean[z], 1.0), obs=y[t])

    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    y[2, 1] = torch.nan
    tree = to_datatree(pyro_em.fit(model, y, missing="nan", max_iter=2, tol=0), num_draws=3)
    assert tree["observed_data"]["y"].dims == ("y_time", "time")
    assert np.array_equal(tree["observed_data"]["y"], y, equal_nan=True)
    assert tree["latent_posterior"]["z"].dims == ("z_time", "time", "z_state")
