"""One figure of a fit: how the objective rose, how the score fell, and what the latents say.

The third panel shows two-dimensional data coloured by the most probable state (pale where that is
uncertain), otherwise the responsibilities as a heat map; of a continuous latent the posterior mean of every element
with two standard deviations to either side. The figure is made without pyplot: no backend is
chosen, no window opens, nothing stays registered.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_em.errors import InputError
from pyro_em.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure

    from pyro_em.result import FitResult

# Okabe and Ito's colours, told apart by readers of every colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
INK, FAINT = "#333333", "#DDDDDD"
MAX_ROWS = 2000  # rows of a heat map; evenly spaced ones beyond


def plot(result: FitResult, site: str | None = None, width: float = 11.0) -> Figure:
    """The figure; `.savefig("fit.png")` writes it.

    :param site: the latent to show (default: the first, or all of an unrolled chain together).
    :param width: in inches.
    :raises InputError: if matplotlib is not installed, or the model has no such latent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("Plots need matplotlib, which is not installed. Run: pip install 'pyro-em[viz]'.") from None
    posterior = None if result.problem is None else result.posterior()
    latents = () if posterior is None else posterior.latents
    if site is not None and site not in latents:
        raise InputError(f"plot: there is no latent '{site}' to show. Latents: {', '.join(latents) or 'none'}.")
    score = np.asarray(result.history.get("score", []), dtype=float)
    panels = ["objective"] + ["score"] * bool((score > 0).any()) + ["latents"] * bool(latents)
    figure = Figure(figsize=(width, 3.4), layout="constrained", facecolor="white")
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for axis in axes.values():
        _restrain(axis)
    _objective(axes["objective"], result)
    if "score" in axes:
        _score(axes["score"], score)
    if posterior is not None and latents:
        _latents(figure, axes["latents"], posterior, site)
    title = f"{result.algorithm}: {result.outcome.name.replace('_', ' ')}"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=10)
    return figure


def _restrain(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(colors=INK, labelsize=8, color=FAINT)
    axis.xaxis.label.set_size(8)
    axis.yaxis.label.set_size(8)


def _iterations(axis: Any, count: int) -> np.ndarray:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("iteration")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return np.arange(count)


def _objective(axis: Any, result: FitResult) -> None:
    values = np.asarray(result.history["objective"], dtype=float)
    count = _iterations(axis, len(values))
    axis.plot(count, values, color=COLOURS[0], linewidth=1.4, marker="o" if len(values) <= 40 else "", markersize=3)
    axis.set_title(result.plan.objective, color=INK, loc="left", fontsize=9)
    finite = values[np.isfinite(values)]
    # The first iterates can lie far below all others; what follows them would be a flat line.
    if len(finite) > 3:
        low, high = np.quantile(finite, 0.1), finite.max()
        if high - finite.min() > 4 * (high - low) > 0:
            axis.set_ylim(low - 0.5 * (high - low), high + 0.1 * (high - low))
    axis.ticklabel_format(axis="y", useOffset=False)


def _score(axis: Any, score: np.ndarray) -> None:
    count = _iterations(axis, len(score))
    axis.semilogy(count, np.where(score > 0, score, math.nan), color=COLOURS[0], linewidth=1.4)
    axis.minorticks_off()
    axis.set_title("score per observation", color=INK, loc="left", fontsize=9)


def _latents(figure: Any, axis: Any, posterior: Posterior, site: str | None) -> None:
    first = posterior.latents[0] if site is None else site
    if posterior.is_continuous(first):
        steps = [name for name in posterior.latents if site is None and _stem(name) == _stem(first)]
        _bands(axis, posterior, steps or [first])
        return
    probs, name = _responsibilities(posterior, site)
    points = _plane(posterior, len(probs)) if name in posterior.latents else None
    if points is not None and probs.shape[1] <= len(COLOURS):
        _scatter(axis, points, probs, name)
        return
    shown = probs[np.linspace(0, len(probs) - 1, min(len(probs), MAX_ROWS)).astype(int)]
    extent = (-0.5, len(probs) - 0.5, probs.shape[1] - 0.5, -0.5)
    image = axis.imshow(shown.T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    axis.set_title(f"p({name} = k | data)", color=INK, loc="left", fontsize=9)
    axis.set_xlabel("element")
    axis.set_ylabel("state")
    axis.set_yticks(range(probs.shape[1]) if probs.shape[1] <= 12 else [])
    bar = figure.colorbar(image, ax=axis, shrink=0.8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color=FAINT)


def _stem(name: str) -> str:
    """The name without its number: the same for all steps of an unrolled chain."""
    return re.sub(r"\d+", "", name)


def _bands(axis: Any, posterior: Posterior, names: list[str]) -> None:
    """Mean ± 2 sd by element of the first plate (by step of a chain), one colour for each other entry that has one."""
    mean = [posterior.mean(name) for name in names]
    sd = [posterior.variance(name).sqrt() for name in names]
    single, title = len(names) == 1, names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
    length = len(names) if not single else len(mean[0]) if mean[0].dim() else 1
    columns, spreads = (torch.stack(part).reshape(length, -1).numpy() for part in (mean, sd))
    rows = np.unique(np.linspace(0, length - 1, min(length, MAX_ROWS)).astype(int))
    style = {"fmt": "o"} if len(rows) <= 40 else {"fmt": "-"}
    for colour, middle, spread in zip(COLOURS, columns.T, spreads.T, strict=False):
        bars = axis.errorbar(rows, middle[rows], 2 * spread[rows], color=colour, ms=3, lw=1, elinewidth=0.6, **style)
        bars.lines[2][0].set_alpha(0.5)
    axis.set_title(f"{title} given the data: mean ± 2 sd", color=INK, loc="left", fontsize=9)
    axis.set_xlabel("element" if single else "step")


def _responsibilities(posterior: Posterior, site: str | None) -> tuple[np.ndarray, str]:
    """Probabilities (elements, K) of one latent, or of the latents of one unrolled chain in order."""
    first = posterior.latents[0] if site is None else site
    probs = posterior.responsibilities(first)
    if site is None and probs.dim() == 1:
        each = {name: posterior.responsibilities(name) for name in posterior.latents}
        alike = [name for name, own in each.items() if own.shape == probs.shape]
        if len(alike) > 1:
            return torch.stack([each[name] for name in alike]).numpy(), f"{alike[0]} ... {alike[-1]}"
    return probs.reshape(-1, probs.shape[-1]).numpy(), first


def _plane(posterior: Posterior, num: int) -> np.ndarray | None:
    """The data as (num, 2), if they are such pairs."""
    observed = [s.value for s in posterior.problem.capture.sites.values() if s.observed]
    if len(observed) != 1 or observed[0].shape != (num, 2) or not observed[0].is_floating_point():
        return None
    return observed[0].detach().cpu().numpy()


def _scatter(axis: Any, points: np.ndarray, probs: np.ndarray, name: str) -> None:
    state, certainty = probs.argmax(1), probs.max(1)
    floor = 1 / probs.shape[1]
    opacity = 0.15 + 0.75 * (certainty - floor) / max(1 - floor, 1e-12)
    for k in range(probs.shape[1]):
        own = state == k
        axis.scatter(
            *points[own].T, s=12, color=COLOURS[k], alpha=opacity[own].clip(0.15, 0.9), linewidths=0,
            label=f"{name} = {k}",
        )  # fmt: skip
    axis.set_title("data by most probable state", color=INK, loc="left", fontsize=9)
    axis.legend(frameon=False, fontsize=8, handletextpad=0.2, labelcolor=INK)
