# SPDX-License-Identifier: Apache-2.0
"""Training a model larger than one GPU: its blocks are divided over processes (FSDP2), each of which reads a share of a step.

What is outside of the blocks (embedding, last norm, output matrix) every process holds whole. Every function here is also right
in a process that is alone; where several work together, all must call it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.multiprocessing as processes
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from deepfusion.errors import DeepFusionError
from deepfusion.types import Progress, silent

Report = tuple[str, int, int, str]
"""What `Progress` is called with."""


def count() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def number() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def divide(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Leave this process its share of the blocks' tensors; in forward and backward passes they are whole for a moment.

    Gradients of divided tensors are means over the processes when the backward pass is over.
    """
    mesh = init_device_mesh(device.type, (count(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def divided(tensor: torch.Tensor) -> bool:
    """Whether this process holds but a share of it."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be divided, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor, divided and placed as `model` is."""
    placed = tensor.to(model.device)
    return distribute_tensor(placed, model.device_mesh, model.placements) if isinstance(model, DTensor) else placed


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Make the gradients of undivided tensors means over the processes, as those of divided ones are."""
    if count() == 1:
        return
    for parameter in parameters:
        if not divided(parameter) and parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= count()


def average(value: float) -> float:
    """Mean of a number over the processes."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(total)
    return float(total) / count()


def clip(parameters: Iterable[torch.Tensor], most: float) -> float:
    """Scale all gradients down where their L2 norm together is above `most`; returns the norm."""
    given = list(parameters)
    if count() == 1:
        return float(torch.nn.utils.clip_grad_norm_(given, most))
    kinds = [p for p in given if divided(p)], [p for p in given if not divided(p)]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = torch.stack(norms).norm()
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, most, norm)
    return float(norm)


def agreed(answer: bool) -> bool:
    """What the first process answers."""
    if count() == 1:
        return answer
    said = [answer]
    distributed.broadcast_object_list(said)
    return said[0]


def together(task: Callable[[Progress], None], size: int, progress: Progress = silent) -> None:
    """Run `task` in `size` new processes of this machine that work together, a GPU each where there are GPUs.

    Args:
        task: picklable; is given a `Progress`, which is heard in the first process.

    Raises:
        DeepFusionError: one of them failed, with what it said; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reports: Any = processes.get_context("spawn").SimpleQueue()
    threads = max(1, torch.get_num_threads() // size)
    running = processes.spawn(_member, (task, size, port, threads, reports), nprocs=size, join=False)  # pyright: ignore
    assert running is not None
    try:
        while not running.join(timeout=0.2):
            _relay(reports, progress)
    except processes.ProcessRaisedException as error:
        said = str(error).strip().splitlines()[-1]
        raise DeepFusionError(f"[server] shards: process {error.error_index} of {size} failed: {said}") from error
    except processes.ProcessExitedException as error:
        raise DeepFusionError(
            f"[server] shards: process {error.error_index} of {size} was ended ({error}); run again with --resume"
        ) from error
    _relay(reports, progress)


def _relay(reports: Any, progress: Progress) -> None:
    while not reports.empty():
        progress(*reports.get())


def _member(index: int, task: Callable[[Progress], None], size: int, port: int, threads: int, reports: Any) -> None:
    """In a new process: take its place among the others (accelerate finds it in the environment), and work."""
    torch.set_num_threads(threads)
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def tell(label: str, done: int, total: int, note: str) -> None:
        reports.put((label, done, total, note))

    try:
        task(silent if index else tell)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
