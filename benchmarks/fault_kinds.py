# SPDX-License-Identifier: Apache-2.0
"""The kinds of faults that `faults.py` brings about, each at a moment drawn at random, in a fleet on loopback."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from deepfusion.artifacts import holder
from deepfusion.fleet import faults
from deepfusion.fleet.faults import When, clients, on_server, state_is, wait_until
from deepfusion.fleet.layout import Layout
from deepfusion.fleet.supervise import Fleet

STAGES = ("uploads", "proxies", "start", "experts", "merged", "moe")


@dataclass(frozen=True)
class World:
    """What a fault is brought about in.

    Attributes:
        draw: where its moment comes from.
        spans: seconds that the server and a client were at work in the undisturbed run.
    """

    layout: Layout
    fleet: Fleet
    draw: random.Random
    spans: dict[str, float]

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.layout.server / "run"

    def device(self) -> str:
        """Any of the devices."""
        return self.draw.choice(sorted(self.layout.devices()))

    def moment(self, span: str) -> float:
        """Seconds to any moment of the span."""
        return self.draw.uniform(0, self.spans[span])


@dataclass
class Fault:
    """A fault, what a person does about it before --resume, and what puts all in order for the next one."""

    when: When
    mend: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None


def client_raises(world: World) -> Fault:
    """A device's text is away."""
    text = world.layout.device(world.device()) / "text.jsonl"
    away = text.with_suffix(".away")

    def back() -> None:
        if away.exists():
            away.rename(text)

    return Fault(When(lambda: True, lambda: text.rename(away) and None), back, back)


def client_killed(world: World) -> Fault:
    """A device's client is killed at any moment of its work."""
    return Fault(faults.kill_client(world.layout, world.device(), world.moment("client")))


def client_hangs(world: World) -> Fault:
    """A device's client stops at any moment of its work, and never goes on."""
    device = world.device()

    def after() -> None:  # whatever has become of the run, it would stay for ever
        for pid in clients(world.layout, device):
            os.kill(pid, signal.SIGKILL)

    return Fault(faults.kill_client(world.layout, device, world.moment("client"), signal.SIGSTOP), after=after)


def node_killed(world: World) -> Fault:
    """A device is switched off at any moment of its work, and on again."""
    device = world.device()
    there = state_is(world.layout, device, "training")
    return Fault(faults.kill_service(world.fleet.nodes[device], there, world.moment("client")))


def node_killed_mid_upload(world: World) -> Fault:
    """A device is switched off when the SuperLink has said that it begins to send."""
    before, nodes = faults.pushes(world.fleet), world.fleet.nodes
    device_of = {str(node): device for device, node in world.fleet.server.nodes().items()}

    def kill() -> None:
        line = world.fleet.link.log.read_text().rpartition("Push replies from node_id=")[2].split()[0]
        process = nodes[device_of[line]].process
        assert process is not None
        os.killpg(process.pid, signal.SIGKILL)

    return Fault(When(lambda: faults.pushes(world.fleet) > before, kill, world.draw.uniform(0, 0.05)))


def node_offline_after_sent(world: World) -> Fault:
    """A device has sent its answer and goes offline before the server has fetched it."""
    device = world.device()
    answers = world.layout.device(device) / "place" / "jobs"

    def act() -> None:
        note = holder(world.run)
        assert note is not None
        server, before = psutil.Process(note["pid"]), faults.pushes(world.fleet)
        server.suspend()
        try:
            wait_until(lambda: faults.pushes(world.fleet) > before, "no answer was sent", 120)
            time.sleep(2)
            node = world.fleet.nodes[device].process
            assert node is not None
            os.killpg(node.pid, signal.SIGTERM)  # it says good-bye, so that it counts as offline at once
            node.wait(60)
        finally:
            server.resume()

    return Fault(When(lambda: any(answers.glob("*/answers/*.safetensors")), act))


def superlink_killed(world: World) -> Fault:
    """The SuperLink is killed at any moment of the run, and started again."""
    return Fault(faults.kill_service(world.fleet.link, lambda: holder(world.run) is not None, world.moment("server")))


def server_killed(world: World) -> Fault:
    """The server's process is killed at any moment of the run, in any stage."""
    return Fault(on_server(world.layout, lambda: True, psutil.Process.kill, world.moment("server")))


def server_killed_after_stage(world: World) -> Fault:
    """The server's process is killed just after a stage, any of them."""
    stage = world.run / world.draw.choice(STAGES[:-1])
    done = lambda: stage.exists() and any(stage.iterdir())  # noqa: E731
    return Fault(on_server(world.layout, done, psutil.Process.kill))


def disk_full(world: World) -> Fault:
    """From any moment of the run on, the server can write nothing of any size."""
    return Fault(on_server(world.layout, lambda: True, faults.fill_disk, world.moment("server")))


def clock_behind(world: World) -> Fault:
    """A device's clock is up to four minutes behind."""
    return _clock(world, -world.draw.uniform(5, 240))


def clock_ahead(world: World) -> Fault:
    """A device's clock is up to four minutes ahead; it is set right when the others have uploaded."""
    return _clock(world, world.draw.uniform(10, 240))


def _clock(world: World, seconds: float) -> Fault:
    device, folder = world.device(), Path(tempfile.mkdtemp())
    others = [state_is(world.layout, other, "uploaded") for other in world.layout.devices() if other != device]
    before = world.fleet.nodes[device]

    def right() -> None:
        if world.fleet.nodes[device] is not before:
            world.fleet.put_in(device, before)

    world.fleet.put_in(device, faults.skewed(world.layout, device, seconds, folder))
    when = When(lambda: seconds < 0 or all(there() for there in others), right if seconds > 0 else lambda: None)
    return Fault(when, after=right)


FAULTS: dict[str, Callable[[World], Fault]] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        client_raises, client_killed, client_hangs, node_killed, node_killed_mid_upload, node_offline_after_sent,
        superlink_killed, server_killed, server_killed_after_stage, disk_full, clock_behind, clock_ahead,
    )
}  # fmt: skip
