"""A request's body: JSON as RFC 8259 has it; what Python's reader lets pass is refused."""

import json
import re
from decimal import Decimal
from typing import Any, NoReturn

from flask import Request
from gunicorn.http.errors import ParseException
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, UnsupportedMediaType

MEDIA_TYPE = "application/json"
MAX_BODY_BYTES = 64 * 1024
MAX_DEPTH = 32
# Possessive, so that no body makes it try again and again; the last string may lack its end.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class NotJson(ValueError):
    """The bytes are not a JSON text we take; the message says what is wrong, never with what."""


class StrictParser(FlaskParser):
    """Takes application/json in UTF-8, uncompressed, and nothing else."""

    def load_json(self, req: Request, schema: Any) -> Any:  # noqa: ARG002 - webargs asks for it
        """Return the body's value; 415 for another kind of body, 400 for one that is not JSON."""
        charset = req.mimetype_params.get("charset", "utf-8").lower()
        if req.mimetype != MEDIA_TYPE or charset != "utf-8" or req.content_encoding:
            raise UnsupportedMediaType("Send application/json in UTF-8, uncompressed.")
        try:
            return loads(_read(req))
        except NotJson as error:
            raise BadRequest(str(error)) from error


def _read(req: Request) -> bytes:
    """Return the whole body; 413 when it is too long, 400 when it is cut or badly framed."""
    try:
        content = req.get_data()
    except ParseException as error:
        raise BadRequest("The body's chunks are not well-formed.") from error
    # A chunked body has no length to be refused by: the server cuts it one byte past the limit.
    if len(content) > MAX_BODY_BYTES:
        raise RequestEntityTooLarge
    if req.content_length is not None and len(content) != req.content_length:
        raise BadRequest("The body ends early.")
    return content


def loads(content: bytes) -> Any:
    """Read a JSON text in UTF-8; numbers with a fraction become Decimal.

    Raises NotJson for anything malformed, another encoding, a byte order mark, NaN and Infinity, a
    name that comes twice in an object, or nesting deeper than 32.
    """
    _check_depth(content)
    try:
        return json.loads(
            content.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_decimal,
            object_pairs_hook=_object,
        )
    except NotJson:
        raise
    except UnicodeError as error:
        raise NotJson("The body is not UTF-8 text.") from error
    except ValueError as error:
        raise NotJson("The body is not JSON.") from error


def _check_depth(content: bytes) -> None:
    """Refuse deep nesting before a recursive reader meets it."""
    if content.count(b"[") + content.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for byte in STRING.sub(b"", content):
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise NotJson(f"The body is nested deeper than {MAX_DEPTH}.")
        elif byte in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise NotJson("A name comes twice in one object.")
    return members


def _decimal(digits: str) -> Decimal:
    try:
        return Decimal(digits)
    except ArithmeticError as error:
        raise NotJson("A number is beyond measure.") from error


def _refuse_constant(_: str) -> NoReturn:
    raise NotJson("NaN and Infinity are not JSON.")
