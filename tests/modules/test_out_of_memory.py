"""A step that runs out of memory: of a call either all is done or nothing, and counted so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fused_dni.backends._cpu")

# Fails the so-manieth time that a kernel's workspace grows.
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
static int left = 0, seen = 0;
void fail_at(int n) { left = n; seen = 0; }
int calls(void) { return seen; }
void *aligned_alloc(size_t alignment, size_t size) {
  static void *(*real)(size_t, size_t) = NULL;
  if (!real) real = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  if (alignment == (size_t)2 << 20) {
    ++seen;
    if (left && --left == 0) return NULL;
  }
  return real(alignment, size);
}
"""

SCRIPT = """
import ctypes, sys
import torch
import fused_dni as fd
from torch import nn

torch.set_num_threads(1)
library = ctypes.CDLL(sys.argv[1])


def made(head):
    torch.manual_seed(0)
    widths = [16, 64, 512, 2048]
    rule = fd.SGD(1e-3)
    layers = [fd.FusedDNILinear(a, b, activation="tanh", update=rule)
              for a, b in zip(widths, widths[1:])]
    if head:
        layers.append(fd.FusedDNILinearCrossEntropyLoss(2048, 10, update=rule))
    return fd.DecoupledSequential(*layers)


def step(model, rows, head):
    x, y = torch.randn(rows, 16), torch.randint(0, 10, (rows,))
    out = model(x, target=y) if head else model(x).square().mean()
    out.backward()


def counts(model):
    return [(m.synthesizer.unit.lessons, m.synthesizer_update.steps)
            for m in model if getattr(m, "synthesizer", None) is not None]


failed, head = [], sys.argv[2] == "head"
for n in range(1, 12):
    model = made(head)
    for _ in range(5):
        step(model, 8, head)
    assert model._stack is not None and model._stack.way() == "one call", model
    before = counts(model)
    library.fail_at(n)
    try:
        step(model, 1024, head)
        raised = False
    except MemoryError:
        raised = True
    library.fail_at(0)
    after = counts(model)
    for (lessons, steps), (lessons_then, steps_then) in zip(before, after):
        assert lessons_then - lessons == steps_then - steps, (n, before, after)
    if not raised:
        break
    failed.append([b[1] - a[1] for a, b in zip(before, after)])
    step(model, 8, head)  # and training goes on
print(failed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="overrides the loader's aligned_alloc")
@pytest.mark.parametrize("end", ["layers", "head"])
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_lessons_that_were_not_given_are_not_counted(tmp_path: Path, end: str) -> None:
    library, script = tmp_path / "fail.so", tmp_path / "script.py"
    (tmp_path / "fail.c").write_text(SOURCE, encoding="utf-8")
    script.write_text(SCRIPT, encoding="utf-8")
    build = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "fail.c"), "-ldl"]
    subprocess.run(build, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, str(script), str(library), end],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout)
    assert failed
    # The last layer's lesson is another call than those of the layers below.
    for given in failed:
        assert given in ([0] * len(given), [1] * (len(given) - 1) + [0]), failed
