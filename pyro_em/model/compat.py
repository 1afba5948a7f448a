"""The only importer of names that Pyro does not promise to keep.

Every function here hides one such name behind a plain meaning, and `tests/model/test_compat.py`
holds each to its contract, so that a new Pyro release breaks one file with a clear message.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import pyro.primitives
import torch
from pyro.distributions.distribution import COERCIONS
from pyro.ops import packed
from pyro.poutine import runtime
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_em.distributions import Coarse
from pyro_em.model.full_mixtures import whole

Site = dict[str, Any]
RawArguments = dict[str, Any]

_RAW = "_pyro_em_raw"
ALTERNATIVES = {"probs", "logits", "covariance_matrix", "precision_matrix", "scale_tril"}
_WRAPPERS = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
# `isinstance` asks abstract base classes, for microseconds, and a binding asks hundreds of times.
_is_wrapper = functools.cache(lambda kind: issubclass(kind, _WRAPPERS))


def _remember(distribution: Any, raw: RawArguments) -> Any:
    """Attach the raw constructor arguments, and keep them through `expand`, which plates call."""
    setattr(distribution, _RAW, raw)
    expand = type(distribution).expand
    distribution.expand = lambda batch_shape, *instance: _remember(expand(distribution, batch_shape, *instance), raw)
    return distribution


def _record_arguments(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if issubclass(cls, _WRAPPERS) or not hasattr(cls, "expand"):
        return None
    distribution = whole(type.__call__(cls, *args, **kwargs))
    names = _argument_names(cls)
    if names is None:
        given = cls.__signature__.bind(*args, **kwargs).arguments
    else:  # as they were accepted
        given = {**dict(zip(names, args, strict=False)), **kwargs}
    raw = {n: given[n] for n in names or given if n != "validate_args" and given.get(n) is not None}
    return _remember(distribution, raw)


@functools.cache
def _argument_names(cls: Any) -> tuple[str, ...] | None:
    """Of a constructor; None if it takes any number of them."""
    found = cls.__signature__.parameters.values()
    return tuple(x.name for x in found) if all(x.kind is x.POSITIONAL_OR_KEYWORD for x in found) else None


@contextlib.contextmanager
def recording_arguments() -> Iterator[None]:
    """Within this context every Pyro distribution remembers its raw constructor arguments.

    Pyro normalises and expands arguments (Categorical its probs, MultivariateNormal its three
    matrices), so what the user wrote can only be seen at construction: `COERCIONS` is consulted
    there by `DistributionMeta.__call__`.
    """
    COERCIONS.append(_record_arguments)
    try:
        yield
    finally:
        COERCIONS.remove(_record_arguments)


@contextlib.contextmanager
def masked_observations(observe: Callable[..., Tensor | None]) -> Iterator[None]:
    """Within this context `pyro.sample(name, fn, obs=, obs_mask=)` asks `observe(name, fn, obs, obs_mask)` first.

    Pyro splits such a statement into two sites before any handler sees it; where `observe` returns None it
    still does.
    """
    split = pyro.primitives._masked_observe

    def either(name: str, fn: Any, obs: Tensor | None, obs_mask: Any, *args: Any, **kwargs: Any) -> Tensor:
        value = observe(name, fn, obs, obs_mask, *args, **kwargs)
        return split(name, fn, obs, obs_mask, *args, **kwargs) if value is None else value

    pyro.primitives._masked_observe = either
    try:
        yield
    finally:
        pyro.primitives._masked_observe = split


@contextlib.contextmanager
def before_handlers(place: Callable[[Site], Callable[[Tensor], Tensor] | None]) -> Iterator[None]:
    """Within this context `place` may change the message of a sample site before any handler sees it.

    What it returns, if anything, then makes of the site's value what the model is given. If it stops the message, none
    does.
    """
    primitives: Any = pyro.primitives
    apply = primitives.apply_stack

    def placed(msg: Any) -> None:
        back = place(msg) if msg["type"] == "sample" else None
        if not msg["stop"]:
            apply(msg)
        if back is not None:
            msg["value"] = back(msg["value"])

    primitives.apply_stack = placed
    try:
        yield
    finally:
        primitives.apply_stack = apply


def base_distribution(fn: Any) -> Any:
    """The innermost distribution below `.to_event`, `.mask` and `.expand`."""
    while _is_wrapper(fn.__class__):
        fn = fn.base_dist
    return fn


def own_arguments(fn: Any) -> RawArguments | None:
    """What a distribution was constructed from, None where that was not recorded."""
    return getattr(fn, _RAW, None)


def plates_around() -> dict[int, int]:
    """Sizes of the vectorised plates that are open, by dim."""
    frames: list[Any] = [own for own in runtime._PYRO_STACK if isinstance(own, IndepMessenger)]
    return {own.dim: getattr(own, "subsample_size", own.size) for own in frames if own.dim is not None}


def raw_arguments(fn: Any) -> RawArguments | None:
    """Raw constructor arguments of a site's base distribution, or None if they cannot be known.

    Of a distribution that was made before the model ran (as those of `PyroSample` are) they are its attributes.
    Those of a response seen only in part are the complete response's and the limits. Those of a distribution that
    is an argument itself follow as "argument.name", with the dims that its `.to_event` declares.
    """
    raw: RawArguments | None = getattr(base_distribution(fn), _RAW, None)
    if raw is None:
        return _attributes(base_distribution(fn))
    if isinstance(base_distribution(fn), Coarse):
        complete = raw_arguments(raw["base"])
        return None if complete is None else {**complete, **{name: raw[name] for name in raw if name != "base"}}
    found = dict(raw)
    inside: dict[str, Any] = {n: v for n, v in raw.items() if isinstance(v, torch.distributions.Distribution)}
    for name, inner in inside.items():
        event = inner.event_shape[: inner.event_dim - base_distribution(inner).event_dim]
        for own, value in (raw_arguments(inner) or {}).items():
            if event and isinstance(value, int | float | Tensor):
                value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype())
                value = value.expand(torch.broadcast_shapes(value.shape, event))
            found[f"{name}.{own}"] = value
    return found


def _attributes(base: Any) -> RawArguments | None:
    """Arguments of a distribution as its attributes; one of those that say the same (probs, logits; matrices)."""
    if type(base).__module__.split(".")[0] not in ("pyro", "torch") or not isinstance(base.arg_constraints, dict):
        return None
    names = [n for n in base.arg_constraints if n not in ALTERNATIVES]
    for group in (("probs", "logits"), ("covariance_matrix", "precision_matrix", "scale_tril")):
        known = [n for n in group if n in base.arg_constraints]
        names += [n for n in known if n in vars(base)][:1] or known[:1]
    found = {name: getattr(base, name, None) for name in names}
    return found if found and all(isinstance(value, Tensor) for value in found.values()) else None


def with_arguments(distribution: Any, raw: RawArguments) -> Any:
    """A distribution whose raw arguments are these."""
    return _remember(distribution, raw)


def markov_step() -> tuple[int, int] | None:
    """Which `pyro.markov` loop is running, and its step; None outside of any.

    :raises ValueError: inside of several.
    """
    loops = [own for own in runtime._PYRO_STACK if isinstance(own, MarkovMessenger)]
    if len(loops) > 1:
        raise ValueError("nested loops")
    return (id(loops[0]), loops[0]._pos) if loops else None


def forgotten_in_markov(site: str) -> Callable[[], None]:
    """Let no `pyro.markov` loop know a site that it has seen, but that handlers further out shall not see.

    What is returned takes this back.
    """
    loops = [own for own in runtime._PYRO_STACK if isinstance(own, MarkovMessenger)]
    seen = [own._stack[own._pos] for own in loops if site in own._stack[own._pos]]
    for names in seen:
        names.discard(site)

    def undo() -> None:
        for names in seen:
            names.add(site)

    return undo


def enumerating() -> bool:
    """Whether discrete latents are being enumerated."""
    return any(isinstance(own, EnumMessenger) for own in runtime._PYRO_STACK)


def recorded() -> bool:
    """Whether what happens here is being recorded by some trace: this is the inside of a model that runs."""
    return any(isinstance(own, TraceMessenger) for own in runtime._PYRO_STACK)


def prune_and_symbolize(trace: Trace) -> Trace:
    """Drop subsample sites and name every plate and enumeration dim of the trace by a symbol."""
    trace = prune_subsample_sites(trace)
    trace.symbolize_dims()
    return trace


def minibatch(fn: Any) -> bool:
    """Whether the distribution of a plate's indices leaves some of them out."""
    return fn.subsample_size is not None and fn.subsample_size < fn.size


def enumeration(max_plate_nesting: int) -> EnumMessenger:
    """A handler that enumerates the sites marked for it, left of `max_plate_nesting` plate dims."""
    return EnumMessenger(first_available_dim=-1 - max_plate_nesting)


def module_parameter(message: Site) -> torch.nn.Parameter | None:
    """The torch parameter behind a param message, if the value is one (its arguments are name, value)."""
    value = message["args"][1] if len(message["args"]) > 1 else None
    return value if isinstance(value, torch.nn.Parameter) else None


def is_enumerated(site: Site) -> bool:
    """The site was enumerated in this run."""
    return site["infer"].get("_enumerate_dim") is not None


def enumeration_symbol(site: Site) -> str | None:
    """Symbol of the site's own enumeration dim, None if it was not enumerated."""
    return site["infer"].get("_enumerate_symbol")


def markov_depth(site: Site) -> int | None:
    """How many `pyro.markov` contexts the site lies in, None outside of them."""
    return site["infer"].get("_markov_depth")


def dim_symbols(site: Site) -> dict[int, str]:
    """Symbols of the site's plate and enumeration dims, by dim (negative)."""
    return site["infer"]["_dim_to_symbol"]


def plate_symbols(trace: Trace) -> dict[str, str]:
    """Symbol of every vectorised plate, by name."""
    return dict(trace.plate_to_symbol)


def pack(value: Tensor, dim_to_symbol: Mapping[int, str]) -> Tensor:
    """Drop dims of size 1 and remember the symbols of the others (see `dims_of`)."""
    return packed.pack(value[...], dim_to_symbol)


def dims_of(value: Tensor) -> str:
    """Symbols of a packed tensor's dims, in order."""
    return value._pyro_dims  # type: ignore[attr-defined]


def with_dims(value: Tensor, dims: str) -> Tensor:
    """The same tensor, packed with the given symbols."""
    value = value[...]
    value._pyro_dims = dims  # type: ignore[attr-defined]
    return value


def detached(value: Tensor) -> Tensor:
    """A packed tensor without its history; `Tensor.detach` alone would lose the dims."""
    return with_dims(value.detach(), dims_of(value))


def unpack(value: Tensor, dim_to_symbol: Mapping[int, str]) -> Tensor:
    """The inverse of `pack`: dims back at their places, right aligned, size 1 where absent."""
    return packed.unpack(value, {symbol: dim for dim, symbol in dim_to_symbol.items()})
