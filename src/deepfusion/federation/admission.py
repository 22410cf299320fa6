# SPDX-License-Identifier: Apache-2.0
"""Whose public key may join: what the SuperLink is told of it, over one connection for all keys, as often as one likes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from deepfusion.errors import ConfigError, FederationError


def admit(address: str, ca: Path, keys: Mapping[str, Path]) -> tuple[dict[str, int], list[str]]:
    """Have the SuperLink admit these public keys and no others.

    What it knows already stays as it is, so that this can be done at any time, also while a run goes on.

    Args:
        address: host and port of the SuperLink.
        ca: the certificate that its own is signed by.
        keys: the file of each device's public key, by device id.

    Returns:
        The node id of each device that is in now; and the devices whose key the SuperLink has shut out before, which it takes
        back after a restart only.

    Raises:
        ConfigError: a file is no public key that Flower can use, or one key is given to two devices.
        FederationError: the SuperLink cannot be reached.
    """
    wanted = _read(keys)
    client = ControlHttpClient.from_server_address(
        address, insecure=False, root_certificates=ca.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="deepfusion")],
    )  # fmt: skip
    try:
        known = _known(client)
        for public, node in known.items():
            if public not in wanted.values() and node.status != NodeStatus.UNREGISTERED:
                _shut_out(client, node)
        found = {device_id: _node_id(client, public, known) for device_id, public in wanted.items()}
    except httpx.HTTPError as error:
        raise FederationError(f"{address}: {error}; is the SuperLink running? (deepfusion fleet link)") from error
    finally:
        client.close()
    nodes = {device_id: node for device_id, node in found.items() if node is not None}
    return nodes, [device_id for device_id in found if device_id not in nodes]


def _node_id(client: ControlHttpClient, public: bytes, known: Mapping[bytes, NodeInfo]) -> int | None:
    """The node id of a key; None where the SuperLink has shut it out."""
    node = known.get(public)
    if node is None:
        try:
            return int(client.RegisterNode(RegisterNodeRequest(public_key=public)).node_id)
        except httpx.HTTPStatusError:  # another command has told it of the key a moment ago
            node = _known(client).get(public)
            if node is None:
                raise
    return None if node.status == NodeStatus.UNREGISTERED else int(node.node_id)


def _known(client: ControlHttpClient) -> dict[bytes, NodeInfo]:
    return {node.public_key: node for node in client.ListNodes(ListNodesRequest()).nodes_info}


def _shut_out(client: ControlHttpClient, node: NodeInfo) -> None:
    try:
        client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
    except httpx.HTTPStatusError:  # Flower 1.41 stumbles over a node that has never been there, but shuts it out
        if _known(client)[node.public_key].status != NodeStatus.UNREGISTERED:
            raise


def _read(keys: Mapping[str, Path]) -> dict[str, bytes]:
    faults: list[str] = []
    found: dict[str, bytes] = {}
    for device_id, path in keys.items():
        try:
            public = load_ssh_public_key(path.read_bytes())
            if not isinstance(public, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(public):
                raise ValueError("it is of another kind")
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            faults.append(f'{path}: not a key for Flower ({error}); make one: ssh-keygen -t ecdsa -b 384 -N "" -f key')
            continue
        octets = public_key_to_bytes(public)
        other = next((name for name, known in found.items() if known == octets), None)
        if other is not None:
            faults.append(f"{path}: the same key as {other}'s; let each device make its own")
        found[device_id] = octets
    if faults:
        raise ConfigError(faults, "public keys")
    return found
