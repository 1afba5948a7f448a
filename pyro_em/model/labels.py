"""Labels known for some rows: `pyro.sample("z", fn, obs=labels, obs_mask=known)` of a discrete z.

Pyro splits such a site into two, z_observed and z_unobserved, and gives every row the one or the other; the
rows then differ in their arguments, and the unobserved half of a labelled row counts as a latent without data.
Here z stays one latent on all rows, and the label is a noiseless second observation of it:

    p(z, label | θ) = p(z | θ) · 1[z = label]      where known,      p(z | θ) elsewhere

which has the same evidence, keeps the name that the model wrote, and leaves the arguments as they are without
labels. The indicator enters as logits, log 1 = 0 and log 0 = -inf, since torch clamps `probs`.

Not handled here: sites without finitely many states, or made of several by `.to_event`; they stay as Pyro
splits them.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_em.errors import InputError

LABELS = "_pyro_em_labels"  # in the `infer` of labels: the site that they are of


def observe_labels(name: str, fn: Any, obs: Tensor | None, obs_mask: Any, *args: Any, **options: Any) -> Tensor | None:
    """The site `name` as a latent with labels; None if it is not of a kind that can have them.

    :raises InputError: for one-hot labels that are not, naming the row.
    """
    base = fn
    while isinstance(base, dist.ExpandedDistribution | dist.MaskedDistribution):
        base = base.base_dist
    one_hot = isinstance(base, dist.OneHotCategorical)
    if obs is None or not (one_hot or isinstance(base, dist.Categorical | dist.Bernoulli | dist.Binomial)):
        return None
    states = fn.enumerate_support(expand=False).shape[0]
    z: Tensor = pyro.sample(name, fn, *args, **options)
    certain = torch.eye(states, dtype=torch.get_default_dtype()).log()
    codes = _codes(name, obs, obs_mask) if one_hot else obs
    told: Any = {LABELS: name}
    with poutine.mask(mask=obs_mask):
        pyro.sample(
            f"{name}_observed",
            dist.Categorical(logits=certain[z.argmax(-1) if one_hot else z.long()], validate_args=False),
            obs=codes,
            infer=told,
        )
    return z


def _codes(name: str, obs: Tensor, obs_mask: Any) -> Tensor:
    """Numbers of the states of one-hot labels."""
    bad = ((obs != 0) & (obs != 1)).any(-1) | (obs.sum(-1) != 1)
    bad = bad & torch.as_tensor(obs_mask)
    if bool(bad.any()):
        row = bad.nonzero()[0].tolist()
        where = row[0] if len(row) == 1 else tuple(row)
        raise InputError(f"Site '{name}': the label of row {where} is not one-hot (a single 1 among zeros).")
    return obs.argmax(-1)
