# SPDX-License-Identifier: Apache-2.0
"""A record's curves as TensorBoard events."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepfusion.record import Record


def write_events(record: Record, folder: Path) -> None:
    """Write (again) the events of all trainings into `folder`, one subfolder for each training."""
    from torch.utils.tensorboard.writer import SummaryWriter  # slow to import

    shutil.rmtree(folder, ignore_errors=True)
    for training, metrics in record.curves.items():
        with SummaryWriter(str(folder / training)) as writer:
            for metric, points in metrics.items():
                for step, value in points:
                    writer.add_scalar(metric, value, int(step))
