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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast.generation.sampler import Sampler
from lmfast.generation.static_models import StaticModel
from lmfast.generation.stopping import StopOnDevice

# Steps between two looks of the host.
STEPS_PER_LOOK = 8
# Steps run before the capture: kernels are compiled and measured, workspaces made.
_WARM_UP = 2


def takes(runner: Any) -> bool:
    """Whether a runner's model has a step on static buffers."""
    return hasattr(runner, "why_not_static") and runner.why_not_static() is None


def unsupported(job: Any, *, on_cpu: bool = False) -> str | None:
    """Why a job cannot be decoded by a static step, or None."""
    o = job.options
    if not hasattr(job.runner, "why_not_static"):
        return "the engine runs whole steps by itself"
    reason = job.runner.why_not_static()
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


def capture(step: StaticStep, generator: torch.Generator | None) -> Callable[[], None]:
    """A function that runs the step once: by a CUDA graph, on a CPU the step itself.

    What warming up and capturing changed is put back; the cache holds the same token again.
    """
    if step.new.device.type != "cuda":
        return step
    before = [t.clone() for t in step.everything()]
    random = None if generator is None else generator.get_state()
    default = torch.cuda.get_rng_state(step.new.device)

    def put_back() -> None:
        for t, b in zip(step.everything(), before, strict=True):
            t.copy_(b)
        torch.cuda.set_rng_state(default, step.new.device)
        if generator is not None and random is not None:
            generator.set_state(random)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
            put_back()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None and generator.device.type == "cuda":
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    put_back()
    return graph.replay


def decode_static(
    job: Any, sampler: Sampler, logits: Tensor, state: Any
) -> Iterator[Tensor] | None:
    """Yield the new ids (B,) of one step after the other, from the prompts' logits and state.

    None if the state cannot be brought onto static buffers: a cache that keeps only a window.
    """
    if not job.runner.may_be_static(state):
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
    run = capture(step, o.generator)
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
