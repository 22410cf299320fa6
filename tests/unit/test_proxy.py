# SPDX-License-Identifier: Apache-2.0
"""Properties of proxies: one for each domain and architecture, weights as asked for, memory flat in the number of devices."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_world import config, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from deepfusion.data.prepare import corpus_from_texts
from deepfusion.devices.models import from_config, load, save
from deepfusion.errors import ModelError, UploadError
from deepfusion.stages import proxy
from deepfusion.stages.evaluate import Score, score_documents
from deepfusion.stages.proxy import MODEL, SCREENED, Judge, ProxyOptions, load_proxies, make_proxies
from deepfusion.state_dicts import distinct_state
from deepfusion.types import Clusters, Proxy, State, Upload

ARCHITECTURES = ("gpt2-pico", "llama-pico")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer, and the first weights of each architecture."""
    folder = tmp_path_factory.mktemp("site")
    tokenizer = write_tokenizer(folder / "tokenizer")
    for name in ARCHITECTURES:
        save(from_config(config(name), seed=0), folder / name, tokenizer)
    return {"tokenizer": tokenizer, **{name: folder / name for name in ARCHITECTURES}}


def upload(
    site: dict[str, Path], folder: Path, index: int, architecture: str, *, tokens: int = 100, seed: int | None = None,
    change: Callable[[State], None] | None = None,
) -> Upload:  # fmt: skip
    state = distinct_state(load(site[architecture]))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        state = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    if change:
        change(state)
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"d{index}.safetensors"
    save_file({"embedding": torch.ones(2), **{MODEL + name: t.contiguous() for name, t in state.items()}}, path)
    return Upload(f"d{index}", architecture, "start", path, np.ones(2, np.float32), tokens)


def clusters_of(labels: list[int]) -> Clusters:
    ids = tuple(f"d{index}" for index in range(len(labels)))
    return Clusters(ids, np.asarray(labels), np.ones((max(labels) + 1, 2)))


def proxies_of(
    site: dict[str, Path], uploads: list[Upload], labels: list[int], out: Path, weights: str = "uniform",
    judge: Judge | None = None, soups: int = 4,
) -> list[Proxy]:  # fmt: skip
    """The mean of all models of a group; greedy soups where there is a judge."""
    out.mkdir(parents=True)
    make_proxies(
        uploads, clusters_of(labels), options=ProxyOptions(average="soup" if judge else "mean", soups=soups, weights=weights),  # type: ignore[arg-type]
        initials={name: site[name] for name in ARCHITECTURES}, tokenizer_folder=site["tokenizer"],
        judge=judge or (lambda _domain, _model: 0.0), out=out,
    )  # fmt: skip
    return load_proxies(out)


def test_there_is_one_for_each_domain_and_architecture_weighed_by_tokens(site: dict[str, Path], tmp_path: Path) -> None:
    rows = [("gpt2-pico", 100), ("llama-pico", 300), ("gpt2-pico", 200), ("gpt2-pico", 50)]
    uploads = [upload(site, tmp_path, i, name, tokens=tokens, seed=i) for i, (name, tokens) in enumerate(rows)]
    proxies = proxies_of(site, uploads, [0, 0, 0, 1], tmp_path / "out")
    assert [(p.cluster, p.architecture, p.members, p.num_tokens, p.weight) for p in proxies] == [
        (0, "gpt2-pico", ("d0", "d2"), 300, 0.5), (0, "llama-pico", ("d1",), 300, 0.5), (1, "gpt2-pico", ("d3",), 50, 1.0)
    ]  # fmt: skip
    stored = [load_file(uploads[i].path) for i in (0, 2)]
    for name, tensor in distinct_state(load(proxies[0].folder)).items():
        torch.testing.assert_close(tensor, (stored[0][MODEL + name] + stored[1][MODEL + name]) / 2)
    for name, tensor in distinct_state(load(proxies[2].folder)).items():
        assert torch.equal(tensor, load_file(uploads[3].path)[MODEL + name]), "the mean of one model is that model"


def test_token_weights_are_the_uniform_ones_where_tokens_are_equal_or_absent(
    site: dict[str, Path], tmp_path: Path
) -> None:
    for tokens in (100, 0):
        folder = tmp_path / str(tokens)
        uploads = [upload(site, folder, i, "llama-pico", tokens=tokens, seed=i) for i in range(3)]
        states = [
            distinct_state(load(proxies_of(site, uploads, [0] * 3, folder / way, way)[0].folder))
            for way in ("uniform", "tokens")
        ]
        for name in states[0]:
            assert torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize("claim", [10**6, 2**62])
def test_a_device_that_claims_many_tokens_weighs_at_most_ten_times_the_median(
    claim: int, site: dict[str, Path], tmp_path: Path
) -> None:
    rows = [("gpt2-pico", 100), ("gpt2-pico", 200), ("gpt2-pico", 300), ("llama-pico", claim)]
    uploads = [upload(site, tmp_path, i, name, tokens=tokens, seed=i) for i, (name, tokens) in enumerate(rows)]
    first, second = proxies_of(site, uploads, [0] * 4, tmp_path / "out")
    assert (first.weight, second.weight) == (600 / 2600, 2000 / 2600)
    assert second.num_tokens == claim, "what was said is told as it was said"
    uploads = [upload(site, tmp_path, i, "llama-pico", tokens=(100, claim)[i], seed=i) for i in range(2)]
    found = distinct_state(load(proxies_of(site, uploads, [0, 0], tmp_path / "mean", "tokens")[0].folder))
    states = [load_file(u.path) for u in uploads]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (states[0][MODEL + name] + 10 * states[1][MODEL + name]) / 11)


def test_token_weights_follow_the_tokens(site: dict[str, Path], tmp_path: Path) -> None:
    uploads = [upload(site, tmp_path, i, "llama-pico", tokens=(300, 100)[i], seed=i) for i in range(2)]
    found = distinct_state(load(proxies_of(site, uploads, [0, 0], tmp_path / "out", "tokens")[0].folder))
    first, second = (load_file(u.path) for u in uploads)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.75 * first[MODEL + name] + 0.25 * second[MODEL + name])


def shift(amount: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state["model.norm.weight"] += amount

    return change


def far_from(wanted: dict[int, float]) -> Judge:
    """A judge to whom a model of domain k is the worse the farther its last norm is from `wanted[k]`."""
    return lambda domain, model: abs(float(distinct_state(model)["model.norm.weight"].mean()) - 1 - wanted[domain])


def test_a_model_joins_the_first_soup_that_it_does_not_make_worse_or_begins_its_own(
    site: dict[str, Path], tmp_path: Path
) -> None:
    shifts = [4.0, 1.5, -1.0, 0.5, 7.0]  # the best last norm is 1: d1 and d3 meet there, d2 and d0 only near it
    uploads = [upload(site, tmp_path, i, "llama-pico", change=shift(by)) for i, by in enumerate(shifts)]
    found = proxies_of(site, uploads, [0] * 5, tmp_path / "out", judge=far_from({0: 1.0}))
    assert [(p.members, p.weight) for p in found] == [(("d1", "d3"), 0.4), (("d2", "d0"), 0.4), (("d4",), 0.2)]
    assert len({p.folder for p in found}) == 3
    norms = [float(distinct_state(load(p.folder))["model.norm.weight"].mean()) for p in found]
    assert norms == pytest.approx([2.0, 2.5, 8.0])


def test_the_worst_models_are_left_out_where_there_are_soups_enough(site: dict[str, Path], tmp_path: Path) -> None:
    uploads = [upload(site, tmp_path, i, "llama-pico", change=shift(by)) for i, by in enumerate([0.0, 3.0, 9.0])]
    found = proxies_of(site, uploads, [0] * 3, tmp_path / "out", judge=far_from({0: 0.0}), soups=2)
    assert [(p.members, p.weight) for p in found] == [(("d0",), 0.5), (("d1",), 0.5)]


def test_each_domain_judges_its_own_soups(site: dict[str, Path], tmp_path: Path) -> None:
    uploads = [upload(site, tmp_path, i, "llama-pico", change=shift(by)) for i, by in enumerate([0.0, 3.0, 0.0, 3.0])]
    found = proxies_of(site, uploads, [0, 0, 1, 1], tmp_path / "out", judge=far_from({0: 0.0, 1: 3.0}), soups=1)
    assert [p.members for p in found] == [("d0",), ("d3",)]


def test_equal_models_all_go_into_one_soup_and_one_that_cannot_be_judged_in_none(
    site: dict[str, Path], tmp_path: Path
) -> None:
    uploads = [upload(site, tmp_path, i, "llama-pico", change=shift(by)) for i, by in enumerate([5.0, 0.0, 0.0])]

    def judge(_domain: int, model: PreTrainedModel) -> float:
        return float("nan") if float(distinct_state(model)["model.norm.weight"].mean()) > 2 else 1.0

    found = proxies_of(site, uploads, [0, 0, 0], tmp_path / "out", judge=judge)
    assert [p.members for p in found] == [("d1", "d2")]


def test_identical_uploads_give_that_model_bit_for_bit(site: dict[str, Path], tmp_path: Path) -> None:
    uploads = [upload(site, tmp_path, i, "gpt2-pico", seed=7) for i in range(5)]
    found = distinct_state(load(proxies_of(site, uploads, [0] * 5, tmp_path / "out")[0].folder))
    assert all(torch.equal(found[name], load_file(uploads[0].path)[MODEL + name]) for name in found)


def test_models_that_started_elsewhere_are_refused_by_name(site: dict[str, Path], tmp_path: Path) -> None:
    uploads = [upload(site, tmp_path, i, "gpt2-pico", seed=i) for i in range(3)]
    uploads[2] = replace(uploads[2], init_id="elsewhere")
    with pytest.raises(UploadError, match=r"d2 started from other weights than d0 \(gpt2-pico\).*; start all devices"):
        proxies_of(site, uploads, [0, 0, 0], tmp_path / "out")


def spoil(name: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = torch.full_like(state[name], value)

    return change


@pytest.mark.parametrize(("change", "says"), [
    (spoil("model.norm.weight", float("nan")), "d1.*model.norm.weight"),
    (spoil("model.norm.weight", float("inf")), "d1.*model.norm.weight"),
    (lambda state: state.pop("model.norm.weight"), r"d1: tensor model.norm.weight is missing, where llama-pico has \[\d+\]; let"),
    (lambda state: state.update({"extra": torch.ones(3)}), r"d1: tensor extra is \[3\], where llama-pico has missing; let"),
    (lambda state: state.update({"model.norm.weight": torch.ones(3)}), r"d1: tensor model.norm.weight is \[3\], where"),
], ids=["nan", "infinity", "missing", "extra", "shape"])  # fmt: skip
def test_an_upload_that_cannot_be_averaged_is_refused_by_name(
    site: dict[str, Path], tmp_path: Path, change: Callable[[State], None], says: str
) -> None:
    uploads = [upload(site, tmp_path, i, "llama-pico", seed=i, change=change if i == 1 else None) for i in range(2)]
    with pytest.raises(UploadError, match=says):
        proxies_of(site, uploads, [0, 0], tmp_path / "out")


def test_memory_does_not_grow_with_the_number_of_devices(
    site: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload is let go before the next one is read; each is read to be tried, and to be averaged."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = proxy.read_model

    def watched(path: Path) -> State:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        state = read(path)
        alive.extend(weakref.ref(tensor) for tensor in state.values())
        return state

    monkeypatch.setattr(proxy, "read_model", watched)
    uploads = [upload(site, tmp_path, i, "gpt2-pico", seed=i) for i in range(12)]
    proxies_of(site, uploads, [0] * 12, tmp_path / "out")
    assert len(alive) == 2 * 12 * len(distinct_state(load(site["gpt2-pico"])))
    assert most <= 1, "more of an upload than the tensor looked at last is in memory when the next one is read"


# ------------------------------------------------------------------------------------------------ hostile models


@pytest.mark.parametrize("how", ["trimmed", "median", "krum"])
def test_one_hostile_model_of_five_moves_a_robust_average_no_further_than_the_others_reach(
    how: str, site: dict[str, Path], tmp_path: Path
) -> None:
    def scaled(state: State) -> None:
        for tensor in state.values():
            tensor.mul_(1e6)

    good = [upload(site, tmp_path, i, "gpt2-pico", seed=i) for i in range(4)]
    bad = upload(site, tmp_path, 4, "gpt2-pico", seed=4, change=scaled)
    (tmp_path / "out").mkdir()
    make_proxies(
        [*good, bad], clusters_of([0] * 5), options=ProxyOptions(average=how, bad=0.2),  # type: ignore[arg-type]
        initials={name: site[name] for name in ARCHITECTURES}, tokenizer_folder=site["tokenizer"],
        judge=lambda _domain, _model: 0.0, out=tmp_path / "out",
    )  # fmt: skip
    (found,) = load_proxies(tmp_path / "out")
    state = distinct_state(load(found.folder))
    states = [load_file(u.path) for u in good]
    for name, tensor in state.items():
        stack = torch.stack([s[MODEL + name] for s in states])
        assert bool((tensor <= stack.amax(0) + 1e-6).all()), name
        assert bool((tensor >= stack.amin(0) - 1e-6).all()), name
    assert len(found.members) == 5


def huge(part: str) -> Callable[[State], None]:
    """Finite weights whose products are not."""

    def change(state: State) -> None:
        for tensor in (tensor for name, tensor in state.items() if part in name):
            generator = torch.Generator().manual_seed(tensor.numel())
            tensor.copy_(3e37 * torch.randn(tensor.shape, generator=generator).sign())

    return change


@pytest.mark.parametrize("screen", [None, 1e9])
@pytest.mark.parametrize("average", ["mean", "soup", "trimmed", "median", "krum"])
def test_a_model_whose_finite_weights_overflow_is_left_out_and_named_and_changes_nothing(
    average: str, screen: float | None, site: dict[str, Path], tmp_path: Path
) -> None:
    """Also where nobody is compared with it: alone in its domain and architecture."""
    text = corpus_from_texts(["w1 w2 w3 w4", "w5 w6 w7"], "public", site["tokenizer"])

    def judge(_domain: int, model: PreTrainedModel) -> float:
        return sum(score_documents(model, text, 16), Score()).log_perplexity

    good = [upload(site, tmp_path, i, "gpt2-pico", seed=i) for i in range(4)]
    bad = [
        upload(site, tmp_path, 4, "gpt2-pico", change=huge("")),
        upload(site, tmp_path, 5, "llama-pico", change=huge("mlp")),
    ]
    for devices, out in ((good, tmp_path / "good"), ([*good, *bad], tmp_path / "all")):
        out.mkdir()
        make_proxies(
            devices, clusters_of([0] * len(devices)), options=ProxyOptions(average=average, screen=screen),  # type: ignore[arg-type]
            initials={name: site[name] for name in ARCHITECTURES}, tokenizer_folder=site["tokenizer"],
            judge=judge, out=out,
        )  # fmt: skip
    honest, found = load_proxies(tmp_path / "good"), load_proxies(tmp_path / "all")
    assert [(p.architecture, p.members, p.weight) for p in found] == [
        (p.architecture, p.members, p.weight) for p in honest
    ]
    files = ["model.safetensors", "config.json"]
    assert all(
        (p.folder / f).read_bytes() == (q.folder / f).read_bytes()
        for p, q in zip(found, honest, strict=True)
        for f in files
    )
    told = json.loads((tmp_path / "all" / SCREENED).read_text())
    assert told == {
        name: f"{name} predicts its domain's public text at no finite number of nats: its weights overflow"
        for name in ("d4", "d5")
    }


def screening(
    site: dict[str, Path], tmp_path: Path, nats: list[float], screen: float | None, start: float = 5.0
) -> list[Proxy]:
    """Proxies of devices with these nats on their domain's text, of a start with so many."""
    values = iter([*([start] if screen is not None else []), *nats])
    uploads = [upload(site, tmp_path, i, "gpt2-pico", seed=i) for i in range(len(nats))]
    (tmp_path / "out").mkdir()
    make_proxies(
        uploads, clusters_of([0] * len(nats)), options=ProxyOptions(average="mean", screen=screen),
        initials={name: site[name] for name in ARCHITECTURES}, tokenizer_folder=site["tokenizer"],
        judge=lambda _domain, _model: next(values), out=tmp_path / "out",
    )  # fmt: skip
    return load_proxies(tmp_path / "out")


def test_a_model_that_is_much_worse_than_its_start_is_left_out_and_named(site: dict[str, Path], tmp_path: Path) -> None:
    (found,) = screening(site, tmp_path, [4.0, 5.4, 9.0, float("nan")], 0.5)
    assert found.members == ("d0", "d1")
    told = json.loads((tmp_path / "out" / SCREENED).read_text())
    assert told.keys() == {"d2", "d3"}
    assert told["d2"] == "d2 predicts its domain's public text at 9.00 nats, the weights that it started from at 5.00"


def test_without_a_screen_everybody_counts(site: dict[str, Path], tmp_path: Path) -> None:
    (found,) = screening(site, tmp_path, [4.0, 9.0], None)
    assert found.members == ("d0", "d1")
    assert json.loads((tmp_path / "out" / SCREENED).read_text()) == {}


def test_where_nobody_is_left_the_models_are_named(site: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UploadError, match=r"no domain has a model left \(d0 predicts .* raise \[proxy\] screen"):
        screening(site, tmp_path, [9.0, 8.0], 0.5)


def test_a_domain_of_which_nobody_is_left_has_no_proxy_and_the_others_theirs(
    site: dict[str, Path], tmp_path: Path
) -> None:
    nats = {"d0": 9.0, "d1": 4.0, "d2": 4.0}
    uploads = [upload(site, tmp_path, i, "llama-pico", change=shift(n)) for i, n in enumerate(nats.values())]
    (tmp_path / "out").mkdir()
    make_proxies(
        uploads, clusters_of([0, 1, 1]), options=ProxyOptions(average="mean", screen=0.5),
        initials={name: site[name] for name in ARCHITECTURES}, tokenizer_folder=site["tokenizer"],
        judge=lambda _domain, model: max(5.0, float(distinct_state(model)["model.norm.weight"].mean()) - 1),
        out=tmp_path / "out",
    )  # fmt: skip
    assert [(p.cluster, p.members, p.weight) for p in load_proxies(tmp_path / "out")] == [(1, ("d1", "d2"), 1.0)]
    assert json.loads((tmp_path / "out" / SCREENED).read_text()).keys() == {"d0"}


def test_a_start_that_cannot_be_judged_stops_the_screening(site: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the weights that d0, d1 started from predict NaN"):
        screening(site, tmp_path, [4.0, 4.0], 0.5, start=float("nan"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ProxyOptions(bad=0.5), "bad = 0.5: a majority cannot be borne"),
        (ProxyOptions(average="krum", weights="tokens"), 'average = "krum" counts every model alike'),
        (ProxyOptions(screen=float("nan")), "screen = nan: must be finite"),
    ],
)
def test_options_that_cannot_work_are_named(options: ProxyOptions, said: str) -> None:
    assert any(said in fault for fault in options.faults())
