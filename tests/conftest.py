"""Fixtures of all tests: seeds, instruction-set levels, the extension that must be there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from lmfast import _extension

try:
    import hypothesis
except ImportError:  # a machine with a GPU, where the tests marked `gpu` run
    pass
else:
    # The same examples in every run, so that a failure is the change's; HYPOTHESIS_PROFILE=default
    # looks for new ones. No deadline: other jobs share the machines that run the tests.
    hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores: threads that wait for each other on a busy core wait for its time
    # slices. Tests of threads set how many they want.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start

    # A silent fallback must not turn tests of the kernels into tests of nothing.
    if os.environ.get("LMFAST_REQUIRE_EXT") == "1":
        for extension in (_extension.cpu, _extension.bpe):
            if not extension.loaded:
                raise pytest.UsageError(f"LMFAST_REQUIRE_EXT=1 but {extension.reason}")


# Files of minutes start first, so that none of them is what one worker does alone at the end.
LONGEST_FIRST = (
    "test_compile_only.py",
    "test_all_ops.py",
    "test_triton.py",
    "test_patch_architectures.py",
    "test_all_ops_traced.py",
    "test_cuda_on_host.py",
    "test_tokenizer_sanitizers.py",
    "test_training_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU that torch can use")
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_extension.available_cpu_isas() or [None])
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once at every instruction-set level this machine has."""
    if request.param is None:
        pytest.skip(f"no CPU kernels: {_extension.cpu.reason}")
    before = _extension.cpu_isa()
    assert before is not None
    _extension.set_cpu_isa(request.param)
    yield request.param
    _extension.set_cpu_isa(before)


@pytest.fixture
def needs_cpu_kernels() -> None:
    if not _extension.cpu.loaded:
        pytest.skip(f"no CPU kernels: {_extension.cpu.reason}")
