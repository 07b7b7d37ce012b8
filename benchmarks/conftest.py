"""Measuring an op beside its peers: interleaved in one process, medians, shares of a ceiling.

    pytest benchmarks --benchmark-enable --benchmark-only [--allocator default] [--results FILE]

Every round runs each peer once and then ours, on the same tensors, so that whatever else the
machine does hits all of them alike. The allocator setting is for the whole process and for all.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmfast
from lmfast import _extension

ROWS: list[dict[str, Any]] = []
_MM = 1024
_LONG = 0.5  # seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allocator",
        choices=("tuned", "default"),
        default="tuned",
        help="tuned: lmfast.tune_allocator() first, for ours and the peers; default: glibc's own",
    )
    parser.addoption(
        "--results", type=Path, help="write the rows as JSON to this file, beside those it has"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--allocator") == "tuned":
        lmfast.tune_allocator()


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Measures ``ours`` against ``peers`` and keeps a row for the table at the end.

    Args of the function:
        name: the row's name.
        ours: what is measured.
        peers: name -> the same work by other means.
        moved: bytes read and written by the work at least; gives GB/s and, beside a measured
            copy of as many bytes, the share of that ceiling.
        flops: operations of the work; gives GFLOP/s and the share of what `torch.mm` reaches on
            1024 x 1024 matrices of `dtype`.
        dtype: of that product.
        rounds: how many times each is run.

    It returns the row, to which more may be added; an empty one where nothing is timed.
    """

    def run(
        name: str,
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        moved: int | None = None,
        rounds: int = 21,
        flops: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        ceilings: dict[str, Callable[[], Any]] = {}
        if flops is not None:
            factor = torch.randn(_MM, _MM).to(dtype)
            ceilings["mm"] = lambda: factor @ factor
        if moved is not None:
            source = torch.empty(max(1, moved // 2), dtype=torch.uint8)
            ceilings["copy"] = source.clone
        times: dict[str, list[float]] = {name: [] for name in (*peers, *ceilings)}
        short = True
        for function in (*ceilings.values(), *peers.values(), ours):
            start = time.perf_counter()
            function()
            short = time.perf_counter() - start < _LONG
            if short:  # what takes longer is warm after one call
                function()

        def run_peers() -> None:
            for peer, function in ceilings.items():
                times[peer].append(_seconds(function))
            if ceilings and short:
                ours()  # each of those compared then follows one that had the same data in cache
            for peer, function in peers.items():
                times[peer].append(_seconds(function))

        benchmark.group = name
        benchmark.pedantic(ours, setup=run_peers, rounds=rounds)
        if benchmark.stats is None:  # --benchmark-disable: everything ran once, nothing is timed
            return {}
        median = benchmark.stats.stats.median
        row: dict[str, Any] = {"name": name, "lmfast_ms": median * 1e3}
        for peer, values in times.items():
            row[f"{peer}_ms"] = statistics.median(values) * 1e3
        if moved is not None:
            row["GB_per_s"] = moved / median / 1e9
        if flops is not None:
            row["GFLOP_per_s"] = flops / median / 1e9
            ceiling = 2 * _MM**3 / statistics.median(times["mm"])
            row["share_of_mm"] = flops / median / ceiling
        benchmark.extra_info.update(row)
        ROWS.append(row)
        return row

    return run


def machine(config: pytest.Config) -> dict[str, Any]:
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "cpu_level": _extension.cpu_isa(),
        "torch": torch.__version__,
        "lmfast": lmfast.__version__,
        "python": platform.python_version(),
        "allocator": config.getoption("--allocator"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Takes a row measured by other means, for instance in a process of its own: `name`, then
    `lmfast_ms` and `<peer>_ms`, or `lmfast_MB` and `<peer>_MB`."""

    option = request.config.getoption

    def add(row: dict[str, Any]) -> None:
        if option("benchmark_enable") or not option("benchmark_disable"):
            ROWS.append(row)

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write("medians in ms; (x): the peer's time over ours; copy: a plain copy of as many bytes")
    write("share: of what torch.mm reaches")
    for row in ROWS:
        unit = "ms" if "lmfast_ms" in row else "MB"
        ours = row[f"lmfast_{unit}"]
        cells = [f"{row['name']:<42} lmfast {ours:8.3f}{' MB' if unit == 'MB' else ''}"]
        for key, value in row.items():
            peer = key.removesuffix(f"_{unit}")
            if key == "share_of_mm":
                cells.append(f"share {value:.2f}")
            elif peer != key and peer not in ("lmfast", "mm"):
                cells.append(f"{peer} {value:8.3f}" + (f" ({value / ours:.2f}x)" if ours else ""))
        write("  ".join(cells))
    path = config.getoption("--results")
    if path is not None:
        here = machine(config)
        rows = {row["name"]: _rounded(row) for row in [*_earlier_rows(path, here), *ROWS]}
        lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in rows.values())
        path.write_text(f'{{"machine": {json.dumps(here)},\n "rows": [\n{lines}\n]}}\n')
        write(f"rows written to {path}")


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def _earlier_rows(path: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that a machine like this one wrote with the same settings, with their
    dates: parts of a benchmark can be measured one by one."""
    if not path.exists():
        return []
    file = json.loads(path.read_text())
    same = ("processor", "threads", "cpu_level", "torch", "allocator")
    if any(file["machine"].get(k) != here[k] for k in same):
        return []
    date, rows = file["machine"]["date"], file["rows"]
    return [row if date == here["date"] else {**row, "date": row.get("date", date)} for row in rows]
