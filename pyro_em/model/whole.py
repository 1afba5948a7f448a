"""Sites that are not unfolded (unfold.py): those whose latents of each row would be inside of an integral.

    p(y_g) = ∫ p(u) Π_n [Σ_c π_c p(y_n | c, u)] du

Where several rows n read an element u that quadrature integrates, the sum over their components stands inside of the
product: it is taken row by row at every node, which is what the site's own density does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro.poutine.messenger import Messenger

from pyro_em.model.capture import Capture
from pyro_em.model.fold_recognition import looked_at
from pyro_em.model.roles import RoleOf
from pyro_em.model.unfold import WHOLE
from pyro_em.types import Model


class _Whole(Messenger):
    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["infer"] = {**msg["infer"], WHOLE: True}


def seen_with(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    roles: Mapping[str, str] | None,
    deltas: Collection[str],
    rules: Mapping[str, bool],
) -> tuple[Model, Capture, dict[str, RoleOf]]:
    """`looked_at`, with sites whole where they have to be.

    :param rules: latents that are integrated numerically, and whether by nodes of their own for every element.
    """
    found = looked_at(model, args, kwargs, roles, deltas, rules)
    names = _inside(found[1], [name for name, adaptive in rules.items() if adaptive])
    if not names:
        return found
    kept: Model = _Whole(names)(model)
    return looked_at(kept, args, kwargs, roles, deltas, rules)


def _inside(seen: Capture, integrated: Collection[str]) -> frozenset[str]:
    """Unfolded sites of which several rows share an element of one of the latents `integrated`."""
    found = set[str]()
    for name, site in seen.sites.items():
        for latent in (f"{name}_component", f"{name}_zero"):
            if not site.observed or latent not in seen.sites or latent not in site.upstream:
                continue
            own = {p.name for p in seen.sites[latent].plates if p.size > 1}
            read = [seen.sites[n] for n in integrated if n in site.upstream and n in seen.sites]
            if any(not own <= {p.name for p in other.plates} for other in read):
                found.add(name)
    return frozenset(found)
