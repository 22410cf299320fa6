# SPDX-License-Identifier: Apache-2.0
"""The spool: uploads on the server's disk from the moment of their arrival, so that a resumed run asks for the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from deepfusion.artifacts import write_atomic
from deepfusion.errors import DiskError, FederationError, UploadError
from deepfusion.federation.payload import inspect_file, parts, read_file
from deepfusion.types import Call, Payload

KEYS = "keys.json"
"""In the folder: under which key each device's upload arrived, or is to arrive."""

Check = Callable[[str, Payload], None]
"""`check(device_id, payload)` raises UploadError when the upload is not what was asked for."""

Open = Callable[[str, Payload], Payload]
"""`open(device_id, payload)` makes of what arrived what is kept; raises UploadError when that cannot be done."""


class Spool:
    """A folder of uploads: `<device>.safetensors` each, and `rejected/<device>.json` for those that were refused."""

    def __init__(self, folder: Path, keys: Mapping[str, str] | None = None) -> None:
        """Open the spool.

        Args:
            keys: for each device the hash of what its upload depends on. What arrived under another one is thrown away, and
                so is what came from any other device.
        """
        self.folder = folder
        if keys is not None:
            self._keep_only(keys)
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(".*.partial"):  # of a run that was killed while it wrote
            partial.unlink()

    def _keep_only(self, keys: Mapping[str, str]) -> None:
        marker = self.folder / KEYS
        before: dict[str, str] = json.loads(marker.read_text()) if marker.exists() else {}
        if before == keys:
            return
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob("rejected/*.json")):
            if path.stem not in keys or before.get(path.stem) != keys[path.stem]:
                path.unlink()
        write_atomic(marker, json.dumps(keys))  # last: whatever is here is under the key that it is said to be under

    def path(self, device_id: str) -> Path:
        """Where the device's upload is, or would be."""
        return self.folder / f"{device_id}.safetensors"

    def have(self) -> list[str]:
        """Ids of the devices whose upload is here, whole and well-formed, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors") if self._is_whole(path))

    def get(self, device_id: str) -> Payload:
        """A device's upload; its tensors are memory-mapped.

        Raises:
            UploadError: the file has been damaged.
        """
        return read_file(self.path(device_id), source=f"device {device_id}")

    def put(self, device_id: str, payload: Payload) -> None:
        """Write an upload as one safetensors file; it is on the disk when this returns.

        Raises:
            DiskError: the disk is full, or the folder cannot be written for another reason.
        """
        final = self.path(device_id)
        partial = self.folder / f".{device_id}.{os.getpid()}.partial"
        try:
            with open(partial, "wb") as file:
                for part in parts(payload):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, final)
            descriptor = os.open(self.folder, os.O_RDONLY)  # the new name is on the disk only with its folder
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            partial.unlink(missing_ok=True)  # half an upload is of no use, and others may still fit
            size = sum(len(part) for part in parts(payload))
            raise DiskError(
                f"{final}: {size:,} bytes cannot be written ({error.strerror}); make room there and go on with --resume"
            ) from error
        (self.folder / "rejected" / f"{device_id}.json").unlink(missing_ok=True)

    def reject(self, device_id: str, reason: str) -> None:
        """Note why a device's upload was refused."""
        text = json.dumps({"device": device_id, "reason": reason}, indent=1)
        write_atomic(self.folder / "rejected" / f"{device_id}.json", text)

    def rejected(self) -> dict[str, str]:
        """Why each refused upload was refused."""
        notes = (json.loads(path.read_text()) for path in sorted((self.folder / "rejected").glob("*.json")))
        return {note["device"]: note["reason"] for note in notes}

    @staticmethod
    def _is_whole(path: Path) -> bool:
        try:
            inspect_file(path, source=path.stem)
        except UploadError:
            return False
        return True


def _accept(device_id: str, payload: Payload) -> None:
    """The check that lets everything through that could be decoded."""


def as_it_came(device_id: str, payload: Payload) -> Payload:
    """What arrived is what is kept."""
    return payload


def collect(
    call: Call,
    requests: Mapping[str, Payload],
    spool: Spool,
    check: Check = _accept,
    minimum: int = 1,
    opened: Open = as_it_came,
    failures: dict[str, str] | None = None,
) -> list[str]:
    """Bring the uploads of the devices into the spool, one at a time, and return who is in it, in order of `requests`.

    Only devices whose upload is not there yet are asked. An upload that `check` refuses is noted and left out; so is
    a second one of the same device, or one that nobody asked for.

    Args:
        check: of what is kept, in this run and in a resumed one.
        minimum: the quorum: how many good uploads are enough, of those that were asked.
        opened: what is kept of an arrival.
        failures: where `call` says why a device gave no answer; whose upload was refused is put there, too.

    Raises:
        FederationError: there are fewer; says who is missing, and why.
    """
    failures = {} if failures is None else failures
    have = {device_id for device_id in requests if _is_good(device_id, spool, check)}
    missing = {device_id: request for device_id, request in requests.items() if device_id not in have}
    if missing:
        try:
            _bring(call, missing, spool, check, opened, have, failures)
        except FederationError:
            if not have:  # what a resumed run has already is as good as what arrives now
                raise
    if not have:
        reasons = [reason for device_id, reason in spool.rejected().items() if device_id in requests]
        said = f"the first of {len(reasons)} refused: {reasons[0]}" if reasons else "none was asked"
        raise FederationError(f"no device's upload can be used; {said}")
    if len(have) < min(minimum, len(requests)):
        absent = [device_id for device_id in requests if device_id not in have]
        reasons = [
            f"{device_id}: {said}" for device_id in absent if (said := failures.get(device_id, "").partition("\n")[0])
        ]
        sentence = (
            f"{len(have)} of {len(requests)} devices answered, [federation] minimum_devices = {minimum}; missing: "
            f"{', '.join(absent)}; what has arrived is kept: see to them and go on with --resume, or lower the minimum"
        )
        raise FederationError("\n  ".join([sentence, *reasons]))
    return [device_id for device_id in requests if device_id in have]


def _bring(
    call: Call, missing: Mapping[str, Payload], spool: Spool, check: Check, opened: Open, have: set[str],
    failures: dict[str, str],
) -> None:  # fmt: skip
    """Ask the missing devices; add those whose upload is good to `have`, and why another one is not to `failures`."""
    for device_id, payload in call(missing):
        if device_id not in missing or device_id in have:
            again = "a second time; give every device an id of its own" if device_id in have else "without being asked"
            spool.reject(device_id, f"device {device_id} answered {again}")
            continue
        try:
            payload = opened(device_id, payload)
            check(device_id, payload)
        except UploadError as error:
            spool.reject(device_id, str(error))
            failures[device_id] = str(error)
            continue
        spool.put(device_id, payload)
        have.add(device_id)
        del payload  # or it would be in memory until the next one has arrived


def _is_good(device_id: str, spool: Spool, check: Check) -> bool:
    """Whether the spool has an upload of this device that is still what is asked for."""
    if not spool.path(device_id).exists():
        return False
    try:
        check(device_id, spool.get(device_id))
    except UploadError:
        return False
    return True
