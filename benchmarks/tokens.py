"""A bearer token of each of many users, one a line; runs in .venv/order."""

import sys
import time
from pathlib import Path

import jwt

from order_service.operate.token import KEY_ID, signing_key
from order_service.settings import Settings

LIFETIME_SECONDS = 3600


def main(users: int) -> None:
    """Print the tokens, signed with the development key beside AUTH_JWKS."""
    settings = Settings.from_environment()
    key = signing_key(Path(settings.auth_jwks))
    expires_at = int(time.time()) + LIFETIME_SECONDS
    for number in range(users):
        claims = {
            "iss": settings.auth_issuer,
            "aud": settings.auth_audience,
            "sub": f"user-{number}",
            "scope": "orders:write",
            "exp": expires_at,
        }
        token = jwt.encode(claims, key, algorithm="RS256", headers={"kid": KEY_ID})
        sys.stdout.write(f"{token}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
