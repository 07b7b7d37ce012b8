"""Two processes learn what one does: DDP and FSDP2 on gloo, their checkpoints, and `lmfast train`
under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dtensor_cases
import pytest
import torch
import training_processes_worker as worker

from lmfast.cli import main
from lmfast.training import Processes, latest_checkpoint, load_model, process_group

# Neither IPv6 nor a name server is needed to find oneself.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made of all runs."""
    directory = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, str(Path(worker.__file__)), str(directory)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    # Where a process died comes last, behind what torchrun says of it.
    assert done.returncode == 0, done.stderr + "".join(
        done.stderr.partition("Fatal Python error")[1:]
    )
    assert "sync_buffers" not in done.stderr  # DDP's, of an option that has another name now
    return directory


@pytest.mark.parametrize("name", worker.RUNS)
def test_two_processes_learn_what_one_does(two, tmp_path, name):
    expected = worker.train(name, tmp_path)
    result = torch.load(two / f"{name}.pt")
    # fp64: only rounding, through the divisions of Adam; fp32: as much more.
    rel = 1e-3 if name.endswith("fp32") else 1e-9
    assert result["losses"] == pytest.approx(expected["losses"], rel=rel)
    for a, b in zip(result["evaluations"], expected["evaluations"], strict=True):
        assert a == pytest.approx(b, rel=rel)
    for key, value in expected["model"].items():
        torch.testing.assert_close(result["model"][key], value, rtol=rel, atol=rel)
    # FSDP2 divides whole rows: 13 of the vocabulary are 7 and 6.
    assert result["held"] < 0.6 if name.startswith("fsdp") else result["held"] == 1


@pytest.mark.parametrize("name", ["ddp", "ddp states", "fsdp", "fsdp tied"])
def test_a_checkpoint_of_two_processes_is_resumed_by_one(two, tmp_path, name):
    expected = worker.train(name, tmp_path)
    run = worker.trainer(name, tmp_path / "continued", worker.STEPS)
    run.resume(latest_checkpoint(two / name))
    assert run.report.step == worker.STEPS // 2
    assert run.fit().losses == pytest.approx(expected["losses"], rel=1e-9)
    for key, value in expected["model"].items():
        # load_model makes fp32 of what was saved.
        torch.testing.assert_close(run.model.state_dict()[key].float(), value)


@pytest.mark.parametrize("name", sorted(dtensor_cases.NAMES))
def test_dtensors(two, name):
    """Values and gradients on whole and divided DTensors are those on plain tensors."""
    recurrent = ("elman_rnn", "gru", "lstm", "elman model", "lstm model")
    if torch.__version__.startswith("2.11.") and name in recurrent:
        pytest.skip("PyTorch 2.11 does not join the steps and the divided batch of a DTensor")
    assert json.loads((two / "dtensors.json").read_text())[name] == ""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
@pytest.mark.parametrize("frees", [True, False])
def test_a_model_outlives_the_group(tmp_path, frees):
    """Freed after its group it neither hangs nor leaves threads; kept, it lets Python end."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, torch\n"
        "from lmfast.training import process_group\n"
        "sys.setswitchinterval(10)  # gloo's threads wait for Python's lock until it is given up\n"
        "with process_group('cpu'):\n"
        "    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))\n"
        "    model(torch.ones(1, 2)).sum().backward()\n"
        f"if {frees}:\n"
        "    del model\n"
        "    tasks = '/proc/self/task'\n"
        "    names = [open(f'{tasks}/{t}/comm').read() for t in os.listdir(tasks)]\n"
        "    assert not any('gloo' in name for name in names), names\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [*TORCHRUN, str(program)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_rows_are_divided_without_rest():
    batch = torch.arange(10)
    for count in (1, 2, 3, 4):
        for parts in (1, 2, 5):
            shares = [Processes(rank, count).rows(batch, parts) for rank in range(count)]
            assert all(len(share) == parts for share in shares)
            assert torch.equal(torch.cat([part for share in shares for part in share]), batch)


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ("cpu", 2, ("cpu", "gloo")),
        ("cuda", 2, ("cuda:1", "nccl")),
        ("auto", 2, ("cuda:1", "nccl")),
        ("auto", 0, ("cpu", "gloo")),
        ("cuda", 1, "process 1 of this machine has no GPU: there are 1"),
        ("mps", 0, "the device of several processes must be cpu or cuda, got mps"),
    ],
)
def test_gpus_talk_by_nccl_and_cpus_by_gloo(monkeypatch, asked, gpus, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", started.append)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda: None)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected), process_group(asked):
            pass
        return
    with process_group(asked) as device:
        assert (device, *started) == expected
    assert chosen == ([1] if "cuda" in device else [])


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("".join(f"the cat number {i} sat on the mat {i % 7}\n" for i in range(600)))
    return path


SMALL = ["--vocab-size", "300", "--emb-dim", "16", "--heads", "2", "--layers", "1"]
SMALL += ["--batch-size", "6", "--context", "8", "--quiet"]


def test_train_command_under_torchrun(data, tmp_path):
    """Two processes, stopped by SIGTERM, continued by one: as one process without a stop."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = ["--data", str(data), *SMALL, "--steps", "400", "--save-every", "0", "--eval-every", "50"]
    assert main(["train", *run, "--out", str(whole)]) == 0
    command = [*TORCHRUN, "-m", "lmfast", "train", *run, "--fsdp", "--out", str(stopped)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    log = stopped / "log.csv"
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.read_text().count("\n") > 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # as a scheduler does; torchrun hands it on
    out, err = process.communicate(timeout=60)
    assert out.count("in 2 processes") == 1, err
    assert err.count("continue with: lmfast train --out") == 1, err
    assert "Warning: FSDP2-wrapped" not in err
    step = int(latest_checkpoint(stopped).name[5:])
    assert 5 <= step < 400
    assert main(["train", "--out", str(stopped), "--resume", "--quiet"]) == 0
    reports = [json.loads((path / "report.json").read_text()) for path in (whole, stopped)]
    # fp32 in another order of summation, through 400 updates.
    assert reports[1]["losses"] == pytest.approx(reports[0]["losses"], abs=0.02)
    assert load_model(stopped).vocab_size == 300


def test_fsdp_needs_torchrun(data, tmp_path, capsys):
    command = ["train", "--data", str(data), *SMALL, "--fsdp", "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert "--fsdp needs several processes: torchrun" in capsys.readouterr().err
