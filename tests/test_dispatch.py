"""The choice of a backend, and everything that overrides or explains it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmfast
from lmfast import _dispatch, _extension

X = torch.ones(2, 4)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# Runs the code of argv[1] in a fork for each of the environments of argv[2]. Python and PyTorch
# start once: that is most of the time of a small program.
EACH = """
import json, os, sys, tempfile, traceback
import torch

for environment in json.loads(sys.argv[2]):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            os.environ.update(environment)
            failed = 1
            try:
                exec(sys.argv[1], {})
                failed = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(failed)
        failed = os.waitpid(child, 0)[1]
        out.seek(0), err.seek(0)
        print(json.dumps([failed, out.read(), err.read()]), flush=True)
"""


def python_each(
    code: str, environments: list[dict[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    """`python` in several environments, none of which PyTorch reads."""
    command = [sys.executable, "-c", EACH, code, json.dumps(environments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = map(json.loads, done.stdout.splitlines())
    return [subprocess.CompletedProcess(code, *result) for result in found]


def test_info_says_what_is_written() -> None:
    rows = dict(line.split(None, 1) for line in lmfast.info().splitlines() if line)
    assert rows["lstm"].split() == ["fwd+bwd", "fwd+bwd", "-", "fwd+bwd"]
    assert rows["cached_attention"].split() == ["forward"] * 4
    assert rows["rope_append"].split() == ["forward", "forward", "forward", "-"]


def test_automatic_choice_takes_the_kernel(needs_cpu_kernels: None) -> None:
    assert lmfast.explain("rms_norm", X) == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "geglu"])
def test_calls_without_a_choice_are_those_of_the_kernel(
    needs_cpu_kernels: None, name: str, dtype: torch.dtype
) -> None:
    op = _dispatch.ops()[name]
    for sample in op.sample_inputs("cpu", dtype):
        found = op.public(*sample.args, **sample.kwargs)
        expected = op.public(*sample.args, **sample.kwargs, backend="cpu")
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_context_overrides_and_restores() -> None:
    before = lmfast.explain("rms_norm", X)
    with lmfast.use_backend("torch"):
        assert lmfast.explain("rms_norm", X) == "torch"
        with lmfast.use_backend("rope=torch"):
            assert lmfast.explain("rms_norm", X) == "torch"
    assert lmfast.explain("rms_norm", X) == before


def test_context_restores_after_an_exception() -> None:
    before = dict(_dispatch._requested)
    with pytest.raises(KeyError), lmfast.use_backend("torch"):
        raise KeyError
    assert _dispatch._requested == before


def test_argument_is_stronger_than_context(needs_cpu_kernels: None) -> None:
    with lmfast.use_backend("torch"):
        assert lmfast.explain("rms_norm", X, backend="cpu") == "cpu"


def test_unknown_names_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="no op named 'rmsnorm'"),
        lmfast.use_backend("rmsnorm=cpu"),
    ):
        pass
    with pytest.raises(ValueError, match="got 'gpu'"), lmfast.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="no op named"):
        lmfast.explain("softmax", X)


def test_a_context_that_cannot_be_met_raises() -> None:
    with lmfast.use_backend("cuda"), pytest.raises(lmfast.BackendError, match="rms_norm"):
        lmfast.ops.rms_norm(X)


def test_explain_names_the_op_whose_arguments_do_not_fit() -> None:
    with pytest.raises(TypeError, match="rms_norm: missing a required argument: 'x'"):
        lmfast.explain("rms_norm")
    with pytest.raises(TypeError, match="rms_norm: got an unexpected keyword argument 'epsilon'"):
        lmfast.explain("rms_norm", X, epsilon=1e-6)


def test_a_request_is_text() -> None:
    with pytest.raises(TypeError, match=r"request must be a str such as .* got None"):
        with lmfast.use_backend(None):
            pass


def test_environment_variable() -> None:
    code = "import lmfast, torch; lmfast.explain('rms_norm', torch.ones(2, 4))"
    requests = ("torch", "rms_norm=torch", "rms_norm=fast", "rms=torch")
    *right, wrong, unknown = python_each(code, [{"LMFAST_BACKEND": r} for r in requests])
    for done in right:
        assert "runs on: torch (asked for)" in done.stdout
    assert wrong.returncode != 0
    assert "backend must be one of" in wrong.stderr
    assert "no op named 'rms'" in unknown.stderr


@pytest.mark.parametrize("name", ["LMFAST_BACKEND", "LMFAST_CPU_ISA"])
def test_the_command_tells_a_wrong_variable_in_one_line(name: str, tmp_path: Path) -> None:
    script = tmp_path / "lmfast"  # as pip writes it
    script.write_text("import sys\nfrom lmfast.cli import main\nsys.exit(main())\n")
    for command in (["-m", "lmfast", "info"], [str(script), "info"]):
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, name: "fast", "PYTHONPATH": str(Path(lmfast.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert re.fullmatch(rf"lmfast: error: {name}.* got 'fast'.*\n", done.stderr)


def test_isa_variable_lowers_and_never_raises_the_level(needs_cpu_kernels: None) -> None:
    code = "from lmfast import _extension; print(_extension.cpu_isa())"
    here = _extension.available_cpu_isas()
    levels = (*_extension.CPU_ISA_LEVELS, "", "sse9")
    *results, empty, wrong = python_each(code, [{"LMFAST_CPU_ISA": level} for level in levels])
    for level, done in zip(_extension.CPU_ISA_LEVELS, results, strict=True):
        assert done.stdout.strip() == (level if level in here else here[-1])
        # A level that is not here is told, once.
        assert done.stderr.count(f"LMFAST_CPU_ISA={level}: this machine") == (level not in here)
    assert empty.stdout.strip() == here[-1]
    assert "LMFAST_CPU_ISA must be one of default, avx2, avx512, amx, got 'sse9'" in wrong.stderr


def test_set_cpu_isa_names_what_is_wrong(needs_cpu_kernels: None) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        _extension.set_cpu_isa("sse9")
    for level in set(_extension.CPU_ISA_LEVELS) - set(_extension.available_cpu_isas()):
        with pytest.raises(ValueError, match="not available here"):
            _extension.set_cpu_isa(level)


def test_registering_twice_is_an_error() -> None:
    op = _dispatch.ops()["rms_norm"]
    with pytest.raises(ValueError, match="registered twice"):
        _dispatch.register_op(op)
    with pytest.raises(ValueError, match="already"):
        _dispatch.register("rms_norm", "torch", (), op.reference, None, lambda *a: None)
    with pytest.raises(ValueError, match="backend must be one of"):
        _dispatch.register("rms_norm", "tpu", (), op.reference, None, lambda *a: None)


def test_info_shows_modules_and_every_op() -> None:
    text = lmfast.info()
    assert f"torch {torch.__version__}" in text
    for name in _dispatch.ops():
        assert name in text
    for extension in (_extension.cpu, _extension.bpe, _extension.cuda):
        assert f"{extension.name}: " in text
    # The table says what is written; below it stands what of that cannot run here.
    assert ("cpu does not run here: " in text) == (not _extension.cpu.loaded)
    if not torch.cuda.is_available():
        assert "triton does not run here: no GPU that torch can use" in text
        assert "cuda does not run here: " in text


def test_tune_allocator_says_what_it_did_and_can_be_repeated() -> None:
    code = (
        "import lmfast; a = lmfast.tune_allocator(); b = lmfast.tune_allocator(); print(a == b, a)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True ")
    if sys.platform == "linux":
        assert "glibc" in done.stdout
    other = python(code, LD_PRELOAD="libjemalloc.so")
    assert "another allocator is preloaded" in other.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads glibc's and Linux's counters")
def test_tuned_memory_is_used_again() -> None:
    code = """
import lmfast, torch, resource
lmfast.tune_allocator()
x = torch.ones(16, 1024, 1024)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    y = x * 2
    del y
before = faults()
for _ in range(5):
    y = x * 2
    del y
print(faults() - before)
"""
    done = python(code)
    if "refused" in lmfast.tune_allocator() or "nothing done" in lmfast.tune_allocator():
        pytest.skip(lmfast.tune_allocator())
    # Untuned, each of the five 64 MB results costs 16384 faults.
    assert int(done.stdout) < 1000, done.stderr
