"""What the updates of an M-step read of an E-step: moments of sites, or posterior weights of their rows.

An engine that forms the moments alone serves those that read no more; one that does not run the model takes arguments
that no rule recognises from the functions that were recorded for them (composed.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyro_em.m_step.composed import Composed
from pyro_em.m_step.newton import Newton
from pyro_em.m_step.separate import Separate
from pyro_em.m_step.unit import Unit
from pyro_em.model.composed import Composed as Function
from pyro_em.model.composed import Place


@dataclass(frozen=True)
class Reads:
    """Of the units of parameters that do not climb by gradients."""

    units: Sequence[Unit]

    @property
    def by_newton(self) -> bool:
        """Some parameters are updated by Newton's method."""
        return any(isinstance(unit, Newton | Composed) for unit in self.units)

    @property
    def functions(self) -> Mapping[Place, Function]:
        """Arguments that are functions of several parameters."""
        return {place: f for unit in self.units if isinstance(unit, Composed) for place, f in unit.functions.items()}

    @property
    def separate(self) -> bool:
        """Every parameter has a closed form of its own, on the moments of its sites."""
        return all(isinstance(unit, Separate) for unit in self.units)

    @property
    def compressed(self) -> bool:
        """The moments of sites alone are read."""
        return all(isinstance(unit, Separate) or _is_compressed(unit) for unit in self.units)

    @property
    def located(self) -> bool:
        """Moments of sites alone, but for locations that a linear solve moves."""
        curved = [unit for unit in self.units if isinstance(unit, Newton | Composed)]
        slots = (slot.name for unit in curved if isinstance(unit, Newton) for site in unit.sites for slot in site.slots)
        return all(map(_is_compressed, curved)) and "loc" not in slots


def _is_compressed(unit: Unit) -> bool:
    if isinstance(unit, Newton):
        return all(site.compressed for site in unit.sites)
    return isinstance(unit, Composed) and unit.compressed
