# SPDX-License-Identifier: Apache-2.0
"""Malformed uploads, counted: refused, accepted, crashed, and the longest that one took.

Each is a good upload of a device with one thing wrong, of a kind drawn at random, and goes the way of every arrival: decoded,
opened, checked. With --guided N as many more come from a coverage-guided fuzzer (`pip install atheris`), which changes
any bytes and puts such things on top of one another, after what reaches new lines of our code: these may be good by chance, so
only crashes count, and whatever takes longer than 5 s.

python benchmarks/fuzz.py [--count 100000] [--format int8] [--seed 0] [--guided 0]
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_args

import numpy as np
import torch

from deepfusion import state_dicts
from deepfusion.data.options import TokenizerOptions
from deepfusion.data.tokenizer import make_tokenizer
from deepfusion.devices.configurations import make_config
from deepfusion.devices.models import from_config, init_id, save
from deepfusion.devices.presets import PRESETS
from deepfusion.errors import UploadError
from deepfusion.federation import formats
from deepfusion.federation import payload as blobs
from deepfusion.federation.formats import CODES, Format, shrink
from deepfusion.federation.payload import decode, encode
from deepfusion.methods import exchange, gathering
from deepfusion.methods.arrivals import Arrivals
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import distinct_state
from deepfusion.types import Payload

DEVICE, NAME, SIZE = "device-0", "llama", 64
Damage = Callable[[np.random.Generator, bytes], bytes]


def good_upload(folder: Path, form: Format) -> tuple[bytes, Arrivals]:
    """An upload as it should be, and what it is compared with."""
    make_tokenizer(TokenizerOptions(vocab_size=300), ["some text of a few words"] * 9, folder, folder / "tokenizer")
    model = from_config(make_config(PRESETS["llama-pico"].config, vocab_size=300, positions=32, eos_id=0), seed=0)
    save(model, folder / NAME, folder / "tokenizer")
    start = {name: tensor.clone() for name, tensor in distinct_state(model).items()}
    trained = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in start.items()}
    arrays = {MODEL + name: tensor for name, tensor in shrink(trained, form, start).items()}
    arrays["embedding"] = torch.nn.functional.normalize(torch.randn(SIZE), dim=0).half()
    told = {"device": DEVICE, "architecture": NAME, "init_id": init_id(model), "tokens": 100, "documents": 3}
    return encode(Payload("model", arrays, told)), Arrivals({DEVICE: NAME}, {NAME: folder / NAME}, form, SIZE)


def admit(blob: bytes, arrivals: Arrivals) -> None:
    """What the server does with an arrival. Raises UploadError where it is refused."""
    arrivals.check(DEVICE, arrivals.opened(DEVICE, decode(blob, source=f"device {DEVICE}")))


# ------------------------------------------------------------------------------------------------ one thing wrong


def split(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def join(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A blob of any header and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor_of(rng: np.random.Generator, header: dict[str, Any], kind: str = "") -> str:
    """Name of a tensor, drawn."""
    names = [name for name, slot in header.items() if name != "__metadata__" and kind in (slot["dtype"], "")]
    return str(rng.choice(names))


def with_header(change: Callable[[np.random.Generator, dict[str, Any]], None]) -> Damage:
    """A damage that rewrites the header."""

    def damage(rng: np.random.Generator, blob: bytes) -> bytes:
        header, data = split(blob)
        change(rng, header)
        return join(header, data)

    return damage


def with_values(change: Callable[[np.random.Generator, dict[str, Any]], None]) -> Damage:
    """A damage that rewrites what the upload says of itself."""

    def rewrite(rng: np.random.Generator, header: dict[str, Any]) -> None:
        (key, text), *_ = header["__metadata__"].items()
        document = json.loads(text)
        change(rng, document["values"])
        header["__metadata__"][key] = json.dumps(document)

    return with_header(rewrite)


def with_payload(change: Callable[[np.random.Generator, Payload], None]) -> Damage:
    """A damage that sends other tensors, in a blob as it should be."""

    def damage(rng: np.random.Generator, blob: bytes) -> bytes:
        payload = decode(blob, source="fuzz")
        change(rng, payload)
        return encode(payload)

    return damage


def slot_change(key: str, draw: Callable[[np.random.Generator, Any], Any]) -> Damage:
    """A damage of one entry of one tensor's row of the header, to something else than it was."""

    def change(rng: np.random.Generator, header: dict[str, Any]) -> None:
        slot = header[tensor_of(rng, header)]
        before = slot[key]
        while slot[key] == before:
            slot[key] = draw(rng, before)

    return with_header(change)


def renamed(rng: np.random.Generator, header: dict[str, Any]) -> None:
    name = tensor_of(rng, header)
    tricks = [
        "../../etc/passwd",
        "/root/x",
        "model/../x",
        "a\u0000b",
        name + "/",
        "",
        " ",
        "\u202e" + name,
        "x" * 600,
        name.upper(),
    ]
    header[str(rng.choice(tricks))] = header.pop(name)


def not_a_number(rng: np.random.Generator, payload: Payload) -> None:
    names = [name for name, tensor in payload.arrays.items() if tensor.is_floating_point() and tensor.numel()]
    tensor = payload.arrays[str(rng.choice(names))]
    tensor.view(-1)[int(rng.integers(tensor.numel()))] = float(rng.choice([np.nan, np.inf, -np.inf]))


def odd_codes(rng: np.random.Generator, payload: Payload) -> None:
    names = [name for name in payload.arrays if name.startswith(MODEL + CODES)] or list(payload.arrays)
    name = str(rng.choice(names))
    tensor, how = payload.arrays[name], int(rng.integers(4))
    cut = tensor.flatten()[: int(rng.integers(tensor.numel()))]
    noise = torch.from_numpy(rng.integers(0, 255, tensor.numel() + 7).astype(np.uint8))
    odd = [cut, torch.cat([tensor.flatten(), tensor.flatten()]), noise, tensor[None]]
    payload.arrays[name] = odd[how].clone()  # type: ignore[index]


def bad_embedding(rng: np.random.Generator, payload: Payload) -> None:
    choices = [
        torch.zeros(SIZE + 1).half(),
        torch.full((SIZE,), 3.0),
        torch.ones(SIZE, dtype=torch.int32),
        torch.zeros(1, SIZE),
    ]
    payload.arrays["embedding"] = choices[int(rng.integers(len(choices)))]  # type: ignore[index]


def extra_tensor(rng: np.random.Generator, payload: Payload) -> None:
    payload.arrays[f"model/extra.{rng.integers(99)}"] = torch.zeros(int(rng.integers(9)))  # type: ignore[index]


def twice(rng: np.random.Generator, blob: bytes) -> bytes:
    header, data = split(blob)
    name = tensor_of(rng, header)
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    return join(text.encode(), data)


def number(rng: np.random.Generator) -> int:
    """Whole numbers that overflow something."""
    return int(rng.choice(np.array([-1, 0, 1, 7, 2**31, 2**32, 2**62, 2**63 - 1], dtype=np.int64))) + int(
        rng.integers(3)
    )


def another_shape(rng: np.random.Generator, was: list[int]) -> list[int]:
    return [*was, number(rng)] if rng.random() < 0.5 else [number(rng) for _ in was]


def another_length(rng: np.random.Generator, blob: bytes) -> bytes:
    return int(rng.integers(0, int.from_bytes(blob[:8], "little"))).to_bytes(8, "little") + blob[8:]


def claims(key: str, *choices: Any) -> Damage:
    """A damage that lets the upload say one of these of itself."""
    return with_values(lambda rng, values: values.update({key: choices[int(rng.integers(len(choices)))]}))


DTYPES = ("F64", "F16", "I8", "BOOL", "U16", "object", "F128", "")
KINDS: dict[str, Damage] = {
    "cut off": lambda rng, blob: blob[: int(rng.integers(len(blob)))],
    "more behind it": lambda rng, blob: blob + rng.bytes(int(rng.integers(1, 64))),
    "gigantic header": lambda rng, blob: int(rng.integers(2**24, 2**62)).to_bytes(8, "little") + blob[8:],
    "header of another length": another_length,
    "not a header": lambda rng, blob: join(rng.bytes(int(rng.integers(1, 99))), split(blob)[1]),
    "a pickle": lambda rng, _blob: pickle.dumps({"weights": rng.bytes(int(rng.integers(1, 999)))}),
    "a name twice": twice,
    "names with tricks": with_header(renamed),
    "another dtype": slot_change("dtype", lambda rng, _: str(rng.choice(DTYPES))),
    "another shape": slot_change("shape", another_shape),
    "other offsets": slot_change("data_offsets", lambda rng, _: [number(rng), number(rng)]),
    "a tensor missing": with_header(lambda rng, header: header.pop(tensor_of(rng, header)) and None),
    "a tensor too many": with_payload(extra_tensor),
    "not finite": with_payload(not_a_number),
    "odd codes": with_payload(odd_codes),
    "an embedding that cannot be": with_payload(bad_embedding),
    "of another device": claims("device", "device-1", "", "../device-0", 0),
    "of another start": claims("init_id", "0" * 64, "", 7),
    "of another architecture": claims("architecture", "gpt2", "", "../x"),
    "counts that cannot be": claims("tokens", -1, 1.5, "9", None, True),
}


def count(seed: int, number_of: int, blob: bytes, arrivals: Arrivals) -> None:
    """Send so many, and print what became of each kind."""
    rng, rows, longest = np.random.default_rng(seed), {name: Counter[str]() for name in KINDS}, 0.0
    names = list(KINDS)
    for _ in range(number_of):
        name = names[int(rng.integers(len(names)))]
        bad = KINDS[name](rng, blob)
        began = time.perf_counter()
        try:
            admit(bad, arrivals)
            rows[name]["accepted"] += 1
        except UploadError:
            rows[name]["refused"] += 1
        except Exception as error:
            rows[name]["crashed"] += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        longest = max(longest, time.perf_counter() - began)
    print("| kind | sent | refused | accepted | crashed |\n|---|---|---|---|---|")
    for name, found in {**rows, "all": sum(rows.values(), Counter())}.items():
        print(f"| {name} | {found.total():,} | {found['refused']:,} | {found['accepted']:,} | {found['crashed']:,} |")
    print(f"\nlongest: {1000 * longest:.0f} ms")


def functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """Those that a module defines, methods of its classes too."""
    for owner in (module, *(each for each in vars(module).values() if isinstance(each, type))):
        for each in vars(owner).values():
            if isinstance(each, FunctionType) and each.__module__ == module.__name__:
                yield each


def guided(seed: int, number_of: int, blob: bytes, arrivals: Arrivals) -> None:
    """As many inputs of a coverage-guided fuzzer, which ends the process where anything but UploadError is raised."""
    import atheris

    for module in (blobs, formats, gathering, exchange, state_dicts):  # what reads an arrival, without torch
        for function in functions_of(module):
            atheris.instrument_func(function)

    def one(data: bytes) -> None:
        try:
            admit(data, arrivals)
        except UploadError:
            return

    def change(data: bytes, most: int, draw: int) -> bytes:
        rng = np.random.default_rng(draw)
        if rng.random() < 0.5:
            with suppress(Exception):  # too broken for it already
                return KINDS[str(rng.choice(list(KINDS)))](rng, data)[:most]
        return atheris.Mutate(data, most)

    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "good").write_bytes(blob)
        how = [f"-runs={number_of}", f"-max_len={2 * len(blob)}", "-timeout=5", f"-seed={seed}"]
        atheris.Setup([sys.argv[0], *how, corpus], one, custom_mutator=change)
        atheris.Fuzz()


def main() -> None:
    """Count, and go on guided where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--format", choices=get_args(Format), default="int8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        blob, arrivals = good_upload(Path(folder), asked.format)
        admit(blob, arrivals)
        count(asked.seed, asked.count, blob, arrivals)
        if asked.guided:
            guided(asked.seed + 1, asked.guided, blob, arrivals)


if __name__ == "__main__":
    main()
