"""Numbers from a CSV file: a header, then one row a line, every cell of the chosen columns a number.

Nothing is guessed: no categories, no dates. A cell that is not a finite number is an error that says where it is,
unless missing cells are announced: then an empty cell, NA and NaN are NaN.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyro_em.errors import InputError

MISSING = frozenset({"", "NA", "NAN"})


def read_table(path: str | Path, columns: Sequence[str] | None = None, *, missing: bool = False) -> Tensor:
    """Columns of a CSV file in float64: (N, number of columns), or (N,) for a single one.

    :param columns: names from the header, in the order wanted; all by default.
    :param missing: whether cells may be missing.
    :raises InputError: naming file, row and column of what is wrong. Rows count from 1 below the header.
    :raises OSError: if the file cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, skipinitialspace=True) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8 ({error}).") from None
    if len(lines) < 2:
        raise InputError(f"{path}: there is no row below the header.")
    header = [name.strip() for name in lines[0]]
    if all(_is_number(name) for name in header):
        raise InputError(f"{path}: the first line holds numbers; put a line with the columns' names above it.")
    picked = range(len(header)) if columns is None else [_position(path, header, name) for name in columns]
    if not picked:
        raise InputError(f"{path}: no column is chosen.")
    rows = []
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise InputError(f"{path}, row {number}: {len(line)} cells, but the header has {len(header)}.")
        rows.append([_cell(path, number, header[i], line[i], missing) for i in picked])
    table = torch.tensor(rows, dtype=torch.float64)
    return table.squeeze(1) if table.shape[1] == 1 else table


def _position(path: str | Path, header: list[str], name: str) -> int:
    if name.strip() not in header:
        raise InputError(f"{path}: there is no column '{name}'. Columns: {', '.join(header)}.")
    return header.index(name.strip())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _cell(path: str | Path, row: int, column: str, text: str, missing: bool) -> float:
    gone = text.strip().upper() in MISSING
    if gone and missing:
        return math.nan
    value = float(text) if _is_number(text) else math.nan
    if not math.isfinite(value):
        raise InputError(
            f"{path}, row {row}, column '{column}': {text[:40]!r} is not a finite number. Correct the cell"
            + (", say --missing nan" if gone else "")
            + ", or choose other columns with --columns."
        )
    return value
