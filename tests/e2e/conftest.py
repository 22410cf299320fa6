# SPDX-License-Identifier: Apache-2.0
"""The small world's text on the disk, once for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_world import write_text


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder
