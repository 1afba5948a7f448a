"""Pyro's param store and the global random state, touched only here.

A fit runs in an empty store of its own and leaves the caller's store and random state as they were; only
a finished fit writes, once, at the end. (`ParamStoreDict.scope` is undone on errors and Ctrl-C too.)
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import pyro
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_em.charts import base_constraint
from pyro_em.errors import InputError
from pyro_em.model.capture import ParameterRecord
from pyro_em.model.compat import recorded
from pyro_em.model.trace import LOCK
from pyro_em.shapes import quick_shapes


@contextlib.contextmanager
def isolated_rng(seed: int | None) -> Iterator[None]:
    """Run with the random state of torch, NumPy and Python given by `seed`; restore it afterwards.

    Without a seed it follows from torch's current state (`torch.manual_seed`), which is not advanced.
    :raises InputError: inside of a model that is running.
    """
    here = torch.get_default_device()  # of the data (device.py)
    devices = [here.index or 0] if here.type == "cuda" else []
    with LOCK, quick_shapes(), torch.random.fork_rng(devices):  # the random state is global too
        if recorded():  # by this thread: the others' models do not run under the lock
            raise InputError(
                "pyro_em was called inside of a model that is running (or of a pyro trace): its parameters and draws "
                "would become sites of that model. Call it before, and give the model what was found as an argument."
            )
        before = get_rng_state()
        if seed is None:
            current = torch.Generator()
            current.set_state(torch.get_rng_state())
            seed = int(torch.randint(2**31 - 1, (), generator=current, device=current.device))
        try:
            _seed(seed)
            yield
        finally:
            set_rng_state(before)


def _seed(seed: int) -> None:
    """`pyro.set_rng_seed`. Of an accelerator that is not in use yet, as no data are there, torch would note the seed
    and where it was given: half a millisecond, and a seed that is left behind for whoever uses it first."""
    if torch.cuda.is_initialized() or torch.get_default_device().type != "cpu":
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextlib.contextmanager
def unspent_rng() -> Iterator[None]:
    """Afterwards the random state is as before."""
    before = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def write_params(
    records: Mapping[str, ParameterRecord], params: Mapping[str, Tensor], modules: Mapping[str, Tensor]
) -> None:
    """Write fitted values as SVI leaves them: in the param store, and in the modules' own parameters.

    Entries that exist are overwritten in place: assigning to the store would make new leaves, which
    optimisers holding the old ones would never see. A probability of exactly 0 has no unconstrained
    coordinate; the store gets the nearest interior value (the result keeps the exact one).
    """
    with LOCK:  # while a fit of another thread runs its model, the store is that model's
        store = pyro.get_param_store()
        leaves = dict(store.named_parameters())
        for name, record in records.items():
            if record.kind == "sample":
                continue
            value = params[name].detach().clone()
            if name in modules:
                modules[name].data.copy_(value)
                if name in leaves and leaves[name] is not modules[name]:
                    del store[name]  # of an earlier module of this name, which would come back at the next read
                pyro.param(name, modules[name])
                continue
            value = interior(record.constraint, value)
            if name in leaves and store[name].shape == value.shape:
                leaves[name].data.copy_(transform_to(record.constraint).inv(value))
                continue
            if name in leaves:
                del store[name]
            pyro.param(name, value, constraint=record.constraint)


def interior(constraint: constraints.Constraint, value: Tensor) -> Tensor:
    """The nearest value with finite unconstrained coordinates."""
    tiny = torch.finfo(value.dtype).tiny
    constraint = base_constraint(constraint)
    if constraint is constraints.simplex:
        value = value.clamp(min=tiny)
        return value / value.sum(-1, keepdim=True)
    if constraint is constraints.unit_interval:
        return value.clamp(min=tiny, max=1 - torch.finfo(value.dtype).eps)
    if constraint in (constraints.positive, constraints.nonnegative):
        return value.clamp(min=tiny)
    return value
