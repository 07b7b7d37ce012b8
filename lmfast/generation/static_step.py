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

from lmfast import ops
from lmfast.generation import _whole_step
from lmfast.generation._blocks import BlockTable
from lmfast.generation._storage import Storage, on_device
from lmfast.generation.cache import KVCache
from lmfast.generation.module_runner import ModuleRunner
from lmfast.generation.sampler import Sampler
from lmfast.generation.stopping import StopOnDevice

# Steps between two looks of the host.
STEPS_PER_LOOK = 8
# Steps run before the capture: kernels are compiled and measured, workspaces made.
_WARM_UP = 2


class StaticLayer:
    """One layer of a cache whose lengths are a tensor: what attention layers take for a cache.

    `rope_append` only keeps the tokens: `attend` rotates, stores and attends in one operator.
    """

    def __init__(
        self, storage: Storage, lengths: Tensor, table: Tensor | None, capacity: int
    ) -> None:
        self._storage, self._lengths, self._table = storage, lengths, table
        self.longest = capacity - 1  # what rotation tables are made for
        self._new: tuple[Any, ...] = ()

    def rope_append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        interleaved: bool,
        positions: int | Tensor | None,
    ) -> Tensor:
        """Take the tokens of the step."""
        assert positions is None
        self._new = (k, v, cos, sin, interleaved)
        return q

    def attend(self, q: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Rotate, store and attend; the lengths count the new token already."""
        assert mask is None
        k, v, cos, sin, interleaved = self._new
        s = self._storage
        return ops.decode_attention(
            *(q, k, v, s.keys, s.values, self._lengths, cos, sin),
            interleaved=interleaved,
            table=self._table,
            key_scales=s.key_scales,
            value_scales=s.value_scales,
            **options,
        )


class StaticCache:
    """The layers, under the method by which models ask for them."""

    def __init__(self, layers: list[StaticLayer]) -> None:
        self._layers = layers

    def layer(self, index: int, counts: Any = None) -> StaticLayer:
        """Return one layer; all rows have one token per step."""
        return self._layers[index]


def takes(runner: Any) -> bool:
    """Whether a runner's model has a step on static buffers."""
    from lmfast.models.decoder import DecoderLanguageModel  # it stands on the cache

    return isinstance(runner, ModuleRunner) and isinstance(runner._model, DecoderLanguageModel)


def unsupported(job: Any, *, on_cpu: bool = False) -> str | None:
    """Why a job cannot be decoded by a static step, or None."""
    o = job.options
    if not takes(job.runner):
        return "only decoders of lmfast.models have a step on static buffers"
    if job.prompts.ids.device.type != "cuda" and not on_cpu:
        return "CUDA graphs need a GPU"
    if os.environ.get("LMFAST_CUDA_GRAPHS") == "0":
        return "switched off by LMFAST_CUDA_GRAPHS=0"
    if any(layer.attn.rope._depends_on_length for layer in job.runner._model.layers):
        return "the rotation depends on the length of the text"
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
        model: a `DecoderLanguageModel`.
        cache: after the prompts.
        sampler: chooses ids.
        stop: ends rows; None: nothing does.
        pad_id: follows in a row that has ended.
        steps: most steps there may be: room in the cache is found for all of them now.
        number: how many ids were chosen before, for the sampler: at least `min_new_tokens`.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        sampler: Sampler,
        stop: StopOnDevice | None,
        pad_id: int,
        steps: int,
        number: int,
    ) -> None:
        self._model, self._sampler, self._stop, self._pad_id = model, sampler, stop, pad_id
        sampler.draw_each_step()
        self._number = number
        device = cache.device
        start = cache._lengths
        whole = _whole_step.begin(cache, steps, None)
        self.lengths = on_device(start.copy(), device)
        self.new = torch.zeros(len(start), dtype=torch.int64, device=device)
        self.finished = torch.zeros(len(start), dtype=torch.bool, device=device)
        self.ring = torch.zeros(STEPS_PER_LOOK, len(start), dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        longest = int(whole.new.ends.max())
        layers = []
        for group, storage in zip(
            cache._group_of, _whole_step.storage_of(cache, whole), strict=True
        ):
            table = whole.placements[group].table
            layers.append(StaticLayer(storage, self.lengths, table, longest))
        self._cache = StaticCache(layers)

    def begin(self, new: Tensor) -> None:
        """Set the first ids (B,), those chosen from the prompts' logits."""
        self.new.copy_(new)
        if self._stop is not None:
            self.finished.copy_(self._stop.update(new))

    def __call__(self) -> None:
        """Feed the ids, choose the next ones, note who has ended: on the device alone."""
        self.lengths += 1
        logits, _ = self._model.step(self.new[:, None], self._cache)
        new = self._sampler(logits, self._number)
        new = new.masked_fill(self.finished, self._pad_id)
        self._sampler.count(new)
        self.new.copy_(new)
        if self._stop is not None:
            self.finished.copy_(self._stop.update(new))
        self.ring.index_copy_(0, self._at, new[None])
        self._at.add_(1).remainder_(STEPS_PER_LOOK)

    def everything(self) -> list[Tensor]:
        """All tensors that a step changes, but for the cache."""
        state = [self.lengths, self.new, self.finished, self.ring, self._at]
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
    job: Any, sampler: Sampler, logits: Tensor, cache: KVCache
) -> Iterator[Tensor] | None:
    """Yield the new ids (B,) of one step after the other, from the prompts' logits and cache.

    None if the cache cannot be appended to in place: a layer that keeps only a window.
    """
    if not all(isinstance(group, BlockTable) for group in cache._groups):
        return None
    return _steps(job, sampler, logits, cache)


def _steps(job: Any, sampler: Sampler, logits: Tensor, cache: KVCache) -> Iterator[Tensor]:
    o = job.options
    batch, device = len(job.prompts.lengths), logits.device
    stop = None
    if job.eos_ids or o.stop_sequences:
        stop = StopOnDevice(batch, job.eos_ids, o.stop_sequences, device)
    left, number = o.max_new_tokens, 0
    model = job.runner._model
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
        logits, _ = model.step(new[:, None], cache)
    step = StaticStep(model, cache, sampler, stop, job.pad_id, left, number)
    step.begin(new)
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
