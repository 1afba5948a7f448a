"""The tree for ArviZ: groups and dims, draws that follow the information, and ArviZ itself reading it."""

from __future__ import annotations

import dataclasses
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from scipy import stats

import pyro_em
from models import gmm, hmm, lca
from pyro_em.arviz import to_datatree
from pyro_em.posterior import Posterior

GROUPS = {"posterior", "log_likelihood", "observed_data", "latent_posterior", "estimates", "em_trace"}


@pytest.fixture(scope="module")
def em() -> pyro_em.FitResult:
    return pyro_em.fit(gmm.model, gmm.load(), restarts=2, seed=0)


@pytest.fixture(scope="module")
def map_em() -> pyro_em.FitResult:
    return pyro_em.fit(gmm.bayesian, gmm.load(), algorithm="map-em", seed=0)


@pytest.fixture(scope="module")
def tree(map_em: pyro_em.FitResult) -> xarray.DataTree:
    return to_datatree(map_em, predictive=7)


@pytest.fixture(scope="module")
def az() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces its own 1.0
        return pytest.importorskip("arviz")


def test_groups_and_dims(tree: xarray.DataTree) -> None:
    assert set(tree.children) == GROUPS | {"posterior_predictive"}
    dims = {name: variable.dims for name, variable in tree["posterior"].data_vars.items()}
    assert dims == {
        "weights": ("chain", "draw", "weights_dim_0"),
        "loc": ("chain", "draw", "components", "loc_dim_1"),
        "variance": ("chain", "draw", "components", "variance_dim_1"),
    }
    assert tree["posterior"].sizes["chain"] == 1 and tree["posterior"].sizes["draw"] == 1000
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "rows")
    assert tree["log_likelihood"]["x"].shape == (1, 1000, 272)
    assert tree["observed_data"]["x"].dims == ("rows", "x_dim_1")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "rows", "x_dim_1")
    assert tree["latent_posterior"]["z"].dims == ("rows", "z_state")


def test_contents_are_those_of_the_result(tree: xarray.DataTree, map_em: pyro_em.FitResult) -> None:
    assert np.array_equal(tree["observed_data"]["x"], gmm.load())
    assert np.array_equal(tree["latent_posterior"]["z"], map_em.posterior().responsibilities("z"))
    for name, values in map_em.history.items():
        assert tree["em_trace"][name].values.tolist() == values
    for name, value in map_em.params.items():
        table = tree["estimates"][name]
        assert np.array_equal(table.sel(statistic="estimate"), value)
        assert np.array_equal(table.sel(statistic="standard_error"), map_em.standard_errors()[name])
    for name in ("log_likelihood", "log_posterior", "aic", "bic", "num_iterations", "seed", "algorithm"):
        assert tree.attrs[name] == getattr(map_em, name)
    assert tree.attrs["converged"] == 1 and tree.attrs["outcome"] == "converged"
    assert tree.attrs["pyro_version"] == pyro.__version__


def test_attributes_are_plain(tree: xarray.DataTree) -> None:
    for node in tree.subtree:
        for value in node.attrs.values():
            assert type(value) in (str, int, float) and value != ""


def test_draws_are_normal_in_free_coordinates(map_em: pyro_em.FitResult) -> None:
    num = 4000
    posterior = to_datatree(map_em, num_draws=num, num_log_likelihood_draws=0)["posterior"]
    information = map_em.information()
    free = np.concatenate(
        [
            np.stack([information.charts[n].to_free(torch.tensor(v)) for v in posterior[n].values[0]])
            for n in information.names
        ],
        axis=1,
    )
    centred = free - information.estimate.numpy()
    whitened = np.linalg.solve(np.linalg.cholesky(information.covariance), centred.T).T
    for column in whitened.T:
        assert stats.kstest(column, "norm").pvalue > 1e-4
    correlation = whitened.T @ whitened / num
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 * np.sqrt(2 / num)


def test_log_likelihood_is_the_models_at_each_draw(tree: xarray.DataTree, map_em: pyro_em.FitResult) -> None:
    assert map_em.problem is not None
    for i in (0, 1, 500, 999):
        params = {n: torch.tensor(v.values[0, i]) for n, v in tree["posterior"].data_vars.items()}
        expected = Posterior(map_em.problem, params).pointwise()
        found = tree["log_likelihood"]["x"].values[0, i]
        assert np.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_batches_of_draws_are_limited_by_the_cells_of_events_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Densities of 272 x 2 rows and states with 5 elements each: 2**15 cells are twelve draws, not sixty."""

    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([[-1.0], [1.0]]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)

    result = pyro_em.fit(model, torch.randn(272, 5, generator=torch.Generator().manual_seed(0)), max_iter=2, tol=0)
    whole = to_datatree(result, num_draws=40)["log_likelihood"]["x"]
    sizes: list[int] = []
    vmap = torch.func.vmap

    def counted(function: Any, **options: Any) -> Any:
        return lambda draws: (sizes.append(len(draws)), vmap(function, **options)(draws))[1]

    monkeypatch.setattr(torch.func, "vmap", counted)
    monkeypatch.setattr("pyro_em.pointwise.CHUNK_CELLS", 2**15)
    parts = to_datatree(result, num_draws=40)["log_likelihood"]["x"]
    assert max(sizes) <= 2**15 // (272 * 2 * 5) and sum(sizes) == 42  # the first two are done both ways
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_model_that_cannot_be_batched_is_run_draw_by_draw() -> None:
    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 2.0]))
        assert bool(loc.detach().isfinite().all())  # vmap lets nobody look into a tensor
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(loc[z.long()], 1.0), obs=x)

    result = pyro_em.fit(model, torch.cat([torch.randn(20) - 2, torch.randn(20) + 2]))
    tree = to_datatree(result, num_draws=5)
    assert result.problem is not None
    for i in range(5):
        params = {"loc": torch.tensor(tree["posterior"]["loc"].values[0, i])}
        expected = Posterior(result.problem, params).pointwise()
        assert np.allclose(tree["log_likelihood"]["x"].values[0, i], expected, rtol=1e-12)
    assert len({*tree["log_likelihood"]["x"].values[0, :, 0].tolist()}) == 5


def test_same_seed_same_tree_and_global_random_state_untouched(em: pyro_em.FitResult) -> None:
    before = torch.random.get_rng_state()
    first, second, other = (to_datatree(em, 50, seed=seed, predictive=3) for seed in (1, 1, 2))
    assert first.identical(second) and not first.identical(other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_entries_on_a_boundary_and_fixed_parameters_do_not_move() -> None:
    result = pyro_em.fit(lca.model, lca.load(), seed=0, m_step={"weights": "fixed"})
    tree = to_datatree(result, num_draws=20)
    assert tree["latent_posterior"]["z"].dims == ("rows", "z_state")  # the plate left of that of the items
    weights, probs = tree["posterior"]["weights"].values[0], tree["posterior"]["probs"].values[0]
    assert (weights == result.params["weights"].numpy()).all()
    error = result.params["probs"].new_tensor(tree["estimates"]["probs"].sel(statistic="standard_error").values)
    moves = (probs != probs[0]).any(0)
    assert (moves == (error > 0).numpy()).all() and 0 < moves.sum() < moves.size
    assert "boundary" in tree.attrs["notes"]


def test_chain_without_data_plate_leaves_log_likelihood_out_and_says_why() -> None:
    result = pyro_em.fit(hmm.poisson, hmm.load()[:15], max_iter=20)
    tree = to_datatree(result, num_draws=10)
    assert "log_likelihood" not in tree.children and "no plate" in tree.attrs["missing_groups"]
    assert tree["latent_posterior"]["z"].dims == ("time", "z_state")
    assert np.array_equal(tree["latent_posterior"]["z"].sel(time=3), result.posterior().responsibilities("z_3"))


def test_fit_by_svi_has_one_draw_that_says_so() -> None:
    result = pyro_em.fit(gmm.bayesian, gmm.load(), algorithm="svi", max_iter=5, seed=0)
    tree = to_datatree(result)
    assert tree["posterior"].sizes["draw"] == 1 and "uncertainty" in tree["posterior"].attrs["approximation"]
    assert "log_likelihood" not in tree.children and "uncertainty" in tree.attrs["missing_groups"]
    assert np.isnan(tree["estimates"]["loc"].sel(statistic="standard_error")).all()


def test_result_without_its_model(em: pyro_em.FitResult) -> None:
    tree = to_datatree(dataclasses.replace(em, problem=None))
    assert set(tree.children) == {"posterior", "estimates", "em_trace"}
    assert "no model" in tree.attrs["missing_groups"]


def test_names_that_clash_or_contain_a_slash() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("draw", 2):
            loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 2.0]), 5.0))
        with pyro.plate("chain", len(x)):
            z = pyro.sample("part/z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("part/x", dist.Normal(loc[z], 1.0), obs=x)

    x = torch.tensor([-2.0, -1.0, 1.0, 3.0])
    result = pyro_em.fit(model, x, algorithm="map-em", init={"loc": torch.tensor([-1.0, 1.0])})
    tree = to_datatree(result, num_draws=5)
    assert tree["posterior"]["loc"].dims == ("chain", "draw", "loc_dim_0")
    assert tree["latent_posterior"].ds["part.z"].dims == ("part.z_dim_0", "part.z_state")
    assert tree["log_likelihood"].ds["part.x"].shape == (1, 5, 4)


def test_numbers_of_draws_are_checked(em: pyro_em.FitResult) -> None:
    for options in ({"num_draws": 1}, {"predictive": -1}, {"num_log_likelihood_draws": -1}):
        with pytest.raises(pyro_em.InputError, match="num_draws"):
            to_datatree(em, **options)


def test_each_line_of_arviz_gets_its_own_container(em: pyro_em.FitResult, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_draws": 5, "num_log_likelihood_draws": 0}
    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(__version__="1.3.0"))
    assert isinstance(em.to_inference_data(**options), xarray.DataTree)
    old = types.SimpleNamespace(__version__="0.23.4", from_datatree=lambda tree: ("converted", tree))
    monkeypatch.setitem(sys.modules, "arviz", old)
    kind, tree = em.to_inference_data(**options)
    assert kind == "converted" and isinstance(tree, xarray.DataTree)


@pytest.mark.parametrize("which", ["em", "map_em"])
def test_arviz_reads_it(which: str, az: Any, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(which)
    data = result.to_inference_data()
    assert set(data.groups() if callable(data.groups) else data.children) == GROUPS
    table = az.summary(data, round_to="none")
    error = float(result.standard_errors()["loc"][1, 0])
    row = table.loc["loc[1, 0]"]
    assert float(row["mean"]) == pytest.approx(float(result.params["loc"][1, 0]), abs=error / 5)
    assert float(row["sd"]) == pytest.approx(error, rel=0.1)
    loo = az.loo(data)
    elpd = float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)
    penalty = float(loo.p_loo if hasattr(loo, "p_loo") else loo.p)
    # In a regular model the penalty is about the number of parameters, and elpd the likelihood less it.
    assert 0.5 * result.num_parameters < penalty < 1.5 * result.num_parameters
    assert elpd == pytest.approx(result.log_likelihood - penalty, abs=2.0)
    assert data.attrs["algorithm"] == result.algorithm


def test_netcdf_round_trip(tree: xarray.DataTree, tmp_path: Path, az: Any) -> None:
    tree.to_netcdf(tmp_path / "fit.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "fit.nc", engine="h5netcdf") as again:
        for node in tree.subtree:
            xarray.testing.assert_equal(again[node.path].to_dataset().load(), node.to_dataset())
            assert again[node.path].attrs == node.attrs
    data = az.from_netcdf(str(tmp_path / "fit.nc"))
    assert float(data["posterior"]["loc"].mean()) == float(tree["posterior"]["loc"].mean())
