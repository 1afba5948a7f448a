"""Limits that a user may change.

>>> pyro_em.settings.max_table_bytes = 8 * 2**30
"""

from __future__ import annotations

# The largest single table that enumeration may allocate. 2 GiB in float64 is 2^28 cells.
max_table_bytes: float = 2 * 2**30
