# SPDX-License-Identifier: Apache-2.0
"""What `deepfusion fleet init` writes for people and for systemd: the units, the README with the exact commands, the thin app."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

APP = """# A Flower app without code: its two components are in the installed package. Devices run theirs whatever this says.
[project]
name = "deepfusion-fleet"
version = "1.0.0"
description = "deepfusion over a fleet of machines"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[tool.flwr.app]
publisher = "deepfusion"

[tool.flwr.app.components]
serverapp = "deepfusion.app:server_app"
clientapp = "deepfusion.app:client_app"

[tool.flwr.app.config]
server = ""
token = ""
resume = false
until = ""
"""

UNMENDABLE = (2, os.EX_CONFIG)
"""Exit codes of `deepfusion` after which the same command would only fail again; see `deepfusion.cli`."""

_UNIT = """# {{ name }}: {{ what }}
[Unit]
Description={{ what }}
After=network-online.target{{ after }}
Wants=network-online.target
{%- for line in limit %}
{{ line }}
{%- endfor %}

[Service]
Type=exec
User=deepfusion
ExecStart={{ command }}
{%- for line in more %}
{{ line }}
{%- endfor %}
RestartPreventExitStatus={{ mend }}
NoNewPrivileges=yes
PrivateTmp=yes
ProtectHome=read-only
ProtectSystem=strict
ReadWritePaths={{ writes }}
UMask=0077
Environment=OMP_NUM_THREADS=1
Environment=HOME={{ writes }}
Environment=DEEPFUSION_CACHE={{ writes }}/cache

[Install]
WantedBy=multi-user.target
"""

_README = """# A trial fleet of {{ devices|length }} devices

Everything here was written by `deepfusion fleet init`. One command runs all of it on this machine, on loopback:

    deepfusion fleet up {{ folder }}

## On machines of their own

Copy `server/` to the server, each `devices/<id>/` to its device, and nothing else to anyone. `devices/<id>/key` is that
device's private key: let it make its own instead (`ssh-keygen -t ecdsa -b 384 -N "" -f key`) and send you `key.pub`, which
goes to `server/keys/<id>.pub`. Clocks have to agree to within 5 seconds (NTP), or a device is not let in.

The SuperLink stays on the server's loopback (`server/fleet.toml` and `server/tls/` stay as they are): its port serves devices
(`/v1/fleet`) and the operator (`/v1/control`) alike, and asks operators for no password. A reverse proxy in front of it, with
your host's own certificate, passes on `/v1/fleet` alone; docs/fleet.md has the text for nginx. In each `device.toml`,
`[connection]` names that proxy: `superlink = "<host>:443"`, and as `certificate` the CA that has signed the proxy's.

On the server:

    deepfusion fleet link {{ folder }}/server          # the SuperLink; keeps running
    deepfusion fleet register {{ folder }}/server      # who may join; again whenever a key has come or gone
    deepfusion fleet run {{ folder }}/server           # the run; --resume goes on with one that was cut off
    deepfusion fleet status {{ folder }}/server/run    # who is online, training, done

On each device:

{% for id in devices %}    deepfusion fleet node {{ folder }}/devices/{{ id }}/device.toml
{% endfor %}
## With systemd

`units/` has a unit for each of these: the SuperLink and the devices are started again whatever ends them (`Restart=always`), the
run only where it has failed (`Restart=on-failure`). Mend the paths, then

    sudo useradd --system deepfusion
    sudo chown -R deepfusion: server          # on the server; devices/<id> on a device: who starts them must be able to read them
    sudo cp units/deepfusion-superlink.service units/deepfusion-run.service /etc/systemd/system/    # on the server
    sudo cp units/deepfusion-node-<id>.service /etc/systemd/system/                                 # on a device
    sudo systemctl daemon-reload
    sudo systemctl enable --now deepfusion-superlink deepfusion-run     # on the server
    sudo systemctl enable --now deepfusion-node-<id>                    # on a device
"""


def unit_files(server: Path, devices: Mapping[str, Path]) -> dict[str, str]:
    """The text of each systemd unit, by file name.

    Args:
        server: the server's folder.
        devices: each device's own configuration, by device id.
    """
    program = Path(sysconfig.get_path("scripts")) / "deepfusion"
    link, run = "deepfusion-superlink.service", "deepfusion-run.service"
    register = f"ExecStartPost={program} fleet register {server}"
    found = {
        link: _unit(link, "the SuperLink of a deepfusion fleet", f"{program} fleet link {server}", str(server),
                    register, "Restart=always", "RestartSec=10", "TimeoutStartSec=300", limit=(3600, 20)),
        run: _unit(run, "the run of a deepfusion fleet", f"{program} fleet run {server} --resume", str(server),
                   "Restart=on-failure", "RestartSec=60", after=f" {link}", limit=(86_400, 20)),
    }  # fmt: skip
    for device_id, path in devices.items():
        name = f"deepfusion-node-{device_id}.service"
        command = f"{program} fleet node {path}"
        found[name] = _unit(name, f"device {device_id} of a deepfusion fleet", command, str(path.parent),
                            "Restart=always", "RestartSec=30", limit=(0, 0))  # fmt: skip
    return found


def readme(folder: Path, devices: Sequence[str]) -> str:
    """The README of a trial fleet."""
    return _fill(_README, folder=folder, devices=devices)


def _unit(name: str, what: str, command: str, writes: str, *more: str, limit: tuple[int, int], after: str = "") -> str:
    """A unit. `limit`: it is given up after so many starts in so many seconds; 0 seconds for never."""
    seconds, starts = limit
    limits = [f"StartLimitIntervalSec={seconds}", *([f"StartLimitBurst={starts}"] if seconds else [])]
    return _fill(
        _UNIT, name=name, what=what, command=command, writes=writes, more=more, after=after, limit=limits,
        mend=" ".join(map(str, UNMENDABLE)),
    )  # fmt: skip


def _fill(template: str, **values: object) -> str:
    return (
        Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
        .from_string(template)
        .render(values)
    )
