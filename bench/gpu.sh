#!/bin/bash
# bench/gpu.sh OUT: everything that needs a GPU, in ten minutes at most, without a network.
#
# For a bare machine with an NVIDIA GPU, Python 3.10 or newer, torch and Triton (tried for: torch
# 2.11 with Triton 3.6, and newer), pip, setuptools, pybind11 and ninja; nvcc is used if it is
# there. Builds into an environment under OUT that sees the machine's own packages, measures the
# baselines, runs the tests marked gpu, and writes JSON, logs and a summary to OUT. A part that
# fails or takes too long is named at the end and does not stop the others.
#
# PYTHON=...  interpreter, python3 by default
# Exit status: 0 all parts done, 1 a part failed, 2 wrong use, 3 no GPU.

set -uo pipefail

if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: bench/gpu.sh OUT" >&2
  exit 2
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
  echo "bench/gpu.sh: $PYTHON cannot import torch (set PYTHON to an interpreter that can)" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "bench/gpu.sh: no CUDA device: torch.cuda.is_available() is false, nothing to measure" >&2
  exit 3
fi

mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
END=$((SECONDS + 585))
FAILED=()

# part NAME SECONDS COMMAND...: run within what is left of the ten minutes, log, note a failure
part() {
  local name=$1 limit=$2 left=$((END - SECONDS)) start=$SECONDS status
  shift 2
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    FAILED+=("$name: no time left")
    return 1
  fi
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  case $status in
    0) echo "$name: done in $((SECONDS - start)) s" ;;
    124 | 137) FAILED+=("$name: stopped after $limit s, see $name.log") ;;
    *) FAILED+=("$name: exit status $status, see $name.log") ;;
  esac
  return $status
}

cd "$ROOT" || exit 2
SITE="$OUT/environment"
RUN="$SITE/bin/python"
part environment 60 "$PYTHON" -m venv --without-pip --system-site-packages "$SITE"
part build 180 "$PYTHON" -m pip --python "$RUN" install --no-deps --no-index \
  --no-build-isolation -e .
[ -x "$RUN" ] || RUN=$PYTHON

part report 60 "$RUN" -m fused_dni env --json && cp "$OUT/report.log" "$OUT/environment.json"
part baselines 330 "$RUN" bench/gpu_baselines.py "$OUT/baselines.json" --seconds 280

gpu_tests() {
  "$RUN" -m pytest -q -m gpu -p no:cacheprovider tests
  local status=$?
  [ $status -ne 5 ] || { echo "no test is marked gpu yet"; status=0; }
  return $status
}
export -f gpu_tests
export RUN
part tests 180 bash -c gpu_tests

{
  [ ! -f "$OUT/baselines.json" ] || "$RUN" bench/gpu_baselines.py --summary "$OUT/baselines.json"
  [ ! -f "$OUT/tests.log" ] || tail -n 1 "$OUT/tests.log"
  if [ ${#FAILED[@]} -gt 0 ]; then
    printf 'FAILED  %s\n' "${FAILED[@]}"
  else
    echo "all parts done in $SECONDS s"
  fi
} | tee "$OUT/summary.txt"
rm -rf "$SITE"
[ ${#FAILED[@]} -eq 0 ]
