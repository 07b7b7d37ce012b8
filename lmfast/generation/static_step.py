"""Decoding by a step whose tensors never move: on a GPU one CUDA graph per token.

A step of a small model is some hundred kernels of a few microseconds each, and starting them from
Python takes longer than running them. Here everything that changes from token to token lies in
tensors: the new ids, the lengths, the random numbers, which rows have ended, and a ring of the last
ids. So the step is captured once and replayed; choosing, drawing and stopping run on the device,
and the host reads the ring every few steps. What cannot be expressed so takes the ordinary loop.

On a CPU the same step runs eagerly: that is how it is tested without a GPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast.generation.sampler import Sampler
from lmfast.generation.static_models import StaticModel
from lmfast.generation.stopping import StopOnDevice

# (step, generator, put back) -> what replays the step.
Record = Callable[["StaticStep", "torch.Generator | None", Callable[[], None]], Callable[[], None]]
# Steps between two looks of the host.
STEPS_PER_LOOK = 8
# Steps run before the capture: kernels are compiled and measured, workspaces made.
_WARM_UP = 2


def why_not_captured(runner: Any) -> str | None:
    """Why a runner's model is run without CUDA graphs whatever the options say, or None."""
    if not hasattr(runner, "why_not_static"):
        return "the engine runs whole steps by itself"
    return getattr(runner, "capture_refused", None) or runner.why_not_static()


def takes(runner: Any) -> bool:
    """Whether a runner's model has a step on static buffers."""
    return why_not_captured(runner) is None


def explained(runner: Any) -> str:
    """What `Generator.explain` adds for a model on a GPU."""
    if runner.device.type != "cuda":
        return ""
    refused = why_not_captured(runner)
    if refused is not None:
        return f"; no CUDA graphs: {refused}"
    return "; a CUDA graph per token where the options allow it"


def unsupported(job: Any, *, on_cpu: bool = False) -> str | None:
    """Why a job cannot be decoded by a static step, or None."""
    o = job.options
    reason = why_not_captured(job.runner)
    if reason is not None:
        return reason
    if job.prompts.ids.device.type != "cuda" and not on_cpu:
        return "CUDA graphs need a GPU"
    if os.environ.get("LMFAST_CUDA_GRAPHS") == "0":
        return "switched off by LMFAST_CUDA_GRAPHS=0"
    for name, given in (
        ("stop strings", bool(o.strings())),
        ("choices", job.choices is not None),
        ("log-probabilities", job.want_log_probs),
        ("use_cache=False", not o.use_cache),
        ('context_policy="slide"', o.context_policy == "slide" and job.window is not None),
    ):
        if given:
            return f"{name} are looked at by the host after every token"
    return None


class StaticStep:
    """The tensors of a step, and the step.

    Args:
        model: with the prompts' state on static buffers.
        sampler: chooses ids.
        stop: ends rows; None: nothing does.
        pad_id: follows in a row that has ended.
        new: (B,) the first ids, those chosen from the prompts' logits.
        number: how many ids were chosen before, for the sampler: at least `min_new_tokens`.
    """

    def __init__(
        self,
        model: StaticModel,
        sampler: Sampler,
        stop: StopOnDevice | None,
        pad_id: int,
        new: Tensor,
        number: int,
    ) -> None:
        self.model, self._sampler, self._stop, self._pad_id = model, sampler, stop, pad_id
        sampler.draw_each_step()
        self._number = number
        self.new = new.clone()
        self.finished = torch.zeros_like(new, dtype=torch.bool)
        self.ring = new.new_zeros(STEPS_PER_LOOK, len(new))
        self._at = new.new_zeros(1)
        if stop is not None:
            self.finished.copy_(stop.update(new))

    def __call__(self) -> None:
        """Feed the ids, choose the next ones, note who has ended: on the device alone."""
        new = self._sampler(self.model(self.new), self._number)
        new = new.masked_fill(self.finished, self._pad_id)
        self._sampler.count(new)
        self.new.copy_(new)
        if self._stop is not None:
            self.finished.copy_(self._stop.update(new))
        self.ring.index_copy_(0, self._at, new[None])
        self._at.add_(1).remainder_(STEPS_PER_LOOK)

    def everything(self) -> list[Tensor]:
        """All tensors that a step changes, but for keys and values."""
        state = [*self.model.state(), self.new, self.finished, self.ring, self._at]
        if self._sampler.counts is not None:
            state.append(self._sampler.counts)
        return state + ([] if self._stop is None else self._stop.state())


class Before:
    """What a step changes, and the random numbers, as they were: `put_back` does so."""

    def __init__(self, step: StaticStep, generator: torch.Generator | None) -> None:
        device = step.new.device
        self._step, self._tensors = step, [t.clone() for t in step.everything()]
        self._generators = [] if generator is None else [generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[step.new.get_device()])
        self._random = [g.get_state() for g in self._generators]
        # A capture that fails may leave a generator waiting for its end: then these take over.
        self._copies = [g.clone_state() for g in self._generators if g.device.type == "cuda"]

    def put_back(self) -> None:
        """Set everything to what it was."""
        for t, b in zip(self._step.everything(), self._tensors, strict=True):
            t.copy_(b)
        for generator, state in zip(self._generators, self._random, strict=True):
            generator.set_state(state)

    def put_back_after_failure(self) -> None:
        """The same, with generators that know of no capture."""
        on_gpu = [g for g in self._generators if g.device.type == "cuda"]
        for generator, copy in zip(on_gpu, self._copies, strict=True):
            generator.graphsafe_set_state(copy)
        self.put_back()


def capture(
    step: StaticStep, generator: torch.Generator | None, record: Record | None = None
) -> tuple[Callable[[], None], str | None]:
    """A function that runs the step once, and why it is the step itself: None for a CUDA graph, and
    where memory was missing, which the next job may have.

    What warming up and capturing changed is put back; the cache holds the same token again. A model
    that waits for the host cannot be captured, nor can much else of other people's: where it
    fails, the step runs eagerly on the same tensors.
    """
    if record is None:
        if step.new.device.type != "cuda":
            return step, "CUDA graphs need a GPU"
        record = _record
    before = Before(step, generator)
    try:
        replay = record(step, generator, before.put_back)
    except Exception as error:  # whatever the model raises: if it is no matter of graphs, the
        before.put_back_after_failure()  # step raises it again
        if isinstance(error, torch.OutOfMemoryError):
            return step, None
        lines = str(error).splitlines() or [""]
        return step, f"its capture failed with {type(error).__name__}: {lines[0]}"
    before.put_back()
    return replay, None


def _record(
    step: StaticStep, generator: torch.Generator | None, put_back: Callable[[], None]
) -> Callable[[], None]:
    """Warm up and capture."""
    stream, waits = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    side = torch.cuda.Stream()
    side.wait_stream(stream)
    try:
        with torch.cuda.stream(side):
            for number in range(_WARM_UP):
                # By the last one kernels are compiled and chosen: what waits for the host now would
                # break the capture off, which is harder to clean up after than an error here.
                if number == _WARM_UP - 1:
                    with warnings.catch_warnings():  # that the mode does not see everything
                        warnings.simplefilter("ignore")
                        torch.cuda.set_sync_debug_mode("error")
                step()
                torch.cuda.set_sync_debug_mode(waits)
                put_back()
        stream.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if generator is not None and generator.device.type == "cuda":
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_sync_debug_mode(waits)
        torch.cuda.set_stream(stream)  # a capture that fails at its end stays on its own
        stream.wait_stream(side)
    return graph.replay


def decode_static(
    job: Any, sampler: Sampler, logits: Tensor, state: Any
) -> Iterator[Tensor] | None:
    """Yield the new ids (B,) of one step after the other, from the prompts' logits and state.

    None if the state cannot be brought onto static buffers: a cache that keeps only a window, or
    no memory for all tokens at once.
    """
    if not job.runner.may_be_static(state, job.options.max_new_tokens):
        return None
    return _steps(job, sampler, logits, state)


def _steps(job: Any, sampler: Sampler, logits: Tensor, state: Any) -> Iterator[Tensor]:
    o = job.options
    batch, device = len(job.prompts.lengths), logits.device
    stop = None
    if job.eos_ids or o.stop_sequences:
        stop = StopOnDevice(batch, job.eos_ids, o.stop_sequences, device)
    left, number = o.max_new_tokens, 0
    finished: Tensor | None = None
    # Until the minimum is reached a step differs from the next: these run one by one.
    while True:
        new = sampler(logits, number)
        new = new if finished is None else new.masked_fill(finished, job.pad_id)
        sampler.count(new)
        yield new
        number, left = number + 1, left - 1
        if left == 0:
            return
        if number >= o.min_new_tokens:
            break
        if stop is not None:
            finished = stop.update(new, False)
        logits, state = job.runner.step(new[:, None], state)
    model = job.runner.static_model(state, left)
    step = StaticStep(model, sampler, stop, job.pad_id, new, number)
    if stop is not None and bool(step.finished.all()):
        return
    run, refused = capture(step, o.generator)
    if refused is not None and step.new.device.type == "cuda":
        job.runner.capture_refused = refused  # the ordinary loop from now on
    while left > 0:
        count = min(STEPS_PER_LOOK, left)
        for _ in range(count):
            run()
        found = step.ring[:count].clone()  # the ring begins anew with every look
        left -= count
        done = stop is not None and bool(step.finished.all())
        yield from found.unbind()
        if done:
            return
