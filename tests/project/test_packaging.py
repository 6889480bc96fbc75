"""The package as others get it: an sdist, a wheel built from it, and that wheel at work in a fresh
environment outside the repository. (That pyproject.toml names all that building takes is proven by
`make install-for-tests`, which builds in isolation.)"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(70)

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path) -> str:
    # Warnings of the tools are theirs; PYTHONPATH and the like must not lend the wheel anything.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment.pop("FUSED_DNI_CUDA_EMULATION", None)
    # As on a machine without nvcc; the other case is the installation that runs the tests.
    environment["FUSED_DNI_CUDA_ARCHS"] = "none"
    # That the sources are there and make a module is proven by portable code at any level of
    # optimisation, and at this one in a tenth of the time; the installation that runs the tests is
    # compiled as usual.
    environment["FUSED_DNI_CPU_ISAS"] = "portable"
    environment["CXXFLAGS"] = f"{environment.get('CXXFLAGS', '')} -O0"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what belongs to the source, so that nothing is built in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "fused_dni"
    ignored = ("*.so", "*.egg-info", "__pycache__", "build", "dist", ".*")
    copy.mkdir()
    for name in ("fused_dni", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*ignored))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    # Without --wheel or --sdist: the wheel is made from the sdist, which therefore is complete.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it. torch and the other dependencies come from the
    environment that runs the tests, by a .pth file: that puts the folder on the path without
    following the .pth files inside it, so the editable install there stays invisible."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", distributions["wheel"], cwd=folder)
    return folder


def test_wheel_holds_what_runs_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "fused_dni",
        "fused_dni_launcher.py",
    }
    for needed in ("fused_dni/__init__.py", "fused_dni/py.typed", "fused_dni/kernels/__init__.py"):
        assert needed in names
    assert any(re.fullmatch(r"fused_dni/backends/_cpu\..*\.so", name) for name in names)
    assert not any(name.startswith("fused_dni/backends/_cuda.") for name in names)
    assert any(name.endswith("/LICENSE") for name in names)


def test_sdist_holds_the_sources(distributions):
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "kernels/__init__.py"} <= names


def test_wheel_works_outside_the_repository(installed):
    code = """
import json, torch, fused_dni, fused_dni.kernels
layer = fused_dni.FusedDNILinear(8, 8, update=fused_dni.SGD(0.1), backend="cpu")
layer(torch.randn(4, 8)).sum().backward()
from fused_dni.backends import _cpu
print(json.dumps([fused_dni.__file__, fused_dni.kernels.__file__, _cpu.__file__]))
"""
    paths = json.loads(run(installed / "bin" / "python", "-c", code, cwd=installed))
    assert all(path.startswith(str(installed)) for path in paths), paths


def test_wheel_installs_the_command(installed):
    report = json.loads(run(installed / "bin" / "fused-dni", "env", "--json", cwd=installed))
    assert report["package"]["location"].startswith(str(installed))
    assert report["backends"]["cpu"] == "serves"
    assert report["package"]["CUDA extension"].startswith("was not built")
    assert "FUSED_DNI_CUDA_ARCHS" in report["backends"]["cuda"]


def test_editable_install_is_what_runs():
    import fused_dni.kernels

    import fused_dni

    assert Path(fused_dni.__file__).parent == ROOT / "fused_dni"
    assert Path(fused_dni.kernels.__file__).parent == ROOT / "kernels"


def test_constraints_pin_what_is_installed():
    """What the tests ran with is what the file names."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                pinned[canonicalize_name(requirement.name)] = requirement.specifier
    wanted = [Requirement(text) for text in importlib.metadata.requires("fused_dni") or ()]
    for requirement in wanted:
        extras = ({"extra": extra} for extra in ("test", "docs"))
        if requirement.marker and not any(map(requirement.marker.evaluate, extras)):
            continue
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt has no line for {name}"
        version = Version(importlib.metadata.version(name))
        assert pinned[name].contains(version), f"{name} {version}, pinned {pinned[name]}"
        assert requirement.specifier.contains(version), f"{name} {version}, {requirement}"


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
    assert lines[-1] == "exec make test"
