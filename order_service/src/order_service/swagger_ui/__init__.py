"""/docs: Swagger UI on our document, with all it needs from here."""

from importlib.resources import files
from pathlib import Path

from flask import Blueprint, Response, abort, send_from_directory

OURS = Path(__file__).parent
THEIRS = Path(str(files("flask_swagger_ui"))) / "dist"
ASSETS = {"start.js": OURS, "swagger-ui.css": THEIRS, "swagger-ui-bundle.js": THEIRS}
# The page takes nothing from elsewhere and tells nobody else anything, tokens above all.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

pages = Blueprint("swagger_ui", __name__, url_prefix="/docs")


@pages.get("")
def show() -> Response:
    """Serve the page."""
    page = send_from_directory(OURS, "index.html")
    page.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    return page


@pages.get("/<name>")
def asset(name: str) -> Response:
    """Serve what the page is made of, and no other file."""
    if name not in ASSETS:
        abort(404)
    return send_from_directory(ASSETS[name], name)
