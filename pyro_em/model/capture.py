"""First look at an untouched model: parameters, sites, plates, dependences, and whether the data fit.

One plain run (latents drawn, nothing enumerated) under provenance tracking tells which upstream sites
and parameters each site depends on. It costs one trace and needs no memory, so it also serves to
predict the size of enumeration tables before any of them is made, and to check the data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_em.device import checked_indices
from pyro_em.errors import InputError, PyroEMError
from pyro_em.model import compat
from pyro_em.model.data import check_arguments, check_data, check_sites, plain_support
from pyro_em.model.flat import some_value
from pyro_em.model.missing import INCOMPLETE, check_unread
from pyro_em.model.notes import noting
from pyro_em.model.provenance import meeting_below_zero, traced
from pyro_em.model.starts import check_start
from pyro_em.model.timeline import Loop, Unplanned, not_together, running
from pyro_em.model.trace import OBSERVE, Plate, quiet_store
from pyro_em.model.unfold import Unfold
from pyro_em.model.unusable import explained
from pyro_em.types import Model

MANY = 2**14  # elements of plates above which a latent is drawn once for all


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter as the model declares it: `kind` is "param", "module" (torch parameter) or "sample"."""

    name: str
    value: Tensor
    constraint: constraints.Constraint
    kind: str


@dataclass(frozen=True)
class PlainSite:
    """What the plain run says of one sample site; `upstream` names sites and parameters it depends on."""

    name: str
    fn: Any
    value: Tensor
    observed: bool
    discrete: bool
    enumerable: bool
    plates: tuple[Plate, ...]
    upstream: frozenset[str]
    markov: bool
    mask: Any
    scale: Any
    infer: dict[str, Any]

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape of the value."""
        split = self.value.dim() - self.fn.event_dim
        return self.value.shape[:split], self.value.shape[split:]

    @cached_property
    def num_states(self) -> int:
        """States that enumeration would give this site."""
        return int(self.fn.enumerate_support(expand=False).shape[0])


@dataclass(frozen=True)
class Capture:
    """The model as written: parameters and sites in program order, how deep its plates nest, its loops over time.

    Of a loop whose steps are run together (timeline.py) there are the first sites, and one for the others.
    `minibatches` are plates that draw some of their elements anew in every run, `below_zero` parameters and sites that
    data below 0 index, `stacked` latents of which every state is a run of its own (indexed.py).
    """

    parameters: dict[str, ParameterRecord]
    sites: dict[str, PlainSite]
    max_plate_nesting: int
    loops: tuple[Loop, ...] = ()
    minibatches: frozenset[str] = frozenset()
    below_zero: frozenset[str] = frozenset()
    stacked: frozenset[str] = frozenset()

    @cached_property
    def options(self) -> dict[str, Any]:
        """How `run_model` is to run this model: without the handlers of enumeration where nothing is enumerated."""
        states = any(site.enumerable and not site.observed for site in self.sites.values())
        return {"max_plate_nesting": self.max_plate_nesting, "loops": self.loops, "enumerated": states}


class _Observe(Messenger):
    """Record parameters and dependences while the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, ParameterRecord] = {}
        self.upstream: dict[str, frozenset[str]] = {}
        self.incomplete: frozenset[str] = frozenset()
        self.minibatches: frozenset[str] = frozenset()

    def _pyro_param(self, msg: Any) -> None:
        """The start as the model wrote it: what the store makes of it satisfies the constraint in any case."""
        name, *given = msg["args"]
        if given and name not in self.parameters and not msg["done"]:
            start = given[0]() if callable(given[0]) else given[0]
            check_start(name, detach_provenance(start), msg["kwargs"].get("constraint", constraints.real))
            msg["args"] = (name, start)  # made once

    def _pyro_post_param(self, msg: Any) -> None:
        name = msg["name"]
        value = detach_provenance(msg["value"])
        if name not in self.parameters:
            kind = "module" if compat.module_parameter(msg) is not None else "param"
            self.parameters[name] = ParameterRecord(name, value.detach().clone(), constraints.real, kind)
        if self.parameters[name].kind == "param":
            msg["value"] = traced(value, name)

    def _pyro_sample(self, msg: Any) -> None:
        """In large plates a discrete latent is one draw for all elements: a million of them would index a million
        covariance matrices. The run asks what depends on what; that the model treats elements alike is certified
        elsewhere (certify.py)."""
        if poutine.util.site_is_subsample(msg) and msg["value"] is None and compat.minibatch(msg["fn"]):
            self.minibatches |= {msg["name"]}
        if not msg["done"] and not msg["is_observed"] and msg["value"] is None:
            msg["value"] = some_value(msg["fn"])
            msg["done"] = msg["value"] is not None
        if msg["done"] or msg["is_observed"] or not getattr(msg["fn"], "has_enumerate_support", False):
            return
        raw = compat.raw_arguments(msg["fn"]) or {}
        check_arguments(msg["name"], msg["fn"], raw)  # torch's sampler would not say where
        if math.prod(f.size for f in msg["cond_indep_stack"] if f.vectorized) > MANY:
            states = msg["fn"].enumerate_support(expand=False)
            event = states.shape[states.dim() - msg["fn"].event_dim :]
            msg["value"] = states.reshape(len(states), *event)[int(torch.randint(len(states), ()))]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if poutine.util.site_is_subsample(msg) or not hasattr(msg["fn"], "log_prob"):
            return
        name, value = msg["name"], detach_provenance(msg["value"])
        if msg["is_observed"]:
            plates = [f for f in msg["cond_indep_stack"] if f.vectorized]
            check_data(name, msg["fn"], value, msg["mask"], gaps=INCOMPLETE in msg["infer"], plates=plates)
        raw = compat.raw_arguments(msg["fn"]) or {}
        inputs = list(raw.values())
        upstream = get_provenance([inputs, msg["value"], msg["mask"], msg["scale"]])
        if not inputs:
            upstream = upstream | get_provenance(msg["fn"].log_prob(value))
        self.upstream[name] = upstream - {name}
        check_unread(name, self.upstream[name], self.incomplete)
        if msg["is_observed"] or not getattr(msg["fn"], "has_enumerate_support", False):
            check_arguments(name, msg["fn"], raw)
        if INCOMPLETE in msg["infer"]:
            self.incomplete |= {name}
        if not msg["is_observed"] or name in self.incomplete:
            msg["value"] = traced(value, name)


def _as_given(value: Tensor, gone: Tensor | None) -> Tensor:
    """The value with NaN where it is missing (masked cells hold some other value)."""
    return value if gone is None else torch.where(gone, torch.nan, value)


def capture(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], *, together: bool = True) -> Capture:
    """Run the model once, plainly, in an empty param store.

    Raises `InputError` for data that are NaN, infinite or outside of a site's support.
    :param together: run the steps of loops together; else every step has sites of its own, as in plain Pyro.
    """
    try:
        seen = _capture(model, args, kwargs, "unplanned" if together else "alone", ())
    except Unplanned:
        shallow = _capture(model, args, kwargs, "shallow", ())
        try:
            seen = _capture(model, args, kwargs, "together", shallow.loops)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, PyroEMError):
                raise
            raise not_together(shallow.loops, error) from error
    check_sites([(site.name, site.observed, site.value) for site in seen.sites.values()])
    return seen


def _capture(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], kind: str, loops: Sequence[Loop]) -> Capture:
    observe = _Observe()
    # Arguments are validated in the enumerated run, where a table has K rows; here each drawn latent makes N.
    quiet = pyro.validation_enabled(False)
    labels = compat.masked_observations(OBSERVE)
    with quiet_store(), poutine.block(), compat.recording_arguments(), labels, torch.no_grad(), quiet:
        looking = running(kind, loops), meeting_below_zero()
        with looking[0] as met, looking[1] as below_zero, checked_indices(), noting(), explained(model, args, kwargs):
            trace: Any = poutine.trace(observe(Unfold()(model))).get_trace(*args, **kwargs)
        declared = pyro.get_param_store().get_state()["constraints"]
    trace = compat.prune_and_symbolize(trace)
    sites: dict[str, PlainSite] = {}
    depth = 0
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        stack = [Plate(f.name, f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized]
        plates = tuple(sorted(stack, key=lambda plate: plate.dim))
        fn = site["fn"]
        depth = max([depth, *(-plate.dim for plate in plates)])
        support = plain_support(fn)
        sites[name] = PlainSite(
            name=name,
            fn=fn,
            value=_as_given(detach_provenance(site["value"]), site["infer"].get(INCOMPLETE)),
            observed=site["is_observed"],
            discrete=bool(getattr(support, "is_discrete", False)),
            enumerable=bool(getattr(fn, "has_enumerate_support", False)),
            plates=plates,
            upstream=observe.upstream.get(name, frozenset()),
            markov=compat.markov_depth(site) is not None,
            mask=detach_provenance(site["mask"]),
            scale=site["scale"],
            infer=site["infer"],
        )
    parameters = {
        name: dataclasses.replace(record, constraint=declared.get(name, constraints.real))
        for name, record in observe.parameters.items()
    }
    return Capture(parameters, sites, depth, tuple(met), observe.minibatches, frozenset(below_zero))


def parameter_records(
    seen: Capture, sites: Collection[str], params: Mapping[str, Tensor]
) -> dict[str, ParameterRecord]:
    """All parameters, the sample sites among them, at `params` where these are given, else at the model's own values.

    :raises InputError: for one that is no floating point number.
    """
    records = dict(seen.parameters)
    for name in sites:
        site = seen.sites[name]
        records[name] = ParameterRecord(name, site.value.detach().clone(), site.fn.support, "sample")
    for name, value in params.items():
        if name in records:
            records[name] = dataclasses.replace(records[name], value=value.detach().clone())
    for record in records.values():
        if not record.value.is_floating_point():
            raise InputError(f"Parameter '{record.name}' has dtype {record.value.dtype}; use a floating point one.")
    return records
