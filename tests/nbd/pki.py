"""Certificates for tests, made by the program `openssl`: good ones, and each kind of bad ones.

server/         ca-cert.pem server-cert.pem server-key.pem, for localhost and 127.0.0.1
client/         ca-cert.pem client-cert.pem client-key.pem, of the same authority
stranger/       the same of another authority, which the server does not know
anonymous/      ca-cert.pem only
expired/        server's and client's, of the first authority; they were good until yesterday
distrustful/    ca-cert.pem of the other authority only
"""

import subprocess
from pathlib import Path

from tests.conftest import require

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_SERVER = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1\nextendedKeyUsage=serverAuth\n"
_CLIENT = "extendedKeyUsage=clientAuth\n"
_AUTHORITY = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")


def make(directory: Path) -> Path:
    """All of them, each kind in its directory below."""
    authority, other = directory / "authority", directory / "other"
    for place in (authority, other):
        place.mkdir(parents=True)
        _openssl(
            *("req", "-x509", *_NEW_KEY, "-keyout", place / "ca-key.pem"),
            *("-out", place / "ca-cert.pem", "-subj", f"/CN={place.name}", "-days", "2"),
            *_AUTHORITY,
        )
    for name, signer, kinds, days in (
        ("server", authority, ["server"], 2),
        ("client", authority, ["client"], 2),
        ("stranger", other, ["server", "client"], 2),
        ("anonymous", authority, [], 2),
        ("expired", authority, ["server", "client"], -1),
        ("distrustful", other, [], 2),
    ):
        place = directory / name
        place.mkdir()
        (place / "ca-cert.pem").write_bytes((signer / "ca-cert.pem").read_bytes())
        for kind in kinds:
            sign(place, kind, signer, days)
    return directory


def sign(place: Path, kind: str, signer: Path, days: int) -> None:
    """A key and a certificate for it: `kind` is server or client."""
    request, extensions = place / "request.pem", place / "extensions"
    extensions.write_text(_SERVER if kind == "server" else _CLIENT)
    _openssl(
        *("req", *_NEW_KEY, "-keyout", place / f"{kind}-key.pem"),
        *("-out", request, "-subj", "/CN=localhost"),
    )
    _openssl(
        *("x509", "-req", "-in", request, "-out", place / f"{kind}-cert.pem"),
        *("-CA", signer / "ca-cert.pem", "-CAkey", signer / "ca-key.pem", "-CAcreateserial"),
        *("-days", days, "-extfile", extensions),
    )
    request.unlink()
    extensions.unlink()


def revoke(authority: Path, certificate: Path, revoked: Path) -> None:
    """Write the list of the authority's revoked certificates, which has this one."""
    settings = authority / "settings"
    (authority / "index").write_text("")
    (authority / "number").write_text("01\n")
    settings.write_text(
        "[ca]\ndefault_ca=a\n[a]\n"
        f"database={authority}/index\ncrlnumber={authority}/number\ndefault_md=sha256\n"
        "default_crl_days=2\n"
    )
    signed = ("-keyfile", authority / "ca-key.pem", "-cert", authority / "ca-cert.pem")
    _openssl("ca", "-config", settings, *signed, "-revoke", certificate)
    _openssl("ca", "-config", settings, *signed, "-gencrl", "-out", revoked)


def encrypt(key: Path, encrypted: Path) -> None:
    secret = ("-aes256", "-passout", "pass:secret")
    _openssl("pkey", "-in", key, "-out", encrypted, *secret)


def _openssl(*arguments: object) -> None:
    command = [require.program("openssl"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
