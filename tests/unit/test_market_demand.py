# SPDX-License-Identifier: Apache-2.0
"""Exit tables add up and agree with published counts; Phase I finds the slowest edge that meets the deadline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.errors import MarketError
from deepfusion.market.architectures import shipped_profiles
from deepfusion.market.demand import CutTable, Edge, Users, minimum_demand, slack
from deepfusion.market.profiles import Mode, Profile, load_profile, load_profiles

PROFILES = shipped_profiles()
names = st.sampled_from(sorted(PROFILES))
rows = st.integers(0, 6)
modes: st.SearchStrategy[Mode] = st.sampled_from(["expected", "worst"])


def users(profile: list[int], **values: float) -> Users:
    usual = {"latency": 0.8, "device_flops": 2e10, "rate": 2e7, "rtt": 0.04, "device_bandwidth": float("inf"), **values}
    return Users(np.array(profile), **{f"{name}_N": np.full(len(profile), value) for name, value in usual.items()})


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize(("name", "gigaflops"), [("alexnet", 1.43), ("resnet34", 7.33), ("vgg16", 30.94)])
def test_flops_are_the_published_ones(name: str, gigaflops: float) -> None:
    """Of one image of 224 by 224; twice the multiply-adds that torchvision's model pages give."""
    profile = PROFILES[name]
    assert (sum(profile.block_flops) + profile.head_flops[-1]) / 1e9 == pytest.approx(gigaflops, rel=2e-3)


@pytest.mark.parametrize(("name", "megabytes"), [("alexnet", 233.1), ("resnet34", 83.3), ("vgg16", 527.8)])
def test_weights_are_the_published_ones(name: str, megabytes: float) -> None:
    """torchvision's file sizes, which hold biases and norms too."""
    profile = PROFILES[name]
    assert (sum(profile.block_reads) + profile.head_reads[-1]) / 2**20 == pytest.approx(megabytes, rel=3e-3)


def test_cited_numbers_stand_in_the_tables() -> None:
    changes = {name: PROFILES[name].accuracy_change[0] for name in ("alexnet", "resnet34", "vgg16", "bart")}
    assert changes == pytest.approx({"alexnet": -0.0197, "resnet34": -0.0247, "vgg16": -0.0377, "bart": 0.0110})
    early = [1 - row[-1] for row in PROFILES["bart"].exit_share[:-1]]
    assert (early[0], early[-1]) == pytest.approx((0.48, 0.18))


@settings(max_examples=60, deadline=None)
@given(names, rows, modes)
def test_what_is_computed_on_either_side_of_a_cut_adds_up(name: str, row: int, mode: Mode) -> None:
    profile = PROFILES[name]
    cuts, reach = profile.cuts(row, mode), profile.reach(row, mode)
    whole = cuts.device_flops_S + cuts.edge_flops_S
    assert whole == pytest.approx(np.full(len(whole), whole[0]), rel=1e-12)
    assert cuts.device_reads_S + cuts.edge_reads_S == pytest.approx(np.full(len(whole), cuts.edge_reads_S[0]))
    assert (cuts.device_flops_S[0], cuts.edge_flops_S[-1], cuts.sent_S[-1], cuts.trips_S[-1]) == (0, 0, 0, 0)
    assert bool((np.diff(reach) <= 1e-12).all())
    if row and mode == "expected":
        assert bool((reach >= profile.reach(row - 1) - 1e-12).all())
    if mode == "worst" or row == 6:
        assert bool((reach[:-1] == 1).all())
        total = sum(profile.block_flops) + sum(profile.head_flops)
        assert whole[0] == pytest.approx(total, rel=1e-12)


def test_tables_survive_the_disk(tmp_path: Path) -> None:
    for profile in PROFILES.values():
        profile.save(tmp_path / f"{profile.name}.json")
    assert load_profiles(tmp_path, {}) == PROFILES
    assert load_profiles(None, PROFILES) == PROFILES


def test_thresholds_and_accuracies_lead_to_rows() -> None:
    vgg = PROFILES["vgg16"]
    assert [vgg.row_of(sigma) for sigma in (0.0, 0.5, 0.51, 0.9, 0.96, 1.0)] == [0, 0, 1, 4, 6, 6]
    assert vgg.row_for_accuracy(-0.05) == 0
    row = vgg.row_for_accuracy(-0.02)
    assert vgg.accuracy_change[row] >= -0.02 > vgg.accuracy_change[row - 1]
    assert PROFILES["bart"].row_for_accuracy(0.005) == 0
    with pytest.raises(MarketError, match=r"reaches \+0 at best"):
        vgg.row_for_accuracy(0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exit_blocks": (5, 2, 7)}, "must ascend"), ({"exit_blocks": (2, 5, 6)}, "to the last block, 7"),
        ({"sigmas": (0.5, 0.4, 0.7, 0.8, 0.9, 0.95, 1.0)}, "sort the rows"),
        ({"sigmas": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)}, "end with 1"),
        ({"exit_share": ((0.5, 0.5, 0.1), *PROFILES["alexnet"].exit_share[1:])}, "sum to 1"),
        ({"exit_share": (*PROFILES["alexnet"].exit_share[:6], (0.1, 0.0, 0.9))}, "at sigma 1 all"),
        ({"exit_share": (PROFILES["alexnet"].exit_share[5], *PROFILES["alexnet"].exit_share[:6])}, "higher sigma"),
        ({"block_flops": (float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)}, "finite"), ({"cut_bytes": (1.0,)}, "8 belong"),
        ({"accuracy_change": (-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)}, "not per cent"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_says_what_is_wrong(tmp_path: Path, change: dict[str, object], words: str) -> None:
    replace(PROFILES["alexnet"], **change).save(tmp_path / "own.json")  # pyright: ignore[reportArgumentType]
    with pytest.raises(MarketError, match=words):
        load_profile(tmp_path / "own.json")


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": 3}')
    for path in (tmp_path / "a.json", tmp_path / "none.json"):
        with pytest.raises(MarketError, match=path.name):
            load_profile(path)
    with pytest.raises(MarketError, match="no such folder"):
        load_profiles(tmp_path / "none", {})
    for name in ("a", "b"):
        PROFILES["bart"].save(tmp_path / f"{name}.json")
    with pytest.raises(MarketError, match="named bart like"):
        load_profiles(tmp_path, {})


# ------------------------------------------------------------------------------------------------ Phase I


def slow_demand(profile: Profile, row: int, mode: Mode, who: Users, edge: Edge) -> tuple[float, int]:
    """Cut by cut, from the formulas of aeria, section 3."""
    reach = profile.reach(row, mode)
    best = (float("inf"), float("inf"), -1)
    for s in range(profile.num_blocks + 1):

        def flops(blocks: range, reach: np.ndarray = reach) -> float:
            heads = dict(zip(profile.exit_blocks, profile.head_flops, strict=True))
            return sum(float(reach[b - 1]) * (profile.block_flops[b - 1] + heads.get(b, 0.0)) for b in blocks)

        q = float(reach[s])
        crossings = profile.crossings[s] if profile.crossings else 1.0
        sent = q * crossings * profile.cut_bytes[s] + (profile.prompt_bytes[s] if profile.prompt_bytes and q else 0.0)
        network = 8 * sent / who.rate_N[0] + (who.rtt_N[0] * max(1.0, q * crossings) if q else 0.0)
        left = who.latency_N[0] - flops(range(1, s + 1)) / who.device_flops_N[0] - network
        work = flops(range(s + 1, profile.num_blocks + 1))
        speed = 0.0 if work == 0 and left >= 0 else float("inf") if left <= 0 else work / left
        best = min(best, (speed, sent, s))
    return best[0], best[2]


@settings(max_examples=300, deadline=None)
@given(names, rows, modes, st.floats(0.02, 6), st.floats(1e9, 1e11), st.floats(7e6, 6e7), st.floats(0, 0.06))
def test_phase_one_is_the_least_over_all_cuts_and_meets_the_deadline_exactly(
    name: str, row: int, mode: Mode, latency: float, device: float, rate: float, rtt: float
) -> None:
    profile, edge = PROFILES[name], Edge(3.93e12)
    table = CutTable([(profile, row), (PROFILES["resnet34"], 3)], mode)
    who = users([0], latency=latency, device_flops=device, rate=rate, rtt=rtt)
    found = minimum_demand(who, table, edge)
    speed, cut = slow_demand(profile, row, mode, who, edge)
    assert float(found.speed_N[0]) == pytest.approx(speed, rel=1e-9)
    if speed < float("inf"):
        assert int(found.cut_N[0]) == cut
    if 0 < speed < float("inf"):
        left = float(slack(who, table.of(who))[0, cut])
        assert latency - left + profile.cuts(row, mode).edge_flops_S[cut] / speed == pytest.approx(latency, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(
    names, st.integers(0, 5), modes, st.floats(0.05, 3), st.floats(1e9, 1e11), st.floats(7e6, 6e7), st.floats(1.0, 3.0)
)
def test_more_time_a_faster_device_or_network_or_a_lower_threshold_never_asks_for_more(
    name: str, row: int, mode: Mode, latency: float, device: float, rate: float, factor: float
) -> None:
    table = CutTable([(PROFILES[name], row), (PROFILES[name], row + 1)], mode)
    base = {"latency": latency, "device_flops": device, "rate": rate}

    def speed(pair: int = 0, **changes: float) -> float:
        return float(minimum_demand(users([pair], **{**base, **changes}), table, Edge(3.93e12)).speed_N[0])

    own = speed()
    for key, value in base.items():
        assert speed(**{key: value * factor}) <= own * (1 + 1e-12)
    assert speed(pair=1) >= own * (1 - 1e-12)


def test_users_with_time_stay_on_their_device_and_those_without_cannot_be_served() -> None:
    table = CutTable([(PROFILES["vgg16"], 0)], "expected")
    assert minimum_demand(users([0], latency=60.0), table, Edge(3.93e12)).speed_N[0] == 0
    hopeless = minimum_demand(users([0], latency=0.001), table, Edge(3.93e12))
    assert hopeless.speed_N[0] == float("inf")


def test_where_memory_binds_the_edge_must_be_rented_for_its_bandwidth() -> None:
    table = CutTable([(PROFILES["gpt2"], 0)], "expected")
    who = users([0], latency=2.0, device_flops=5e9)
    plain = minimum_demand(who, table, Edge(3.93e12)).speed_N[0]
    bound = minimum_demand(who, table, Edge(3.93e12, bandwidth=2e11)).speed_N[0]
    cuts = PROFILES["gpt2"].cuts(0)
    assert bound > plain
    ratios = cuts.edge_reads_S[:-1] * (3.93e12 / 2e11) / cuts.edge_flops_S[:-1]
    assert ratios.min() > 1, "decoding reads weights for longer than it computes, at every cut"
