# SPDX-License-Identifier: Apache-2.0
"""Ed25519 keys and signatures as text: users sign bids, the service signs receipts and results."""

from __future__ import annotations

import base64
import contextlib
import os
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)

from deepfusion.errors import MarketError

HOW = "`openssl pkey -in ann.pem -pubout | sed -n 2p`"
"""How a user gets the line for the provider."""


def public_text(key: Ed25519PublicKey) -> str:
    """A public key in one line: base64 of its DER form, which is the middle line of OpenSSL's PEM."""
    return base64.b64encode(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


@lru_cache(1024)
def read_public(text: str) -> Ed25519PublicKey:
    """A public key of `public_text`.

    Raises:
        MarketError: it is none.
    """
    try:
        key = load_der_public_key(base64.b64decode(text, validate=True))
    except ValueError as error:  # binascii.Error is one
        raise MarketError(f'key = "{text[:80]}": no public key; give the line that {HOW} prints') from error
    if not isinstance(key, Ed25519PublicKey):
        raise MarketError(f'key = "{text[:80]}": not an Ed25519 key; give the line that {HOW} prints')
    return key


def sign(key: Ed25519PrivateKey, message: bytes) -> str:
    """A signature in base64. The same key and message always give the same one."""
    return base64.b64encode(key.sign(message)).decode()


def signed_by(key: Ed25519PublicKey, signature: str, message: bytes) -> bool:
    """Whether a signature of `sign` is that of the key's owner under this message."""
    try:
        key.verify(base64.b64decode(signature, validate=True), message)
    except (InvalidSignature, ValueError):  # binascii.Error is one
        return False
    return True


def _make(path: Path) -> None:
    """A new key, whole or not at all; where two services make one at a time, the first stays."""
    made = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(made)
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def own_key(path: Path) -> tuple[Ed25519PrivateKey, int]:
    """The service's private key, made at the first start, and an open file that stands for having it.

    Raises:
        MarketError: the file is no key of this kind, or others than its owner may read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _make(path)
    held = os.open(path, os.O_RDONLY)
    if os.fstat(held).st_mode & 0o077:
        raise MarketError(f"{path}: others may read the service's private key; chmod 600 {path}")
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise MarketError(
            f"{path}: no private key in PEM; put back the service's own, or choose another ledger"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise MarketError(f"{path}: not an Ed25519 key; put back the service's own, or choose another ledger")
    return key, held
