"""What runs in the emulation runs on a device: the tests that a machine with a GPU collects for it
are those of the emulation, op by op, option by option, in every precision."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    "tests/ops/test_linear_backends.py",
    "tests/ops/test_lstm_backends.py",
    "tests/kernels/test_gpu_linear.py",
    "tests/kernels/test_cuda_linear.py",
    "tests/kernels/test_cuda_lstm.py",
]
# Only the emulation counts barriers, and has as few blocks as a test says.
EMULATION_ALONE = {
    "test_a_step_at_the_preactivation_meets_less_often",
    "test_a_failed_launch_is_an_exception_with_its_name",
    "test_an_error_of_the_launch_has_its_name",
}


@functools.cache
def collected(chosen: str, gpu: bool) -> frozenset[str]:
    """The ids that ``-m`` chooses, on this machine or on one with a GPU."""
    environment = {**os.environ, "PRETENDED_GPU": "yes" if gpu else "no"}
    environment["PYTHONPATH"] = str(ROOT / "tests" / "support")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-p", "no:cacheprovider", "-n", "0",
         "--collect-only", "-q", "-m", chosen, *FILES],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return frozenset(line for line in done.stdout.splitlines() if "::" in line)


def of_cuda(ids: frozenset[str]) -> set[str]:
    """Without other backends' cases."""
    return {i for i in ids if "/test_cuda_" in i or re.search(r"[\[-]cuda\b", i)}


def function(name: str) -> str:
    return name.split("::")[1].split("[")[0]


def test_every_test_of_the_emulation_is_one_of_a_device() -> None:
    emulation = of_cuda(collected("not gpu and not repeat", False))
    device = of_cuda(collected("gpu and not repeat", True))
    assert {function(name) for name in emulation - device} == EMULATION_ALONE
    assert {function(name)[:9] for name in device - emulation} == {"test_gpu_"}


@pytest.mark.parametrize(
    "parts",
    [
        ("test_linear_backends.py::test_step[", "float32"),
        ("test_linear_backends.py::test_step[", "bfloat16"),
        ("test_linear_backends.py::test_parts[", "float32"),
        ("test_linear_backends.py::test_parts[", "bfloat16"),
        ("test_cuda_linear.py::test_tensor_cores[", "tf32"),
        ("test_cuda_linear.py::test_tensor_cores[", "float16"),
        ("test_lstm_backends.py::test_options[", "window"),
        ("test_lstm_backends.py::test_options[", "cell"),
        ("test_lstm_backends.py::test_closing[", "float32"),
        ("test_cuda_lstm.py::test_low_precision[", "tf32"),
        ("test_cuda_lstm.py::test_low_precision[", "bfloat16"),
        ("test_cuda_lstm.py::test_low_precision[", "float16"),
        ("test_cuda_lstm.py::test_a_boundary_in_low_precision[", "float16"),
        ("test_cuda_lstm.py::test_a_cell_in_low_precision[", "bfloat16"),
        ("test_cuda_lstm.py::test_an_update_in_low_precision[", "float16"),
        ("test_cuda_lstm.py::test_gpu_same_input_same_bits[", "tf32"),
    ],
    ids="".join,
)
def test_an_op_in_a_precision_is_among_them(parts: tuple[str, str]) -> None:
    """What the comparison would not see: that the emulation's own list lacks something."""
    device = of_cuda(collected("gpu and not repeat", True))
    assert any(parts[0] in name and parts[1] in name for name in device)
