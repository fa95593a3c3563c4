"""What the API answers from its database is what the committed OpenAPI document shows."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator, FormatChecker

from tests.support.world import order, place

DOCUMENT = json.loads(
    (Path(__file__).parents[2] / "order_service/openapi.json").read_text(encoding="utf-8")
)
ORDERS = DOCUMENT["paths"]["/v1/orders"]
ONE_ORDER = DOCUMENT["paths"]["/v1/orders/{order_id}"]
PRODUCTS = DOCUMENT["paths"]["/v1/products"]
EXAMPLES = DOCUMENT["components"]["examples"]


def check(response: httpx.Response, operation: dict[str, Any]) -> None:
    """Hold an answer to its description: status, media type, schema, and required headers."""
    described = operation["responses"][str(response.status_code)]
    for name, reference in described["headers"].items():
        header = DOCUMENT["components"]["headers"][reference["$ref"].rpartition("/")[2]]
        assert name in response.headers or not header.get("required"), name
    if "content" in described:
        media = described["content"][response.headers["Content-Type"]]
        schema = {**media["schema"], "components": DOCUMENT["components"]}
        Draft202012Validator(schema, format_checker=FormatChecker()).validate(response.json())
    else:
        assert response.content == b""


@pytest.mark.parametrize("name", ["tea", "expected-amount"])
def test_an_example_of_the_body_places_an_order(alice: httpx.Client, name: str) -> None:
    """Whoever copies it has a 201, then the order, then nothing new, then a list with it."""
    media = ORDERS["post"]["requestBody"]["content"]["application/json"]
    placed = alice.post(
        "/v1/orders",
        json=media["examples"][name]["value"],
        headers={"Idempotency-Key": f"documented {name}"},
    )
    shown = alice.get(placed.headers["Location"])
    listed = alice.get("/v1/orders", params={"limit": 1})
    assert (placed.status_code, shown.status_code, listed.status_code) == (201, 200, 200)
    check(placed, ORDERS["post"])
    check(shown, ONE_ORDER["get"])
    check(listed, ORDERS["get"])


def test_an_order_that_has_not_changed_is_304_without_a_body(alice: httpx.Client) -> None:
    """The tag comes again with it, as RFC 9110 wants."""
    location = place(alice).headers["Location"]
    for _ in range(20):
        tag = alice.get(location).headers["ETag"]
        again = alice.get(location, headers={"If-None-Match": tag})
        if again.status_code == 304:
            break
    check(again, ONE_ORDER["get"])
    assert (again.status_code, again.headers.get("ETag")) == (304, tag)


def test_the_products_are_as_described(alice: httpx.Client) -> None:
    """Both names, a price that is text, and its currency; the example is one of them."""
    answer = alice.get("/v1/products")
    check(answer, PRODUCTS["get"])
    example = PRODUCTS["get"]["responses"]["200"]["content"]["application/json"]["example"]
    assert example["items"][0] in answer.json()["items"]


def test_what_the_database_refuses_is_told_of_as_in_the_examples(alice: httpx.Client) -> None:
    """Each problem is, member for member, the documented one."""
    tea = order()
    key = {"Idempotency-Key": "documented refusals"}
    assert alice.post("/v1/orders", json=tea, headers=key).status_code == 201
    answers = {
        "idempotency-key-reused": alice.post(
            "/v1/orders", json={**tea, "locale": "en"}, headers=key
        ),
        "price-changed": place(alice, expectedAmount="1"),
        "product-unknown": place(alice, items=[{"sku": "TEA-BLUE-50", "quantity": 1}]),
        "order-not-found": alice.get("/v1/orders/01936f6e-7c1a-7000-8000-000000000001"),
    }
    told = {name: answer.json() for name, answer in answers.items()}
    assert told == {name: EXAMPLES[name]["value"] for name in answers}
    for name, answer in answers.items():
        check(answer, (ONE_ORDER["get"] if name == "order-not-found" else ORDERS["post"]))
