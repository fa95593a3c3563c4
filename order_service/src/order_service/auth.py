"""Bearer token → user (RFC 6750, RFC 7519); keys from a JWKS (RFC 7517)."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import jwt
from flask import current_app, g, request

from order_service.errors import NotAllowed, NotAuthenticated, TemporarilyUnavailable
from order_service.telemetry import log

ALGORITHMS = ("RS256", "ES256")
LEEWAY_SECONDS = 30
JWKS_TIMEOUT_SECONDS = 5.0
JWKS_REFRESH_SECONDS = 300.0
JWKS_COOL_DOWN_SECONDS = 10.0
# A client sends one token many times: so many of them are known again by key and text.
REMEMBERED_TOKENS = 4_096
REMEMBERED_HEADERS = 64
REALM = 'Bearer realm="order-service"'

MAX_USER_ID_CHARACTERS = 255

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking, and what for the token was given."""

    user_id: str
    scopes: frozenset[str]


class JwksFile:
    """Keys in a file, read again when it has changed; the file may come later than we do."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at_ns = -1
        self._keys: dict[str | None, jwt.PyJWK] = {}

    def get_signing_key(self, key_id: str) -> jwt.PyJWK:
        """Return the key of this id; raise PyJWKClientError when there is none."""
        try:
            changed_at_ns = self._path.stat().st_mtime_ns
            if changed_at_ns != self._read_at_ns:
                jwks = jwt.PyJWKSet.from_json(self._path.read_text(encoding="utf-8"))
                self._keys = {key.key_id: key for key in jwks.keys}
                self._read_at_ns = changed_at_ns
            return self._keys[key_id]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise jwt.PyJWKClientError("no such key") from error


class JwksUrl:
    """Keys of an issuer; while it does not answer those it gave last are good."""

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, timeout=JWKS_TIMEOUT_SECONDS)
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._has_answered = False
        self._asked_at = float("-inf")
        self._asking = threading.Lock()

    def get_signing_key(self, key_id: str) -> jwt.PyJWK:
        """Return the key of this id; raise PyJWKClientError when the issuer has none.

        Raises TemporarilyUnavailable when the issuer does not answer and the key is not known. It
        is asked every five minutes, and for an unknown key at most every ten seconds: tokens that
        name keys at random must not become requests to it.
        """
        with self._asking:
            wait_seconds = JWKS_REFRESH_SECONDS if key_id in self._keys else JWKS_COOL_DOWN_SECONDS
            if time.monotonic() - self._asked_at > wait_seconds:
                self._ask()
        if key_id in self._keys:
            return self._keys[key_id]
        if not self._has_answered:
            raise TemporarilyUnavailable(
                "The issuer's keys cannot be read now.", headers={"Retry-After": "10"}
            )
        raise jwt.PyJWKClientError("no such key")

    def _ask(self) -> None:
        try:
            keys = self._client.get_signing_keys(refresh=True)
            self._keys = {key.key_id: key for key in keys}
            self._has_answered = True
        except (jwt.PyJWTError, OSError, ValueError) as error:
            self._has_answered = False
            log.warning("issuer.not_read", error=type(error).__name__)
        self._asked_at = time.monotonic()


class TokenVerifier:
    """Checks signature, issuer, audience and times of a token."""

    def __init__(self, *, issuer: str, audience: str, jwks: str) -> None:
        self._issuer = issuer
        self._audience = audience
        self._keys = JwksUrl(jwks) if "://" in jwks else JwksFile(Path(jwks))
        # A key that is read anew is another object: what the last one signed is checked again.
        self._checked = lru_cache(REMEMBERED_TOKENS)(self._check)

    def verify(self, token: str) -> Principal:
        """Return whose token it is; raise NotAuthenticated when it proves nothing."""
        try:
            key = self._keys.get_signing_key(_key_id(token.partition(".")[0]))
            principal, expires_at = self._checked(token, key)
            if expires_at <= time.time() - LEEWAY_SECONDS:
                raise jwt.ExpiredSignatureError("expired since it was checked")
        except jwt.PyJWTError as error:
            challenge = f'{REALM}, error="invalid_token"'
            raise NotAuthenticated(
                "The bearer token is not valid.", headers={"WWW-Authenticate": challenge}
            ) from error
        return principal

    def _check(self, token: str, key: jwt.PyJWK) -> tuple[Principal, int]:
        claims = jwt.decode(
            token,
            key,
            algorithms=ALGORITHMS,
            issuer=self._issuer,
            audience=self._audience,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        _check_subject(claims["sub"])
        scopes = frozenset(str(claims.get("scope", "")).split())
        return Principal(claims["sub"], scopes), int(claims["exp"])


def requires(scope: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a route in only with a token that carries `scope`; `g.principal` is then set."""

    def decorate(route: Callable[P, R]) -> Callable[P, R]:
        @wraps(route)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            principal = _authenticate()
            if scope not in principal.scopes:
                challenge = f'{REALM}, error="insufficient_scope", scope="{scope}"'
                raise NotAllowed(
                    f"The token lacks the scope {scope}.", headers={"WWW-Authenticate": challenge}
                )
            g.principal = principal
            return route(*args, **kwargs)

        return guarded

    return decorate


@lru_cache(REMEMBERED_HEADERS)
def _key_id(header: str) -> str:
    """Return the id of the key that a token's first part names."""
    key_id = jwt.get_unverified_header(f"{header}.e30.").get("kid")
    if not isinstance(key_id, str):
        raise jwt.InvalidTokenError("no key is named")
    return key_id


def _check_subject(subject: str) -> None:
    """Refuse a user whom neither the database nor the contract can carry."""
    if not 1 <= len(subject) <= MAX_USER_ID_CHARACTERS or not subject.isprintable():
        raise jwt.InvalidTokenError("not a user id")


def _authenticate() -> Principal:
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() != "bearer" or not token:
        raise NotAuthenticated("A bearer token is needed.", headers={"WWW-Authenticate": REALM})
    verifier: TokenVerifier = current_app.extensions["token_verifier"]
    return verifier.verify(token.strip())
