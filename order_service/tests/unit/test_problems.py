from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

BODY: dict[str, Any] = {"email": "minji@example.com", "items": [{"sku": "A", "quantity": 1}]}
Post = Callable[..., Any]


def pointers(answer: Any) -> list[str]:
    return [fault["pointer"] for fault in answer.get_json(force=True)["errors"]]


def test_a_problem_is_rfc_9457(post: Post) -> None:
    """A refused body is told of by type, title, status, detail and the faults."""
    answer = post({"email": "minji@example.com", "items": []})
    assert (answer.status_code, answer.content_type, answer.get_json(force=True)) == (
        422,
        "application/problem+json",
        {
            "type": "about:blank",
            "title": "Unprocessable Entity",
            "status": 422,
            "detail": "The request is not as described.",
            "errors": [{"pointer": "/items", "detail": "Length must be between 1 and 50."}],
        },
    )


def test_a_problem_of_ours_names_its_type(post: Post) -> None:
    """A client can tell our problems apart without reading their text."""
    answer = post(BODY, **{"Idempotency-Key": ""})
    assert (answer.status_code, answer.get_json(force=True)["type"]) == (
        400,
        "urn:order-service:problem:idempotency-key-rejected",
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"items": BODY["items"]}, ["/email"]),
        (BODY | {"amount": "1"}, ["/amount"]),
        (BODY | {"items": [{"sku": "A", "quantity": 0}]}, ["/items/0/quantity"]),
        (BODY | {"items": [*BODY["items"], {"quantity": 1}]}, ["/items/1/sku"]),
        (BODY | {"expectedAmount": 1}, ["/expectedAmount"]),
        ([], [""]),
        (BODY | {"a/b": 1}, ["/a~1b"]),
        (BODY | {"a~b": 1}, ["/a~0b"]),
    ],
)
def test_a_fault_is_pointed_at(post: Post, body: object, expected: list[str]) -> None:
    """Each fault carries the JSON Pointer (RFC 6901) of what is wrong."""
    assert pointers(post(body)) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff",
        b'{"email": "\xe9"}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"items": [{"quantity": ' + b"9" * 5_000 + b"}]}",
    ],
    ids=["cut", "not UTF-8", "Latin-1", "nested arrays", "nested objects", "endless number"],
)
def test_what_is_no_json_is_400(post: Post, body: bytes) -> None:
    """Whatever is sent in the place of JSON is the client's fault, never ours."""
    assert post(body).status_code == 400


def test_a_lone_surrogate_in_a_name_is_the_clients_fault(post: Post) -> None:
    """A name that is no Unicode text is an unknown field like any other."""
    assert post('{"\\ud800": 1}').status_code == 422


def test_an_endless_body_is_413(post: Post) -> None:
    """More than 64 KiB is not read."""
    assert post(" " * 65_537).status_code == 413


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/orders/7", "/v2/orders"])
def test_an_unknown_address_is_a_problem_too(client: FlaskClient, path: str) -> None:
    """Even what Flask itself refuses is application/problem+json."""
    answer = client.get(path)
    assert (answer.status_code, answer.content_type) == (404, "application/problem+json")


def test_a_method_that_is_not_there_is_405_and_names_those_that_are(client: FlaskClient) -> None:
    """RFC 9110 wants Allow beside a 405."""
    answer = client.put("/v1/orders")
    allowed = set(answer.headers["Allow"].split(", "))
    assert (answer.status_code, allowed) == (405, {"GET", "HEAD", "POST", "OPTIONS"})


def test_a_database_that_does_not_answer_is_503_and_invites_again(post: Post) -> None:
    """The client is told that the same key makes it safe to try again."""
    answer = post(BODY)
    assert (answer.status_code, answer.headers["Retry-After"], answer.get_json(force=True)) == (
        503,
        "1",
        {
            "type": "urn:order-service:problem:temporarily-unavailable",
            "title": "Service Unavailable",
            "status": 503,
            "detail": "The database did not answer in time. With the same Idempotency-Key it is "
            "safe to send the order again.",
        },
    )


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/readyz", 503)])
def test_without_a_database_the_service_lives_and_is_not_ready(
    client: FlaskClient, path: str, status: int
) -> None:
    """A restart would not bring the database back."""
    assert client.get(path).status_code == status


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_are_not_where_users_are(client: FlaskClient, path: str) -> None:
    """On the port of the REST API there are no probes."""
    assert client.get(path, base_url="http://shop.example:8000").status_code == 404


def test_the_description_is_openapi(client: FlaskClient) -> None:
    """The API describes itself, and every route is in it."""
    described = client.get("/openapi.json").get_json()
    assert (described["openapi"], sorted(described["paths"])) == (
        "3.1.0",
        ["/v1/orders", "/v1/orders/{order_id}", "/v1/products"],
    )


@pytest.mark.parametrize(
    ("query", "expected"), [("limit=0", ["limit"]), ("limit=x&cursor=y", ["cursor", "limit"])]
)
def test_a_parameter_at_fault_is_named(
    client: FlaskClient, sign: Callable[..., str], query: str, expected: list[str]
) -> None:
    """No JSON Pointer leads into a query: its faults go by the parameter's name."""
    headers = {"Authorization": f"Bearer {sign()}"}
    answer = client.get(f"/v1/orders?{query}", headers=headers)
    assert answer.status_code == 422
    faults = answer.get_json(force=True)["errors"]
    assert sorted(fault["parameter"] for fault in faults) == expected
