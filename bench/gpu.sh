#!/bin/bash
# bench/gpu.sh OUT [SECONDS]: everything that needs a GPU, in ten minutes at most, without a network.
#
# For a bare machine with an NVIDIA GPU, Python 3.10 or newer, torch and Triton (tried for: torch
# 2.11 with Triton 3.6, and newer), pip, setuptools, pybind11 and ninja; nvcc, ncu and
# compute-sanitizer are used if they are there. Builds into a temporary environment that sees the
# machine's own packages (the CUDA part for this GPU alone, if there is nvcc), runs the tests marked
# gpu, measures our kernels and what they have to beat, and looks at them with the two tools. What
# matters most comes first, each part has a share of the time, and a part that fails or takes too long
# is named at the end and does not stop the others. Without the CUDA part its rows say so.
#
# OUT then has summary.txt (written anew after every part), log.txt, environment.json, and a JSON and
# a text each of kernels and baselines (written anew after every group), all that is known, whenever
# the script is killed; backends.json, the times of both backends for `auto` to choose by, and
# tiles.json where there was time to tune.
#
# PYTHON=...       interpreter, python3 by default
# ONLY="a b ..."   these parts alone (and environment and build): tests layer floors lstm memcheck-cuda
#                  racecheck-cuda synccheck-cuda baselines ncu memcheck-triton ... tune
# FUSED_DNI_CUDA_ARCHS=...   what nvcc compiles for, this GPU by default
# Exit status: 0 all parts done, 1 a part failed, 2 wrong use, 3 no GPU.

set -uo pipefail

BUDGET=${2:-585}
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${1#-}" != "$1" ] || [[ ! $BUDGET =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bench/gpu.sh OUT [SECONDS]" >&2
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
WORK=$(mktemp -d) || exit 2
trap 'rm -rf "$WORK"' EXIT
END=$((SECONDS + BUDGET))
DONE=()
FAILED=()
: >"$OUT/log.txt"

# part NAME SECONDS COMMAND...: run within what is left of the time, log, note a failure
part() {
  local name=$1 limit=$2 left=$((END - SECONDS)) start=$SECONDS status=1
  shift 2
  case " ${ONLY:-$name} environment build " in *" $name "*) ;; *) return 1 ;; esac
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    FAILED+=("$name: no time left")
  else
    timeout --kill-after=5 "$limit" "$@" >"$WORK/$name.log" 2>&1
    status=$?
    { echo "==== $name: $*"; cat "$WORK/$name.log"; } >>"$OUT/log.txt"
    case $status in
      0) DONE+=("$name: done in $((SECONDS - start)) s") ;;
      124 | 137) FAILED+=("$name: stopped after $limit s, see log.txt") ;;
      *) FAILED+=("$name: exit status $status, see log.txt") ;;
    esac
  fi
  summary >/dev/null
  return $status
}

# What is known so far, the most important lines last.
summary() {
  {
    printf '%s\n' "${DONE[@]+"${DONE[@]}"}"
    for file in "$OUT/baselines.txt" "$WORK/ncu.txt" "$OUT/kernels.txt"; do
      [ ! -f "$file" ] || cat "$file"
    done
    for tool in $TOOLS; do
      for backend in cuda triton; do
        log="$WORK/$tool-$backend.log"
        [ ! -f "$log" ] || sed -n "s/^=* *\(.*SUMMARY.*\)/$tool, $backend: \1/p" "$log"
      done
    done
    [ ! -f "$WORK/tests.log" ] || tail -n 1 "$WORK/tests.log"
    if [ ${#FAILED[@]} -gt 0 ]; then
      printf 'FAILED  %s\n' "${FAILED[@]}"
    else
      echo "no part has failed after $SECONDS s"
    fi
  } >"$WORK/summary.txt" 2>&1
  cp "$WORK/summary.txt" "$OUT/summary.txt"
  cat "$OUT/summary.txt"
}

cd "$ROOT" || exit 2
RUN="$WORK/environment/bin/python"
TOOLS="memcheck racecheck synccheck"
make_environment() {
  "$PYTHON" -m venv --without-pip "$WORK/environment" || return
  # What this interpreter sees, which in an environment of its own is not what the system has.
  "$PYTHON" -c 'import site, sys
for place in sys.path:
    if place.endswith("-packages"):
        print(f"import site; site.addsitedir({place!r})")' \
    >"$(echo "$WORK"/environment/lib/python3*/site-packages)/outer.pth"
}
export -f make_environment
export PYTHON WORK
part environment 60 bash -c make_environment
[ -x "$RUN" ] || RUN=$PYTHON
# For this GPU alone, which takes a quarter of the time.
export FUSED_DNI_CUDA_ARCHS=${FUSED_DNI_CUDA_ARCHS:-$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * (major == 9))')}
install=("$PYTHON" -m pip --python "$RUN" install --no-deps --no-index --no-build-isolation -e .)
if ! part build 200 "${install[@]}" &&
  ! FUSED_DNI_CUDA_ARCHS=none part build-without-cuda 60 "${install[@]}"; then
  # Triton needs no compiler of ours: the package as it would be installed, without the C++.
  mkdir -p "$WORK/unbuilt"
  cp -r fused_dni "$WORK/unbuilt" && cp -r kernels "$WORK/unbuilt/fused_dni/kernels"
  # (A safe path leaves the folder of a script out.)
  export PYTHONPATH="$WORK/unbuilt:$ROOT/bench" PYTHONSAFEPATH=1
fi
part report 60 "$RUN" -m fused_dni env --json && cp "$WORK/report.log" "$OUT/environment.json"

export FUSED_DNI_CACHE="$WORK/tiles" # not what this user may have tuned before
part tests 150 "$RUN" -m pytest -q -m "gpu and not slow" -p no:cacheprovider tests
left=$((END - SECONDS))
for kind in layer floors lstm; do
  case $kind in layer) share=$((left * 35 / 100)) ;; floors) share=35 ;; *) share=$((left * 25 / 100)) ;; esac
  part "$kind" "$share" "$RUN" bench/gpu_kernels.py "$OUT/kernels.json" --part "$kind" \
    --seconds $((share - 15))
done

# sanitize BACKEND: every tool on every op of it once
sanitize() {
  for tool in $TOOLS; do
    # A pool hides what lies outside a tensor.
    part "$tool-$1" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 "$RUN" bench/gpu_kernels.py --profile --tiny --backend "$1"
  done
}
if command -v compute-sanitizer >/dev/null; then
  sanitize cuda
fi
part baselines 60 "$RUN" bench/gpu_baselines.py "$OUT/baselines.json" --seconds 50

look_at_kernels() {
  # shellcheck disable=SC2046 # options, a word each
  ncu $("$RUN" bench/gpu_kernels.py --ncu-options) --profile-from-start off \
    --log-file "$WORK/ncu.csv" "$RUN" bench/gpu_kernels.py --profile
  local status=$?
  "$RUN" bench/gpu_kernels.py --ncu "$WORK/ncu.csv" >"$WORK/ncu.txt"
  return $status
}
if command -v ncu >/dev/null; then
  export -f look_at_kernels
  export RUN
  part ncu 90 bash -c look_at_kernels
fi
if command -v compute-sanitizer >/dev/null; then
  sanitize triton
fi

# The table of what was measured above, to which tuning adds.
mkdir -p "$FUSED_DNI_CACHE"
if [ -f "$OUT/kernels.json" ]; then
  "$RUN" bench/gpu_kernels.py "$OUT/kernels.json" --backends >"$WORK/backends.json" 2>/dev/null &&
    cp "$WORK/backends.json" "$FUSED_DNI_CACHE" && cp "$WORK/backends.json" "$OUT"
fi
part tune 150 "$RUN" -m fused_dni tune linear --batch 128 --in 1024 --ops linear_step --quiet &&
  cp "$FUSED_DNI_CACHE"/*.json "$OUT"

summary
[ ${#FAILED[@]} -eq 0 ]
