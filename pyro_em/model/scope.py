"""Which latents of `pyro.markov` loops a site may read: Pyro lets go of a state `history` steps later, and outside.

Its dim is then given to another latent. A site that still reads it has a density of the right shape, along the dim of
that other latent, and would be summed over the wrong states: no shape tells. What a site reads is known from the plain
run (capture.py), what is in scope from the symbols that the site was given in the enumerated one.
"""

from __future__ import annotations

from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model.capture import Capture
from pyro_em.model.density import shape_in
from pyro_em.model.timeline import read_outside
from pyro_em.model.trace import Run


def shapes_in(run: Run, seen: Capture) -> dict[str, Tensor]:
    """Packed tensors of the shapes of all sites' log-densities, whose latents are in scope.

    :raises Refusal: for a site that reads others, or has dims of its own.
    """
    _refuse_out_of_scope(run, seen)
    return {name: shape_in(site, seen) for name, site in run.sites.items()}


def _refuse_out_of_scope(run: Run, seen: Capture) -> None:
    """Raise `Refusal` naming the first site that reads a latent which its loop has let go of.

    :param run: enumerated.
    """
    symbols = {name: site.symbol for name, site in run.sites.items() if site.symbol is not None}
    for name, site in run.sites.items():
        read = seen.sites[name].upstream & symbols.keys() if name in seen.sites else frozenset()
        for latent in sorted(read):
            if not seen.sites[latent].markov or symbols[latent] in site.symbols.values() or _one_state(run, latent):
                continue
            for loop in seen.loops:
                if latent in loop.names and name not in loop.names:
                    raise read_outside(name, latent)
            raise Refusal(
                name,
                f"it reads '{latent}', which its pyro.markov loop has let go of: from outside of the loop, or from "
                "further back than its history.",
                "give the loop the history that its body reads, pyro.markov(range(T), history=2), and put sites that "
                "read its states inside; or write range(T), which keeps the states of all steps.",
            )


def _one_state(run: Run, latent: str) -> bool:
    """Such a latent has no dim."""
    return len(run.sites[latent].fn.enumerate_support(expand=False)) == 1
