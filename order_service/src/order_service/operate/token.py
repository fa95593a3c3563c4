"""`token`: a bearer token of our own issuing, for development."""

import json
import time
from pathlib import Path

import click
import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from order_service.operate.output import CannotBeDone, examples
from order_service.settings import Settings

KEY_ID = "development"
KEY_BITS = 2048


@click.command(
    epilog=examples(
        "order-service token --user minji",
        "order-service token --user minji --scope orders:read --hours 1",
    )
)
@click.option("--user", required=True, help="The token's subject.")
@click.option("--scope", default="orders:read orders:write", show_default=True)
@click.option("--hours", default=12, show_default=True, type=click.IntRange(1, 24 * 7))
def token(user: str, scope: str, hours: int) -> None:
    """Print a bearer token for USER, signed with a key beside AUTH_JWKS.

    The key and its JWKS are made when they are missing. Refused in production.
    """
    settings = Settings.from_environment()
    if settings.app_env == "production" or "://" in settings.auth_jwks:
        raise CannotBeDone("tokens come from your issuer; AUTH_JWKS is not a file of ours")
    now = int(time.time())
    claims = {
        "iss": settings.auth_issuer,
        "aud": settings.auth_audience,
        "sub": user,
        "scope": scope,
        "iat": now,
        "exp": now + hours * 3600,
    }
    key = signing_key(Path(settings.auth_jwks))
    click.echo(jwt.encode(claims, key, algorithm="RS256", headers={"kid": KEY_ID}))


def signing_key(jwks: Path) -> rsa.RSAPrivateKey:
    """Return the private key beside `jwks`; make both when they are missing."""
    private = jwks.with_name("signing-key.pem")
    if private.exists():
        key = serialization.load_pem_private_key(private.read_bytes(), password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise CannotBeDone(f"{private} is not an RSA key")
        return key
    key = rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)
    jwks.parent.mkdir(parents=True, exist_ok=True)
    public = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    public |= {"kid": KEY_ID, "use": "sig", "alg": "RS256"}
    _write_whole(jwks, json.dumps({"keys": [public]}).encode(), mode=0o644)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _write_whole(private, pem, mode=0o600)
    return key


def _write_whole(path: Path, content: bytes, *, mode: int) -> None:
    """Let the file appear with all its content, so that no reader meets half of it."""
    draft = path.with_suffix(".new")
    draft.touch(mode=mode)
    draft.write_bytes(content)
    draft.replace(path)
