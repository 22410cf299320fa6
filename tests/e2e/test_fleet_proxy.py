# SPDX-License-Identifier: Apache-2.0
"""The reverse proxy that docs/fleet.md describes, word for word: devices come through it, and nobody else."""

from __future__ import annotations

import re
import shutil
import ssl
from pathlib import Path

import httpx
import pytest

from deepfusion.fleet.credentials import write_certificates
from deepfusion.fleet.layout import Layout
from deepfusion.fleet.running import run_here
from deepfusion.fleet.server_file import open_server
from deepfusion.fleet.supervise import Service, fleet_on_this_machine
from fleet_world import result_bytes

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
pytestmark = [pytest.mark.fleet, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]
DOCS = Path(__file__).parents[2] / "docs" / "fleet.md"
REST = """
daemon off;
user root;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""


def nginx_with_the_text_of_the_docs(layout: Layout, port: int, folder: Path) -> Service:
    """The proxy, with our ports and paths in the place of those that the page gives as examples."""
    (text,) = re.findall(r"```nginx\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    server = open_server(layout.server)
    for theirs, ours in {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "fusion.hospital.example": "localhost",
        "/etc/deepfusion/host": str(folder / "server"),
        "/srv/deepfusion/server/tls/ca.crt": str(server.path(server.file.ca)),
        "127.0.0.1:18443": f"127.0.0.1:{server.file.port}",
    }.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    (folder / "nginx.conf").write_text(REST.format(folder=folder, server=text))
    assert NGINX is not None
    return Service("nginx", [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")], {}, folder / "nginx.log")


def test_a_fleet_behind_the_documented_proxy_ends_with_the_same_bytes_and_its_operators_door_stays_shut(
    loopback: Layout, local: dict[str, bytes], tmp_path: Path
) -> None:
    network = tmp_path / "network"
    write_certificates(network, "localhost")  # the network's CA and the host's certificate: not those of the SuperLink
    server = open_server(loopback.server)
    port = server.file.port + 7  # of the eight in a row that were free, the fleet takes four
    for path in loopback.devices().values():
        path.write_text(path.read_text().replace(f'"{server.address}"', f'"localhost:{port}"'))
        (path.parent / "ca.crt").write_bytes((network / "ca.crt").read_bytes())
    proxy = nginx_with_the_text_of_the_docs(loopback, port, network)
    proxy.start()
    try:
        with fleet_on_this_machine(loopback) as fleet:
            run_here(fleet, resume=False)
            trusted = ssl.create_default_context(cafile=str(network / "ca.crt"))
            for route in (
                "/v1/control/list-nodes",
                "/v1/runtime/pull-task-input",
                "/",
                "/v1/fleet/../control/list-runs",
            ):
                assert httpx.post(f"https://localhost:{port}{route}", verify=trusted).status_code == 404
            direct = httpx.post(
                f"https://{server.address}/v1/control/list-nodes",
                verify=ssl.create_default_context(cafile=str(server.path(server.file.ca))),
            )
            assert direct.status_code != 404  # the door that stays shut is there
    finally:
        proxy.end()
    assert result_bytes(loopback.server / "run") == local
    access = (network / "access.log").read_text()
    assert access.count("POST /v1/fleet/activate-node") == 3
    assert "/v1/fleet/push-object" in access
