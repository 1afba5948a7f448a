"""Sites of a model as written, with those of the steps of a loop over time as one series.

    y_0, y_1, ..., y_{T-1}, each plates + event   ->   y, of shape (T,) + plates + event

So a loop has the same variables whether it is `pyro.markov` or `pyro_em.markov`, and whatever became of it (one site
for many steps, model/timeline.py; one Kalman site, model/folding.py). Sites of steps are one series if their names
differ in the number of the step only, and their plates and shapes in nothing. Steps without the site leave gaps in
`steps`.

Not joined: loops inside of one another, and sites of which a step differs; these keep the names that the model gave.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.model import compat
from pyro_em.model.capture import capture
from pyro_em.model.folding import unfolded
from pyro_em.model.missing import INCOMPLETE
from pyro_em.model.timeline import Loop, Template
from pyro_em.model.trace import Plate
from pyro_em.problem import Problem
from pyro_em.store import isolated_rng
from pyro_em.types import Model

About = tuple[bool, tuple[Plate, ...], int]


@dataclass(frozen=True)
class Series:
    """One site, or the sites of a loop's steps: their names in the order of time, and `steps`, the numbers in these.

    `value`, of observed sites NaN where it is missing, has time first if there are `steps`; `plates` are those besides.
    """

    name: str
    sites: tuple[str, ...]
    value: Tensor
    observed: bool
    plates: tuple[Plate, ...]
    event_dim: int
    steps: tuple[int, ...] | None = None

    def joined(self, of: Mapping[str, Tensor], lead: int = 0) -> Tensor:
        """Tensors of the sites as one, time after `lead` dims."""
        return of[self.name] if self.steps is None else torch.stack([of[site] for site in self.sites], lead)


@dataclass(frozen=True)
class _Site:
    """A sample statement in one run, with the `pyro.markov` loop that it lies in, and the step there."""

    name: str
    value: Tensor
    observed: bool
    plates: tuple[Plate, ...]
    event_dim: int
    loop: int | None
    step: int

    @property
    def about(self) -> About:
        """What sites of one series have in common, but for the shape of their values."""
        return self.observed, self.plates, self.event_dim


class _Watch(Messenger):
    """Note the sites of a run as the model states them, not those that other handlers make of them meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, _Site] = {}
        self._open = 0

    def begin(self) -> None:
        """Of a run: the one before may have ended in the middle of a site."""
        self.sites.clear()
        self._open = 0

    def _pyro_sample(self, msg: Any) -> None:
        self._open += 1

    def _pyro_post_sample(self, msg: Any) -> None:
        self._open -= 1
        fn = msg["fn"]
        if self._open or poutine.util.site_is_subsample(msg) or not hasattr(fn, "log_prob"):
            return
        place = _place()
        stack = (Plate(_stem(f.name, *place), f.dim, f.size) for f in msg["cond_indep_stack"] if f.vectorized)
        plates = tuple(sorted(stack, key=lambda plate: plate.dim))
        value, gone = detach_provenance(msg["value"]), msg["infer"].get(INCOMPLETE)
        value = value if gone is None else torch.where(gone, torch.nan, value)
        batch = [1] * max((-plate.dim for plate in plates), default=0)
        for plate in plates:
            batch[plate.dim] = plate.size
        whole = (*batch, *value.shape[value.dim() - fn.event_dim :])
        value = value.expand(torch.broadcast_shapes(value.shape, whole))
        self.sites[msg["name"]] = _Site(msg["name"], value, msg["is_observed"], plates, fn.event_dim, *place)


def _place() -> tuple[int | None, int]:
    """The loop that is running, and its step; no loop where several run inside of one another."""
    try:
        return compat.markov_step() or (None, 0)
    except ValueError:
        return None, 0


def _stem(plate: str, loop: int | None, step: int) -> str:
    """Name of a plate that is made at every step, f"items_{t}", without the step."""
    own = re.fullmatch(r"(?!markov_)(.*?)[_\W]*(\d+|\d+:\d+)", plate) if loop is not None else None
    return own[1] if own is not None and own[1] and (":" in own[2] or own[2] == str(step)) else plate


def series_of(problem: Problem) -> dict[str, Series]:
    """Those of all sample sites, by name, in program order; costs one run of the model."""
    model: Model = unfolded(problem.model)
    watch = _Watch()

    def watched(*args: Any, **kwargs: Any) -> None:
        watch.begin()  # a loop over time is looked at in several runs, of which the last has all its steps
        with watch:
            model(*args, **kwargs)

    with isolated_rng(0):
        loops = [loop for loop in capture(watched, problem.args, problem.kwargs).loops if loop.together]
    sites = watch.sites
    together = {name for loop in loops for name in loop.names}
    sequences = [own for loop in loops for own in _together(loop, sites)]
    steps = _one_by_one([site for name, site in sites.items() if name not in together])
    # The posterior has latents of steps that are run together as one sequence, without what is before the loop.
    joined = [_with_earlier(own, sites) for own in (*steps, *(s for s in sequences if s.series.observed))]
    names = _names([*joined, *(s for s in sequences if not s.series.observed)], sites)
    inside = {site: own for own in names.values() for site in own.made_of}
    found = {}
    for name, site in sites.items():
        alone = Series(name, (name,), site.value, *site.about)
        own = inside[name].series if name in inside else alone
        found[own.name] = own
    return found


@dataclass(frozen=True)
class _Joined:
    """A series, the template of its sites, and the sites of the run that it is made of."""

    series: Series
    template: Template
    made_of: tuple[str, ...]


def _together(loop: Loop, sites: Mapping[str, _Site]) -> Iterator[_Joined]:
    """The series of a loop whose later steps are run together."""
    for site in [sites[name] for name in loop.names if name in sites]:
        plate = next((p for p in site.plates if p.name == loop.plate), None)
        if plate is None:
            continue
        template = Template.of(site.name, loop)
        plates = tuple(p for p in site.plates if p is not plate)
        axis = site.value.dim() - site.event_dim + plate.dim
        between = -1 - plate.dim - max((-p.dim for p in plates), default=0)  # dims of plates that others have
        rest = site.value.reshape(plate.size, *site.value.shape[axis + 1 + between :])
        heads = {t: sites[name] for t in range(loop.history) if (name := template.name(t, loop)) in sites}
        about: About = (site.observed, plates, site.event_dim)
        if any(head.about != about or head.value.shape != rest.shape[1:] for head in heads.values()):
            heads = {}
        value = torch.cat([*(head.value.unsqueeze(0) for head in heads.values()), rest])
        own = (*heads, *range(loop.history, loop.steps))
        names, steps = (tuple(f(t, loop) for t in own) for f in (template.name, template.number))
        series = Series("", names, value, *about, tuple(map(int, steps)))
        yield _Joined(series, template, (*(head.name for head in heads.values()), site.name))


def _one_by_one(sites: Sequence[_Site]) -> Iterator[_Joined]:
    """The series of loops whose steps are run one by one: sites of one name but for a number that moves with the step.

    A name may have other numbers, too: that one counts which makes the longest series.
    """
    options: dict[str, dict[tuple[Any, ...], int]] = {}
    for site in sites:
        for number in re.finditer(r"\d+", site.name) if site.loop is not None else ():
            text = site.name[: number.start()] + "{}" + site.name[number.end() :]
            key = (text, int(number[0]) - site.step, site.loop, site.about, site.value.shape)
            options.setdefault(site.name, {})[key] = int(number[0])
    members = Counter(key for keys in options.values() for key in keys)
    groups: dict[tuple[Any, ...], dict[int, _Site]] = {}
    for site in sites:
        if site.name in options:
            key = max(options[site.name], key=members.__getitem__)
            groups.setdefault(key, {})[options[site.name][key]] = site
    for (text, *_), group in groups.items():
        own = [group[step] for step in sorted(group)]
        if len(own) > 1:
            names, value = tuple(site.name for site in own), torch.stack([site.value for site in own])
            series = Series("", names, value, *own[0].about, tuple(sorted(group)))
            yield _Joined(series, Template(text, 0), names)


def _with_earlier(own: _Joined, sites: Mapping[str, _Site]) -> _Joined:
    """With the sites before the loop that are named as steps before its first, as y_0 is before a loop from 1."""
    series = own.series
    assert series.steps is not None
    site = sites.get(own.template.text.replace("{}", str(series.steps[0] - 1)))
    alike = series.observed, series.plates, series.event_dim
    if site is None or site.loop is not None or site.about != alike or site.value.shape != series.value.shape[1:]:
        return own
    value, steps = torch.cat([site.value.unsqueeze(0), series.value]), (series.steps[0] - 1, *series.steps)
    longer = replace(series, sites=(site.name, *series.sites), value=value, steps=steps)
    return _with_earlier(_Joined(longer, own.template, (site.name, *own.made_of)), sites)


def _names(joined: Sequence[_Joined], sites: Mapping[str, _Site]) -> dict[str, _Joined]:
    """By names without the step; what is missing at some steps, and a latent there, is called y_latent beside y."""
    found: dict[str, _Joined] = {}
    for own in sorted(joined, key=lambda own: not own.series.observed):
        stem = own.template.stem
        names = (stem, own.template.text) if own.series.observed else (stem, f"{stem}_latent", own.template.text)
        name = next(name for name in names if name not in found and name not in sites)
        found[name] = replace(own, series=replace(own.series, name=name))
    return found
