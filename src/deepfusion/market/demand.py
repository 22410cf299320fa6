# SPDX-License-Identifier: Apache-2.0
"""Phase I: the slowest edge that meets each user's deadline, over all cuts (aeria, section 4). Shapes: N users, S cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from deepfusion.market.profiles import Cuts, Mode, Profile


@dataclass(frozen=True, eq=False)
class Users:
    """What Phase I needs to know of each user; arrays of shape (N,).

    Attributes:
        profile_N: index into the table of (model, threshold) pairs.
        latency_N: t_i, seconds.
        device_flops_N: speed of the device, FLOP/s.
        rate_N: network, bit/s.
        rtt_N: a round trip, seconds.
        device_bandwidth_N: memory of the device, bytes/s; infinite where it does not bind.
    """

    profile_N: np.ndarray
    latency_N: np.ndarray
    device_flops_N: np.ndarray
    rate_N: np.ndarray
    rtt_N: np.ndarray
    device_bandwidth_N: np.ndarray


@dataclass(frozen=True, eq=False)
class Edge:
    """The provider's cluster: capacity f_e in FLOP/s, and its memory bandwidth in bytes/s."""

    capacity: float
    bandwidth: float = float("inf")


@dataclass(frozen=True, eq=False)
class Demand:
    """What each user asks of the edge.

    Attributes:
        speed_N: a_i in FLOP/s: 0 where the device can do it alone, infinite where no edge is fast enough.
        cut_N: s_i, the cut that it takes.
    """

    speed_N: np.ndarray
    cut_N: np.ndarray


COSTLY = {"device_flops_S", "edge_flops_S", "sent_S"}
"""What is infinite where a model has fewer cuts than the longest."""


class CutTable:
    """The cuts of several (model, threshold) pairs, side by side and padded, so that all users are done at once."""

    def __init__(self, pairs: Sequence[tuple[Profile, int]], mode: Mode) -> None:
        self.mode: Mode = mode
        cuts = [profile.cuts(row, mode) for profile, row in pairs]
        width = max((len(cut.sent_S) for cut in cuts), default=1)
        self._stacked = {
            f.name: _stack([getattr(cut, f.name) for cut in cuts], width, np.inf if f.name in COSTLY else 0.0)
            for f in fields(Cuts)
        }

    def of(self, users: Users) -> Cuts:
        """Each user's cuts; arrays of shape (N, S), of infinite cost where a model has fewer."""
        return Cuts(**{name: stack[users.profile_N] for name, stack in self._stacked.items()})


def _stack(rows: Sequence[np.ndarray], width: int, padding: float) -> np.ndarray:
    stacked = np.full((len(rows), width), padding)
    for index, row in enumerate(rows):
        stacked[index, : len(row)] = row
    return stacked


def slack(users: Users, cuts: Cuts) -> np.ndarray:
    """Seconds that each cut leaves for the edge, t_i - T_dev - T_net; shape (N, S), minus infinity on padding."""
    device = np.maximum(
        cuts.device_flops_S / users.device_flops_N[:, None], cuts.device_reads_S / users.device_bandwidth_N[:, None]
    )
    network = 8 * cuts.sent_S / users.rate_N[:, None] + users.rtt_N[:, None] * cuts.trips_S
    return users.latency_N[:, None] - device - network


def minimum_demand(users: Users, table: CutTable, edge: Edge) -> Demand:
    """The least edge speed over the cuts, and the cut that has it; ties take the cut with the fewest bytes.

    Where memory binds (`Edge.bandwidth`), a user who rents the share a / f_e of the cluster has that share of the
    bandwidth, so that the edge's time stays inversely proportional to a.
    """
    cuts = table.of(users)
    slack_NS = slack(users, cuts)
    work_NS = np.maximum(cuts.edge_flops_S, cuts.edge_reads_S * (edge.capacity / edge.bandwidth))
    with np.errstate(divide="ignore", invalid="ignore"):
        speed_NS = np.where(slack_NS > 0, work_NS / slack_NS, np.inf)
    speed_NS[(work_NS == 0) & (slack_NS >= 0)] = 0.0
    speed_NS[np.isinf(cuts.sent_S)] = np.inf
    speed_N = speed_NS.min(axis=1)
    cut_N = np.where(speed_NS == speed_N[:, None], cuts.sent_S, np.inf).argmin(axis=1)
    return Demand(speed_N, cut_N)
