# SPDX-License-Identifier: Apache-2.0
"""A device's account: no release is charged twice, none is granted beyond the owner's budget, and the secret stays one."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from deepfusion.devices.noise import Noise
from deepfusion.devices.releases import Release, Seeded
from deepfusion.errors import PrivacyError
from deepfusion.fleet.account import Account, Demands

ONE = Release(what="embedding", text="t", epsilon=0.5, delta=1e-6)


def account(folder: Path, context: str = "request", **demands: float) -> Account:
    return Account(folder / "privacy", "ward-7", Demands(**demands), (context,))


def numbers(noise: Noise) -> list[int]:
    return noise.stream(0).words(4).tolist()


def test_the_same_request_gets_the_same_noise_and_is_charged_once(tmp_path: Path) -> None:
    first = numbers(account(tmp_path, embedding_epsilon=0.5).grant(ONE))
    for _ in range(3):
        assert numbers(account(tmp_path, embedding_epsilon=0.5).grant(ONE)) == first
    assert len((tmp_path / "privacy/account.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("change", [{"text": "u"}, {"epsilon": 0.4}, {"delta": 1e-7}, {"what": "training"}, {}])
def test_whatever_differs_gets_noise_of_its_own(tmp_path: Path, change: dict[str, object]) -> None:
    """Another text under the same noise would show the difference of the two texts without any."""
    first = numbers(account(tmp_path).grant(ONE))
    other = account(tmp_path, "request" if change else "another")
    assert numbers(other.grant(replace(ONE, **change))) != first  # type: ignore[arg-type]


def test_another_device_has_another_secret(tmp_path: Path) -> None:
    found = [numbers(account(tmp_path / name).grant(ONE)) for name in "ab"]
    assert found[0] != found[1]
    assert numbers(Seeded(1).grant(ONE)) == numbers(Seeded(1).grant(ONE)) != numbers(Seeded(2).grant(ONE))


def test_a_budget_that_is_spent_is_spent_and_earlier_requests_are_still_answered(tmp_path: Path) -> None:
    granted = [numbers(account(tmp_path, str(n), embedding_epsilon=1.0).grant(ONE)) for n in range(2)]
    said = r"ward-7 has spent epsilon = 1 of 1 on embeddings, this one would cost 0.5 more; .*account\.jsonl"
    with pytest.raises(PrivacyError, match=said):
        account(tmp_path, "2", embedding_epsilon=1.0).grant(ONE)
    assert numbers(account(tmp_path, "0", embedding_epsilon=1.0).grant(ONE)) == granted[0]
    assert numbers(account(tmp_path, "2", embedding_epsilon=1.5).grant(ONE)) not in granted


def test_deltas_add_up_like_epsilons(tmp_path: Path) -> None:
    account(tmp_path, "0", embedding_epsilon=9.0, delta=1.5e-6).grant(ONE)
    with pytest.raises(PrivacyError, match=r"allows delta = 1.5e-06 for its embeddings together, 1e-06 is spent"):
        account(tmp_path, "1", embedding_epsilon=9.0, delta=1.5e-6).grant(ONE)


def test_where_noise_is_demanded_none_is_refused_also_after_the_fact(tmp_path: Path) -> None:
    clear = replace(ONE, epsilon=math.inf, delta=0.0)
    with pytest.raises(PrivacyError, match=r"gives no embedding of its text away without noise; ask with .* 1 or less"):
        account(tmp_path, embedding_epsilon=1.0).grant(clear)
    account(tmp_path).grant(clear)  # its owner demands nothing yet
    with pytest.raises(PrivacyError, match="has spent epsilon = inf of 1"):
        account(tmp_path, embedding_epsilon=1.0).grant(ONE)


def test_with_a_new_secret_the_same_request_is_charged_again_because_its_noise_is_new(tmp_path: Path) -> None:
    account(tmp_path, embedding_epsilon=0.9).grant(ONE)
    (tmp_path / "privacy/secret").unlink()
    with pytest.raises(PrivacyError, match=r"has spent epsilon = 0.5 of 0.9"):
        account(tmp_path, embedding_epsilon=0.9).grant(ONE)


def test_secret_and_account_are_their_owners_alone(tmp_path: Path) -> None:
    account(tmp_path).grant(ONE)
    secret = tmp_path / "privacy/secret"
    assert len(secret.read_bytes()) == 32
    assert [path.stat().st_mode & 0o777 for path in (secret, tmp_path / "privacy/account.jsonl")] == [0o600, 0o600]
    assert (tmp_path / "privacy").stat().st_mode & 0o777 == 0o700
    secret.chmod(0o640)
    with pytest.raises(PrivacyError, match="others than its owner may read it; chmod 600"):
        account(tmp_path).grant(ONE)
    secret.chmod(0o600)
    secret.write_bytes(b"short")
    with pytest.raises(PrivacyError, match="has 5 bytes, not 32"):
        account(tmp_path).grant(ONE)


def test_a_crash_within_a_row_grants_nothing_until_it_is_mended(tmp_path: Path) -> None:
    account(tmp_path).grant(ONE)
    book = tmp_path / "privacy/account.jsonl"
    book.write_text(book.read_text() + '{"name": "x", "wh')
    with pytest.raises(PrivacyError, match=r"account.jsonl: cannot be read .*; take its last line away"):
        account(tmp_path).grant(ONE)


def test_requests_at_the_same_time_do_not_overdraw(tmp_path: Path) -> None:
    granted, refused = [], []

    def ask(number: int) -> None:
        try:
            granted.append(numbers(account(tmp_path, str(number), embedding_epsilon=2.0).grant(ONE)))
        except PrivacyError:
            refused.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(granted), len(refused)) == (4, 8)


@pytest.mark.parametrize(
    ("value", "said"), [({"embedding_epsilon": 0.0}, "must be positive"), ({"delta": 1.0}, "between 0 and 1")]
)
def test_impossible_demands_are_named_with_their_cure(value: dict[str, float], said: str) -> None:
    (fault,) = Demands(**value).faults()
    assert said in fault
