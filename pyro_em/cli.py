"""The command `pyro-em`: fit a model of a file to a CSV table, see the plan, read a saved fit.

    pyro-em fit models/gmm.py:model --data models/data/faithful.csv --restarts 10 --seed 0 -o fit.nc
    pyro-em plan models/gmm.py:model --data models/data/faithful.csv
    pyro-em summary fit.nc

A model file is a program; it is run because its path was typed, and nothing else is. Exit codes: 0 done, 1 the
fit failed or was refused, 2 wrong usage or input. An error is one line on stderr.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import xarray

import pyro_em
from pyro_em.accelerate import ACCELERATORS
from pyro_em.arviz import to_datatree
from pyro_em.errors import EMWarning, InputError, PyroEMError
from pyro_em.files import check_writable, replacing
from pyro_em.information import standard_errors
from pyro_em.options import ALGORITHMS
from pyro_em.precision import PRECISIONS
from pyro_em.result import FitResult
from pyro_em.summary import MAX_HESSIAN, STATISTICS, Estimate, available_information, facts, render
from pyro_em.table import read_table

PROG = "pyro-em"


class UsageError(Exception):
    """What was typed cannot be done; the message is one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. `argv` is without the program's name."""
    try:
        options = _parser().parse_args(argv)
    except UsageError as error:
        return _fail(2, str(error))
    try:
        with _settings(options):
            options.run(options)
    except OSError as error:
        return _fail(2, f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except (UsageError, InputError) as error:
        return _fail(2, str(error))
    except PyroEMError as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(1, "interrupted.")
    except Exception as error:  # raised by the user's model; Pyro appends a table of shapes to the first line
        return _fail(1, f"{options.model} raised {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return 0


def _fail(code: int, message: str) -> int:
    print(f"{PROG}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _settings(options: argparse.Namespace) -> Iterator[None]:
    """The default dtype asked for, and warnings as single lines; both as before afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if getattr(options, "float64", True) else torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", EMWarning)
            warnings.showwarning = _show_warning
            yield
    finally:
        torch.set_default_dtype(before)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"{PROG}: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(PROG, description="Exact EM, MAP-EM, generalised EM and SVI for Pyro models.")
    parser.add_argument("--version", action="version", version=f"{PROG} {pyro_em.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help="fit a model and print what was found")
    _model_options(fit)
    fit.add_argument("--restarts", type=int, default=1, metavar="R", help="starts, the best is kept (1)")
    fit.add_argument("--seed", type=int, default=0, help="makes the fit reproducible (0)")
    fit.add_argument("--max-iter", type=int, default=1000, metavar="N", help="most iterations (1000)")
    fit.add_argument("--tol", type=float, default=1e-6, help="bound on the score per observation (1e-6)")
    fit.add_argument("--accelerate", choices=ACCELERATORS, help="extrapolate where EM creeps")
    fit.add_argument("--precision", choices=PRECISIONS, default="float64", help="of the E-step's products (float64)")
    fit.add_argument("--temperature", type=float, metavar="T", help="anneal, starting at this temperature")
    fit.add_argument("--init", choices=("model", "random", "kmeans++"), help="how to start")
    fit.add_argument("-o", "--output", type=Path, metavar="FILE.nc", help="write the fit for ArviZ (NetCDF)")
    fit.add_argument("--png", type=Path, metavar="FILE.png", help="write a figure")
    fit.add_argument("--json", action="store_true", help="print one JSON object instead of the summary")
    fit.set_defaults(run=_fit)
    plan = commands.add_parser("plan", help="say what a fit would do, and why")
    _model_options(plan)
    plan.set_defaults(run=_plan)
    show = commands.add_parser("summary", help="print the summary of a fit that was written with -o")
    show.add_argument("file", type=Path, metavar="FILE.nc")
    show.set_defaults(run=_summary)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FILE.py:FUNCTION", help="the model; the file is run")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.csv", help="table with a header")
    parser.add_argument("--columns", metavar="A,B", help="columns to use (default: all), in this order")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="em", help="the inference (em)")
    parser.add_argument(
        "--missing", choices=("nan",), help="empty cells, NA and NaN are missing at random (default: an error)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="keyword argument of the model, repeatable"
    )
    parser.add_argument(
        "--float64", action=argparse.BooleanOptionalAction, default=True, help="data and defaults in double precision"
    )


def _fit(options: argparse.Namespace) -> None:
    for path in (options.output, options.png):
        if path is not None:
            check_writable(path)  # before the fit, which may take long
    model, data, keywords = _model(options)
    result = pyro_em.fit(
        model, data, algorithm=options.algorithm, restarts=options.restarts, seed=options.seed, init=options.init,
        max_iter=options.max_iter, tol=options.tol, temperature=options.temperature, missing=options.missing,
        accelerate=options.accelerate, precision=options.precision, **keywords,
    )  # fmt: skip
    tree = to_datatree(result) if options.output is not None else None
    if tree is not None:
        with replacing(options.output) as temporary:
            tree.to_netcdf(temporary, engine="h5netcdf")
    if options.png is not None:
        with replacing(options.png) as temporary:
            result.plot().savefig(temporary, format="png", dpi=150)
    if options.json:
        print(json.dumps(_as_json(result), allow_nan=False))
    else:
        print(result.summary())
    for path in (options.output, options.png):
        if path is not None:
            print(f"{PROG}: wrote {path}", file=sys.stderr)


def _plan(options: argparse.Namespace) -> None:
    model, data, keywords = _model(options)
    print(pyro_em.plan(model, data, algorithm=options.algorithm, missing=options.missing, **keywords))


def _summary(options: argparse.Namespace) -> None:
    try:
        with xarray.open_datatree(options.file, engine="h5netcdf") as tree:
            known = {str(name): value for name, value in tree.attrs.items()}
            rows = {str(name): _estimate(variable) for name, variable in tree["estimates"].data_vars.items()}
        page = render(known, rows, str(known.get("notes", "")).split("\n"))
    except FileNotFoundError:
        raise UsageError(f"{options.file}: there is no such file.") from None
    except Exception as error:  # a file of any kind: HDF5, xarray and the page each find their own fault
        raise UsageError(
            f"{options.file} cannot be read as a fit written by '{PROG} fit -o' ({type(error).__name__})."
        ) from None
    print("".join(c for c in page if c == "\n" or c.isprintable()))  # a file must not steer the terminal


def _estimate(variable: Any) -> Estimate:
    value, error, lower, upper = (variable.sel(statistic=name).values for name in STATISTICS)
    return Estimate(value, error, lower, upper, bool(variable.attrs["triangular"]))


def _model(options: argparse.Namespace) -> tuple[Callable[..., Any], torch.Tensor, dict[str, Any]]:
    """The model function, its data and its keyword arguments."""
    keywords = dict(_keyword(text) for text in options.set)
    columns = None if options.columns is None else options.columns.split(",")
    data = read_table(options.data, columns, missing=options.missing is not None).to(torch.get_default_dtype())
    return _load_function(options.model), data, keywords


def _keyword(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--set {text!r}: write NAME=VALUE, as in --set num_components=3.")
    if name in inspect.signature(pyro_em.fit).parameters:
        raise UsageError(f"--set {name}: this is an option of the fit, so the model cannot be given it.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _load_function(text: str) -> Callable[..., Any]:
    """Run the file that was typed and take the function from it."""
    file, _, name = text.rpartition(":")
    if not file or not name:
        raise UsageError(f"{text!r}: write FILE.py:FUNCTION, as in models/gmm.py:model.")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{file}: there is no such file.")
    spec = importlib.util.spec_from_file_location(f"pyro_em_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file}: the name of a Python file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{file} cannot be run: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{file} has no function '{name}'.")
    return function


def _as_json(result: FitResult) -> dict[str, Any]:
    found: dict[str, Any] = {name: _finite(value) for name, value in facts(result).items() if name != "plan"}
    found["restarts"] = [[_finite(value), outcome] for value, outcome in result.restarts]
    found["warnings"] = list(result.warnings)
    found["params"] = {name: _finite(value.tolist()) for name, value in result.params.items()}
    information, notes = available_information(result, MAX_HESSIAN)
    errors = {} if information is None else standard_errors(information, result.params)
    found["standard_errors"] = {name: _finite(value.tolist()) for name, value in errors.items()} or None
    found["notes"] = notes
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
