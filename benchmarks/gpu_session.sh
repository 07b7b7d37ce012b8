#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: builds in place, runs the tests
# marked `gpu`, measures, and writes benchmarks/results/gpu.json and gpu.png. Needs python3 with a CUDA build of
# torch, triton, pytest, pytest-benchmark, setuptools, cmake and nvcc; no network. PYTHON names
# another interpreter. Where $OUT is set, logs and results are copied there too.
#
#   benchmarks/gpu_session.sh [build|test|bench|check]...     (default: build test bench)
#
# check: the kernels of the small samples under compute-sanitizer, memcheck and racecheck.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
results=benchmarks/results
logs=build/gpu_logs
mkdir -p "$results" "$logs"
export PYTHONPATH="$PWD"
status=0

run() { # name command...: its output into a log, the end of it on the screen
  local name=$1 start=$SECONDS
  shift
  "$@" >"$logs/$name.log" 2>&1
  local code=$?
  tail -n "${LINES_SHOWN:-40}" "$logs/$name.log"
  echo "== $name: exit status $code after $((SECONDS - start)) s"
  [ $code -eq 0 ] || status=1
}

for step in "${@:-build test bench}"; do
  for part in $step; do
    case $part in
      build)
        export LMFAST_BUILD=cuda LMFAST_REQUIRE_EXT=1 LMFAST_CUDA_ARCHS="${LMFAST_CUDA_ARCHS:-90a}"
        export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
        LINES_SHOWN=15 run build "$python" setup.py build_ext --inplace
        "$python" -c "import lmfast; print(lmfast.info())"
        ;;
      test) run test "$python" -m pytest tests/test_gpu.py tests/test_gpu_decoding.py -m gpu -p no:cacheprovider ;;
      bench) LINES_SHOWN=80 run bench "$python" -m benchmarks.gpu --out "$results/gpu.json" ;;
      check)
        for tool in memcheck racecheck; do
          run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest tests/test_gpu.py tests/test_gpu_decoding.py -m gpu -x \
            -k "(test_values and cuda) or test_recurrent_layers"
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
