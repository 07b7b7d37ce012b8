"""The step on static buffers, run eagerly on the CPU, says what the ordinary loop says.

Models of transformers: test_generation_static_transformers.py.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lmfast.generation import Generator, loop, static_step
from lmfast.generation.module_runner import ModuleRunner
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel

V = 40


def model(**options: Any) -> DecoderLanguageModel:
    torch.manual_seed(1)
    made = DecoderLanguageModel(V, 32, 4, 2, 0, num_kv_heads=2, final_norm=True, **options)
    return made.double()  # both ways round differently


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes the static step on the CPU as well; how many jobs went that way."""
    taken: list[int] = []
    unsupported, steps = static_step.unsupported, static_step._steps
    monkeypatch.setattr(static_step, "unsupported", lambda job: unsupported(job, on_cpu=True))
    monkeypatch.setattr(static_step, "_steps", lambda *a: (taken.append(1), steps(*a))[1])
    return taken


def generator_of(model: Any) -> Generator:
    """By the modules: the engine of the CPU would take the model otherwise."""
    generator = Generator(model)
    generator.runner = ModuleRunner(model)
    return generator


def generate(decoder: Any, ids: Tensor, seed: int | None, **options: Any) -> Tensor:
    if seed is not None:
        options |= {"do_sample": True, "generator": torch.Generator().manual_seed(seed)}
    return generator_of(decoder).generate(ids, **options)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "greedy": ({}, {}, None),
    "one token": ({}, {"max_new_tokens": 1}, None),
    "two tokens": ({}, {"max_new_tokens": 2}, None),
    "drawn": ({}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}, 7),
    "penalties": ({}, {"repetition_penalty": 1.4, "frequency_penalty": 0.2}, 8),
    "ends": ({}, {"eos_token_id": list(range(1, 12))}, 9),
    "ends late": ({}, {"eos_token_id": list(range(1, 30)), "min_new_tokens": 11}, 10),
    "ends at once": ({}, {"eos_token_id": list(range(V))}, 11),
    "stop sequences": ({}, {"stop_sequences": [[i, j] for i in range(9) for j in range(V)]}, 12),
    "several of each": ({}, {"num_return_sequences": 3}, 13),
    "half rotation, window": ({"rope_interleaved": False, "window": 500}, {}, None),
    "capped, normed": ({"softcap": 5.0, "qk_norm": True, "logit_softcap": 9.0}, {}, 14),
}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_ids_as_the_loop(name: str, ragged: bool, static: list[int]) -> None:
    made, options, seed = CASES[name]
    decoder = model(**made)
    ids = torch.randint(1, V, (3, 70), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 30, "eos_token_id": None, **options}
    if ragged:
        mask = torch.ones_like(ids)
        mask[0, :9] = mask[2, :69] = 0
        options["attention_mask"] = mask
    found = generate(decoder, ids, seed, **options)
    assert static == [1]
    static_step.unsupported = lambda job: "not now"  # the fixture puts it back
    expected = generate(decoder, ids, seed, **options)
    assert static == [1]
    # The host looks every eighth step; on a GPU, `generate` then cuts the padding off.
    assert torch.equal(found[:, : expected.shape[1]], expected)
    assert not found[:, expected.shape[1] :].any()
    assert found.shape[1] - expected.shape[1] < static_step.STEPS_PER_LOOK


def test_a_stream_gives_out_every_step(static: list[int]) -> None:
    decoder, ids = model(), torch.tensor([[3, 4, 5]])
    steps = list(generator_of(decoder).stream(ids, max_new_tokens=19))
    assert len(steps) == 19
    expected = generate(decoder, ids, None, max_new_tokens=19)
    assert torch.equal(torch.stack(steps, 1), expected[:, 3:])


def test_a_window_that_is_not_kept_whole_takes_the_loop(static: list[int]) -> None:
    decoder, ids = model(window=8), torch.randint(1, V, (1, 400))
    assert generate(decoder, ids, None, max_new_tokens=3).shape == (1, 403)
    assert static == []


class _Tokens:
    """What stop strings need."""

    def decode(self, ids: Any) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"stop_strings": ["abcdef"], "tokenizer": _Tokens()}, "stop strings"),
    ],
)
def test_says_why_not(options: dict[str, Any], reason: str) -> None:
    said: list[str | None] = []
    generator = generator_of(model())
    wanted = loop.GenerationOptions(max_new_tokens=2, **options)
    job = generator._job(torch.tensor([[3, 4]]), None, wanted)
    said.append(static_step.unsupported(job, on_cpu=True))
    assert reason in str(said[0])
    assert "need a GPU" in str(static_step.unsupported(job))


class _Other:
    """A model of somebody else, which may look at its values."""

    vocab_size = V

    def new_state(self, batch: int, capacity: int | None) -> Tensor:
        return torch.zeros(1, batch, 1)

    def step(self, ids: Tensor, state: Tensor, lengths: Tensor | None = None) -> tuple:
        return torch.zeros(len(ids), V), state


def test_other_models_and_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, ids = loop.GenerationOptions(max_new_tokens=2), torch.tensor([[3, 4]])
    other = generator_of(_Other())
    assert "only lmfast's decoders" in str(static_step.unsupported(other._job(ids, None, wanted)))
    job = generator_of(model())._job(ids, None, wanted)
    assert static_step.unsupported(job, on_cpu=True) is None
    monkeypatch.setenv("LMFAST_CUDA_GRAPHS", "0")
    assert "LMFAST_CUDA_GRAPHS" in str(static_step.unsupported(job, on_cpu=True))


def recurrent(cell: str = "lstm") -> RecurrentLanguageModel:
    torch.manual_seed(1)
    return RecurrentLanguageModel(V, 16, 2, 0, cell=cell).double()


@pytest.mark.parametrize("cell", ["elman", "rnn", "lstm", "gru", "gru_textbook", "min_lstm"])
def test_recurrent_models_say_the_same(cell: str, static: list[int]) -> None:
    ids = torch.randint(1, V, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options: dict[str, Any] = {"max_new_tokens": 21, "eos_token_id": [1, 2], "attention_mask": mask}
    found = generate(recurrent(cell), ids, 5, **options)
    assert static == [1]
    static_step.unsupported = lambda job: "not now"  # the fixture puts it back
    expected = generate(recurrent(cell), ids, 5, **options)
    assert torch.equal(found[:, : expected.shape[1]], expected)


def made_step(decoder: Any) -> static_step.StaticStep:
    """A step with everything in it: draws, penalties, ids and sequences that end a row."""
    wanted = loop.GenerationOptions(
        max_new_tokens=20,
        eos_token_id=3,
        stop_sequences=[[5, 6]],
        frequency_penalty=0.1,
        do_sample=True,
        top_k=5,
    )
    job = generator_of(decoder)._job(torch.randint(4, V, (2, 5)), None, wanted)
    sampler = loop.Sampler(wanted, job.prompts, V, job.eos_ids)
    logits, state = job.start()
    stop = static_step.StopOnDevice(2, job.eos_ids, wanted.stop_sequences, logits.device)
    static = job.runner.static_model(state, 15)
    return static_step.StaticStep(static, sampler, stop, 0, logits.argmax(-1), 1)


@pytest.mark.parametrize("kind", [model, recurrent])
@torch.inference_mode()
def test_a_step_moves_no_tensor(kind: Any) -> None:
    """What a graph has captured stays where it was: every step writes to the same memory."""
    step = made_step(kind())
    places = [t.data_ptr() for t in step.everything()]
    before = [t.clone() for t in step.everything()]
    for _ in range(15):
        step()
    assert [t.data_ptr() for t in step.everything()] == places
    if kind is model:
        assert torch.equal(step.model.lengths, before[0] + 15)
    # Put back, a step says the same again: the capture relies on it.
    torch.manual_seed(6)
    found = []
    for _ in range(2):
        for t, b in zip(step.everything(), before, strict=True):
            t.copy_(b)
        torch.manual_seed(6)
        step()
        found.append([t.clone() for t in step.everything()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [model, recurrent])
@pytest.mark.parametrize("looks", [False, True])
def test_a_step_looks_at_no_value(looks: bool, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that have no values: whatever would wait for a GPU raises."""
    with torch.no_grad():
        step = made_step(kind())
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU, unchecked
        if looks:
            update = step._stop.update
            step._stop.update = lambda ids: (bool(ids.any()), update(ids))[1]
        with FakeTensorMode(allow_non_fake_inputs=True):
            if looks:
                with pytest.raises(DataDependentOutputException):
                    step()
            else:
                step()


@pytest.mark.parametrize("fails", [False, True])
@torch.inference_mode()
def test_what_a_capture_changed_is_put_back(fails: bool) -> None:
    """Also where it fails: then the step itself goes on, with the same tensors and draws."""
    step, draws = made_step(model()), torch.Generator().manual_seed(4)
    step._sampler._generator = draws
    before, state = [t.clone() for t in step.everything()], draws.get_state()

    def record(step: Any, generator: Any, put_back: Any) -> Any:
        step()
        put_back()
        assert torch.equal(draws.get_state(), state)
        step()
        if fails:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return step.__call__

    run, refused = static_step.capture(step, draws, record)
    assert all(torch.equal(a, b) for a, b in zip(step.everything(), before, strict=True))
    assert torch.equal(draws.get_state(), state)
    assert (run is step) == fails
    said = "its capture failed with RuntimeError: called a synchronizing CUDA operation"
    assert refused == (said if fails else None)
    run()
    assert torch.equal(step.model.lengths, before[0] + 1)

    def without_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    assert static_step.capture(step, draws, without_memory) == (step, None)


def test_generation_goes_on_where_a_capture_fails(
    static: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(step: Any, generator: Any, put_back: Any) -> Any:
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    capture = static_step.capture
    monkeypatch.setattr(static_step, "capture", lambda step, g: capture(step, g, record))
    ids = torch.randint(1, V, (3, 9), generator=torch.Generator().manual_seed(2))
    # Without draws: a CPU, not a GPU, has drawn for several steps before this one.
    options: dict[str, Any] = {"max_new_tokens": 21, "eos_token_id": [1, 2]}
    found = generate(model(), ids, None, frequency_penalty=0.2, **options)
    assert static == [1]
    static_step.unsupported = lambda job: "not now"  # the fixture puts it back
    expected = generate(model(), ids, None, frequency_penalty=0.2, **options)
    assert torch.equal(found[:, : expected.shape[1]], expected)


class _Stream:
    """Where a capture runs; the current one is what `torch.cuda` has."""

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, _Stream)


@pytest.mark.parametrize("fails", ["", "waits", "at the end"])
def test_a_capture_leaves_streams_and_modes_as_they_were(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of calls, with a `torch.cuda` that keeps them: warm-up, watched, captured."""
    first, calls = _Stream(), []
    current, mode = [first], [1]

    @contextmanager
    def on(stream: Any) -> Any:
        current.append(stream)
        yield
        current.pop()

    @contextmanager
    def graph(graph: Any) -> Any:
        current.append(_Stream())
        yield
        if fails == "at the end":  # as PyTorch does, which stays on the stream then
            raise RuntimeError("capture invalidated")
        current.pop()

    def step() -> None:
        calls.append((mode[0], len(current)))
        if fails == "waits" and mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    fakes = {
        "Stream": _Stream,
        "stream": on,
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay="replay"),
        "current_stream": lambda: current[-1],
        "set_stream": lambda stream: current.append(stream),
        "get_sync_debug_mode": lambda: mode[0],
        "set_sync_debug_mode": lambda m: mode.__setitem__(0, m),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    put_back = partial(calls.append, "put back")
    if fails:
        with pytest.raises(RuntimeError):
            static_step._record(step, None, put_back)
    else:
        assert static_step._record(step, None, put_back) == "replay"
    watched = [(1, 2), "put back", ("error", 2)]
    assert calls == (watched if fails == "waits" else [*watched, "put back", (1, 2)])
    assert current[-1] is first
    assert mode == [1]


def test_a_model_that_was_not_captured_takes_the_loop() -> None:
    wanted, ids = loop.GenerationOptions(max_new_tokens=2), torch.tensor([[3, 4]])
    generator = generator_of(model())
    assert static_step.takes(generator.runner)
    generator.runner.capture_refused = "its capture failed"
    assert not static_step.takes(generator.runner)
    reason = static_step.unsupported(generator._job(ids, None, wanted), on_cpu=True)
    assert reason == "its capture failed"


def test_explain_says_why_there_are_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = generator_of(model())
    assert static_step.explained(generator.runner) == ""
    monkeypatch.setattr(ModuleRunner, "device", torch.device("cuda"))
    assert "; a CUDA graph per token" in static_step.explained(generator.runner)
    generator.runner.capture_refused = "its capture failed"
    assert static_step.explained(generator.runner) == "; no CUDA graphs: its capture failed"
