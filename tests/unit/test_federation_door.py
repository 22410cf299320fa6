# SPDX-License-Identifier: Apache-2.0
"""The door over the local grid: the same bytes from every engine, and a device's fault costs that device only."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest
import torch
from federation_apps import GARBAGE_ROUND
from flwr.app import Array, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from deepfusion.errors import DeepFusionError, DropoutError, FederationError
from deepfusion.federation.door import Door
from deepfusion.federation.engines import ForkServer
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.local_grid import LocalGrid
from deepfusion.federation.messages import pack
from deepfusion.federation.payload import encode
from deepfusion.types import Payload

APP = "federation_apps:client_app"
Engine = Literal["forkserver", "inline", "ray"]
ENGINES: tuple[Engine, ...] = ("inline", "forkserver", *(["ray"] if find_spec("ray") else []))
IDS = [f"d{i}" for i in range(4)]


@pytest.fixture(scope="module")
def grids() -> Iterator[dict[Engine, LocalGrid]]:
    """One grid of each engine for all tests: to start a process that imports torch takes seconds."""
    made = {engine: LocalGrid(APP, IDS, engine=engine, workers=2, timeout=4.0) for engine in ENGINES}
    yield made
    for grid in made.values():
        grid.close()


@pytest.fixture(params=ENGINES)
def grid(grids: dict[Engine, LocalGrid], request: pytest.FixtureRequest) -> LocalGrid:
    """A grid of each engine in turn."""
    return grids[request.param]


@pytest.fixture
def forked(grids: dict[Engine, LocalGrid]) -> LocalGrid:
    """The grid of which every client has a process of its own."""
    return grids["forkserver"]


def on_grid(grid: LocalGrid, server: Callable[[], None]) -> None:
    """Run a function as a ServerApp."""
    app = ServerApp()

    @app.main()
    def main(_grid: Grid, context: Context) -> None:
        server()

    grid.serve(app)


def open_door(grid: LocalGrid, folder: Path, retries: int = 1) -> tuple[Door, Ledger]:
    ledger = Ledger(folder / "ledger.jsonl")
    return Door(grid, grid.nodes, ledger, in_flight=grid.in_flight, retries=retries), ledger


def exchange(
    grid: LocalGrid, folder: Path, request: Payload, retries: int = 1
) -> tuple[dict[str, Payload], Door, Ledger]:
    """Send every device the same request; returns the answers, the door and the ledger."""
    answers: dict[str, Payload] = {}
    door, ledger = open_door(grid, folder, retries)
    on_grid(grid, lambda: answers.update(door(dict.fromkeys(IDS, request))))
    return answers, door, ledger


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_engines_give_the_same_bytes_for_a_training(grids: dict[Engine, LocalGrid], tmp_path: Path) -> None:
    request = Payload("train", metadata={"seed": 3})
    found: list[dict[str, bytes]] = []
    for engine in ENGINES:
        answers, door, _ = exchange(grids[engine], tmp_path, request)
        assert door.failures == {}
        found.append({device: encode(payload) for device, payload in answers.items()})
    assert found[0].keys() == set(IDS)
    assert all(other == found[0] for other in found[1:])
    assert found[0]["d0"] != found[0]["d1"]


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is there")
def test_an_engine_that_is_not_installed_is_told_with_its_cure() -> None:
    with pytest.raises(
        DeepFusionError, match=r'engine = "ray": Ray is not installed; run: pip install "deepfusion-moe\[ray\]"'
    ):
        LocalGrid(APP, IDS, engine="ray")


def test_ledger_totals_are_the_lengths_of_all_blobs_and_replaying_changes_nothing(
    grid: LocalGrid, tmp_path: Path
) -> None:
    request = Payload("init", {"w": torch.ones(10)}, {"victim": "none"}, round=2)
    for _ in range(2):
        answers, _, ledger = exchange(grid, tmp_path, request)
        # The answer holds the process's id, whose digits may differ; so compare with what did arrive.
        up = sum(len(encode(payload)) for payload in answers.values())
        down = len(IDS) * len(encode(request))
        expected = {"upload_bytes": up, "download_bytes": 0, "init_bytes": down, "total_bytes": up + down}
        assert ledger.totals() == expected
        assert {row.round for row in ledger.rows()} == {2}
    assert len(list(ledger.rows())) == 2 * len(IDS)


@pytest.mark.parametrize("what", ["raise", "exit"])
def test_an_exception_costs_its_device_only_and_is_told_with_device_task_and_trace(
    grid: LocalGrid, what: str, tmp_path: Path
) -> None:
    answers, door, _ = exchange(grid, tmp_path, Payload(what, metadata={"victim": "d2"}))
    assert answers.keys() == {"d0", "d1", "d3"}
    assert door.failures.keys() == {"d2"}
    if what == "raise":
        assert "device d2, asked for 'raise': LookupError: no text on this device" in door.failures["d2"]
        assert 'raise LookupError("no text on this device")' in door.failures["d2"]
    else:
        assert door.failures["d2"].startswith("SystemExit: 3")


def test_a_killed_client_costs_itself_only(forked: LocalGrid, tmp_path: Path) -> None:
    answers, door, _ = exchange(forked, tmp_path, Payload("kill", metadata={"victim": "d1"}))
    assert answers.keys() == {"d0", "d2", "d3"}
    assert "SIGKILL" in door.failures["d1"]
    assert "lower [federation] workers" in door.failures["d1"]


def test_a_client_that_was_killed_once_is_asked_again(forked: LocalGrid, tmp_path: Path) -> None:
    request = Payload("kill-once", metadata={"folder": str(tmp_path)})
    answers, door, ledger = exchange(forked, tmp_path, request)
    assert answers.keys() == set(IDS)
    assert door.failures == {}
    assert ledger.totals()["download_bytes"] == 4 * len(encode(request)), "a second attempt counts once"


def test_without_retries_a_broken_client_is_given_up(forked: LocalGrid, tmp_path: Path) -> None:
    with pytest.raises(DropoutError, match=r"none of 4 devices answered; device d\d: its process was ended by SIGKILL"):
        exchange(forked, tmp_path, Payload("kill-once", metadata={"folder": str(tmp_path)}), retries=0)


def test_a_hung_client_is_ended_in_time_with_all_that_it_started(forked: LocalGrid, tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    request = Payload("hang", metadata={"victim": "d0", "folder": str(tmp_path / "pids")})
    answers, door, _ = exchange(forked, tmp_path, request)
    assert answers.keys() == {"d1", "d2", "d3"}
    assert "no answer within 4 s" in door.failures["d0"]
    (note,) = (tmp_path / "pids").iterdir()
    assert wait_until(lambda: not any(is_alive(int(pid)) for pid in note.name.split("-")))


def test_malformed_and_diverged_answers_are_refused_by_name(grid: LocalGrid, tmp_path: Path) -> None:
    request = Payload("diverge", metadata={"victim": "d1"}, round=int(GARBAGE_ROUND))
    answers, door, ledger = exchange(grid, tmp_path, request)
    assert answers.keys() == {"d2", "d3"}
    assert door.failures["d0"].startswith("device d0: this is a pickle")
    assert "device d1: tensor x holds NaN" in door.failures["d1"]
    assert {row.device: row.what for row in ledger.rows() if row.direction == "up"}["d0"] == "refused"


def test_if_all_devices_fail_the_first_ones_error_is_raised(grid: LocalGrid, tmp_path: Path) -> None:
    with pytest.raises(
        FederationError, match=r"none of 4 devices answered; device d\d: .*LookupError: no text"
    ) as found:
        exchange(grid, tmp_path, Payload("raise"))
    assert not isinstance(found.value, DropoutError), "they have not dropped out, they say what is wrong"


def test_a_device_that_is_not_connected_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    grid = LocalGrid(APP, ["d0"], engine="inline")
    door = Door(grid, grid.nodes, Ledger(tmp_path / "l.jsonl"))
    with pytest.raises(FederationError, match="devices d8, d9 are not connected"):
        door({"d9": Payload("x"), "d0": Payload("x"), "d8": Payload("x")})


def test_an_app_that_cannot_be_imported_is_told_with_the_reason(tmp_path: Path) -> None:
    with LocalGrid("no_such_module:client_app", IDS) as grid:
        door, _ = open_door(grid, tmp_path)
        with pytest.raises(FederationError, match=r"cannot start(.|\n)*No module named 'no_such_module'"):
            on_grid(grid, lambda: all(door({"d0": Payload("x")})))


def test_a_nodes_state_lasts_from_message_to_message_and_ids_are_stable(grid: LocalGrid, tmp_path: Path) -> None:
    first, second = (exchange(grid, tmp_path, Payload("echo"))[0] for _ in range(2))
    assert all(second[d].metadata["calls"] == int(first[d].metadata["calls"]) + 1 for d in IDS)
    assert grid.nodes == LocalGrid(APP, IDS, engine="inline").nodes


def test_flowers_own_send_and_receive_works_on_the_grid(grid: LocalGrid) -> None:
    replies: list[Message] = []

    def server() -> None:
        def pushed() -> list[Message]:
            return [Message(RecordDict(), node, "train") for node in grid.get_node_ids() for _ in range(2)]

        replies.extend(grid.send_and_receive(pushed()))
        (*others, last) = grid.push_messages(pushed())
        replies.extend(pull_alone(grid, last))  # though others wait, and nobody pulls them
        while others:
            arrived = list(grid.pull_messages(others))
            others = [i for i in others if i not in {reply.metadata.reply_to_message_id for reply in arrived}]

    on_grid(grid, server)
    assert len(replies) == 9
    assert all(reply.has_error() and "door.answer" in reply.error.reason for reply in replies)


def pull_alone(grid: LocalGrid, message_id: str) -> Iterator[Message]:
    """Pull one message although others that were pushed before it wait to be pulled."""
    for _ in range(100):
        if replies := list(grid.pull_messages([message_id])):
            return iter(replies)
    raise AssertionError("the grid never answered")


def test_replies_wait_for_a_slow_server_so_that_memory_does_not_grow_with_the_fleet(
    forked: LocalGrid, tmp_path: Path
) -> None:
    size, workers = 2_000_000, 2
    ids = [f"d{i}" for i in range(4)] * 4
    held: list[int] = []

    def server() -> None:
        messages = [Message(pack(encode(request)), forked.nodes[device_id], "train") for device_id in ids]
        waiting = list(forked.push_messages(messages))
        while waiting:
            wait_until(lambda: scratch_bytes(forked) > size, 1)  # a server that is slower than its devices
            held.append(scratch_bytes(forked))
            arrived = list(forked.pull_messages(waiting[:1]))
            waiting = waiting[len(arrived) :]
            held.append(scratch_bytes(forked))

    request = Payload("big", metadata={"bytes": size})
    on_grid(forked, server)
    assert len(held) >= len(ids)
    assert size < max(held) <= 2 * workers * (size + 1000)


def scratch_bytes(grid: LocalGrid) -> int:
    """Bytes of replies that nobody has pulled yet."""
    engine = grid._engine
    assert isinstance(engine, ForkServer)
    return sum(path.stat().st_size for path in engine._scratch.rglob("reply*"))


def test_an_answer_leaves_memory_at_once_and_not_when_the_collector_comes(grid: LocalGrid, tmp_path: Path) -> None:
    def arrays() -> int:
        return sum(type(thing) is Array for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = arrays()
        exchange(grid, tmp_path, Payload("echo", {"w": torch.ones(1000)}))
        assert arrays() == before
    finally:
        gc.enable()


class Silent(LocalGrid):
    """A grid like a fleet whose devices have gone: it takes messages and never has a reply."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return []


def test_answers_are_not_waited_for_longer_than_told(tmp_path: Path) -> None:
    grid = Silent(APP, IDS, engine="inline")
    door = Door(grid, grid.nodes, Ledger(tmp_path / "l.jsonl"), timeout=0.3)
    began = time.monotonic()
    with pytest.raises(FederationError, match=r"none of 4 devices answered; device d0: gave no answer within 0.3 s"):
        on_grid(grid, lambda: all(door(dict.fromkeys(IDS, Payload("echo")))))
    assert time.monotonic() - began < 3


def test_nothing_is_left_when_the_program_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from test_federation_door import *\n"
        "grid = LocalGrid(APP, ['d0', 'd1'])\n"
        "door = Door(grid, grid.nodes, Ledger(Path(sys.argv[1]) / 'l.jsonl'))\n"
        "request = Payload('hang', metadata={'folder': sys.argv[1] + '/pids'})\n"
        "on_grid(grid, lambda: list(door(dict.fromkeys(['d0', 'd1'], request))))\n"
    )
    (tmp_path / "pids").mkdir()
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment) as process:
        try:
            assert wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2, 300), (
                "a busy machine is slow to import"
            )
            pids = [int(pid) for note in (tmp_path / "pids").iterdir() for pid in note.name.split("-")]
            assert all(is_alive(pid) for pid in pids)
        finally:
            process.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))
    assert wait_until(lambda: not list((tmp_path / "tmp").iterdir())), "requests and replies are removed, too"


def test_if_the_nursery_is_killed_its_clients_are_asked_again_by_a_new_one(forked: LocalGrid, tmp_path: Path) -> None:
    door, _ = open_door(forked, tmp_path)
    answered: list[str] = []

    def server() -> None:
        for device_id, _ in door(dict.fromkeys(IDS, Payload("echo", metadata={"seconds": 0.3}))):
            answered.append(device_id)
            if len(answered) == 1:
                engine = forked._engine
                assert isinstance(engine, ForkServer)
                assert engine._nursery is not None
                engine._nursery.kill()

    on_grid(forked, server)
    assert sorted(answered) == IDS
