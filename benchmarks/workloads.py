"""Every workload, by name. Letters: rows N, components K, features D, items J."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import (
    accelerator,
    chains,
    gaussian,
    item_response,
    mixed_models,
    peers,
    problems,
    regressions,
    state_space,
)
from benchmarks.cold import Cold
from benchmarks.gap import Gap, Problem
from benchmarks.paired import OURS, Entry, Paired
from benchmarks.scale import Scale, features
from benchmarks.workload import Workload
from models import gmm, poisson_mixture


def _mixture(
    name: str,
    rows: int,
    components: int,
    features: int,
    ours: tuple[int, int],
    scikit_learn: tuple[tuple[int, int], float],
    pomegranate: tuple[tuple[int, int], float | None],
    *,
    diagonal: bool = False,
    peak_target: int | None = None,
) -> Paired:
    make = {
        OURS: Entry(peers.ours_mixture, ours),
        "scikit-learn": Entry(peers.scikit_learn_mixture, *scikit_learn),
        "pomegranate": Entry(peers.pomegranate_mixture, *pomegranate),
    }
    kind = "diagonal" if diagonal else "full"
    return Paired(
        name,
        f"Gaussian mixture, {kind}, N={rows:,} K={components} D={features}",
        lambda tiny: problems.mixture(*((200, 2, 3) if tiny else (rows, components, features)), diagonal=diagonal),
        make,
        peak_target,
    )


def _chain(
    name: str,
    title: str,
    size: dict[str, int],
    ours: tuple[int, int],
    hmmlearn: tuple[int, int],
    targets: tuple[float | None, float | None] = (None, None),
) -> Paired:
    small = {"steps": 60, "sequences": 2, "states": 2, **{k: 3 for k in ("features", "symbols") if k in size}}
    return Paired(
        name,
        title,
        lambda tiny: chains.chain(**(small if tiny else size)),
        {
            OURS: Entry(chains.ours, ours),
            "hmmlearn": Entry(chains.hmmlearn_log, hmmlearn, targets[0]),
            "hmmlearn scaling": Entry(chains.hmmlearn_scaling, hmmlearn, targets[1]),
        },
    )


def _overlapping(num_rows: int, components: int = 3, features: int = 2, sep: float = 1.0) -> Callable[[bool], Problem]:
    """Components whose means are `sep` standard deviations from their centre."""

    def make(tiny: bool) -> Problem:
        own = problems.mixture(*((100, 3, 2) if tiny else (num_rows, components, features)), sep=sep)
        return Problem(gmm.model, (own.data, own.num_components), own.start)

    return make


def _death_notices(tiny: bool) -> Problem:
    """Hasselblad's counts, from rates 1 and 3. They are few: nothing is left to shrink."""
    start = {
        "weights": torch.tensor([0.5, 0.5], dtype=torch.float64),
        "rate": torch.tensor([1.0, 3.0], dtype=torch.float64),
    }
    return Problem(poisson_mixture.model, (poisson_mixture.load(),), start)


# Our n1 is beyond the recording of the EM map (pyro_em/evaluator.py), which is part of the set-up, and of small
# problems beyond the update at which the replay is written as a function (pyro_em/tape/replay.py).
BEYOND = (350, 2350)
_ALL: tuple[Workload, ...] = (
    _mixture("A1", 100_000, 10, 10, (25, 75), ((1, 6), 6.0), ((1, 4), 12.0)),
    _mixture("A2", 1_000_000, 10, 8, (25, 50), ((1, 4), 6.0), ((1, 3), 12.0), peak_target=150_000_000),
    _mixture("A3", 20_000, 50, 32, (25, 55), ((1, 4), 3.0), ((1, 4), None)),
    _mixture("A4", 1_000_000, 20, 16, (25, 45), ((2, 10), 3.5), ((1, 2), 50.0), diagonal=True),
    _chain(
        "B1",
        "Hidden Markov, Gaussian diagonal, T=100,000 K=5 D=2",
        {"steps": 100_000, "sequences": 1, "states": 5, "features": 2},
        (25, 75),
        (1, 4),
        (8.0, 2.0),
    ),
    _chain(
        "B2",
        "Hidden Markov, Gaussian diagonal, 1,000 sequences of 100, K=8 D=4",
        {"steps": 100, "sequences": 1000, "states": 8, "features": 4},
        (25, 75),
        (1, 3),
        (8.0, 2.0),
    ),
    _chain(
        "B3",
        "Hidden Markov, categorical, T=100,000 K=10 V=50",
        {"steps": 100_000, "sequences": 1, "states": 10, "symbols": 50},
        (25, 75),
        (1, 3),
        (8.0, 2.0),
    ),
    _chain(
        "hmm-small",
        "Hidden Markov, Gaussian, T=200 K=3",
        {"steps": 200, "sequences": 1, "states": 3, "features": 1},
        BEYOND,
        (5, 105),
        (0.5, 0.5),
    ),
    Paired(
        "D",
        "Latent classes, N=100,000 J=20 binary K=5",
        lambda tiny: problems.latent_classes(200, 4, 2) if tiny else problems.latent_classes(100_000, 20, 5),
        {
            OURS: Entry(peers.ours_latent_classes, (25, 125)),
            "StepMix": Entry(peers.stepmix_latent_classes, (2, 12), 4.5),
            "pomegranate": Entry(peers.pomegranate_latent_classes, (1, 6), 10.0),
        },
    ),
    Paired(
        "F",
        "20 restarts of a Gaussian mixture, full, N=20,000 K=10 D=10",
        lambda tiny: problems.mixture(*((1000, 2, 3) if tiny else (20_000, 10, 10)), sep=1.5),
        {
            OURS: Entry(peers.ours_restarts, (25, 85)),
            "scikit-learn": Entry(peers.scikit_learn_restarts, (1, 6), 8.0),
        },
        starts=peers.RESTARTS,
    ),
    Paired(
        "small",
        "Gaussian mixture, full, irises: N=150 K=3 D=4",
        lambda tiny: problems.iris(),
        {
            OURS: Entry(peers.ours_mixture, BEYOND),
            "scikit-learn": Entry(peers.scikit_learn_mixture, (5, 105), 1.0),
        },
    ),
    Paired(
        "front-end",
        "`fit` against its bare engine, full, N=100,000 K=10 D=10",
        lambda tiny: problems.mixture(200, 2, 3) if tiny else problems.mixture(100_000, 10, 10),
        {
            OURS: Entry(peers.ours_mixture, (25, 125)),
            "bare engine": Entry(peers.engine_mixture, (2, 102), 1 / 1.15),
            "hand-written torch": Entry(peers.hand_written_mixture, (2, 102)),
        },
    ),
    Cold(
        "whole-fit",
        "First fit after import, Old Faithful, 50 updates",
        lambda tiny: problems.old_faithful(),
        {OURS: peers.ours_mixture, "scikit-learn": peers.scikit_learn_mixture},
        updates=50,
        target_seconds=0.3,
    ),
    Scale(
        "scale-N",
        "Gaussian mixture, full, K=10 D=10",
        "N",
        lambda rows: problems.mixture(rows, 10, 10),
        peers.fit_mixture,
        (10_000, 100_000, 1_000_000, 10_000_000),
        lambda rows: rows,
        "row",
        flat_within=0.25,
    ),
    Scale(
        "scale-K",
        "Gaussian mixture, full, N=100,000 D=8",
        "K",
        lambda components: problems.mixture(100_000, components, 8),
        peers.fit_mixture,
        (2, 8, 32, 128),
        lambda components: 100_000 * components,
        "row and component",
        tiny=(2, 3),
    ),
    Scale(
        "scale-D",
        "Gaussian mixture, full, N=50,000 K=8",
        "D",
        lambda width: problems.mixture(50_000, 8, width),
        peers.fit_mixture,
        (2, 8, 32, 64),
        lambda width: 50_000 * features(width),
        "row and feature",
        tiny=(2, 3),
    ),
    Scale(
        "scale-T",
        "Hidden Markov, Gaussian diagonal, K=5 D=2",
        "T",
        lambda steps: chains.chain(steps, 1, 5, features=2),
        chains.fit,
        (1_000, 10_000, 100_000, 1_000_000),
        lambda steps: steps,
        "step",
        flat_within=0.5,
        beside=_chain("", "", {"steps": 1000, "sequences": 1, "states": 5, "features": 2}, BEYOND, (5, 105)),
    ),
    Gap("gap-gaussian", "To within 1e-3 nat: overlapping Gaussians, N=2,000 K=3 D=2", _overlapping(2000), 4000, 5.0),
    Gap("gap-large", "To within 1e-3 nat: overlapping Gaussians, N=100,000 K=3 D=2", _overlapping(100_000), 1000, 5.0),
    Gap(
        "gap-mixed",
        "To within 1e-3 nat: overlapping Gaussians, N=20,000 K=50 D=32, precision float64 and mixed",
        _overlapping(20_000, 50, 32, sep=0.6),
        400,
        None,
        ("em", "em, mixed"),
    ),
    Gap("gap-poisson", "To within 1e-3 nat: two Poissons, London Times deaths", _death_notices, 4000, 5.0),
)

_OTHERS: tuple[Workload, ...] = (
    *regressions.WORKLOADS,
    *accelerator.WORKLOADS,
    *state_space.WORKLOADS,
    *item_response.WORKLOADS,
    *mixed_models.WORKLOADS,
    *gaussian.WORKLOADS,
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in (*_ALL, *_OTHERS)}
