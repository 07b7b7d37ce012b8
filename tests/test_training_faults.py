"""What happens to a run: killed while saving, a full disk, a file that may not grow, SIGTERM."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from lmfast.cli import main
from lmfast.models import DecoderLanguageModel
from lmfast.training import PackedBatches, Trainer, files, latest_checkpoint, load_model


def trainer(directory, steps=9, **options):
    torch.manual_seed(0)
    ids = torch.randint(1, 13, (400,), generator=torch.Generator().manual_seed(0))
    options = {"save_every": 1, "output_dir": directory, "progress": False, **options}
    model = DecoderLanguageModel(13, 16, 2, 1, 0)
    return Trainer(model, PackedBatches(ids, 8, context=10), max_steps=steps, **options)


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def saved_by_a_child(run, killed_at):
    """Let a child process save, killed before its operation of that number; return its status."""
    child = os.fork()
    if child != 0:
        return os.waitpid(child, 0)[1]
    count = itertools.count()

    def counted(function):
        def call(*args, **options):
            if next(count) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    status = 1  # for whatever else happens: this copy of pytest must not go on
    try:
        torch.set_num_threads(1)  # the threads of the pool are not in the child
        for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        files.save_file = counted(files.save_file)
        run.save()
        status = 0
    finally:
        os._exit(status)


@pytest.mark.parametrize("again", [False, True])
def test_killed_at_any_moment_of_saving(tmp_path, again):
    """kill -9 before every operation on the file system: a whole checkpoint is always there, and
    the run goes on from it to the same end; `again`: one of the same step is being replaced."""
    whole = trainer(tmp_path / "whole", 5)
    whole.fit()
    earlier = tmp_path / "earlier"
    trainer(earlier, 3).fit()
    last = {"step-00000003"} if again else {"step-00000003", "step-00000004"}
    for killed_at in range(99):
        place = tmp_path / f"killed-{killed_at}"
        shutil.copytree(earlier, place)
        run = trainer(place, 3 if again else 4)
        run.resume()
        if not again:
            run.save_every = 0
            run.fit()
        status = saved_by_a_child(run, killed_at)
        continued = trainer(place, 5)
        continued.resume()
        assert latest_checkpoint(place).name in last
        continued.fit()
        assert torch.equal(parameters(continued), parameters(whole))
        if status == 0:  # it came to its end
            break
        assert os.WIFSIGNALED(status), f"the child that saves failed: exit status {status >> 8}"
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert killed_at >= 10
    assert latest_checkpoint(place).name == "step-00000005"


def test_runs_killed_at_random_moments_end_as_one_that_was_not(tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"the cat number {i} sat on the mat {i % 7}"}) for i in range(600)]
    data.write_text("\n".join(lines))
    options = ["--data", str(data), "--vocab-size", "300", "--emb-dim", "16", "--heads", "2"]
    options += ["--layers", "1", "--batch-size", "4", "--context", "8", "--quiet", "--steps", "40"]
    options += ["--save-every", "1", "--stream", "--buffer", "50", "--eval-every", "0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", *options, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "lmfast", "train", "--out", str(killed)]
    started, kills = options, 0
    for wait in (0, 9, 23):  # until so many steps are saved, then as soon as that is seen
        process = subprocess.Popen([*command, *started], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            names = [p.name for p in (killed / "checkpoints").glob("step-*")]
            if (killed / "run.json").exists() and (
                not wait or any(int(name[5:]) >= wait for name in names)
            ):
                break
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        started = ["--resume", "--quiet"]
    assert kills == 3
    assert main(["train", "--out", str(killed), "--resume", "--quiet"]) == 0
    a, b = load_model(whole).state_dict(), load_model(killed).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    reports = [json.loads((run / "report.json").read_text()) for run in (whole, killed)]
    assert reports[0]["losses"] == reports[1]["losses"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(small_disk):
    trainer(small_disk, 3, keep=1).fit()
    last = latest_checkpoint(small_disk)
    obstacle = small_disk / "in the way"
    size = sum(path.stat().st_size for path in last.iterdir())
    for left in (1, 2, 3):  # where it does not fit: at its end, in its middle, nearer its start
        obstacle.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - size * left // 4))
        run = trainer(small_disk, 9, keep=1)
        run.resume()
        message = f"checkpoint of step 4 could not be written.*the last one is .*{last.name}"
        with pytest.raises(OSError, match=message):
            run.fit()
        assert [path.name for path in last.parent.iterdir()] == [last.name]
        obstacle.unlink()
    run = trainer(small_disk, 9, keep=1)
    run.resume()
    assert run.fit().step == 9


def test_a_file_size_limit_is_told_and_leaves_the_last_checkpoint(tmp_path):
    run = trainer(tmp_path, 2)
    run.fit()
    run.report.step = 3
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"step-00000002$"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = trainer(tmp_path, 4)
    again.resume()
    assert again.fit().step == 4


def test_a_disk_that_fails_at_the_end_is_told(tmp_path, monkeypatch):
    run = trainer(tmp_path, 2)
    run.fit()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run.report.step = 3
    with pytest.raises(OSError, match=r"No space left on device; the last one is .*step-00000002"):
        run.save()
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_sigterm_saves_and_a_second_one_ends_at_once(tmp_path):
    calls = []

    def stop(model, x, y, ignore_index):
        calls.append(os.kill(os.getpid(), signal.SIGTERM) if len(calls) == 2 else None)
        return model.loss(x, y, ignore_index=ignore_index)

    previous = signal.getsignal(signal.SIGTERM)
    run = trainer(tmp_path, 9, loss=stop, save_every=0)
    report = run.fit()
    assert (report.step, report.interrupted, report.stop_signal) == (3, True, signal.SIGTERM)
    assert latest_checkpoint(tmp_path).name == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) is previous

    class Ended(BaseException):
        pass

    def end(number, frame):
        raise Ended

    def stop_twice(model, x, y, ignore_index):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended):
            trainer(tmp_path / "other", 9, loss=stop_twice).fit()
    finally:
        signal.signal(signal.SIGTERM, previous)
