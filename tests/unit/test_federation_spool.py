# SPDX-License-Identifier: Apache-2.0
"""The spool holds what has arrived; a resumed run asks only for the rest, and a bad upload costs its device only."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from deepfusion.errors import FederationError, UploadError
from deepfusion.federation.payload import encode
from deepfusion.federation.spool import KEYS, Spool, collect
from deepfusion.types import Payload

REQUESTS = {f"d{i}": Payload("init") for i in range(4)}


def upload(device_id: str) -> Payload:
    return Payload("model", {"w": torch.arange(3.0) + int(device_id[1:])}, {"device": device_id})


class Devices:
    """A call that remembers whom it asked, and may break down after some answers."""

    def __init__(self, answers: int = 99) -> None:
        self.asked: list[str] = []
        self.answers = answers

    def __call__(self, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        for device_id in requests:
            self.asked.append(device_id)
            if len(self.asked) > self.answers:
                raise KeyboardInterrupt
            yield device_id, upload(device_id)


def test_each_file_is_the_blob_that_crossed_the_wire(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert collect(Devices(), REQUESTS, spool) == list(REQUESTS) == spool.have()
    assert all(spool.path(device_id).read_bytes() == encode(upload(device_id)) for device_id in REQUESTS)


def test_a_resumed_run_asks_only_for_what_is_missing_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(Devices(answers=2), REQUESTS, Spool(tmp_path / "a"))
    (tmp_path / "a" / ".d2.1.partial").write_bytes(b"half")
    resumed, undisturbed = Devices(), Devices()
    assert collect(resumed, REQUESTS, Spool(tmp_path / "a")) == collect(undisturbed, REQUESTS, Spool(tmp_path / "b"))
    assert resumed.asked == ["d2", "d3"]
    files = [{p.name: p.read_bytes() for p in (tmp_path / run).iterdir() if p.is_file()} for run in ("a", "b")]
    assert files[0] == files[1]


def test_a_damaged_or_outdated_upload_is_asked_again(tmp_path: Path) -> None:
    collect(Devices(), REQUESTS, Spool(tmp_path))
    spool = Spool(tmp_path)
    spool.path("d1").write_bytes(spool.path("d1").read_bytes()[:-3])
    assert spool.have() == ["d0", "d2", "d3"]

    def not_d2_as_it_was(device_id: str, payload: Payload) -> None:
        if device_id == "d2" and not again.asked:
            raise UploadError("device d2: it is of another start; start it anew")

    again = Devices()
    collect(again, REQUESTS, spool, not_d2_as_it_was)
    assert again.asked == ["d1", "d2"]


def test_what_arrived_under_another_key_or_from_a_device_that_is_gone_is_thrown_away_and_nothing_else(
    tmp_path: Path,
) -> None:
    keys = dict.fromkeys(REQUESTS, "one")
    collect(Devices(), REQUESTS, Spool(tmp_path / "s", keys))
    assert Spool(tmp_path / "s", keys).have() == ["d0", "d1", "d2", "d3"]
    assert Spool(tmp_path / "s", {**keys, "d1": "two", "d9": "one"}).have() == ["d0", "d2", "d3"]
    del keys["d2"]
    assert Spool(tmp_path / "s", keys).have() == ["d0", "d3"]  # nor is d1 back under its first key
    (tmp_path / "s" / KEYS).unlink()
    assert Spool(tmp_path / "s", keys).have() == []


def test_a_refused_upload_is_noted_and_costs_its_device_only(tmp_path: Path) -> None:
    def check(device_id: str, payload: Payload) -> None:
        if device_id == "d1":
            raise UploadError("device d1: it is too large; send less")

    spool = Spool(tmp_path)
    assert collect(Devices(), REQUESTS, spool, check) == ["d0", "d2", "d3"]
    assert json.loads((tmp_path / "rejected" / "d1.json").read_text())["reason"].startswith(
        "device d1: it is too large"
    )
    assert spool.rejected().keys() == {"d1"}
    assert collect(Devices(), REQUESTS, spool) == list(REQUESTS)
    assert spool.rejected() == {}, "a device that made good is no longer refused"


def test_a_quorum_that_is_not_reached_tells_why_of_everybody_who_is_missing(tmp_path: Path) -> None:
    failures = {"d3": "was not online\nand more"}

    def check(device_id: str, payload: Payload) -> None:
        if device_id == "d1":
            raise UploadError("device d1: it is too large; send less")

    def without_d3(requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        yield from Devices()({device_id: request for device_id, request in requests.items() if device_id != "d3"})

    with pytest.raises(FederationError) as caught:
        collect(without_d3, REQUESTS, Spool(tmp_path), check, minimum=3, failures=failures)
    sentence, *reasons = str(caught.value).splitlines()
    assert "2 of 4 devices answered, [federation] minimum_devices = 3; missing: d1, d3; what has arrived" in sentence
    assert reasons == ["  d1: device d1: it is too large; send less", "  d3: was not online"]
    assert failures["d1"] == "device d1: it is too large; send less"


def test_a_second_answer_of_one_device_does_not_replace_the_first(tmp_path: Path) -> None:
    def twice(requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        yield "d0", upload("d0")
        yield "d0", upload("d9")
        yield "d7", upload("d7")

    spool = Spool(tmp_path)
    assert collect(twice, REQUESTS, spool) == ["d0"]
    assert spool.get("d0").metadata["device"] == "d0"
    assert "an id of its own" in spool.rejected()["d0"]
    assert "without being asked" in spool.rejected()["d7"]


def test_no_usable_upload_at_all_is_an_error_that_quotes_the_first(tmp_path: Path) -> None:
    def check(device_id: str, payload: Payload) -> None:
        raise UploadError(f"device {device_id}: all wrong; start anew")

    with pytest.raises(FederationError, match=r"the first of 4 refused: device d0: all wrong"):
        collect(Devices(), REQUESTS, Spool(tmp_path), check)


def test_a_resumed_run_goes_on_without_a_device_that_fails_again(tmp_path: Path) -> None:
    collect(Devices(), {"d0": REQUESTS["d0"]}, Spool(tmp_path))

    def dead(requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        raise FederationError("none of 3 devices answered")
        yield

    assert collect(dead, REQUESTS, Spool(tmp_path)) == ["d0"]
    with pytest.raises(FederationError, match="none of 3"):
        collect(dead, REQUESTS, Spool(tmp_path / "empty"))
