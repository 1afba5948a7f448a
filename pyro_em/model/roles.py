"""Which site is data, which is latent, which is a parameter: the rules, with the reason of each.

Rules in order; the first that fits decides, and `plan()` prints the reason.
    1. `roles={site: ...}` or `infer={"em": ...}` of the site, or a rule for it in `e_step=` (latent);
    2. observed: data;
    3. discrete and enumerable: latent (enumerated);
    4. in the guide as a Delta: parameter;
    5. in a `pyro.markov` context, in a plate with data, or with a prior that depends on a parameter or a
       latent: latent. (A prior that depends only on parameters of its own, non-empty, set of plates
       stays a parameter: the means of a Normal-inverse-Wishart prior.)
    6. otherwise (fixed hyperparameters, no data plate): parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from pyro_em.errors import InputError
from pyro_em.model.capture import Capture, PlainSite

Role = Literal["data", "latent", "parameter"]


@dataclass(frozen=True)
class RoleOf:
    """A site's role and why; `override` says how to change it where the rule can mislead."""

    role: Role
    reason: str
    override: str | None = None


def assign_roles(
    capture: Capture,
    roles: Mapping[str, str] | None = None,
    deltas: Collection[str] = (),
    rules: Mapping[str, bool] | None = None,
) -> dict[str, RoleOf]:
    """Role of every sample site of the model, in program order.

    :param roles: user overrides, `{"site": "parameter" | "latent"}`.
    :param deltas: sites that the guide point-estimates.
    :param rules: sites that are integrated numerically, and whether by nodes of their own for every element: who asks
        for these says that the site is latent, be its prior without parameters (abilities that rows read).
    :raises InputError: for an override of an unknown site or to an unknown role.
    """
    integrated = {name: "latent" for name, adaptive in (rules or {}).items() if adaptive and name in capture.sites}
    overrides = integrated | _overrides(capture, roles or {})
    observed_plates = {plate.name for site in capture.sites.values() if site.observed for plate in site.plates}
    found: dict[str, RoleOf] = {}
    for name, site in capture.sites.items():
        if site.observed:
            found[name] = RoleOf("data", "observed")
        elif name in overrides:
            found[name] = RoleOf(overrides[name], "as told")  # type: ignore[arg-type]
        elif site.enumerable:
            found[name] = RoleOf("latent", "discrete, enumerated")
        elif site.discrete:
            found[name] = RoleOf("latent", "discrete with infinitely many states")
        elif name in deltas:
            found[name] = RoleOf("parameter", "a Delta in the guide")
        else:
            found[name] = _continuous(site, capture, found, observed_plates)
    return found


def _overrides(capture: Capture, roles: Mapping[str, str]) -> dict[str, str]:
    overrides = {name: site.infer["em"] for name, site in capture.sites.items() if "em" in site.infer}
    overrides.update(roles)
    for name, role in overrides.items():
        if name not in capture.sites:
            known = ", ".join(capture.sites)
            raise InputError(f"roles: the model has no sample site '{name}'. Its sites are: {known}.")
        if role not in ("parameter", "latent"):
            raise InputError(f"roles: '{role}' is no role for site '{name}'. Use 'parameter' or 'latent'.")
        if role == "parameter" and capture.sites[name].discrete:
            raise InputError(f"roles: site '{name}' is discrete; only a continuous site can be a parameter.")
    return overrides


def _continuous(
    site: PlainSite, capture: Capture, found: Mapping[str, RoleOf], observed_plates: Collection[str]
) -> RoleOf:
    override = f'roles={{"{site.name}": "parameter"}} makes it a point estimate'
    if site.markov:
        return RoleOf("latent", "inside of pyro.markov", override)
    shared = sorted(plate.name for plate in site.plates if plate.name in observed_plates)
    if shared:
        return RoleOf("latent", f"shares plate '{shared[0]}' with data", override)
    own = {plate.name for plate in site.plates}
    for name in sorted(site.upstream):
        role = found.get(name)
        if role is not None and role.role == "data":
            continue
        beside = role is not None and role.role == "parameter" and own
        if beside and own == {plate.name for plate in capture.sites[name].plates}:
            continue
        kind = "parameter" if role is None or role.role == "parameter" else "latent"
        return RoleOf("latent", f"its prior depends on the {kind} '{name}'", override)
    return RoleOf(
        "parameter",
        "fixed hyperparameters and no data plate",
        f'roles={{"{site.name}": "latent"}} integrates it out instead' if site.plates else None,
    )
