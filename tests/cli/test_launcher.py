"""``fused-dni`` before PyTorch is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CODE = "import sys; import fused_dni_launcher as l; sys.exit(l.main())"


def test_the_version_does_not_wait_for_pytorch() -> None:
    code = (
        "import sys; import fused_dni_launcher as l; code = l.main()\n"
        "print(code, *sorted({'torch', 'numpy', 'fused_dni'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True
    )
    name, version, code_and_modules = done.stdout.replace("\n", " ").split(maxsplit=2)
    assert name == "fused-dni" and version[0].isdigit()
    assert code_and_modules.split() == ["0"]


def test_ctrl_c_during_an_import_is_one_line(tmp_path: Path) -> None:
    """The module that is being imported turns it into another error, as extensions do."""
    (tmp_path / "torch.py").write_text(
        "import time\n"
        "try:\n"
        "    print('importing', flush=True)\n"
        "    time.sleep(60)\n"
        "except BaseException as error:\n"
        "    raise ImportError('what was a KeyboardInterrupt') from error\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "env"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert said.strip() == "fused-dni: stopped; nothing was kept"


WITHOUT = (
    "import sys; import fused_dni_launcher as l; code = l.main()\n"
    "print(code, *sorted({'torch', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
)


def without_pytorch(*argv: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that imports neither PyTorch nor NumPy."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *argv], capture_output=True, text=True, cwd=folder
    )
    *lines, last = done.stderr.splitlines()
    assert len(last.split()) == 1, f"imported: {last}"
    return int(last), done.stdout, "\n".join(lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("trian", "did you mean 'train'"),
        ("train --epochs none", "from 1 on, got 'none'"),
        ("train --resume", "--resume needs --checkpoint DIR"),
        ("demo --resume", "--resume needs --checkpoint DIR"),
        ("train copy --resume", "--resume needs --checkpoint DIR"),
        ("train --data x --dataset digits", "leave --dataset digits out"),
        ("verdict", "required: SEGMENT"),
        ("verdict linaer", "did you mean 'linear'"),
        ("verdict linear --out 1024", "for output features there is --outputs"),
        ("verdict linear --rank 2 --synthesizers dense", "not both"),
        ("verdict linear --device gpu", "unknown device 'gpu': allowed are cpu and cuda[:N]"),
        ("verdict top critic", "FACTORY must be package.module:factory, got 'critic'"),
        ("advise model", "FACTORY must be package.module:factory, got 'model'"),
        ("race arms", "FACTORY must be package.module:factory, got 'arms'"),
        ("report gone.json", "cannot read gone.json: No such file"),
        ("report words.json", "words.json is no JSON"),
        ("report foreign.json", "foreign.json is no report of fused_dni: its kind is 'bill'"),
        ("report half.json", "half.json is incomplete: it lacks"),
        ("report half.json -o half.png", "--output must end in .html or .md"),
        ("compare half.json half.json", "half.json is incomplete: it lacks"),
        ("compare words.json half.json", "words.json is no JSON"),
    ],
)
def test_bad_input_does_not_wait_for_pytorch(argv: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text("no JSON")
    (tmp_path / "foreign.json").write_text('{"kind": "bill"}')
    (tmp_path / "half.json").write_text('{"kind": "verdict", "version": 2, "facts": {}}')
    code, out, error = without_pytorch(*argv.split(), folder=tmp_path)
    assert (code, out) == (2, "")
    assert error.startswith("fused-dni: error: ") and message in error and "\n" not in error


@pytest.mark.parametrize("argv", ["", "--help", "verdict --help", "train copy --help"])
def test_help_does_not_wait_for_pytorch(argv: str, tmp_path: Path) -> None:
    code, out, error = without_pytorch(*argv.split(), folder=tmp_path)
    assert (code, error) == (0, "") and "usage: fused-dni" in out


def test_a_report_is_read_without_pytorch(tmp_path: Path) -> None:
    results = Path(__file__).resolve().parents[2] / "bench" / "results" / "verdict"
    code, out, error = without_pytorch(
        "report", str(results / "amd-epyc-avx512-rivals.json"), folder=tmp_path
    )
    assert (code, error) == (0, "") and "Rivals of backprop" in out


def test_a_command_runs_behind_its_arguments(tmp_path: Path) -> None:
    """The package that was left for later is the one that runs, and its parts are one."""
    code = (
        "import sys; import fused_dni_launcher as l; code = l.main()\n"
        "import fused_dni, fused_dni.cli, fused_dni.modules\n"
        "assert fused_dni.FusedDNILinear is fused_dni.modules.FusedDNILinear\n"
        "assert sys.modules['fused_dni'] is fused_dni and fused_dni.cli.main\n"
        "sys.exit(code)"
    )
    words = "verdict linear --in 8 --batch 8 --seconds 0.05 --no-compile --no-parts --quiet"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split(), "--threads", "1"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "one layer 8 to 8" in done.stdout, done.stderr


def test_a_missing_pytorch_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, "env"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "fused-dni: error: torch is missing: pip install torch"
