"""EXPLAIN for inference: one row per site and parameter, what will be done with it, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """`name` is treated by `route` ("enumerate", "closed", "numeric", ...) because of `reason`."""

    name: str
    role: str
    route: str
    reason: str
    note: str = ""


OTHER_POSTERIORS = {"cem": "the most probable states", "sem": "one posterior draw of the states"}


@dataclass(frozen=True)
class Plan:
    """What an algorithm will do with a model. Printing it gives a table.

    `e_step` has one row per latent and per data site, `m_step` one per parameter; `exact` says whether
    the E-step is the exact posterior; `predicted_bytes` is the size of the interpreter's enumerated tables;
    `engine` runs the E-steps.
    """

    algorithm: str
    exact: bool
    objective: str
    e_step: tuple[Row, ...]
    m_step: tuple[Row, ...]
    predicted_bytes: int
    notes: tuple[str, ...] = ()
    engine: str = ""

    def route(self, name: str) -> str:
        """Route of a site or parameter. Raises KeyError if the plan has none of that name."""
        for row in (*self.e_step, *self.m_step):
            if row.name == name:
                return row.route
        raise KeyError(name)

    def __str__(self) -> str:
        posterior = "exact posterior" if self.exact else OTHER_POSTERIORS.get(self.algorithm, "guide (a lower bound)")
        lines = [f"Plan for algorithm '{self.algorithm}': E-step by {posterior}, climbing {self.objective}."]
        for title, rows in (("E-step", self.e_step), ("M-step", self.m_step)):
            if rows:
                lines += ["", title, *_table(rows)]
        if self.engine:
            lines += ["", f"E-steps run {self.engine}."]
        lines += ["", f"Memory for enumerated tables: {self.predicted_bytes / 2**20:.3g} MiB."]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)


ALIKE = 3  # more rows than this that differ in their names only are one line


def _table(rows: tuple[Row, ...]) -> list[str]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.role, row.route, row.reason), []).append(row.name)
    cells = []
    for (role, route, reason), names in groups.items():
        shown = [f"{names[0]} ... {names[-1]} ({len(names)})"] if len(names) > ALIKE else names
        cells += [(name, role, route, reason) for name in shown]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return ["  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in cells]
