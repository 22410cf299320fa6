# SPDX-License-Identifier: Apache-2.0
"""A ClientApp for the tests of the federation: what a device does is said by the request's `what`."""

import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from deepfusion.federation.door import answer
from deepfusion.federation.messages import pack
from deepfusion.types import Payload

client_app = ClientApp()
GARBAGE_ROUND = "666"
"""In this round device d0 answers with a pickle."""


@client_app.train()
def train(message: Message, context: Context) -> Message:
    device_id = str(context.node_config["device-id"])
    if message.metadata.group_id == GARBAGE_ROUND and device_id == "d0":
        return Message(pack(b"\x80\x04" + b"cos\nsystem\n" * 9), reply_to=message)
    count = int(context.state.metric_records.get("calls", {"n": 0})["n"]) + 1
    context.state["calls"] = MetricRecord({"n": count})
    return answer(message, device_id, lambda request: behave(device_id, request, count))


def behave(device_id: str, request: Payload, count: int) -> Payload:
    victim = request.metadata.get("victim", device_id) == device_id
    what = request.what if victim else "echo"
    if what == "train":
        return tiny_training(device_id, int(request.metadata["seed"]))
    if what == "raise":
        raise LookupError("no text on this device")
    if what == "exit":
        raise SystemExit(3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill-once":
        marker = Path(str(request.metadata["folder"])) / device_id
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        note_pids(request)
        time.sleep(600)
    if what == "big":
        return Payload("model", {"x": torch.full((int(request.metadata["bytes"]),), 7, dtype=torch.uint8)})
    if what == "diverge":
        return Payload("model", {"x": torch.tensor([1.0, float("nan")])})
    time.sleep(float(request.metadata.get("seconds", 0)))
    return Payload("echo", request.arrays, {"device": device_id, "calls": count, "pid": os.getpid()}, request.round)


def note_pids(request: Payload) -> None:
    """Start a process of the device's own, and write down both ids."""
    child = subprocess.Popen(["sleep", "600"])
    (Path(str(request.metadata["folder"])) / f"{os.getpid()}-{child.pid}").touch()


def tiny_training(device_id: str, seed: int) -> Payload:
    """A few steps of gradient descent on a network with dropout: all that is random comes out of the seed."""
    torch.manual_seed(seed + int(device_id[1:]))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.GELU(), torch.nn.Linear(16, 8))
    parameters = list(model.parameters())
    for _ in range(5):
        x = torch.randn(32, 8)
        loss = (model(x) - x).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():  # not torch.optim, which imports torch._dynamo for seconds
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    return Payload("model", half, {"device": device_id, "loss": loss.item()})
