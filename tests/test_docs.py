"""Every public name says what it is and shows an example, and every example in the package prints what it says.

The example of `pyro_em.fit` defines a `model` and its data `x`; other examples go on from there.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import types
import warnings
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

import pyro_em

ROOT = Path(pyro_em.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FILES = sorted(path for path in ROOT.rglob("*.py") if ">>> " in path.read_text())


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def _public() -> list[tuple[str, Any]]:
    """Names of the package and of its public module `distributions`; a version is a string and documents itself."""
    names = [(name, getattr(pyro_em, name)) for name in pyro_em.__all__]
    names += [(f"distributions.{n}", getattr(pyro_em.distributions, n)) for n in pyro_em.distributions.__all__]
    return [(name, value) for name, value in names if not isinstance(value, str)]


def _namespace() -> dict[str, Any]:
    """What the example of `fit` leaves behind."""
    text = inspect.getdoc(pyro_em.fit)
    assert text is not None
    names: dict[str, Any] = {}
    example = doctest.DocTestParser().get_doctest(text, names, "fit", None, 0)
    found = doctest.DocTestRunner(optionflags=OPTIONS).run(example, clear_globs=False)
    assert found.attempted > 0 and found.failed == 0
    return {name: value for name, value in example.globs.items() if name != "__builtins__"}


def _blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for kind, body in found if kind == language]


def test_the_front_page_runs_and_shows_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first example, on the Old Faithful data, and the plan that it shows."""
    text = (ROOT.parent / "README.md").read_text()
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(ROOT.parent)
    names: dict[str, Any] = {}
    (example,) = _blocks(text, "python")
    exec(example, names)
    assert names["result"].converged and "loc" in capsys.readouterr().out
    (shown,) = [block for block in _blocks(text, "") if block.startswith("Plan for")]
    assert str(pyro_em.plan(names["model"], names["x"])).rstrip() == shown.rstrip()


def test_the_package_says_that_it_is_typed() -> None:
    """Type checkers read its annotations only beside this file (PEP 561), which the wheel takes along."""
    assert (ROOT / "py.typed").is_file()


@pytest.mark.parametrize(("name", "value"), _public(), ids=[name for name, _ in _public()])
def test_public_names_are_documented_with_an_example(name: str, value: Any) -> None:
    text = value.__doc__  # its own: `inspect.getdoc` would take that of a parent
    assert text, f"{name} has no docstring"
    assert doctest.DocTestParser().get_examples(text), f"{name} shows no example"


@pytest.mark.parametrize(("name", "value"), _public(), ids=[name for name, _ in _public()])
def test_public_methods_are_documented(name: str, value: Any) -> None:
    if isinstance(value, types.ModuleType) or not inspect.isclass(value) or issubclass(value, Warning):
        return
    for method, member in vars(value).items():
        if not method.startswith("_") and (callable(member) or isinstance(member, property)):
            inherited = any(getattr(parent, method, None) is not None for parent in value.__mro__[1:])
            assert inherited or inspect.getdoc(member), f"{name}.{method} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_examples_print_what_they_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_em.settings, "max_table_bytes", pyro_em.settings.max_table_bytes)  # put back behind it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyro_em.EMWarning)
        torch.set_default_dtype(torch.float32)  # as on the reader's machine
        shared = _namespace()
        module = importlib.import_module(_name(path))
        examples = [t for t in doctest.DocTestFinder().find(module, extraglobs=shared) if t.examples]
        assert examples, "an example outside of any docstring is not run"
        for example in examples:
            pyro.clear_param_store()
            report: list[str] = []
            doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
            assert not report, "".join(report)
