# SPDX-License-Identifier: Apache-2.0
"""What a SuperNode of ours starts for each message, instead of Flower's `flwr-clientapp`: always the one installed client.

Flower's own would unpack the app that the server has sent and run what is in it. And it gives a process 30 seconds until
its first sign of life, less than a small machine needs to import torch: so this file imports Flower alone, and the client
when the signs of life have begun.
"""

from __future__ import annotations

from typing import Any

from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp as runtime

from deepfusion.errors import FederationError
from deepfusion.federation.nursery import load_app


def run_client_app(client_app: str) -> None:
    """Answer the one message that the arguments of this process name.

    Args:
        client_app: `module:attribute`.

    Raises:
        FederationError: Flower loads apps in another way than the version that this is made for.
    """
    names = runtime.__dict__
    if not {"install_from_fab", "get_load_client_app_fn"} <= names.keys():
        raise FederationError("this flwr loads apps in another way; install flwr>=1.41,<1.42")

    def load(*_: Any) -> Any:
        return load_app(client_app)

    names["install_from_fab"] = lambda *_, **__: None
    names["get_load_client_app_fn"] = lambda *_, **__: load
    flwr_clientapp()
