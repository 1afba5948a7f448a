"""Designs whose coefficients are values of continuous latents (W z, a·θ): read off anew at the atoms of each E-step.

The argument is link(A(z) θ + offset) at every z (latent_uses.py); one run of the model at the atoms, with gradients to
the block's parameters, gives A at all of them (model/affine.py). Shapes as in design.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pyro_em.design import Design
from pyro_em.model.affine import terms_at
from pyro_em.model.links import LINKS, PredictorLink
from pyro_em.model.predictor import Term, at_entry
from pyro_em.model.trace import Run
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params


def run_at_atoms(names: Sequence[str], params: Params, sufficient: Sufficient) -> Run:
    """The model at `params` and the atoms of this E-step, with gradients to some parameters."""
    leaves = {name: params[name].detach().clone().requires_grad_(True) for name in names}
    with torch.enable_grad():
        return sufficient.problem.run({**params, **leaves})


def terms_of_run(
    run: Run, site: str, slot: str, names: Sequence[str], link: PredictorLink = LINKS[0]
) -> tuple[list[Term], int]:
    """Terms of one argument of that run in the parameters `names`, and the length of its last dim."""
    argument = (run.sites[site].arguments or {})[slot]
    terms = [term for name in names for term in terms_at(name, run.leaves[name], argument, link)]
    return terms, argument.shape[-1] if argument.dim() else 1


def designs_at(
    run: Run,
    site: str,
    slot: str,
    names: Sequence[str],
    starts: Mapping[str, int],
    size: int,
    cells: torch.Size,
    *,
    vector: bool,
) -> tuple[Design, ...]:
    """Designs of a location, one for each entry of a vector."""
    terms, entries = terms_of_run(run, site, slot, names)
    parts = [[at_entry(t, d) for t in terms] for d in range(entries)] if vector else [terms]
    return tuple(Design(part, starts, size, cells) for part in parts)
