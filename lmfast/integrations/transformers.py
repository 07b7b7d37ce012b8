"""Models of transformers: what `lmfast.patch` adds for them, and parts to use by themselves.

    lmfast.patch(model)                                       # everything
    register(); model.set_attn_implementation("lmfast")       # attention only
    model.generate(ids, past_key_values=LMFastCache(model.config))  # transformers 5.24: cache=
    Trainer(..., callbacks=[use_lmfast()])

Importing this module makes `attn_implementation="lmfast"` known.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lmfast.integrations._attention import attention_forward, name_for, register
from lmfast.integrations._cache import LMFastCache
from lmfast.integrations._continuous import BEFORE
from lmfast.integrations._loss import LazyLogits
from lmfast.integrations._own_attention import calls_attention, form_of, plan_own_attention
from lmfast.integrations._rotary import plan_rotary, rotary_functions
from lmfast.integrations._trainer import use_lmfast
from lmfast.patching import swap
from lmfast.patching.probe import Call, bare_copy, compare, own_randomness, two_copies
from lmfast.patching.rules import Plan

__all__ = ["LMFastCache", "LazyLogits", "attention_forward", "register", "use_lmfast"]

# First and first not: the tests have been run with 5.17, 5.23 and 5.24.
_KNOWN = ((5, 17), (5, 25))

register()


def refusal(model: nn.Module) -> str | None:
    """Why models of the installed transformers are not patched, or None."""
    major, minor = transformers.__version__.split(".")[:2]
    version = int(major), int(minor)
    if _KNOWN[0] <= version < _KNOWN[1]:
        return None
    return (
        f"transformers {transformers.__version__} is not known to work: "
        f"{_KNOWN[0][0]}.{_KNOWN[0][1]} to {_KNOWN[1][0]}.{_KNOWN[1][1] - 1} are; nothing was "
        "replaced"
    )


def roots(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The outermost models of transformers within a module."""
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}." if other else "") for other, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return found


def patch(model: nn.Module, worker: Any) -> None:
    """The part of `lmfast.patch` that needs to know transformers."""
    for _, root in roots(model):
        _own_attention(root, worker)
        _rotary(root, worker)
        _attention(root, worker)
        _loss(root, worker)


def unpatch(model: nn.Module) -> None:
    """Gives the models within a module their attention back."""
    for module in model.modules():
        before = vars(module).pop(BEFORE, None)
        if before is not None and isinstance(module, PreTrainedModel):
            if str(module.config._attn_implementation).startswith(name_for(None)):
                module.set_attn_implementation(before)


def _own_config(model: nn.Module) -> None:
    """Gives a copy of a model a configuration of its own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, memo)


def _inputs(model: PreTrainedModel, embedding: nn.Module, **more: Any) -> list[Call]:
    """Two small batches, the second one with padding in front."""
    weight: Any = embedding.weight
    vocabulary = min(weight.shape[0], 1000)
    ids = torch.randint(0, vocabulary, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        embedded = embedding(ids.to(weight.device))
    mask = _padding()

    def result(keep: Tensor | None) -> Any:
        def select(out: Any) -> Any:
            values = _plain(out.logits if getattr(out, "logits", None) is not None else out[0])
            # Classes of a whole row come from its last token, which is none of padding.
            each = keep is not None and values.shape[:2] == keep.shape
            chosen = [values[keep] if each else values]
            loss = getattr(out, "loss", None)
            return chosen if loss is None else [*chosen, loss]

        return select

    calls = []
    for padding in (None, mask):
        kwargs: dict[str, Any] = {
            "inputs_embeds": embedded.detach().clone().requires_grad_(),
            "use_cache": False,
            **more,
        }
        if padding is not None:
            kwargs["attention_mask"] = padding.to(weight.device)
        keep = None if padding is None else padding.bool().to(weight.device)
        calls.append(Call((), kwargs, result(keep)))
    return calls


def _padding() -> Tensor:
    """The mask of the second batch: its second row has two tokens in front that are none."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :2] = 0
    return mask


def _plain(values: Tensor) -> Tensor:
    return values.compute() if isinstance(values, LazyLogits) else values


def _quiet(model: nn.Module) -> None:
    """Only the inputs of a copy get gradients."""
    for p in model.parameters():
        p.requires_grad_(False)


def _rotary(root: PreTrainedModel, worker: Any) -> None:
    wanted = {
        name: m
        for name, m in root.named_modules()
        if id(m) not in worker.outcomes and rotary_functions(m)
    }
    if not wanted:
        return
    for m, calls in _with_calls(root, wanted, worker):
        plan = plan_rotary(m, lambda calls=calls: calls)  # type: ignore[misc]
        if isinstance(plan, Plan):
            worker.attempt(m, plan)
        elif plan is not None:
            worker.outcomes[id(m)] = (None, plan)


def _own_attention(root: PreTrainedModel, worker: Any) -> None:
    """Layers that do not ask transformers' AttentionInterface."""
    if root._can_set_attn_implementation():
        return
    wanted = {
        name: m
        for name, m in root.named_modules()
        if id(m) not in worker.outcomes and form_of(m) is not None
    }
    if not wanted:
        return
    # Rows of padding see no key, and every implementation fills them as it likes.
    real = _padding().bool()
    for m, calls in _with_calls(root, wanted, worker):
        for call, keep in zip(calls, (torch.ones_like(real), real)):
            call.select = functools.partial(_rows, keep=keep)
            # Whoever collects weights says so.
            call.kwargs["output_attentions"] = False
        plan = plan_own_attention(m, lambda calls=calls: calls)  # type: ignore[misc]
        if plan is not None and not worker.attempt(m, plan) and rotary_functions(m):
            del worker.outcomes[id(m)]  # its rotary positions are tried next


def _rows(result: Any, keep: Tensor) -> Tensor:
    """Rows of what an attention layer returns beside its weights."""
    return result[0][keep.to(result[0].device)]


def _with_calls(
    root: PreTrainedModel, wanted: dict[str, nn.Module], worker: Any
) -> Iterator[tuple[nn.Module, list[Call]]]:
    """Modules with the calls that they get when the model runs; what gets none is reported."""
    try:
        captured = _captured(root, set(wanted))
    except Exception as error:
        for m in wanted.values():
            worker.outcomes[id(m)] = (None, f"the model could not be run: {error}")
        return
    for name, m in wanted.items():
        if name in captured:
            yield m, captured[name]
        else:
            worker.outcomes[id(m)] = (None, "the model does not call it")


def _captured(root: PreTrainedModel, names: set[str]) -> dict[str, list[Call]]:
    """The arguments that modules get when the model runs."""
    found: dict[str, list[Call]] = {}
    with own_randomness(root):
        clone = bare_copy(root)
        for name, m in clone.named_modules():
            if name in names:

                def keep(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                    found.setdefault(name, []).append(_fresh(args, kwargs))

                m.register_forward_pre_hook(keep, with_kwargs=True)
        clone.eval()
        embedding = clone.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad():
            for call in _inputs(root, embedding):
                clone.forward(**call.kwargs)
    return found


def _fresh(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A captured call with its first floating-point tensor made a leaf that gets a gradient."""
    args, kwargs = tuple(args), dict(kwargs)
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            args = (*args[:index], value.detach().clone().requires_grad_(), *args[index + 1 :])
            return Call(args, kwargs)
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            kwargs[name] = value.detach().clone().requires_grad_()
            break
    return Call(args, kwargs)


def _attention(root: PreTrainedModel, worker: Any) -> None:
    """`attn_implementation="lmfast"`, if the whole model computes the same with it."""
    report = worker.report
    before = root.config._attn_implementation
    name = name_for(worker.backend)
    if before == name:
        report.notes.append(f'attention: attn_implementation="{name}" already')
        return
    if not root._can_set_attn_implementation():
        count = sum(calls_attention(m) for m in root.modules())
        layers = f"{count} layer{'s' if count > 1 else ''}"
        what = f"lmfast.ops.attention within {layers}" if count else "left as it is"
        report.notes.append(
            f"attention: {what}, the model does not use transformers' AttentionInterface"
        )
        return
    if getattr(root.config, "output_attentions", False):
        # transformers saves such a configuration with "eager" alone.
        reason: str | None = "config.output_attentions asks for the weights in every call"
    else:
        reason = _differs(root, lambda clone: clone.set_attn_implementation(name))
    if reason is not None:
        report.notes.append(f"attention: left as it is ({before}): {reason}")
        return
    vars(root)[BEFORE] = before
    root.set_attn_implementation(name)
    report.notes.append(f'attention: attn_implementation="{name}" in the place of "{before}"')


def _differs(root: PreTrainedModel, change: Any, **more: Any) -> str | None:
    """Why a copy of a model that was changed computes something else, or None."""
    with own_randomness(root):
        try:
            original, candidate = two_copies(root)
            _quiet(original)
            _own_config(candidate)
            change(candidate)
            calls = _inputs(root, original.get_input_embeddings(), **more)  # type: ignore[operator]
        except Exception as error:
            return f"it could not be checked: {type(error).__name__}: {error}"
        return compare(original, candidate, calls)


def _loss(root: PreTrainedModel, worker: Any) -> None:
    """The loss without logits, where there is an output layer."""
    if swap.swap_of(root) is not None:
        return
    layer = root.get_output_embeddings()
    name = "lmfast.integrations"
    note = "no output layer: nothing but what it holds"
    if layer is not None:
        name, note = (
            "lmfast.ops.linear_cross_entropy",
            "the loss in training; logits when looked at",
        )
    options: dict[str, Any] = {"backend": worker.backend, "label": name, "note": note}
    chosen = tuple(sorted(options.items()))
    if "forward" in vars(root):
        worker.outcomes[id(root)] = (None, "its forward was replaced on the instance")
        return
    if layer is not None:
        labels = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(4))
        labels[0, 2] = -100
        reason = _differs(
            root,
            lambda clone: swap.apply(clone, "transformers_model", chosen),
            labels=labels.to(root.device),
        )
        if reason is not None:
            worker.outcomes[id(root)] = (None, f"loss: {reason}")
            return
    swap.apply(root, "transformers_model", chosen)
    worker.outcomes[id(root)] = (name if layer is not None else None, note)
