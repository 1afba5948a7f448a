"""Refusal of switching state-space models: a chain of Gaussian states coupled with a discrete latent at every step.

    s_t | s_{t-1} ~ Categorical,     x_t | x_{t-1}, s_t ~ N(A[s_t] x_{t-1}, Q[s_t])

Given s_1..s_T the states are Gaussian, so their posterior is a mixture of K^T normals: nothing short of summing over
all paths is exact. A discrete latent of the whole series (K of them) is no trouble, and neither is one at every step
beside continuous latents that do not depend on those of other steps.
"""

from __future__ import annotations

from collections.abc import Collection

from pyro_em.errors import Refusal
from pyro_em.model.capture import Capture


def refuse_switching(seen: Capture, latent: Collection[str]) -> None:
    """Raise `Refusal` naming the first site that reads both a chain of continuous latents and a switching latent.

    :param latent: names of the continuous latents.
    """
    discrete = {n for n, site in seen.sites.items() if site.markov and site.enumerable and not site.observed}
    continuous = {name for name in latent if seen.sites[name].markov}
    chained = {name for name in continuous if seen.sites[name].upstream & continuous}
    chained |= {name for later in chained for name in seen.sites[later].upstream & continuous}
    for name, site in seen.sites.items():
        read = site.upstream | {name}
        switches, states = sorted(read & discrete), sorted(read & chained)
        if switches and states:
            raise Refusal(
                name,
                f"the chain of continuous latents around '{states[0]}' switches with the discrete latent "
                f"'{switches[0]}' from step to step, so that its posterior is a mixture with as many components as "
                "there are paths of the discrete latent.",
                "use algorithm='svi' with a guide for both, make the discrete latent one of the whole series, or "
                "observe the continuous one.",
            )
