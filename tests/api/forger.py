"""Prints tokens that prove nothing, by what is wrong; runs in the order service's environment.

python tests/api/forger.py http://127.0.0.1:1234/jwks.json
"""

import base64
import hashlib
import hmac
import json
import sys
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import RSAAlgorithm

from order_service.operate.token import KEY_ID, signing_key
from order_service.settings import Settings

HOUR = 3600
MEGABYTE = 1_000_000
# Where somebody listens for whoever follows an address in a token.
LISTENER = sys.argv[1]

settings = Settings.from_environment()
ours = signing_key(Path(settings.auth_jwks))
stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
public_pem = ours.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
now = int(time.time())
claims: dict[str, Any] = {
    "iss": settings.auth_issuer,
    "aud": settings.auth_audience,
    "sub": "mallory",
    "scope": "orders:read orders:write",
    "iat": now,
    "exp": now + HOUR,
}


def part(value: Any) -> str:
    """Encode a header, claims or a signature as a token carries them."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def signed(header: dict[str, Any] | None = None, /, **changed: Any) -> str:
    """Sign with the right key; a claim or header that is None is left out."""
    body = {name: value for name, value in (claims | changed).items() if value is not None}
    return by_hand({"alg": "RS256", "typ": "JWT", "kid": KEY_ID} | (header or {}), body)


def by_hand(header: dict[str, Any], body: Any, key: rsa.RSAPrivateKey = ours) -> str:
    """Sign whatever it is with RS256, where a library would refuse."""
    present = {name: value for name, value in header.items() if value is not None}
    text = f"{part(present)}.{part(body)}"
    signature = RSAAlgorithm(RSAAlgorithm.SHA256).sign(text.encode(), key)
    return f"{text}.{part(signature)}"


def unsigned(algorithm: str) -> str:
    """Claim that a token needs no signature."""
    return f"{part({'alg': algorithm, 'kid': KEY_ID})}.{part(claims)}."


def with_hmac(secret: bytes) -> str:
    """Sign with what everybody knows."""
    text = f"{part({'alg': 'HS256', 'kid': KEY_ID})}.{part(claims)}"
    return f"{text}.{part(hmac.digest(secret, text.encode(), hashlib.sha256))}"


def elliptic() -> str:
    """Sign with an elliptic key of a stranger under our key's name."""
    key = ec.generate_private_key(ec.SECP256R1())
    return jwt.encode(claims, key, algorithm="ES256", headers={"kid": KEY_ID})


good = signed()
head, body, signature = good.split(".")
stranger_jwk = RSAAlgorithm.to_jwk(stranger.public_key(), as_dict=True)
duplicate = json.dumps(claims)[:-1].encode() + b', "sub": 7}'

FORGED: dict[str, str] = {
    "algorithm none": unsigned("none"),
    "algorithm None": unsigned("None"),
    "algorithm NONE": unsigned("NONE"),
    "algorithm nOnE": unsigned("nOnE"),
    "algorithm empty": unsigned(""),
    "no algorithm": by_hand({"alg": None, "kid": KEY_ID}, claims),
    "algorithm null": f"{part({'alg': None, 'kid': KEY_ID})}.{body}.{signature}",
    "algorithm a list": by_hand({"alg": ["RS256"], "kid": KEY_ID}, claims),
    "algorithm an object": by_hand({"alg": {}, "kid": KEY_ID}, claims),
    "HMAC with the public key": with_hmac(public_pem),
    "HMAC with the public key, stripped": with_hmac(public_pem.strip()),
    "HMAC with the JWKS": with_hmac(Path(settings.auth_jwks).read_bytes()),
    "HMAC with nothing": with_hmac(b""),
    "HMAC with the key id": with_hmac(KEY_ID.encode()),
    "PS256 of the right key": jwt.encode(claims, ours, algorithm="PS256", headers={"kid": KEY_ID}),
    "RS512 of the right key": jwt.encode(claims, ours, algorithm="RS512", headers={"kid": KEY_ID}),
    "ES256 under an RSA key's name": elliptic(),
    "a stranger's key": by_hand({"alg": "RS256", "kid": KEY_ID}, claims, stranger),
    "a stranger's key in jwk": by_hand(
        {"alg": "RS256", "jwk": stranger_jwk, "kid": KEY_ID}, claims, stranger
    ),
    "a stranger's key and no key id": by_hand({"alg": "RS256"}, claims, stranger),
    "jku to somewhere": by_hand({"alg": "RS256", "jku": LISTENER}, claims, stranger),
    "x5u to somewhere": by_hand({"alg": "RS256", "x5u": LISTENER}, claims, stranger),
    "no key id": signed({"kid": None}),
    "an unknown key id": signed({"kid": "unknown"}),
    "a key id that is a path": signed({"kid": "../../dev/null"}),
    "a key id that is a file": signed({"kid": f"file://{settings.auth_jwks}"}),
    "a key id that is SQL": signed({"kid": "' OR '1'='1"}),
    "a key id that is a command": signed({"kid": "$(id)|id;id"}),
    "a key id with a NUL": signed({"kid": f"{KEY_ID}\0"}),
    "a key id that is a surrogate": signed({"kid": "\ud800"}),
    "a key id that is a number": signed({"kid": 7}),
    "a key id that is a list": signed({"kid": [KEY_ID]}),
    "a key id that is an object": signed({"kid": {}}),
    "a key id that is null": f"{part({'alg': 'RS256', 'kid': None})}.{body}.{signature}",
    "a demand nobody knows": signed({"crit": ["evil"], "evil": 1}),
    "a payload left as it is": signed({"crit": ["b64"], "b64": False}),
    "another issuer": signed(iss="https://evil.example"),
    "an issuer that begins right": signed(iss=settings.auth_issuer + ".evil.example"),
    "an issuer that is a list": signed(iss=[settings.auth_issuer]),
    "no issuer": signed(iss=None),
    "another audience": signed(aud="mail-service"),
    "a list of other audiences": signed(aud=["mail-service", "order-service "]),
    "an empty list of audiences": signed(aud=[]),
    "an audience that is a number": signed(aud=7),
    "an audience that is an object": signed(aud={settings.auth_audience: 1}),
    "no audience": signed(aud=None),
    "expired": signed(exp=now - HOUR),
    "expired in 1970": signed(exp=0),
    "expired before time": signed(exp=-1),
    "an end that is a date": signed(exp="2999-01-01T00:00:00Z"),
    "an end that is a list": signed(exp=[now + HOUR]),
    "an end that is Infinity": signed(exp=float("inf")),
    "an end that is NaN": signed(exp=float("nan")),
    "no end": signed(exp=None),
    "not yet": signed(nbf=now + HOUR),
    "a beginning that is a word": signed(nbf="now"),
    "issued tomorrow": signed(iat=now + 24 * HOUR),
    "issued at a word": signed(iat="now"),
    "no user": signed(sub=None),
    "an empty user": signed(sub=""),
    "a user that is a number": signed(sub=7),
    "a user that is a list": signed(sub=["mallory"]),
    "a user that is an object": signed(sub={"$ne": ""}),
    "a user with a NUL": signed(sub="mallory\0"),
    "a user with a line feed": signed(sub="mallory\nroot"),
    "a user that is a surrogate": signed(sub="\ud800"),
    "a user of 256 characters": signed(sub="m" * 256),
    "claims that are a list": by_hand({"alg": "RS256", "kid": KEY_ID}, [claims]),
    "claims that are null": by_hand({"alg": "RS256", "kid": KEY_ID}, None),
    "claims that are a text": by_hand({"alg": "RS256", "kid": KEY_ID}, "mallory"),
    "claims that are no JSON": by_hand({"alg": "RS256", "kid": KEY_ID}, b"{"),
    "claims that are no text": by_hand({"alg": "RS256", "kid": KEY_ID}, b"\xff\xfe"),
    "claims nested deep": by_hand({"alg": "RS256", "kid": KEY_ID}, b"[" * 3_000),
    "claims with a duplicate name": by_hand({"alg": "RS256", "kid": KEY_ID}, duplicate),
    "the claims changed": f"{head}.{part(claims | {'sub': 'root'})}.{signature}",
    "the header changed": f"{part({'alg': 'ES256', 'kid': KEY_ID})}.{body}.{signature}",
    "a header that is a list": f"{part([])}.{body}.{signature}",
    "a header that is a number": f"{part(7)}.{body}.{signature}",
    "a header that is null": f"{part(None)}.{body}.{signature}",
    "a header that is no JSON": f"{part(b'{')}.{body}.{signature}",
    "a header nested deep": f"{part(b'[' * 3_000)}.{body}.{signature}",
    "a header with a huge number": f"{part(b'9' * 5_000)}.{body}.{signature}",
    "the signature cut": good[:-10],
    "the signature left out": f"{head}.{body}.",
    "the signature of zeros": f"{head}.{body}.{part(bytes(256))}",
    "the signature of another": f"{head}.{body}.{signed(sub='root').split('.')[2]}",
    "the signature left out with its dot": f"{head}.{body}",
    "a part too many": f"{good}.{signature}",
    "an encrypted one": f"{head}.{body}.{signature}.{signature}.{signature}",
    "two tokens": f"{good},{good}",
    "two tokens with a space": f"{good} {good}",
    "in quotes": f'"{good}"',
    "percent-encoded": good.replace(".", "%2e"),
    "dots": "..",
    "a dot": ".",
    "nothing of base64": "!.!.!",
    "a word": "token",
    "null": "null",
    "a path": "../../etc/passwd",
    "7,000 bytes": "a" * 7_000,
    "7,000 dots": "." * 7_000,
    "1 MB": f"{head}.{part(claims | {'pad': 'x' * MEGABYTE})}.{signature}",
}

if __name__ == "__main__":
    json.dump(FORGED, sys.stdout)
