"""The tutorials run as scripts, hold what they assert, and their notebooks are up to date.

A notebook is compared with its script twice: cell by cell in source, and by what it shows against what the script
prints now. Numbers are left out of the second, since the last digits may differ between machines; the scripts'
own assertions are about numbers.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tutorials.execute import HERE, notebook, tutorials

TUTORIALS = (
    "01_swap_the_algorithm",
    "02_what_the_plan_says",
    "03_your_own_model",
    "04_latents_that_are_numbers",
    "05_sequences",
    "06_what_is_not_there",
)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
MACHINE = re.compile(r"(?:/|\\\\)(?:home|Users|root|tmp|usr|opt|var|work|site-packages)\b|\b[A-Z]:\\\\")


def _saved(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.ipynb").read_text())


def _words(text: str) -> str:
    """Text without its numbers and its layout, which depends on their width."""
    return " ".join(NUMBER.sub("0", text).split())


def test_every_tutorial_is_listed() -> None:
    """A script or a notebook that no test runs would rot."""
    assert [path.stem for path in tutorials()] == list(TUTORIALS)
    assert {path.stem for path in HERE.glob("*.py")} == {*TUTORIALS, "execute"}
    assert {path.stem for path in HERE.glob("*.ipynb")} == set(TUTORIALS)


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_and_prints_what_its_notebook_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the tutorials draw")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    assert not list(tmp_path.iterdir()), "a tutorial leaves nothing behind"

    outputs = [output for cell in _saved(name)["cells"] for output in cell.get("outputs", ())]
    shown = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    printed = capsys.readouterr().out
    assert _words(shown) == _words(printed), "out of date: run `make tutorials`"


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_notebook_has_the_cells_of_its_script(name: str) -> None:
    pytest.importorskip("jupytext", reason="reads the percent script")
    expected = [(cell.cell_type, cell.source) for cell in notebook(HERE / f"{name}.py").cells]
    saved = [(cell["cell_type"], "".join(cell["source"])) for cell in _saved(name)["cells"]]
    assert saved == expected, "out of step: run `make tutorials`"


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_notebook_was_executed_from_top_to_bottom(name: str) -> None:
    code = [cell for cell in _saved(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}, "no errors, no bare values"
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream"), "no warnings"


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_ends_in_assertions(name: str) -> None:
    """And names no place of the machine that it was executed on."""
    last = "".join(_saved(name)["cells"][-1]["source"])
    assert last.count("assert ") >= 5
    assert not MACHINE.search((HERE / f"{name}.ipynb").read_text())


def test_places_of_a_machine_are_recognised() -> None:
    """The other side of the search above."""
    assert MACHINE.search(json.dumps("/home/someone/fit.em"))
    assert MACHINE.search(json.dumps("C:\\fits"))
    assert not MACHINE.search(json.dumps("a/b, models/data and e.g. 3/4"))
