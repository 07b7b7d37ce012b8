#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: builds in place, runs the tests
# marked `gpu`, measures, and writes benchmarks/results/gpu.json and gpu.png. Needs python3 with a
# CUDA build of torch, triton, pytest, setuptools, pybind11, cmake and nvcc; no network. PYTHON names
# another interpreter. Where $OUT is set, logs and results are copied there too.
#
#   benchmarks/gpu_session.sh [build|test|bench|check]...     (default: build test bench)
#
# check: the kernels of the small samples under compute-sanitizer: memcheck, racecheck, synccheck.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
results=benchmarks/results
logs=build/gpu_logs
mkdir -p "$results" "$logs"
export PYTHONPATH="$PWD"
status=0
# pyproject's options name plugins that need not be here, and a test file that needs one of them
# has no test for a GPU. Most of the time is compiling kernels for every kind of argument: with
# pytest-xdist by several processes. Tensors of 10 GB come after that, one process for all of them.
gpu_tests=("$python" -m pytest -m gpu -p no:cacheprovider --continue-on-collection-errors
  -o "addopts=-q --strict-markers")
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n "${GPU_TEST_WORKERS:-$(($(nproc) < 14 ? $(nproc) : 14))}")

run() { # name command...: its output into a log, the end of it on the screen
  local name=$1 start=$SECONDS
  shift
  timeout "${LIMIT:-590}" "$@" >"$logs/$name.log" 2>&1
  local code=$?
  tail -n "${LINES_SHOWN:-40}" "$logs/$name.log"
  echo "== $name: exit status $code after $((SECONDS - start)) s"
  [ $code -eq 0 ] || status=1
}

for step in "${@:-build test bench}"; do
  for part in $step; do
    case $part in
      build)
        LMFAST_BUILD=cuda LMFAST_CUDA_ARCHS="${LMFAST_CUDA_ARCHS:-90a}" \
          MAX_JOBS="${MAX_JOBS:-$(nproc)}" LINES_SHOWN=15 \
          run build "$python" setup.py build_ext --inplace
        "$python" -c "
import lmfast
from lmfast import _extension
print(lmfast.info())
raise SystemExit(None if _extension.cuda.loaded else _extension.cuda.reason)" || status=1
        ;;
      test)
        run test "${gpu_tests[@]}" tests --ignore tests/test_gpu_large.py --durations=10 \
          ${workers[@]+"${workers[@]}"}
        run test_large "${gpu_tests[@]}" tests/test_gpu_large.py
        ;;
      bench) LINES_SHOWN=80 run bench "$python" -m benchmarks.gpu --out "$results/gpu.json" ;;
      check)
        for tool in memcheck racecheck synccheck; do
          run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${gpu_tests[@]}" tests/test_gpu.py tests/test_gpu_decoding.py -x \
            -k "(test_values and cuda) or test_recurrent_layers or eight_bit"
        done
        ;;
      *)
        echo "unknown part $part; the parts are build, test, bench, check" >&2
        exit 2
        ;;
    esac
  done
done

if [ -n "${OUT:-}" ]; then
  cp -r "$logs" "$OUT/"
  for file in gpu.json gpu.png; do
    [ -f "$results/$file" ] && cp "$results/$file" "$OUT/"
  done
fi
exit $status
