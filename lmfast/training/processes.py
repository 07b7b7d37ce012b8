"""Training in several processes: who they are, what each takes, and how results come together.

Every process reads the same batches and works on its own rows of each. So a run does not depend
on how many processes it has, a checkpoint of four is resumed by one, and all know how many tokens
a step learns from without asking each other. That all read everything costs next to nothing: on
two CPU cores a stream gives 5.6 M tokens/s, of which the reference decoder learns 35,000 a second.
"""

from __future__ import annotations

import importlib
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# FSDP2 and its tensors are imported where they are used: they take 0.4 s, of all of lmfast's 0.5.


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model together.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @staticmethod
    def current() -> Processes:
        """Return those of PyTorch's default process group; without one, this process alone."""
        if dist.is_available() and dist.is_initialized():
            return Processes(dist.get_rank(), dist.get_world_size())
        return Processes()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.count > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, and return it."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order; picklable ones, to the first only."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.first else None
        dist.gather_object(value, values)
        return values or []

    def largest(self, number: int) -> int:
        """Return the largest of the numbers of all processes."""
        if self.count == 1:
            return number
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        value = torch.tensor(number, device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def in_first(self, action: Callable[[], None]) -> None:
        """Do something in the first process; what goes wrong with its files is raised in all."""
        problem: OSError | None = None
        if self.first:
            try:
                action()
            except OSError as error:
                problem = error
        if self.count > 1:
            box = [problem]
            dist.broadcast_object_list(box)
            problem = box[0]
        if problem is not None:
            raise problem

    def rows(self, batch: Tensor, parts: int) -> list[Tensor]:
        """Return this process's rows of a batch, in so many parts; some may be empty.

        Example:
            >>> Processes(rank=1, count=2).rows(torch.arange(5), 1)
            [tensor([3, 4])]
        """
        own = slice(self.rank * parts, (self.rank + 1) * parts)
        return list(batch.tensor_split(self.count * parts)[own])


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, and give the name of this process's device.

    Outside torchrun there is nothing to join. CPUs talk by gloo, GPUs by NCCL.

    Args:
        device: a device, or "auto" for a GPU where there is one; "cuda" means for each process
            the GPU of its local rank.

    Raises:
        ValueError: the processes cannot have such devices.

    Example:
        >>> with process_group("cpu") as device:
        ...     print(device)
        cpu
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"the device of several processes must be cpu or cuda, got {device}")
    if device == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"process {local} of this machine has no GPU: there are {count}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    # Its functions have the process group as a default. Imported later, by DDP or by DTensors, the
    # module would hold the group, and gloo's threads would run on while the interpreter ends.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield device
        # One that leaves early makes the others abort: half of the runs did without this.
        _last_barrier()
    finally:
        dist.destroy_process_group()


def _last_barrier() -> None:
    """Wait for the other processes, and until gloo's threads have let go of all they worked on.

    A backward pass leaves a Python object in the work it starts, and the thread that drops it needs
    the interpreter's lock. Where DDP's reducer destroys the group, that thread is waited for with
    the lock held; where the interpreter ends, it is ended in the middle. On busy cores a tenth of
    the programs hung, and some aborted (torch 2.13; pytorch/pytorch#56297, #190489). Nothing tells
    when the threads are done: it takes them microseconds, once they have a core and the lock.
    """
    dist.barrier()
    time.sleep(0.1)


def distribute(module: nn.Module, model: nn.Module, device: torch.device, *, shard: bool) -> Any:
    """Make one module train in all processes of the default group.

    Args:
        module: what is called to train; it contains the model.
        model: whose `layers`, if it has such, are gathered one at a time.
        shard: FSDP2: parameters, gradients and optimiser states are divided among the processes.
            Otherwise DDP: each has them all.

    Returns:
        The module to call: wrapped by DDP, or the same one sharded.
    """
    if not shard:
        ids = [device.index] if device.type == "cuda" else None
        # A buffer is a table computed alike everywhere; nothing to send. torch 2.13 has a new name.
        known = inspect.signature(DistributedDataParallel).parameters
        send = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
        options: dict[str, Any] = {"device_ids": ids, send: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(module, **options)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A product's output, which a block may return, is a view. Nothing here writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = getattr(model, "layers", None)
    for layer in layers if isinstance(layers, nn.ModuleList) else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


@contextmanager
def gradients_stay(module: nn.Module) -> Iterator[None]:
    """Keep the gradients of backward passes in here from being exchanged: more are to come."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        sharded: Any = module
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)
    else:
        yield


def let_go(module: nn.Module) -> None:
    """Give back the parameters that FSDP2 gathered for a forward pass without a backward pass."""
    if hasattr(module, "reshard"):
        sharded: Any = module
        sharded.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece; all processes must ask for a sharded one."""
    divided: Any = tensor
    return divided.full_tensor() if _is_sharded(tensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor divided as a parameter is; a scalar stays whole."""
    if not _is_sharded(parameter) or value.dim() == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    divided: Any = parameter
    local = value.to(parameter.device)
    return distribute_tensor(local, divided.device_mesh, divided.placements, src_data_rank=None)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
