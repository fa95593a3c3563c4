import base64
import hashlib
import hmac
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from flask.testing import FlaskClient

from order_service.auth import Principal, TokenVerifier
from order_service.cli import commands
from order_service.errors import NotAuthenticated, TemporarilyUnavailable
from order_service.operate.token import KEY_ID, signing_key
from order_service.settings import Settings

HOUR = 3600


@pytest.fixture
def verifier(settings: Settings, key: rsa.RSAPrivateKey) -> TokenVerifier:
    """Give a verifier that knows the issuer's key."""
    return TokenVerifier(
        issuer=settings.auth_issuer, audience=settings.auth_audience, jwks=settings.auth_jwks
    )


def encoded(part: dict[str, Any]) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")


def signed_with_the_public_key(key: rsa.RSAPrivateKey, claims: dict[str, Any]) -> str:
    """Forge what a verifier takes that lets the token choose the algorithm."""
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    content = encoded({"alg": "HS256", "typ": "JWT", "kid": KEY_ID}) + b"." + encoded(claims)
    digest = hmac.digest(public, content, hashlib.sha256)
    return (content + b"." + base64.urlsafe_b64encode(digest).rstrip(b"=")).decode()


def test_a_good_token_tells_user_and_scopes(
    verifier: TokenVerifier, sign: Callable[..., str]
) -> None:
    """The subject is the user, the scope a list of words."""
    assert verifier.verify(sign()) == Principal(
        "user-7", frozenset({"orders:read", "orders:write"})
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"iss": "https://evil.example"},
        {"iss": None},
        {"aud": "mail-service"},
        {"aud": None},
        {"exp": int(time.time()) - HOUR},
        {"exp": None},
        {"nbf": int(time.time()) + HOUR},
        {"sub": None},
        {"sub": 7},
        {"kid": "unknown"},
    ],
    ids=lambda changed: " ".join(f"{name}={value}" for name, value in changed.items())[:24],
)
def test_a_token_that_proves_nothing_is_refused(
    verifier: TokenVerifier, sign: Callable[..., str], changed: dict[str, Any]
) -> None:
    """A good signature is not enough: issuer, audience, times, user and key must be right."""
    with pytest.raises(NotAuthenticated):
        verifier.verify(sign(**changed))


@pytest.mark.parametrize("subject", ["auth0|5f7c8ec7", "민지", "a b", "x" * 255])
def test_a_user_is_whom_the_issuer_names(
    verifier: TokenVerifier, sign: Callable[..., str], subject: str
) -> None:
    """Issuers have alphabets of their own; the contract takes them."""
    assert verifier.verify(sign(sub=subject)).user_id == subject


@pytest.mark.parametrize("subject", ["", "a\nb", "a\0b", "x" * 256])
def test_a_user_whom_the_contract_cannot_name_is_refused(
    verifier: TokenVerifier, sign: Callable[..., str], subject: str
) -> None:
    """An order of such a user would become an event that every reader sets aside."""
    with pytest.raises(NotAuthenticated):
        verifier.verify(sign(sub=subject))


def test_a_token_without_a_signature_is_refused(
    verifier: TokenVerifier, claims: dict[str, Any]
) -> None:
    """The algorithm `none` is no algorithm."""
    unsigned = jwt.encode(claims, "", algorithm="none", headers={"kid": KEY_ID})
    with pytest.raises(NotAuthenticated):
        verifier.verify(unsigned)


def test_a_token_signed_with_the_public_key_is_refused(
    verifier: TokenVerifier, key: rsa.RSAPrivateKey, claims: dict[str, Any]
) -> None:
    """The public key is known to all: as an HMAC secret it proves nothing."""
    with pytest.raises(NotAuthenticated):
        verifier.verify(signed_with_the_public_key(key, claims))


def test_a_token_of_another_key_is_refused(
    verifier: TokenVerifier, claims: dict[str, Any], tmp_path: Path
) -> None:
    """A key id alone proves nothing."""
    stranger = signing_key(tmp_path / "jwks.json")
    forged = jwt.encode(claims, stranger, algorithm="RS256", headers={"kid": KEY_ID})
    with pytest.raises(NotAuthenticated):
        verifier.verify(forged)


def test_clocks_may_differ_a_little(verifier: TokenVerifier, sign: Callable[..., str]) -> None:
    """A token that expired ten seconds ago is still good."""
    assert verifier.verify(sign(exp=int(time.time()) - 10)).user_id == "user-7"


def test_a_token_taken_before_is_refused_once_it_has_expired(
    verifier: TokenVerifier, sign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the signature is not checked again changes nothing about the time."""
    token = sign()
    verifier.verify(token)
    later = time.time() + 24 * HOUR
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(NotAuthenticated):
        verifier.verify(token)


def test_a_token_taken_before_is_refused_once_its_key_is_gone(
    settings: Settings, sign: Callable[..., str], tmp_path: Path
) -> None:
    """An issuer that withdraws a key withdraws what it signed."""
    jwks = tmp_path / "jwks.json"
    jwks.write_bytes(Path(settings.auth_jwks).read_bytes())
    verifier = TokenVerifier(
        issuer=settings.auth_issuer, audience=settings.auth_audience, jwks=str(jwks)
    )
    token = sign()
    verifier.verify(token)
    jwks.write_text('{"keys": []}')
    with pytest.raises(NotAuthenticated):
        verifier.verify(token)


def test_a_new_key_is_known_when_the_file_has_changed(
    claims: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    """Keys rotate without a restart."""
    jwks, rotated = tmp_path / "jwks.json", tmp_path / "rotated" / "jwks.json"
    old, new = signing_key(jwks), signing_key(rotated)
    verifier = TokenVerifier(
        issuer=settings.auth_issuer, audience=settings.auth_audience, jwks=str(jwks)
    )
    verifier.verify(jwt.encode(claims, old, algorithm="RS256", headers={"kid": KEY_ID}))
    jwks.write_bytes(rotated.read_bytes())
    os.utime(jwks, (0, 0))
    token = jwt.encode(claims, new, algorithm="RS256", headers={"kid": KEY_ID})
    assert verifier.verify(token).user_id == "user-7"


def test_the_key_file_may_come_later(
    claims: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    """The service starts before anybody has made a key."""
    jwks = tmp_path / "jwks.json"
    verifier = TokenVerifier(
        issuer=settings.auth_issuer, audience=settings.auth_audience, jwks=str(jwks)
    )
    token = jwt.encode(
        claims, signing_key(tmp_path / "first/jwks.json"), "RS256", headers={"kid": KEY_ID}
    )
    with pytest.raises(NotAuthenticated):
        verifier.verify(token)
    jwks.write_bytes((tmp_path / "first/jwks.json").read_bytes())
    assert verifier.verify(token).user_id == "user-7"


@pytest.mark.parametrize("content", ["", '{"keys": [', "[]"])
def test_a_key_file_half_written_refuses_and_does_not_break(
    sign: Callable[..., str], settings: Settings, tmp_path: Path, content: str
) -> None:
    """Whoever rotates the file may be in the middle of it."""
    jwks = tmp_path / "jwks.json"
    jwks.write_text(content, encoding="utf-8")
    verifier = TokenVerifier(
        issuer=settings.auth_issuer, audience=settings.auth_audience, jwks=str(jwks)
    )
    with pytest.raises(NotAuthenticated):
        verifier.verify(sign())


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Basic dTpw"}, {"Authorization": "Bearer"}]
)
def test_no_token_is_401_and_says_what_is_needed(
    client: FlaskClient, header: dict[str, str]
) -> None:
    """A client without a token is asked for one, without a reason (RFC 6750 §3.1)."""
    answer = client.post("/v1/orders", headers=header)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (
        401,
        'Bearer realm="order-service"',
    )


@pytest.mark.parametrize("token", ["nonsense", "a.b.c", "é"])
def test_a_bad_token_is_401_and_says_that_it_is(client: FlaskClient, token: str) -> None:
    """What is no token at all is an invalid one."""
    answer = client.post("/v1/orders", headers={"Authorization": f"Bearer {token}"})
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (
        401,
        'Bearer realm="order-service", error="invalid_token"',
    )


def test_a_token_without_the_scope_is_403_and_names_it(
    client: FlaskClient, sign: Callable[..., str]
) -> None:
    """Who may only read cannot order."""
    answer = client.post(
        "/v1/orders", headers={"Authorization": f"Bearer {sign(scope='orders:read')}"}
    )
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (
        403,
        'Bearer realm="order-service", error="insufficient_scope", scope="orders:write"',
    )


def test_a_good_token_lets_in(client: FlaskClient, sign: Callable[..., str]) -> None:
    """With a good token the body is what is judged; `bearer` may be written small."""
    headers = {"Authorization": f"bearer {sign()}"}
    answer = client.post("/v1/orders", json={}, headers=headers)
    assert answer.status_code == 422


def test_the_command_issues_a_token_that_is_good(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """`token` makes key and JWKS when they are missing, and signs with that key."""
    ours = environment | {"AUTH_JWKS": str(tmp_path / "new" / "jwks.json")}
    printed = CliRunner().invoke(commands, ["token", "--user", "minji"], env=ours)
    settings = Settings.from_environment(ours)
    verifier = TokenVerifier(
        issuer=settings.auth_issuer, audience=settings.auth_audience, jwks=settings.auth_jwks
    )
    assert verifier.verify(printed.output.strip()) == Principal(
        "minji", frozenset({"orders:read", "orders:write"})
    )


def test_the_private_key_is_for_its_owner_only(tmp_path: Path) -> None:
    """Nobody else on the machine can sign."""
    signing_key(tmp_path / "jwks.json")
    assert (tmp_path / "signing-key.pem").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "changed",
    [{"APP_ENV": "production"}, {"AUTH_JWKS": "https://issuer.example/jwks.json"}],
    ids=["production", "somebody's issuer"],
)
def test_the_command_issues_nothing_where_tokens_are_an_issuers(
    environment: dict[str, str], changed: dict[str, str]
) -> None:
    """In production, and beside a real issuer, no token of ours exists."""
    result = CliRunner().invoke(commands, ["token", "--user", "minji"], env=environment | changed)
    assert (result.exit_code, result.output) == (
        3,
        "Error: tokens come from your issuer; AUTH_JWKS is not a file of ours\n",
    )


class Issuer(BaseHTTPRequestHandler):
    """Serves the keys of an issuer, as often as it is asked."""

    jwks = b"{}"
    asked_count = 0

    def do_GET(self) -> None:
        """Count and answer."""
        type(self).asked_count += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.jwks)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture
def issuer(settings: Settings, key: rsa.RSAPrivateKey) -> Iterator[HTTPServer]:
    """Run an issuer whose keys are those of the file."""
    Issuer.jwks, Issuer.asked_count = Path(settings.auth_jwks).read_bytes(), 0
    with HTTPServer(("127.0.0.1", 0), Issuer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def verifier_at(port: int, settings: Settings) -> TokenVerifier:
    return TokenVerifier(
        issuer=settings.auth_issuer,
        audience=settings.auth_audience,
        jwks=f"http://127.0.0.1:{port}/jwks.json",
    )


def test_an_issuer_is_asked_once_for_keys_that_are_known_or_made_up(
    issuer: HTTPServer, settings: Settings, sign: Callable[..., str]
) -> None:
    """Tokens that name keys at random do not become requests to the issuer."""
    verifier = verifier_at(issuer.server_port, settings)
    assert verifier.verify(sign()).user_id == "user-7"
    for number in range(20):
        forged = encoded({"alg": "RS256", "kid": f"made-up-{number}"}).decode() + ".e30.x"
        with pytest.raises(NotAuthenticated):
            verifier.verify(forged)
    assert Issuer.asked_count == 1


def test_an_issuer_that_does_not_answer_is_no_fault_of_the_client(
    settings: Settings, sign: Callable[..., str], free_port: int
) -> None:
    """Nobody knows whether the token is good: 503, and not 401."""
    verifier = verifier_at(free_port, settings)
    for _ in range(2):
        with pytest.raises(TemporarilyUnavailable):
            verifier.verify(sign())


def test_keys_that_are_known_outlive_their_issuer(
    issuer: HTTPServer,
    settings: Settings,
    sign: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An issuer that is away for a while locks nobody out."""
    verifier = verifier_at(issuer.server_port, settings)
    verifier.verify(sign())
    issuer.shutdown()
    issuer.server_close()
    monkeypatch.setattr("order_service.auth.JWKS_REFRESH_SECONDS", 0)
    assert verifier.verify(sign()).user_id == "user-7"


@pytest.fixture
def free_port() -> int:
    """Find a port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
