"""Parameters of a response seen only in part are updated by one route.

Closed forms climb E[log p(y, z | θ)] with the response y completed; numeric updates climb E[log p(o | z, θ)] with y
integrated out. Both are minorisers of log p(o | θ), but alternating between the two takes many rounds to agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyro_em.m_step.unit import Unit
from pyro_em.model.trace import SiteRecord
from pyro_em.model.use import Use


def not_completed(
    units: Sequence[Unit],
    numeric: Sequence[str],
    uses: Mapping[str, tuple[Use, ...]],
    sites: Mapping[str, SiteRecord],
) -> list[tuple[Unit, str]]:
    """Units that share such a response with a parameter whose update is numeric, each with the reason."""
    partner = {
        use.site: name
        for name in numeric
        for use in uses[name]
        if (family := sites[use.site].family) is not None and family.latent_response
    }
    found = []
    for unit in units:
        shared = [use.site for name in unit.names for use in uses[name] if use.site in partner]
        if shared:
            reason = f"'{partner[shared[0]]}' of the same partly seen response '{shared[0]}' has no closed form"
            found.append((unit, reason))
    return found
