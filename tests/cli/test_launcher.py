"""``fused-dni`` before PyTorch is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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
        [sys.executable, "-c", CODE, "verdict"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "fused-dni: stopped; nothing was kept"
