"""The house holds: imports only go down, private Pyro names live in one file, files are short and say what they are.

The source is read, not run. A layer may import itself and what stands before it in `LAYERS`; a new module has to
be given a place there.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pyro_em"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
COMPAT = PACKAGE / "model" / "compat.py"
MINI = PACKAGE / "mini.py"  # the idea on one page: it stands alone, so it has private names of its own

LAYERS = """
    types errors settings files shapes version derivatives products softmax factors | device
    constraint_names charts distributions kernels table tape state_space | slopes families | model
    store stop evidence | latents latent_uses | problem options | rebind all_atoms | statistics terms gram
    state_posterior sequence_posterior picks series | mixed_states unrolled_posterior | chain_posterior
    posterior predict design expected | vector_design | sufficient impute clusters | e_step.base | m_step
    recordings | evaluator | loop explain information | pointwise e_step accelerate checks progress
    integration initialise anneal precision | condense | binding elbo result | em guides | ascent | svi | fit
    summary plots checkpoint dims | arviz | __init__ | cli | __main__ | mini
"""
ORDER = {name: place for place, layer in enumerate(LAYERS.replace("\n", "|").split("|")) for name in layer.split()}

PRIVATE = {
    "pyro.distributions.distribution",
    "pyro.ops.packed",
    "pyro.poutine.enum_messenger",
    "pyro.poutine.trace_struct",
    "pyro.poutine.runtime",
    "pyro.poutine.indep_messenger",
    "pyro.poutine.subsample_messenger",
    "pyro.infer.traceenum_elbo",
    "pyro.infer.util",
}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _unit(module: str) -> str:
    """The unit that is placed in `LAYERS`: a file or folder below pyro_em, or a file of a folder that is named."""
    parts = module.split(".")[1:]
    deeper = ".".join(parts[:2])
    return deeper if deeper in ORDER else parts[0] if parts else "__init__"


def _imports(path: Path) -> set[str]:
    """Everything that a module imports at run time, `from a import b` as a.b."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own(names: set[str]) -> set[str]:
    """Units of pyro_em among imported names: `from pyro_em import settings` is settings, `... import fit` the root."""
    return {_unit(name) if _unit(name) in ORDER else "__init__" for name in names if name.split(".")[0] == "pyro_em"}


def test_every_module_has_its_place() -> None:
    units = {_unit(_name(path)) for path in MODULES}
    assert not units - ORDER.keys(), "give these a place in LAYERS"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_only_go_down(path: Path) -> None:
    unit = _unit(_name(path))
    for other in _own(_imports(path)):
        if other != unit:
            assert ORDER[other] < ORDER[unit] or _lazily(path, other), f"{_name(path)} imports {other}"


def _lazily(path: Path, other: str) -> bool:
    """Result's writers of figures and files are looked up when called: the core must not need their libraries."""
    return _name(path) == "pyro_em.result" and other in {"summary", "arviz", "checkpoint", "plots"}


def _levels() -> dict[str, set[str]]:
    """Modules of pyro_em that each module imports, module by module."""
    names = {_name(path) for path in MODULES}
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        found = set()
        for imported in _imports(path):
            target = imported if imported in names else imported.rpartition(".")[0]
            if target in names and target != _name(path) and not _lazily(path, _unit(target)):
                found.add(target)
        graph[_name(path)] = found
    return graph


def test_no_cycle_between_modules() -> None:
    """Also within a folder, which is one unit above."""
    graph = _levels()
    placed: set[str] = set()
    while len(placed) < len(graph):
        ready = {name for name, needs in graph.items() if name not in placed and needs <= placed}
        assert ready, f"a cycle among {sorted(graph.keys() - placed)}"
        placed |= ready


@pytest.mark.parametrize("path", [p for p in MODULES if p not in (COMPAT, MINI)], ids=_name)
def test_private_pyro_names_live_in_compat(path: Path) -> None:
    for name in _imports(path):
        if name.split(".")[0] == "pyro":
            assert not any(part.startswith("_") for part in name.split(".")), f"{name} is private"
            assert not any(name == p or name.startswith(p + ".") for p in PRIVATE), f"{name} belongs into compat.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in {"_enumerate_dim", "_enumerate_symbol", "_dim_to_symbol", "_markov_depth"}
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"_pyro_dims", "_params", "_constraints", "_param_to_name", "_pyro_name"}


def test_mini_stands_alone() -> None:
    assert not _own(_imports(MINI))


def test_compat_is_where_they_are() -> None:
    """The other side of the rule above, so that it cannot pass by looking at the wrong names."""
    assert any(name.startswith(private) for name in _imports(COMPAT) for private in PRIVATE)
    assert "_enumerate_dim" in COMPAT.read_text()


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert text.count("\n") <= 300


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=lambda path: path.stem)
def test_models_are_plain_pyro(path: Path) -> None:
    assert not _own(_imports(path)), "a model must run without pyro_em"
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_exact_engine_does_not_read_the_param_store() -> None:
    """Parameters come in as arguments; only those who own a scope, or write the result, touch the store."""
    allowed = {"store", "model", "options", "em", "elbo", "guides", "ascent", "mini"}
    for path in MODULES:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if "get_param_store" in names:
            assert _unit(_name(path)) in allowed, f"{_name(path)} reads the param store"
