# SPDX-License-Identifier: Apache-2.0
"""The small world's text on the disk, once for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.fleet.layout import Layout
from fleet_world import fleet_tree, make_fleet, result_bytes
from loopback_world import environment, free_port
from small_world import write_text


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


@pytest.fixture
def loopback(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A fleet on ports that are free, whose processes have one thread and import what the tests import."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return make_fleet(root, tmp_path / "trial", port=free_port())


@pytest.fixture(scope="module")
def local(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of the fleet's configuration in one process."""
    folder = tmp_path_factory.mktemp("local") / "run"
    launch(parse_config(fleet_tree(root)), folder)
    return result_bytes(folder)
