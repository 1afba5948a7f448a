"""The command: what it prints, which files it writes, its exit codes, and one line for each error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_em
from models import gmm, mvn_missing
from pyro_em.cli import main
from pyro_em.table import read_table

ROOT = Path(__file__).resolve().parent.parent
MODEL = f"{ROOT / 'models' / 'gmm.py'}:model"
DATA = str(ROOT / "models" / "data" / "faithful.csv")
FIT = ["fit", MODEL, "--data", DATA]

Capture = pytest.CaptureFixture[str]


def error_line(capture: Capture) -> str:
    """The one line on stderr; nothing may be on stdout."""
    out, err = capture.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("pyro-em: error: ")
    return err


def test_fit_prints_the_summary_and_writes_what_is_asked_for(tmp_path: Path, capsys: Capture) -> None:
    output, picture = tmp_path / "fit.nc", tmp_path / "fit.png"
    code = main([*FIT, "--restarts", "2", "--seed", "0", "-o", str(output), "--png", str(picture)])
    out, err = capsys.readouterr()
    assert code == 0 and err == f"pyro-em: wrote {output}\npyro-em: wrote {picture}\n"
    assert out == str(pyro_em.fit(gmm.model, gmm.load(), restarts=2, seed=0)) + "\n"
    assert picture.read_bytes().startswith(b"\x89PNG") and sorted(os.listdir(tmp_path)) == ["fit.nc", "fit.png"]
    assert main(["summary", str(output)]) == 0
    assert capsys.readouterr().out == out


def test_summary_of_a_fit_without_standard_errors(tmp_path: Path, capsys: Capture) -> None:
    model = MODEL.replace(":model", ":bayesian")
    options = ["--algorithm", "svi", "--max-iter", "3", "-o", str(tmp_path / "fit.nc")]
    assert main(["fit", model, "--data", DATA, *options]) == 0
    printed = capsys.readouterr().out
    assert main(["summary", str(tmp_path / "fit.nc")]) == 0
    assert capsys.readouterr().out == printed and "ELBO" in printed


def test_missing_cells_are_announced(tmp_path: Path, capsys: Capture) -> None:
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n,4\nNA,1\n3,NaN\n2,2.5\n0,1\n")
    call = [f"{ROOT / 'models' / 'mvn_missing.py'}:model", "--data", str(table)]
    assert main(["fit", *call]) == 2
    assert "row 2, column 'a': ''" in (line := error_line(capsys)) and "--missing nan" in line
    assert main(["fit", *call, "--missing", "nan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    result = pyro_em.fit(mvn_missing.model, read_table(table, missing=True), missing="nan", seed=0)
    assert found["log_likelihood"] == result.log_likelihood
    assert main(["plan", *call, "--missing", "nan"]) == 0
    assert "weighted scatter matrix" in capsys.readouterr().out


def test_json_is_one_object(capsys: Capture) -> None:
    options = ["--set", "num_components=3", "--init", "kmeans++", "--max-iter", "5", "--tol", "0"]
    assert main([*FIT, "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    result = pyro_em.fit(gmm.model, gmm.load(), num_components=3, init="kmeans++", max_iter=5, tol=0, seed=0)
    assert found["log_likelihood"] == result.log_likelihood and found["num_iterations"] == 5
    assert found["params"] == {name: value.tolist() for name, value in result.params.items()}
    assert found["outcome"] == "max_iter" and found["converged"] == 0


def test_acceleration_and_precision(capsys: Capture) -> None:
    assert main([*FIT, "--json", "--accelerate", "squarem", "--precision", "mixed"]) == 0
    found = json.loads(capsys.readouterr().out)
    result = pyro_em.fit(gmm.model, gmm.load(), accelerate="squarem", precision="mixed", seed=0)
    assert found["log_likelihood"] == result.log_likelihood and found["num_iterations"] == result.num_iterations
    assert main([*FIT, "--precision", "single"]) == 2
    assert "--precision" in error_line(capsys)


def test_plan_runs_no_inference(capsys: Capture) -> None:
    model = MODEL.replace(":model", ":univariate")
    assert main(["plan", model, "--data", DATA, "--columns", "waiting", "--algorithm", "gem"]) == 0
    expected = pyro_em.plan(gmm.univariate, gmm.load()[:, 1], algorithm="gem")
    assert capsys.readouterr().out == f"{expected}\n"


def test_default_dtype_and_random_state_are_put_back(capsys: Capture) -> None:
    torch.set_default_dtype(torch.float32)
    before = torch.random.get_rng_state()
    assert main([*FIT, "--max-iter", "1"]) == 0
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.random.get_rng_state(), before)


def test_warnings_are_single_lines(tmp_path: Path, capsys: Capture) -> None:
    model = tmp_path / "mine.py"
    model.write_text(
        "import pyro, pyro.distributions as dist, torch\n"
        "def model(x):\n"
        "    loc = pyro.param('loc', torch.zeros(2))\n"
        "    with pyro.plate('rows', len(x)):\n"
        "        z = pyro.sample('z', dist.Categorical(torch.ones(2) / 2))\n"
        "        pyro.sample('x', dist.Normal(loc[z], 1.0), obs=x)\n"
    )
    assert main(["fit", f"{model}:model", "--data", DATA, "--columns", "eruptions"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("pyro-em: warning: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["fit"], "required"),
        ([*FIT, "--algorithm", "emm"], "invalid choice"),
        ([*FIT, "--restarts", "x"], "invalid int"),
        ([*FIT, "--restarts", "0"], "restarts must be a positive integer"),
        ([*FIT, "--tol", "nan"], "tol must be"),
        ([*FIT, "--set", "num_components"], "NAME=VALUE"),
        ([*FIT, "--set", "seed=1"], "option of the fit"),
        ([*FIT, "--columns", "eruptions,height"], "no column 'height'. Columns: eruptions, waiting"),
        (["fit", "gmm.py", "--data", DATA], "FILE.py:FUNCTION"),
        (["fit", "none.py:model", "--data", DATA], "none.py: there is no such file"),
        (["fit", MODEL + "s", "--data", DATA], "no function 'models'"),
        (["fit", f"{DATA}:model", "--data", DATA], "ends in .py"),
        (["fit", MODEL, "--data", "none.csv"], "none.csv: No such file"),
        (["summary", "none.nc"], "none.nc: there is no such file"),
        (["summary", DATA], "cannot be read as a fit"),
    ],
)
def test_wrong_usage_and_input_end_with_2(arguments: list[str], words: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize("name", [".", "none/fit.nc", "link.nc"])
def test_output_that_cannot_be_written_is_found_before_the_fit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.nc").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(pyro_em, "fit", lambda *args, **kwargs: pytest.fail("the fit has begun"))
    assert main([*FIT, "-o", name]) == 2
    assert str(Path(name)) in error_line(capsys) and os.listdir(tmp_path) == ["link.nc"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def full(self: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("xarray.DataTree.to_netcdf", full)
    (tmp_path / "fit.nc").write_text("old")
    assert main([*FIT, "--max-iter", "1", "-o", str(tmp_path / "fit.nc")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["fit.nc"] and (tmp_path / "fit.nc").read_text() == "old"


def test_refused_and_failing_models_end_with_1(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import pyro, pyro.distributions as dist\n"
        "def refused(x):\n"
        "    with pyro.plate('rows', len(x)):\n"
        "        z = pyro.sample('z', dist.Poisson(1.0))\n"
        "        pyro.sample('x', dist.Normal(z, 1.0), obs=x)\n"
        "def failing(x):\n"
        "    raise RuntimeError('first line\\nsecond line')\n"
        "def interrupted(x):\n"
        "    raise KeyboardInterrupt\n"
    )
    for name, words in (
        ("refused", "infinitely many states"),
        ("failing", "failing raised RuntimeError: first line"),
        ("interrupted", "interrupted"),
    ):
        assert main(["fit", f"{file}:{name}", "--data", DATA, "--columns", "waiting"]) == 1
        assert words in error_line(capsys)


def test_collapse_ends_with_1(tmp_path: Path, capsys: Capture) -> None:
    table = tmp_path / "x.csv"
    table.write_text("x\n1\n1\n1\n5\n9\n")
    model = MODEL.replace(":model", ":univariate")
    assert main(["fit", model, "--data", str(table)]) == 1
    assert "Degenerate" in error_line(capsys)


def test_model_file_that_cannot_be_run_ends_with_2(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "broken.py").write_text("def model(:\n")
    assert main(["fit", f"{tmp_path / 'broken.py'}:model", "--data", DATA]) == 2
    assert "SyntaxError" in error_line(capsys)


def test_summary_does_not_let_a_file_steer_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    xarray = pytest.importorskip("xarray")
    assert main([*FIT, "--max-iter", "1", "-o", str(tmp_path / "fit.nc")]) == 0
    with xarray.open_datatree(tmp_path / "fit.nc", engine="h5netcdf") as tree:
        changed = tree.load()
    changed.attrs["outcome_sentence"] = "\x1b[2Jgone"
    changed.to_netcdf(tmp_path / "evil.nc", engine="h5netcdf")
    capsys.readouterr()
    assert main(["summary", str(tmp_path / "evil.nc")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no row below the header"),
        ("a,b\n", "no row below the header"),
        ("1,2\n3,4\n", "first line holds numbers"),
        ("a,b\n1,2\n3\n", "row 2: 1 cells, but the header has 2"),
        ("a,b\n1,2\n3,x\n", "row 2, column 'b': 'x' is not a finite number"),
        ("a,b\n1,NA\n", "row 1, column 'b': 'NA'"),
        ("a,b\n1,\n", "row 1, column 'b': ''"),
        ("a,b\n1,nan\n", "row 1, column 'b': 'nan'"),
        ("a,b\ninf,1\n", "row 1, column 'a': 'inf'"),
    ],
)
def test_table_errors_say_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(pyro_em.InputError) as caught:
        read_table(path)
    assert message in str(caught.value) and str(caught.value).startswith(str(path))


def test_table_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(pyro_em.InputError, match="not a CSV file in UTF-8"):
        read_table(tmp_path / "x.csv")


def test_table_columns_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('\ufeff"a", b,name\r\n1,2.5,one\r\n\r\n-3e2,4,two\r\n', encoding="utf-8")
    assert read_table(path, ["b", "a"]).tolist() == [[2.5, 1.0], [4.0, -300.0]]
    assert read_table(path, ["b"]).tolist() == [2.5, 4.0] and read_table(path, ["b"]).dtype == torch.float64


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyro_em", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    done = run("fit", "models/gmm.py:model", "--data", "models/data/faithful.csv", "-o", str(tmp_path / "fit.nc"))
    assert done.returncode == 0 and done.stdout.startswith("em: Converged")
    assert done.stderr == f"pyro-em: wrote {tmp_path / 'fit.nc'}\n" and (tmp_path / "fit.nc").exists()


def test_module_reports_errors_as_a_command() -> None:
    done = run("fit", "models/gmm.py:model", "--data", "models/data/iris.csv")
    assert done.returncode == 2 and done.stdout == "" and "'Species'" in done.stderr
    assert done.stderr.count("\n") == 1
