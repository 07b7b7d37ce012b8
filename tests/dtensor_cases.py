"""What tests/training_processes_worker.py does with DTensors in two processes: every operator that
trains, and whole models, on tensors that each process holds and on divided ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_leaves

import lmfast
from lmfast._dispatch import Op
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel
from lmfast.testing import Sample, relative_error

OPERATORS = (
    "rms_norm",
    "add_rms_norm",
    "rope",
    "swiglu",
    "geglu",
    "linear",
    "lora_linear",
    "quantised_linear",
    "attention",
    "additive_attention",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_recurrence",
    "elman_rnn",
    "gru",
    "lstm",
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "decoder": lambda: DecoderLanguageModel(13, 16, 2, 2, 0, final_norm=True, output_bias=True),
    "tied decoder": lambda: DecoderLanguageModel(13, 16, 4, 1, 0, num_kv_heads=2, tie_weights=True),
    "elman model": lambda: RecurrentLanguageModel(13, 16, 2, 0),
    "lstm model": lambda: RecurrentLanguageModel(13, 16, 2, 0, cell="lstm"),
}
NAMES = (*OPERATORS, *MODELS, "few rows", "placements")
LENGTH = 36  # of the models' texts: stacks of recurrent layers this long run as one
PLACES = {"whole": Replicate(), "divided": Shard(0)}
# fp32, and sums over processes in another order.
_LARGEST_ERROR = 1e-5


def run() -> dict[str, str]:
    """Return what is wrong, "" if nothing, for each operator and model."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    results = {}
    for name in OPERATORS:
        results[name] = "; ".join(_operator_problems(lmfast._dispatch.ops()[name], mesh))
    for name, make in MODELS.items():
        results[name] = "; ".join(_model_problems(make(), mesh))
    results["few rows"] = "; ".join(_product_problems(mesh))
    results["placements"] = "; ".join(_placement_problems(mesh))
    return results


def _operator_problems(op: Op, mesh: DeviceMesh) -> Iterator[str]:
    samples = list(op.sample_inputs("cpu", torch.float32))
    for sample in samples[:6]:
        # What plain PyTorch makes of DTensors is not ours: lengths and broadcasting masks.
        if "lengths" in sample.name or not all(t.numel() for t in sample.tensors()):
            continue
        for name, place in PLACES.items():
            if op.name == "additive_attention" and name == "divided":
                continue

            def distributed(t: Tensor, place: Any = place) -> Tensor:
                # PyTorch's `view` does not take unequal parts.
                fits = t.dim() and (t.dim() <= 2 or len(t) % 2 == 0)
                return distribute_tensor(t.detach(), mesh, [place if fits else Replicate()])

            expected, theirs = _results(op, sample.map(lambda t: t.detach()))
            try:
                found, ours = _results(op, sample.map(distributed))
            except (RuntimeError, ValueError) as error:
                yield f"{sample.name}, {name}: {error}"
                continue
            pairs = [*zip(found, expected, strict=True), *zip(ours, theirs, strict=True)]
            error = max(relative_error(_whole(a), b) for a, b in pairs)
            if not error <= _LARGEST_ERROR:
                yield f"{sample.name}, {name}: error {error:.1e}"


def _results(op: Op, sample: Sample) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs without gradients, and the gradients of their weighted sum."""
    with torch.no_grad():
        outputs = _tensors(op.public(*sample.args, **sample.kwargs))
    names = op.differentiable
    if not names:
        return outputs, []
    leaves = [t for t in _tensors(sample.args[: len(names)]) if t.is_floating_point()]
    if op.name == "rope":
        leaves = leaves[:2]  # tables are no parameters
    for t in leaves:
        t.requires_grad_()
    recorded = _tensors(op.public(*sample.args, **sample.kwargs))
    total = sum(o.square().sum() for o in recorded if o.requires_grad)
    return outputs, list(torch.autograd.grad(total, leaves))


def _model_problems(plain: nn.Module, mesh: DeviceMesh) -> Iterator[str]:
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(1, 13, (4, LENGTH), generator=generator) for _ in range(2))
    targets[0, 3] = -100
    expected = plain.loss(ids, targets)
    expected.backward()
    for of_model, place in PLACES.items():
        for of_batch, batch_place in PLACES.items():
            model = _distributed(plain, mesh, place)
            batch = [distribute_tensor(t, mesh, [batch_place]) for t in (ids, targets)]
            try:
                with implicit_replication():  # tables of the rotation are plain tensors
                    loss = model.loss(*batch)
                    loss.backward()
            except RuntimeError as error:
                yield f"{of_model} model, {of_batch} batch: {error}"
                continue
            pairs = [(loss, expected)]
            pairs += [(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters())]
            error = max(relative_error(_whole(a), b) for a, b in pairs)
            if not error <= _LARGEST_ERROR:
                yield f"{of_model} model, {of_batch} batch: error {error:.1e}"


def _distributed(plain: nn.Module, mesh: DeviceMesh, place: Any) -> nn.Module:
    model = copy.deepcopy(plain)
    model.zero_grad()

    def distribute(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = distribute_tensor(parameter.detach(), mesh, [place])
                module.register_parameter(key, nn.Parameter(value))

    return distribute_module(model, mesh, distribute)


def _product_problems(mesh: DeviceMesh) -> Iterator[str]:
    """Few rows of any rank, which a kernel takes as they are, beside weights divided either way."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(160, 128, generator=generator)
    for shape in ((128,), (2, 128), (2, 3, 128)):
        x = torch.randn(shape, generator=generator)
        expected = lmfast.ops.linear(x, weight)
        for x_dim in (None, *range(len(shape))):
            for weight_dim in (None, 0, 1):
                places = [Replicate() if d is None else Shard(d) for d in (x_dim, weight_dim)]
                a, b = (
                    distribute_tensor(t, mesh, [place])
                    for t, place in zip((x, weight), places, strict=True)
                )
                for one, other in (
                    (a, b),
                    (a, distribute_tensor(weight.t(), mesh, [places[1]]).t()),
                ):
                    error = relative_error(_whole(lmfast.ops.linear(one, other)), expected)
                    if not error <= _LARGEST_ERROR:
                        yield f"{shape} {places}: error {error:.1e}"


def _placement_problems(mesh: DeviceMesh) -> Iterator[str]:
    """A divided batch stays divided through a block, and the heads of attention."""

    def divided(*shape: int, dim: int = 0) -> DTensor:
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(shape, generator=generator)
        return distribute_tensor(value, mesh, [Shard(dim)]).requires_grad_()

    weight = distribute_tensor(torch.ones(8), mesh, [Replicate()]).requires_grad_()
    heads = [divided(2, 4, 3, 8, dim=1) for _ in range(3)]
    rows = [divided(2, 4, 3, 8) for _ in range(3)]
    table = distribute_tensor(torch.randn(3, 4), mesh, [Replicate()])
    targets = distribute_tensor(torch.tensor([1, 2, 3, 0]), mesh, [Shard(0)])
    classes = distribute_tensor(torch.randn(5, 8), mesh, [Replicate()])
    outputs = {
        "rms_norm": (lmfast.ops.rms_norm(divided(4, 8), weight), Shard(0)),
        "swiglu": (lmfast.ops.swiglu(divided(4, 8)), Shard(0)),
        "rope": (lmfast.ops.rope(*rows[:2], table, table)[0], Shard(0)),
        "attention": (lmfast.ops.attention(*rows), Shard(0)),
        "attention by heads": (lmfast.ops.attention(*heads), Shard(1)),
        "linear_cross_entropy": (
            lmfast.ops.linear_cross_entropy(divided(4, 8), classes, targets, reduction="none"),
            Shard(0),
        ),
    }
    for name, (output, place) in outputs.items():
        if output.placements != (place,):
            yield f"{name}: {output.placements}"


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
