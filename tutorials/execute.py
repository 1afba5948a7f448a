"""Runs every tutorial and writes its notebook next to it. This is what `make tutorials` runs.

    NN_name.py (percent script, the source)  ->  NN_name.ipynb (the same cells, with their outputs)

The scripts are what people edit and what the tests run; a notebook is only ever written from here. It holds no
times, versions or paths, so that it changes when the tutorial or its results do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def tutorials() -> list[Path]:
    """The scripts, in reading order: every Python file here whose name starts with a digit."""
    return sorted(HERE.glob("[0-9]*.py"))


def notebook(script: Path) -> Any:
    """The notebook of a script, without outputs."""
    import jupytext

    made = jupytext.read(script, fmt="py:percent")
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return made


def execute(made: Any) -> None:
    """Fill in the outputs. Raises nbclient's CellExecutionError where a cell does."""
    from nbclient import NotebookClient

    metadata = dict(made.metadata)
    NotebookClient(made, timeout=300, record_timing=False, resources={"metadata": {"path": str(HERE)}}).execute()
    made.metadata = metadata  # the kernel adds its version
    for cell in made.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)


def _joined(outputs: list[Any]) -> list[Any]:
    """Text that a kernel sent in pieces, as the buffers filled, in one."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream" and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def main() -> None:
    """Execute and write all."""
    import nbformat

    # For the kernels: the package of this checkout, and no word from ArviZ about its future, or from tqdm about
    # widgets that nobody would see.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore:IProgress not found"
    for script in tutorials():
        made = notebook(script)
        execute(made)
        nbformat.write(made, script.with_suffix(".ipynb"))
        print(script.with_suffix(".ipynb").name, file=sys.stderr)


if __name__ == "__main__":
    main()
