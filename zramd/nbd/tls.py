"""TLS of the server: what the user names, made into a context that can be used, or refused by name.

    make(required=True, certificates=DIR) -> Tls      # raises BadValue

Promises:
1. What is made can serve: each file has been read, the key belongs to the certificate, and a client
   that trusts the certificate has got through a handshake in memory. So an expired one is refused
   here, once and by its name, and not again and again by each client in words of its own.
2. Every fault is one line that names the file and the next step.
3. TLS 1.2 at least. No renegotiation, which costs the server more than its client; and no session
   tickets, as NBD's connections are few and long.

The names in the directory are those of nbdkit, qemu and libnbd: server-cert.pem, server-key.pem,
and to verify clients ca-cert.pem and, where it is there, ca-crl.pem. A file of keys is psktool's:
USER:HEX in each line.

Importing this imports OpenSSL, 7 MiB: only a process that was asked for TLS does
(zramd/without_ssl.py).
"""

import re
import ssl
import sys
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zramd.errors import BadValue

CERTIFICATE: Final = "server-cert.pem"
KEY: Final = "server-key.pem"
CA: Final = "ca-cert.pem"
REVOKED: Final = "ca-crl.pem"

_RECEIVED_AT_ONCE: Final = 64 << 10
"""Bytes. asyncio would keep 256 KiB for each connection, of the 279 KiB that an idle one takes, and
is no faster for it; a record of TLS has 16 KiB."""
SSLProtocol.max_size = _RECEIVED_AT_ONCE

_PSK_CIPHERS: Final = "kECDHEPSK:kDHEPSK:kPSK:!eNULL:!SHA1:!CCM8:!ARIA:!CAMELLIA"
"""Those of TLS 1.2; all of TLS 1.3 are there whatever this says. The last are for old peers."""
_LEAST_PSK: Final = 16
"""Bytes. psktool makes 32."""
_MOST_PSK: Final = 256
"""Bytes of a key, and of a user's name (PSK_MAX_PSK_LEN, PSK_MAX_IDENTITY_LEN of OpenSSL)."""

_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
"""X509_V_ERR_..., of openssl/x509_vfy.h."""

_HOW: Final = "docs/nbd.md tells how to make one"


@dataclass(frozen=True, slots=True)
class Tls:
    context: ssl.SSLContext
    required: bool
    """Nothing is served without it."""


def make(
    *,
    required: bool,
    certificates: Path | None = None,
    verify_peer: bool = False,
    psk: Path | None = None,
) -> Tls:
    """With the certificate in a directory, or the keys in a file: one of the two. Raises
    BadValue."""
    if psk is not None:
        return Tls(_with_keys(psk), required)
    assert certificates is not None
    return Tls(_with_certificate(certificates, verify_peer=verify_peer), required)


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


# Certificates


def _with_certificate(directory: Path, *, verify_peer: bool) -> ssl.SSLContext:
    if not directory.is_dir():
        raise BadValue(f"{directory} is not a directory", hint=f"it is to have {CERTIFICATE}")
    certificate, key = directory / CERTIFICATE, directory / KEY
    context = _new_context()
    _readable(certificate, "a certificate")
    _trusting(certificate)  # or nobody could tell whether it or its key is none
    _readable(key, "its key")
    try:
        context.load_cert_chain(certificate, key, _no_passphrase(key))
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise BadValue(
                f"{key} is not the key of {certificate}", hint="name the two that belong together"
            ) from error
        raise _useless(key, "a private key", error) from error
    except OSError as error:
        raise _unreadable(key, error) from error
    if verify_peer:
        _verify_clients(context, directory)
    _rehearse(context, certificate)
    return context


def _trusting(file: Path) -> ssl.SSLContext:
    """What a client has that trusts all that is in `file`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as error:
        raise _useless(file, "a certificate", error) from error
    except OSError as error:
        raise _unreadable(file, error) from error
    return context


def _verify_clients(context: ssl.SSLContext, directory: Path) -> None:
    authority, revoked = directory / CA, directory / REVOKED
    _readable(authority, "whom to believe a client's certificate")
    _trusting(authority)
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    if revoked.exists():
        _readable(revoked, "which certificates are revoked")
        try:
            context.load_verify_locations(revoked)
        except ssl.SSLError as error:
            raise _useless(revoked, "a list of revoked certificates", error) from error
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _rehearse(context: ssl.SSLContext, certificate: Path) -> None:
    """Raises BadValue where a client that trusts the certificate would go away again."""
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(ours, theirs, server_side=True)
    client = _trusting(certificate).wrap_bio(theirs, ours)
    for _ in range(3):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                if end is server:  # that client has no certificate, and need not
                    return
                raise _not_accepted(certificate, error) from error
            except ssl.SSLError as error:
                if end is client:
                    raise _useless(certificate, "a server's certificate", error) from error
                return
            if end is client:
                return


def _not_accepted(certificate: Path, error: ssl.SSLCertVerificationError) -> BadValue:
    if error.verify_code == _EXPIRED:
        return BadValue(f"{certificate} has expired", hint="renew it; no client would accept it")
    if error.verify_code == _NOT_YET_VALID:
        return BadValue(f"{certificate} is not valid yet", hint="look at this machine's clock")
    return BadValue(f"no client would accept {certificate}: {error.verify_message}", hint=_HOW)


def _readable(file: Path, what: str) -> None:
    try:
        with open(file, "rb") as opened:
            opened.read(1)
    except FileNotFoundError as error:
        raise BadValue(f"{file} is not there: {what}", hint=_HOW) from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> BadValue:
    return BadValue(
        f"{file} cannot be read: {error.strerror}", hint="name a file that the server may read"
    )


def _useless(file: Path, what: str, error: ssl.SSLError) -> BadValue:
    why = (error.reason or str(error)).lower().replace("_", " ")
    return BadValue(f"{file} is not {what} that can be used, in PEM: {why}", hint=_HOW)


def _no_passphrase(key: Path) -> Callable[[], str]:
    def ask() -> str:
        raise BadValue(
            f"{key} is encrypted, and a server has nobody to ask for its passphrase",
            hint=f"write it without one: openssl pkey -in {key} -out NEW",
        )

    return ask


# Keys that both sides have beforehand


def _with_keys(file: Path) -> ssl.SSLContext:
    keys = read_keys(file)
    context = _new_context()
    try:
        set_callback: Any = context.set_psk_server_callback  # type: ignore[attr-defined, unused-ignore]
    except AttributeError as error:
        raise BadValue(
            f"TLS with the keys of {file} needs Python 3.13, and this is"
            f" {sys.version_info[0]}.{sys.version_info[1]}",
            hint="run zramd with that, use certificates, or nbdkit with its --tls-psk",
        ) from error
    context.set_ciphers(_PSK_CIPHERS)
    # OpenSSL ends the handshake of who gets an empty key.
    set_callback(lambda identity: keys.get(identity or "", b""))
    return context


def read_keys(file: Path) -> dict[str, bytes]:
    """psktool's file: a user and a key in each line. Raises BadValue."""
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise BadValue(f"{file} is not UTF-8", hint=_HOW) from error
    except FileNotFoundError as error:
        raise BadValue(f"{file} is not there", hint=_psktool(file)) from error
    except OSError as error:
        raise _unreadable(file, error) from error
    keys = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        user, colon, key = line.strip().rpartition(":")
        if not colon or not user or len(user.encode()) > _MOST_PSK:
            raise BadValue(f"{file}:{number}: this is not USER:KEY", hint=_psktool(file))
        if not re.fullmatch(r"([0-9A-Fa-f]{2})+", key):  # and it is not shown: it is a secret
            raise BadValue(f"{file}:{number}: the key is not hexadecimal", hint=_psktool(file))
        if not _LEAST_PSK <= len(key) // 2 <= _MOST_PSK:
            raise BadValue(
                f"{file}:{number}: the key has {len(key) // 2} bytes; {_LEAST_PSK} to {_MOST_PSK}"
                " are allowed",
                hint=_psktool(file),
            )
        keys[_user(user, file, number)] = bytes.fromhex(key)
    if not keys:
        raise BadValue(f"{file} has no key", hint=_psktool(file))
    return keys


def _user(written: str, file: Path, number: int) -> str:
    """GnuTLS writes a name that is no plain text as # and its bytes in hexadecimal."""
    if not written.startswith("#"):
        return written
    try:
        return bytes.fromhex(written[1:]).decode()
    except ValueError as error:
        raise BadValue(
            f"{file}:{number}: the user's name is not UTF-8", hint=_psktool(file)
        ) from error


def _psktool(file: Path) -> str:
    return f"make it so: psktool -u USER -p {file}"
