"""One run of the user's model with given parameters, and what each of its sample sites said.

`run_model` is the interpreter of the package: every other part sees a model only through the
`Run` it returns. Parameters are handed out as one leaf per name (`pyro.param` gives a new tensor at
each read; gradients need one), parameter-role sample sites take the given value, discrete latents
are enumerated without the user asking for it.

Not handled here: which site plays which role (roles.py), what the sites mean (recognise.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from pyro.infer import config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.errors import PyroEMError
from pyro_em.families import Family, family_for
from pyro_em.families.by_mean import seen_so
from pyro_em.model import compat
from pyro_em.model.labels import observe_labels
from pyro_em.model.missing import first_of, observe_where
from pyro_em.model.notes import noting
from pyro_em.model.substitute import Substitute
from pyro_em.model.timeline import Loop, running
from pyro_em.model.unfold import Unfold
from pyro_em.types import Model


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: its name, its dim (negative) and its full and drawn sizes."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class SiteRecord:
    """What one sample site said in one run.

    `arguments` are the raw constructor arguments of the base distribution as tensors, or None where
    the family is unknown; `element_dims` counts the dims that `.to_event` added to the base event.
    """

    name: str
    fn: Any
    value: Tensor
    observed: bool
    enumerated: bool
    symbol: str | None
    plates: tuple[Plate, ...]
    symbols: dict[int, str]
    mask: Tensor | None
    scale: float | Tensor
    family: Family | None
    arguments: dict[str, Tensor] | None
    constants: dict[str, Any]
    element_dims: int
    element_mask: Tensor | None
    batch_shape: tuple[int, ...]
    infer: dict[str, Any] = field(repr=False)
    integrated: bool = False  # a continuous latent, at one of its values

    @property
    def latent(self) -> bool:
        """The site is summed or integrated out, so that its density must stay normalised (no mask)."""
        return self.enumerated or self.integrated

    @property
    def plate_dims(self) -> frozenset[str]:
        """Symbols of the plates that the site lies in."""
        return frozenset(self.symbols[plate.dim] for plate in self.plates)


@dataclass(frozen=True)
class Run:
    """Sites in program order, the leaves that were handed out as parameters, and the loops run together.

    `notes` are the values of `pyro.deterministic`, which are no sites (notes.py).
    """

    sites: dict[str, SiteRecord]
    leaves: dict[str, Tensor]
    plate_symbols: dict[str, str]
    loops: tuple[Loop, ...] = ()
    notes: dict[str, Tensor] = field(default_factory=dict)


def without_gradients(run: Run) -> Run | None:
    """The same run as far as its sites say what they are; None if one hides its arguments."""
    if any(site.arguments is None for site in run.sites.values()):
        return None
    sites = {
        name: dataclasses.replace(
            site,
            value=site.value.detach(),
            arguments={a: v.detach() for a, v in (site.arguments or {}).items()},
            mask=None if site.mask is None else site.mask.detach(),
        )
        for name, site in run.sites.items()
    }
    return dataclasses.replace(run, sites=sites, leaves={n: v.detach() for n, v in run.leaves.items()})


def _enumerate_discrete(site: Any, given: Collection[str] = ()) -> Any:
    """Enumerate in parallel what the user left open or marked "sequential" (exact either way), if it has no value."""
    if site["name"] in given:
        return {"enumerate": None}
    if site["is_observed"] or not getattr(site["fn"], "has_enumerate_support", False):
        return {}
    if site["infer"].get("enumerate") == "sequential":
        return {"enumerate": "parallel"}
    return {}


def combined_masks(fn: Any, mask: Any) -> tuple[Tensor | None, Tensor | None]:
    """Masks of `poutine.mask` and of `.mask` wrappers: (over the batch, over the elements).

    A `.mask` inside of `.to_event` acts on single elements of the event, all others on whole events.
    """
    batch, element = None, None
    if isinstance(mask, Tensor):
        batch = mask.bool()
    elif mask is False:
        batch = torch.zeros((), dtype=torch.bool)
    base_event_dim = compat.base_distribution(fn).event_dim
    inside = False
    while hasattr(fn, "base_dist"):
        own = getattr(fn, "_mask", None)
        if isinstance(own, bool):
            own = torch.tensor(own)
        if own is not None:
            if inside and fn.event_dim == base_event_dim:
                element = own if element is None else element & own
            else:
                batch = own if batch is None else batch & own
        inside = inside or isinstance(fn, Independent)
        fn = fn.base_dist
    return batch, element


def _unexpanded(mask: Tensor | None, plate_dims: set[int | None], element_dims: int) -> Tensor | None:
    """`.mask` wrappers are expanded over enumeration dims, along which they are constant: one slice says all."""
    if mask is None:
        return None
    for i in range(mask.dim() - element_dims):
        first = mask.narrow(i, 0, 1)
        outside = i - (mask.dim() - element_dims) not in plate_dims
        if outside and mask.shape[i] > 1 and torch.equal(mask, first.expand_as(mask)):
            mask = first
    while mask.dim() > element_dims and mask.shape[0] == 1:
        mask = mask.squeeze(0)
    return mask


def _tensors(raw: Mapping[str, Any], family: Family, like: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arguments: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in raw.items():
        if name in family.arguments:
            arguments[name] = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=like.dtype)
        else:
            constants[name] = value
    return arguments, constants


def _record(name: str, site: dict[str, Any], integrated: bool, symbols: Mapping[int, str]) -> SiteRecord:
    fn = site["fn"]
    base = compat.base_distribution(fn)
    element_dims = fn.event_dim - base.event_dim
    batch_mask, element_mask = combined_masks(fn, site["mask"])
    plate_dims = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
    batch_mask = _unexpanded(batch_mask, plate_dims, 0)
    element_mask = _unexpanded(element_mask, plate_dims, element_dims)
    raw = compat.raw_arguments(fn)
    family = family_for(base) if raw is not None else None
    if family is not None and raw is not None and not family.accepts(raw):
        family = None
    arguments: dict[str, Tensor] | None = None
    constants: dict[str, Any] = {}
    if family is not None and raw is not None:
        like = site["value"] if site["value"].is_floating_point() else torch.empty(0)
        family, given = seen_so(family, raw, site["infer"], element_dims)
        arguments, constants = _tensors(given, family, like)
    plates = tuple(
        sorted(
            (Plate(f.name, f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized),
            key=lambda plate: plate.dim,
        )
    )
    return SiteRecord(
        name=name,
        fn=fn,
        value=site["value"],
        observed=site["is_observed"],
        enumerated=compat.is_enumerated(site),
        symbol=compat.enumeration_symbol(site),
        plates=plates,
        symbols={**compat.dim_symbols(site), **symbols},
        mask=batch_mask,
        scale=site["scale"],
        family=family,
        arguments=arguments,
        constants=constants,
        element_dims=element_dims,
        element_mask=element_mask,
        batch_shape=tuple(fn.batch_shape),
        infer=site["infer"],
        integrated=integrated,
    )


# What becomes of `pyro.sample(..., obs=, obs_mask=)`.
OBSERVE = first_of(observe_labels, observe_where)

ALL_STATES = (
    "pyro_em ran the model with all states of its discrete latents at once, along a new leftmost dim. An ambiguous "
    "Boolean or a tensor that is no scalar: the model branches in Python on a latent, or makes it an int; use indexing "
    "(loc[z]) or torch.where. Shapes that do not fit: index with pyro.ops.indexing.Vindex. A latent that is itself "
    "indexed along its plate (z[i], z[j] of pairs of elements) couples these: algorithm='svi' with a guide takes such."
)

# Pyro's handler stack and param store are global: runs of several threads take turns.
LOCK = threading.RLock()


@contextlib.contextmanager
def quiet_store() -> Iterator[None]:
    """Run with an empty param store, and give the caller's back whatever happens."""
    with LOCK, pyro.get_param_store().scope():
        yield


def run_model(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Mapping[str, Tensor],
    *,
    max_plate_nesting: int,
    enumerated: bool = True,
    live: bool = False,
    loops: Sequence[Loop] = (),
    chosen: bool = False,
    first: Messenger | None = None,
    integrated: Collection[str] = (),
    symbols: Mapping[str, Mapping[int, str]] | None = None,
) -> Run:
    """Run `model(*args, **kwargs)` with the parameters at `values` and return what its sites said.

    Gradients flow from the sites' arguments to `values` when those require them (and to the module's own
    parameters, see `Run.leaves`). With `live` the handlers around the call see the run, as a loss inside of
    `SVI.step` needs; otherwise the run is hidden from them. Given the `loops` of the model (see timeline.py) these
    run their later steps together, or, if `chosen`, at the few steps at which they are certified; without, each
    step by itself. `first` cuts a plate. `integrated` names the continuous latents, which take their values from
    `values` too; `symbols` names more dims of some sites (that of several such values).
    """
    substitute = Substitute(values)
    with contextlib.ExitStack() as stack:
        if not live:
            stack.enter_context(poutine.block())
        stack.enter_context(compat.recording_arguments())
        stack.enter_context(compat.masked_observations(OBSERVE))
        stack.enter_context(substitute)
        notes = stack.enter_context(noting())
        if first is not None:
            stack.enter_context(first)
        model = Unfold()(model)
        if enumerated:
            stack.enter_context(compat.enumeration(max_plate_nesting))
            configured = partial(_enumerate_discrete, given=integrated)
            model = poutine.infer_config(config_enumerate(model, default="parallel"), config_fn=configured)
        met = stack.enter_context(running("chosen" if chosen else "together", loops)) if loops else []
        try:
            trace: Any = compat.prune_and_symbolize(poutine.trace(model).get_trace(*args, **kwargs))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if enumerated and not isinstance(error, PyroEMError):
                error.add_note(ALL_STATES)
            raise
    more = symbols or {}
    sites = {
        name: _record(name, site, name in integrated, more.get(name, {}))
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
    }
    return Run(sites, dict(substitute.leaves), compat.plate_symbols(trace), tuple(met), notes)
