"""Signatures of bundles: Ed25519 over the bytes of a manifest, which pins every other file by its digest.

The only file that imports cryptography. A private key is an unencrypted PKCS#8 PEM that only its owner may read, a
public key a PEM of its own; a signature is the 64 bytes themselves. Other tools read all three:

    openssl pkeyutl -verify -rawin -pubin -inkey KEY.pub -in versions/3.json -sigfile versions/3.json.sig
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refrag_core.errors import ConfigError, MissingExtraError, SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "signing and verifying bundles needs the package cryptography: pip install 'refrag[sign]'"
        ) from error


def write_key_pair(path: Path) -> Path:
    """Make a key pair: the private key in `path` (mode 0600), the public one in `path`.pub, which is returned.

    Raises ConfigError, and writes nothing, when either file is there already.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_name(f"{path.name}.pub")
    taken = [str(name) for name in (path, public) if name.exists()]
    if taken:
        raise ConfigError(f"{' and '.join(taken)} exist; expected free names: a key is never overwritten, name another")
    key = Ed25519PrivateKey.generate()
    private_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _create(path, private_pem, 0o600)
    _create(public, public_pem, 0o644)
    return public


def _create(path: Path, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)


def sign(data: bytes, key: Path) -> bytes:
    """64 bytes: the signature of `data` with the private key in the file `key`.

    Raises ConfigError for a file that is no such key or that others may read.
    """
    return _private_key(key).sign(data)


def check_signature(data: bytes, signature: bytes | None, keys: Sequence[Path], *, where: str) -> None:
    """Raise SignatureError unless `signature` is that of `data` with the private half of one of the public `keys`."""
    public_keys = [_public_key(path) for path in keys]
    if signature is None:
        raise SignatureError(
            f"{where} is not signed, expected a signature with {_names(keys)}: nothing of it is used; have it "
            "exported with --sign, or leave --verify-key out to take it unsigned"
        )
    if not any(_fits(key, data, signature) for key in public_keys):
        raise SignatureError(
            f"the signature of {where} was not made with {_names(keys)} over these bytes: it was altered, or signed "
            "with another key; nothing of it is used. Fetch it again, or give the key that it was signed with"
        )


def _names(keys: Sequence[Path]) -> str:
    return " or ".join(str(key) for key in keys)


def _fits(key: "Ed25519PublicKey", data: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _private_key(path: Path) -> "Ed25519PrivateKey":
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path} has mode {mode:04o}, expected 0600: others can read this key; run chmod 600 on it")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None  # what the library says of a key may hold parts of it
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"{path} is no private Ed25519 key, expected an unencrypted PEM: make one with `refrag bundle keygen`"
        )
    return key


def _public_key(path: Path) -> "Ed25519PublicKey":
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(
            f"{path} is no public Ed25519 key, expected the PEM in the .pub file of `refrag bundle keygen`"
        )
    return key
