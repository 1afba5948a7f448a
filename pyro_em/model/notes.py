"""Values that a model notes with `pyro.deterministic`: neither data nor latents, with a log-density of 0.

No handler sees them: as sites they would be data that lie in no plate, which couple all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pyro_em.model import compat


@contextlib.contextmanager
def noting() -> Iterator[dict[str, Tensor]]:
    """Within this context such values are no sites; gives them by name."""
    values: dict[str, Tensor] = {}

    def place(msg: Any) -> None:
        if msg["infer"].get("_deterministic"):
            values[msg["name"]] = msg["value"]
            msg["stop"] = True

    with compat.before_handlers(place):
        yield values
