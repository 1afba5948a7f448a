"""The figure: which panels there are, and that they show the fit's numbers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyro_em
from models import factor_analysis, gmm, hmm, overdispersed, poisson_mixture, time_loops

pytest.importorskip("matplotlib")


def test_pairs_of_numbers_are_drawn_by_state(tmp_path: Path) -> None:
    result = pyro_em.fit(gmm.model, gmm.load(), init="kmeans++", seed=1)
    figure = result.plot()
    objective, score, data = figure.axes
    assert objective.lines[0].get_ydata().tolist() == result.history["objective"]
    assert score.lines[0].get_ydata().tolist() == result.history["score"] and score.get_yscale() == "log"
    drawn = np.concatenate([points.get_offsets() for points in data.collections])
    state = result.posterior().responsibilities("z").argmax(-1)
    x = gmm.load()
    assert np.array_equal(drawn, np.concatenate([x[state == 0], x[state == 1]]))
    figure.savefig(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_other_data_get_a_heat_map() -> None:
    result = pyro_em.fit(poisson_mixture.model, poisson_mixture.load(), seed=0, max_iter=20)
    image = result.plot().axes[2].images[0]
    assert np.array_equal(image.get_array(), result.posterior().responsibilities("z").numpy().T)


def test_states_of_an_unrolled_chain_stand_side_by_side() -> None:
    result = pyro_em.fit(hmm.poisson, hmm.load()[:12], seed=0, max_iter=10)
    axis = result.plot().axes[2]
    assert axis.images[0].get_array().shape == (2, 12) and "z_0 ... z_11" in axis.get_title(loc="left")
    assert result.plot(site="z_3").axes[2].images[0].get_array().shape == (2, 1)


@pytest.mark.parametrize(
    ("model", "data", "latents"),
    [
        (overdispersed.gamma_poisson, overdispersed.load(), ["rate"]),  # one number for every element
        (factor_analysis.model, (factor_analysis.load()[:30],), ["z"]),  # a vector
        (time_loops.local_level, (time_loops.load()[:20],), [f"x_{t}" for t in range(20)]),  # a loop over time
    ],
)
def test_continuous_latents_are_drawn_as_means_with_bars(model: Any, data: tuple, latents: list[str]) -> None:
    result = pyro_em.fit(model, *data, max_iter=3)
    bars = result.plot().axes[-1].containers[0]
    posterior = result.posterior()
    first = torch.stack([posterior.mean(n) for n in latents]).reshape(len(bars.lines[0].get_ydata()), -1)[:, 0]
    assert np.array_equal(bars.lines[0].get_ydata(), first.numpy())
    ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
    sd = torch.stack([posterior.variance(n).sqrt() for n in latents]).reshape(len(first), -1)[:, 0]
    assert np.allclose(ends[:, 1] - ends[:, 0], 4 * sd.numpy(), rtol=1e-12)
    assert len(result.plot(site=latents[-1]).axes[-1].containers) > 0
    with pytest.raises(pyro_em.InputError, match="is continuous and has no states; ask for its mean"):
        posterior.responsibilities(latents[0])


def test_panels_that_have_nothing_to_show_are_left_out() -> None:
    result = pyro_em.fit(gmm.bayesian, gmm.load(), algorithm="svi", max_iter=5, seed=0)
    assert len(result.plot().axes) == 2  # no score under svi
    assert len(dataclasses.replace(result, problem=None).plot().axes) == 1


def test_unknown_latent_is_named() -> None:
    result = pyro_em.fit(gmm.model, gmm.load(), max_iter=1)
    with pytest.raises(pyro_em.InputError, match=r"no latent 'y' to show\. Latents: z"):
        result.plot(site="y")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    result = pyro_em.fit(gmm.model, gmm.load(), max_iter=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(pyro_em.InputError, match=r"pip install 'pyro-em\[viz\]'"):
        result.plot()
