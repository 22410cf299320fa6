# SPDX-License-Identifier: Apache-2.0
"""Independent work of the server over machines: one task after the other here, or side by side on Ray (the extra `ray`)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from deepfusion.errors import DeepFusionError

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """[server]: how the server's own work is spread.

    Attributes:
        workers: students that are distilled at a time where they are independent (recipe = "paper"). More than one are tasks
            of Ray (the extra `ray`), a GPU each where there are any: on this machine, or on a cluster by RAY_ADDRESS and
            storage that its machines share. The models are the same, byte for byte, as with one.
        shards: processes, a GPU each where there are GPUs, over which the MoE is divided while it is tuned (FSDP), for one that
            is larger than a GPU. Each reads its share of the micro-batches of a step, so [tune.optimisation] accumulate must be
            a multiple of it. But for rounding the model is the same as with one.
    """

    workers: int = 1
    shards: int = 1

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.workers < 1:
            yield f"workers = {self.workers}: nobody would work; choose 1 or more"
        if self.shards < 1:
            yield f"shards = {self.shards}: nobody would hold the model; choose 1 or more"


def spread(
    task: Callable[[int], Result], numbers: Sequence[int], workers: int, *, done: Callable[[int], None] = lambda count: None
) -> list[Result]:  # fmt: skip
    """The results of `task` for each number, in order; `workers` at a time, each with as many threads as here.

    Args:
        task: with more than one worker it and what it refers to must be picklable.
        done: with more than one worker, told how many are finished; a task that runs here can tell of itself.

    Raises:
        DeepFusionError: Ray is not installed, or a worker died. What a task raises is raised as it is.
    """
    if workers == 1:
        return [task(number) for number in numbers]
    with open_ray("[server] workers", workers) as ray:
        remote = ray.remote(num_cpus=1, num_gpus=1 if ray.cluster_resources().get("GPU") else 0, max_retries=1)(_run)
        shared, threads = ray.put(task), torch.get_num_threads()
        waiting, running, results = list(numbers), dict[Any, int](), dict[int, Result]()
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    number = waiting.pop(0)
                    running[remote.remote(shared, number, threads)] = number
                for job in ray.wait(list(running))[0]:
                    # before it is read: to cancel a task that has just ended can end this process (a check of Ray's)
                    number = running.pop(job)
                    results[number] = ray.get(job)
                    done(len(results))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            raise DeepFusionError(
                f"[server] workers: a worker of Ray was lost ({reason}); run again with --resume"
            ) from error
        finally:
            for job in running:
                ray.cancel(job, force=True)
    return [results[number] for number in numbers]


def import_ray(place: str) -> Any:
    """Ray's module.

    Args:
        place: section and key that ask for it, for the error.

    Raises:
        DeepFusionError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise DeepFusionError(
            f'{place}: Ray is not installed; run: pip install "deepfusion-moe[ray]", or leave this option out'
        ) from error


@contextmanager
def open_ray(place: str, workers: int) -> Generator[Any]:
    """Ray on the cluster that RAY_ADDRESS names, or one that is open already, or within the block one of `workers` here.

    Raises:
        DeepFusionError: see `import_ray`.
    """
    ray = import_ray(place)
    opened = not ray.is_initialized()
    if opened:
        here: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
        ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=environment, **here)
    try:
        yield ray
    finally:
        if opened:
            ray.shutdown()


def _run(task: Callable[[int], Result], number: int, threads: int) -> Result:
    """In a worker: one task."""
    torch.set_num_threads(threads)
    return task(number)
