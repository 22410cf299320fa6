# SPDX-License-Identifier: Apache-2.0
"""The wire format: what is sent arrives unchanged, and what a stranger sends can only be refused."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.errors import UploadError
from deepfusion.federation.header import DTYPES, LARGEST_HEADER, METADATA_KEY
from deepfusion.federation.payload import (
    check_embedding,
    check_metadata,
    check_state,
    decode,
    encode,
    inspect_file,
    read_file,
    read_metadata,
)
from deepfusion.types import Payload

GOOD = Payload(
    "model",
    {"model/w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "embedding": torch.tensor([0.6, 0.8])},
    {"device": "d01", "architecture": "gpt2", "init_id": "abc", "tokens": 12, "documents": 2, "loss": 0.5, "ok": True},
    3,
)
DEFAULT_METADATA = {METADATA_KEY: json.dumps({"what": "model", "round": 0, "values": {}})}


def blob_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one_tensor(name: str = "w", data: bytes = b"\0" * 8, **changes: object) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return blob_of({"__metadata__": DEFAULT_METADATA, name: entry}, data)


def with_values(**document: object) -> bytes:
    inner = {"what": "model", "round": 0, "values": {}} | document
    return blob_of({"__metadata__": {METADATA_KEY: json.dumps(inner)}})


def test_every_allowed_dtype_and_shape_arrives_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = {
        f"{name}/{'x'.join(map(str, shape)) or 'scalar'}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in ((), (0,), (3,), (2, 0, 4), (3, 5))
    }
    got = decode(encode(Payload("model", arrays, {"a": "ü", "b": -1, "c": 1e-9, "d": False}, 7)), source="d1")
    assert (got.what, got.round, got.metadata) == ("model", 7, {"a": "ü", "b": -1, "c": 1e-9, "d": False})
    assert got.arrays.keys() == arrays.keys()
    for name, tensor in arrays.items():
        assert got.arrays[name].dtype == tensor.dtype
        assert got.arrays[name].shape == tensor.shape
        assert torch.equal(got.arrays[name], tensor)


def test_empty_tensors_of_any_origin_arrive() -> None:
    for empty in (torch.from_numpy(np.zeros(0, np.float32)).half(), torch.zeros(0, 3), torch.ones(4)[:0]):
        found = decode(encode(Payload("model", {"e": empty, "w": torch.ones(2)})), source="device d01").arrays
        assert (found["e"].shape, found["e"].dtype) == (empty.shape, empty.dtype)
        assert found["w"].tolist() == [1, 1]


def test_equal_payloads_have_equal_bytes_whatever_their_order() -> None:
    turned = Payload(GOOD.what, dict(reversed(GOOD.arrays.items())), dict(reversed(GOOD.metadata.items())), GOOD.round)
    assert encode(turned) == encode(GOOD)
    assert encode(decode(encode(GOOD), source="d1")) == encode(GOOD)


def test_tensors_that_are_not_contiguous_are_sent_by_value() -> None:
    got = decode(encode(Payload("x", {"t": torch.arange(6).reshape(2, 3).T})), source="d1")
    assert got.arrays["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_blob_is_an_ordinary_safetensors_file_and_every_tensor_lies_aligned(tmp_path: Path) -> None:
    mixed = Payload("x", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(mixed))
    assert torch.equal(safetensors.torch.load_file(path)["b"], mixed.arrays["b"])
    assert all(slot.start % slot.dtype.itemsize == 0 for slot in inspect_file(path, source="d1").slots.values())


def test_files_are_mapped_and_writing_to_the_tensors_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "d01.safetensors"
    path.write_bytes(encode(GOOD))
    payload = read_file(path, source="d01")
    payload.arrays["model/w"].zero_()
    assert path.read_bytes() == encode(GOOD)
    assert read_metadata(path) == GOOD.metadata


def test_misaligned_tensors_of_other_writers_are_read() -> None:
    entries = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    blob = blob_of({"__metadata__": DEFAULT_METADATA, **entries}, b"\x07" + b"\0\0\x80\x3f")
    assert decode(blob, source="d1").arrays["b"].tolist() == [1.0]


BAD_BLOBS = {
    "empty file": (b"", "has 0 bytes"),
    "cut off in the header": (encode(GOOD)[:40], "cut off"),
    "cut off in the tensors": (encode(GOOD)[:-5], "cut off"),
    "trailing bytes": (encode(GOOD) + b"more", "4 bytes follow the last tensor"),
    "huge header length": ((2**60).to_bytes(8, "little") + b"{}", f"limit of {LARGEST_HEADER:,}"),
    "header longer than the blob": ((1000).to_bytes(8, "little") + b"{}", "only 2 follow"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00" + b"cposix\nsystem\n", "pickle"),
    "zip archive of torch.save": (b"PK\x03\x04" + b"\0" * 60, "pickle"),
    "not JSON": (blob_of(b"{what"), "not valid JSON"),
    "not UTF-8": (blob_of(b'{"\xff": 1}'), "not valid JSON"),
    "deeply nested JSON": (blob_of(b"[" * 100_000), "not valid JSON"),
    "JSON list": (blob_of([1]), "a JSON list"),
    "no metadata": (blob_of({}), "has no"),
    "metadata is not ours": (blob_of({"__metadata__": {"format": "pt"}}), "has no"),
    "metadata with other keys": (with_values(more=1), "not what, round and values"),
    "nested metadata": (with_values(values={"a": {"b": 1}}), "only strings, numbers"),
    "null metadata": (with_values(values={"a": None}), "only strings, numbers"),
    "NaN metadata": (blob_of({"__metadata__": {METADATA_KEY: '{"what":"m","round":0,"values":{"a":NaN}}'}}), "no JSON number"),
    "infinite metadata": (blob_of({"__metadata__": {METADATA_KEY: '{"what":"m","round":0,"values":{"a":1e999}}'}}), "not finite"),
    "negative round": (with_values(round=-1), "no round's number"),
    "path as kind": (with_values(what="../x"), "not a short plain word"),
    "half a character": (with_values(values={"a": "\ud800"}), "half a character"),
    "name climbs out": (one_tensor("../../etc/passwd"), "could be a path"),
    "absolute name": (one_tensor("/etc/passwd"), "could be a path"),
    "name with a backslash": (one_tensor("a\\b"), "could be a path"),
    "name with a null byte": (one_tensor("a\0b"), "could be a path"),
    "name twice": (
        blob_of(b'{"__metadata__":{},"w":{},"w":{}}'),
        "stands twice",
    ),
    "unknown dtype": (one_tensor(dtype="F8_E4M3"), "convert it to one of"),
    "negative shape": (one_tensor(shape=[-2]), "whole numbers"),
    "shape of booleans": (one_tensor(shape=[True, 2]), "whole numbers"),
    "huge shape": (one_tensor(shape=[2**40]), "needs 4,398,046,511,104 bytes"),
    "overflowing empty shape": (one_tensor(data=b"", shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "needs 0 bytes"),
    "gap": (one_tensor(data=b"\0" * 16, data_offsets=[8, 16]), "a gap or an overlap"),
    "offsets turned round": (one_tensor(data_offsets=[8, 0]), "data_offsets"),
    "offsets beyond the file": (one_tensor(shape=[20], data_offsets=[0, 80]), "has only"),
    "NaN": (encode(Payload("m", {"w": torch.tensor([0.0, float("nan")])})), "holds NaN"),
    "infinity": (encode(Payload("m", {"w": torch.tensor([0.0, -float("inf")], dtype=torch.bfloat16)})), "infinite"),
    "BOOL of 2": (one_tensor(data=b"\x02", dtype="BOOL", shape=[1], data_offsets=[0, 1]), "other than 0 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BLOBS)
def test_a_bad_blob_is_refused_with_its_sender_the_fault_and_the_cure(case: str) -> None:
    blob, fault = BAD_BLOBS[case]
    with pytest.raises(UploadError) as caught:
        decode(blob, source="device d01")
    text = str(caught.value)
    assert text.startswith("device d01: ")
    assert fault in text
    assert "; " in text, "what to do is missing"


@pytest.mark.parametrize("case", ["empty file", "cut off in the tensors", "huge header length", "pickle"])
def test_a_bad_file_is_refused_like_a_bad_blob(case: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(BAD_BLOBS[case][0])
    for read in (inspect_file, read_file):
        with pytest.raises(UploadError, match="device d01"):
            read(tmp_path / "f", source="device d01")


def changed(arrays: dict[str, torch.Tensor] | None = None, **metadata: str | int) -> Payload:
    return Payload("model", {**GOOD.arrays, **(arrays or {})}, {**GOOD.metadata, **metadata})


def check(payload: Payload) -> None:
    check_metadata(payload, "d01", "gpt2", "abc")
    check_embedding(payload, 2, "d01")
    state = {name: tensor for name, tensor in payload.arrays.items() if name != "embedding"}
    check_state(state, {"model/w": torch.empty(2, 3, device="meta")}, "d01")


UNFIT = {
    "missing tensor": (Payload("model", {"embedding": GOOD.arrays["embedding"]}, GOOD.metadata), "missing (model/w)"),
    "extra tensor": (changed({"model/v": torch.ones(1)}), "not asked for (model/v)"),
    "wrong shape": (changed({"model/w": torch.ones(3, 2)}), "model/w has shape [3, 2], not [2, 3]"),
    "wrong dtype": (changed({"model/w": torch.ones(2, 3).half()}), "model/w has dtype torch.float16"),
    "no embedding": (Payload("model", {"model/w": torch.ones(2, 3)}, GOOD.metadata), 'no tensor "embedding"'),
    "embedding of another length": (changed({"embedding": torch.ones(3)}), "shape [3], not [2]"),
    "embedding of whole numbers": (changed({"embedding": torch.tensor([0, 1])}), "not a floating one"),
    "embedding not of length 1": (changed({"embedding": torch.tensor([3.0, 4.0])}), "length 5, not 1"),
    "embedding of NaN": (changed({"embedding": torch.tensor([float("nan"), 0.0])}), "length nan"),
    "another device's id": (changed(device="d02"), "device = 'd02', but 'd01' was asked"),
    "another architecture": (changed(architecture="llama"), "architecture = 'llama'"),
    "another start": (changed(init_id="zzz"), "init_id = 'zzz'"),
    "negative token count": (changed(tokens=-1), "tokens = -1"),
    "token count as text": (changed(tokens="12"), "tokens = '12'"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_upload_that_does_not_fit_is_refused_with_its_device_the_fault_and_the_cure(case: str) -> None:
    payload, fault = UNFIT[case]
    with pytest.raises(UploadError) as caught:
        check(payload)
    text = str(caught.value)
    assert text.startswith("device d01: ")
    assert fault in text
    assert "; " in text, "what to do is missing"


def test_a_good_upload_fits_also_without_text() -> None:
    check(GOOD)
    check(changed({"embedding": torch.zeros(2)}))


def test_many_wrong_tensors_are_counted_and_the_first_few_are_named() -> None:
    with pytest.raises(UploadError, match=r"9 tensors are missing \(t0, t1, t2 and 6 more\)"):
        check_state({}, {f"t{i}": torch.ones(1) for i in range(9)}, "d01")


BLOB = encode(GOOD)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_bytes_are_read_or_refused_but_nothing_else_happens(data: st.DataObject) -> None:
    mutant = bytearray(BLOB)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        cut = data.draw(st.integers(0, 3))
        mutant[at : at + cut] = data.draw(st.binary(max_size=4))
        if not mutant:
            break
    payload = read_or_refuse(bytes(mutant))
    assert sum(t.numel() * t.element_size() for t in payload.arrays.values()) <= len(mutant)


def read_or_refuse(blob: bytes) -> Payload:
    """The payload, or an empty one if the blob is refused by its sender's name; any other error comes through."""
    try:
        return decode(blob, source="device d01")
    except UploadError as error:
        if not str(error).startswith("device d01: "):
            raise
        return Payload("refused")


WORDS = ["w", "dtype", "shape", "data_offsets", "__metadata__", METADATA_KEY]


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
        max_leaves=8,
    )
)
def test_any_json_as_a_header_is_read_or_refused(header: object) -> None:
    for entry in (header, {"__metadata__": DEFAULT_METADATA, "w": header}):
        assert len(read_or_refuse(blob_of(entry, b"\0" * 8)).arrays) <= 1


def test_nothing_is_allocated_that_a_header_only_claims() -> None:
    claims = [one_tensor(shape=[2**n], data_offsets=[0, 2 ** (n + 2)]) for n in range(20, 60)]
    claims.append((LARGEST_HEADER - 1).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    try:
        for blob in claims:
            with pytest.raises(UploadError):
                decode(blob, source="d1")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
