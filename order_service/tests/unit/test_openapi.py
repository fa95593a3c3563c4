import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator, FormatChecker
from openapi_spec_validator import OpenAPIV31SpecValidator

from order_service import api, errors
from order_service.app import create_app
from order_service.cli import commands
from order_service.docs import KEY_PATTERN
from order_service.idempotency import parse_key
from order_service.schemas import AMOUNT, AMOUNT_PATTERN, SKU, SKU_PATTERN
from order_service.settings import Settings

COMMITTED = Path(__file__).parents[2] / "openapi.json"
METHODS = ("get", "post", "put", "patch", "delete")
BODY: dict[str, Any] = {"email": "minji@example.com", "items": [{"sku": "A", "quantity": 1}]}
Node = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Node:
    """Give the document as it is committed."""
    loaded: Node = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def operations(document: Node) -> dict[str, Node]:
    """Give every operation by its id."""
    return {
        operation["operationId"]: operation
        for path in document["paths"].values()
        for method, operation in path.items()
        if method in METHODS
    }


def resolved(document: Node, node: Node) -> Node:
    """Follow a reference into the document."""
    while "$ref" in node:
        steps = node["$ref"].removeprefix("#/").split("/")
        node = document
        for step in steps:
            node = node[step]
    return node


def examples(document: Node, media: Node) -> Iterator[Any]:
    if "example" in media:
        yield media["example"]
    for example in media.get("examples", {}).values():
        yield resolved(document, example)["value"]


def faults(document: Node, schema: Node, value: Any) -> list[str]:
    whole = {**schema, "components": document["components"]}
    validator = Draft202012Validator(whole, format_checker=FormatChecker())
    return [error.message for error in validator.iter_errors(value)]


def problem_examples(document: Node, operation: Node, status: int) -> list[Node]:
    media = operation["responses"][str(status)]["content"]["application/problem+json"]
    return list(examples(document, media))


def test_the_document_is_openapi_31(document: Node) -> None:
    """It says so, and the specification's own schema agrees."""
    assert document["openapi"] == "3.1.0"
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


def test_the_committed_document_is_the_served_one(client: FlaskClient) -> None:
    """After a change: `order-service openapi > order_service/openapi.json`."""
    assert client.get("/openapi.json").get_data(as_text=True) == COMMITTED.read_text("utf-8")


def test_the_command_prints_the_document_without_any_setting() -> None:
    """Whoever builds a client needs neither a database nor an issuer."""
    done = CliRunner(env=dict.fromkeys(("APP_ENV", "DATABASE_URL"))).invoke(commands, ["openapi"])
    assert (done.exit_code, done.output) == (0, COMMITTED.read_text("utf-8"))


def test_every_route_is_described_and_nothing_else(settings: Settings, document: Node) -> None:
    """The document's operations are those of the URL map, but for the probes and the document."""
    beside = ("probes.", "api-docs.", "swagger_ui.")
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in create_app(settings).url_map.iter_rules()
        for method in rule.methods or ()
        if not rule.endpoint.startswith(beside) and method not in ("HEAD", "OPTIONS")
    }
    described = {
        (path, method)
        for path, node in document["paths"].items()
        for method in node
        if method in METHODS
    }
    assert routes == described


def test_every_operation_is_named_summed_up_and_tagged(
    document: Node, operations: dict[str, Node]
) -> None:
    """Generated clients take their names from operationId, readers find by tag and summary."""
    assert set(operations) == {"placeOrder", "listOrders", "getOrder", "listProducts"}
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations.values():
        assert operation["summary"]
        assert set(operation["tags"]) <= tags


def test_every_example_is_as_its_schema_says(document: Node, operations: dict[str, Node]) -> None:
    """Requests and answers, problems included; every media type has at least one."""
    for name, operation in operations.items():
        bodies = [operation["requestBody"]] if "requestBody" in operation else []
        for body in (*bodies, *operation["responses"].values()):
            for media in body.get("content", {}).values():
                found = list(examples(document, media))
                assert found, name
                for example in found:
                    assert faults(document, media["schema"], example) == [], name


def test_a_wrong_example_would_be_found(document: Node) -> None:
    """The check above can fail: a number in the place of money, a member missing or unknown."""
    order = document["components"]["schemas"]["Order"]
    request = document["components"]["schemas"]["OrderRequest"]
    example = document["paths"]["/v1/orders"]["post"]["responses"]["201"]["content"]
    value = example["application/json"]["example"]
    assert faults(document, order, value) == []
    assert faults(document, order, {**value, "amount": 24000})
    assert faults(document, order, {**value, "amount": "24,000"})
    assert faults(document, order, {key: value[key] for key in value if key != "id"})
    assert faults(document, request, {**BODY, "amount": "1"})
    assert faults(document, request, BODY) == []


def test_every_refusal_is_a_problem(document: Node, operations: dict[str, Node]) -> None:
    """From 400 on there is application/problem+json and nothing else, with the right status."""
    for operation in operations.values():
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert set(response["content"]) == {"application/problem+json"}
                for example in problem_examples(document, operation, int(status)):
                    assert example["status"] == int(status)


def test_every_problem_has_its_example(document: Node, operations: dict[str, Node]) -> None:
    """The closed list of errors.py and the document name the same problems."""
    prefix = "urn:order-service:problem:"
    described = {
        example["type"].removeprefix(prefix): example["status"]
        for operation in operations.values()
        for status in operation["responses"]
        if int(status) >= 400
        for example in problem_examples(document, operation, int(status))
        if example["type"].startswith(prefix)
    }
    assert described == {kind.slug: int(kind.status) for kind in errors.Problem.__subclasses__()}


def test_no_example_lies_unused(document: Node) -> None:
    """Each example among the components is referred to by an answer."""
    text = json.dumps(document)
    for kind in ("examples", "headers", "schemas"):
        for name in document["components"][kind]:
            assert f'"#/components/{kind}/{name}"' in text, name


def test_each_operation_names_what_it_can_answer(operations: dict[str, Node]) -> None:
    """No status more, none less."""
    assert {name: sorted(operation["responses"]) for name, operation in operations.items()} == {
        "placeOrder": [
            *("201", "400", "401", "403", "409", "413", "415", "422", "429", "500", "503"),
        ],
        "listOrders": ["200", "401", "403", "422", "500", "503"],
        "getOrder": ["200", "304", "401", "403", "404", "500", "503"],
        "listProducts": ["200", "500", "503"],
    }


def test_headers_are_described_where_they_occur(operations: dict[str, Node]) -> None:
    """Beside X-Request-ID, which every answer carries."""
    described = {
        (name, status): set(response["headers"]) - {"X-Request-ID"}
        for name, operation in operations.items()
        for status, response in operation["responses"].items()
        if set(response["headers"]) != {"X-Request-ID"}
    }
    refusals = {"401": {"WWW-Authenticate"}, "403": {"WWW-Authenticate"}}
    with_token = ("placeOrder", "listOrders", "getOrder")
    assert described == {
        ("placeOrder", "201"): {"Location", "Idempotent-Replayed"},
        ("placeOrder", "409"): {"Retry-After"},
        ("placeOrder", "429"): {"Retry-After"},
        ("listOrders", "200"): {"Link"},
        ("getOrder", "200"): {"ETag"},
        ("getOrder", "304"): {"ETag"},
        **{(name, status): names for name in with_token for status, names in refusals.items()},
        **{(name, "503"): {"Retry-After"} for name in operations},
    }


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("post", "/v1/orders", "placeOrder"),
        ("get", "/v1/orders", "listOrders"),
        ("get", "/v1/orders/01936f6e-7c1a-7000-8000-000000000001", "getOrder"),
        ("get", "/v1/products", "listProducts"),
    ],
)
def test_who_must_prove_who_they_are_is_described(
    client: FlaskClient,
    sign: Callable[..., str],
    operations: dict[str, Node],
    method: str,
    path: str,
    name: str,
) -> None:
    """An operation with bearerAuth answers 401 without a token and 403 without its scope."""
    security = operations[name].get("security", [])
    anonymous = client.open(path, method=method)
    if not security:
        assert anonymous.status_code == 503
        return
    ((scope,),) = (requirement["bearerAuth"] for requirement in security)
    token = sign(scope="orders:nothing")
    answer = client.open(path, method=method, headers={"Authorization": f"Bearer {token}"})
    assert (anonymous.status_code, answer.status_code) == (401, 403)
    assert f'scope="{scope}"' in answer.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (BODY, {"Authorization": ""}, 401),
        (BODY, {"Idempotency-Key": ""}, 400),
        ("{", {}, 400),
        (" " * 65_537, {}, 413),
        (BODY, {"Content-Type": "text/plain"}, 415),
        ({"email": "minji", "items": [{"sku": "A", "quantity": 0}]}, {}, 422),
        (BODY, {}, 503),
    ],
    ids=["no token", "no key", "no JSON", "too large", "text", "not as described", "no database"],
)
def test_a_refused_order_is_told_of_as_in_the_example(
    client: FlaskClient,
    sign: Callable[..., str],
    document: Node,
    operations: dict[str, Node],
    body: object,
    headers: dict[str, str],
    status: int,
) -> None:
    """The answer is, byte for byte of its JSON, one of the examples of its status."""
    sent = {
        "Authorization": f"Bearer {sign()}",
        "Idempotency-Key": "key-1",
        "Content-Type": "application/json",
    }
    raw = body if isinstance(body, str) else json.dumps(body)
    answer = client.post("/v1/orders", data=raw, headers=sent | headers)
    assert (answer.status_code, answer.content_type) == (status, "application/problem+json")
    described = operations["placeOrder"]
    assert answer.get_json(force=True) in problem_examples(document, described, status)
    assert set(described["responses"][str(status)]["headers"]) <= set(answer.headers.keys())


def test_a_token_without_the_scope_is_told_of_as_in_the_example(
    post: Callable[..., Any], sign: Callable[..., str], document: Node, operations: dict[str, Node]
) -> None:
    """403 names the scope that is missing."""
    answer = post(BODY, Authorization=f"Bearer {sign(scope='orders:read')}")
    assert answer.get_json(force=True) in problem_examples(document, operations["placeOrder"], 403)


@pytest.mark.parametrize(
    ("path", "name", "status"),
    [("/v1/orders/7", "getOrder", 404), ("/v1/orders?limit=0", "listOrders", 422)],
)
def test_a_refused_question_is_told_of_as_in_the_example(
    client: FlaskClient,
    sign: Callable[..., str],
    document: Node,
    operations: dict[str, Node],
    path: str,
    name: str,
    status: int,
) -> None:
    """What routing and the query refuse is described as well."""
    answer = client.get(path, headers={"Authorization": f"Bearer {sign()}"})
    assert answer.get_json(force=True) in problem_examples(document, operations[name], status)


def test_a_fault_of_ours_is_told_of_as_in_the_example(
    post: Callable[..., Any],
    document: Node,
    operations: dict[str, Node],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """500 says nothing of what went wrong inside."""

    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(api, "place_order", fail)
    answer = post(BODY)
    assert answer.status_code == 500
    assert answer.get_json(force=True) in problem_examples(document, operations["placeOrder"], 500)


@pytest.mark.parametrize(
    ("raw", "is_good"),
    [
        ("8e03978e-40d5-43e8-bc93-6894a57f9324", True),
        ('"8e03978e-40d5-43e8-bc93-6894a57f9324"', True),
        ("a", True),
        ("a b", True),
        ('"', True),
        ('"a', True),
        ('a"', True),
        ('"a"b"', True),
        ("x" * 255, True),
        ('"' + "x" * 255 + '"', True),
        ("", False),
        ('""', False),
        ('" a"', False),
        ('"a "', False),
        ("x" * 256, False),
        ('"' + "x" * 256 + '"', False),
        ("키", False),
        ("a\tb", False),
    ],
)
def test_the_described_key_is_the_accepted_one(raw: str, *, is_good: bool) -> None:
    """The pattern of the Idempotency-Key and the code that reads it agree."""
    try:
        parse_key(raw)
        is_accepted = True
    except errors.IdempotencyKeyRejected:
        is_accepted = False
    assert (is_accepted, re.search(KEY_PATTERN, raw) is not None) == (is_good, is_good)


def test_the_key_is_described_with_its_scope_and_its_time(operations: dict[str, Node]) -> None:
    """Required, with format, an example, and how long it is kept."""
    (key,) = operations["placeOrder"]["parameters"]
    assert (key["name"], key["in"], key["required"]) == ("Idempotency-Key", "header", True)
    assert "48 hours" in key["description"]
    assert re.search(key["schema"]["pattern"], key["example"])


@pytest.mark.parametrize(
    ("validator", "pattern"), [(SKU, SKU_PATTERN), (AMOUNT, AMOUNT_PATTERN)], ids=["sku", "amount"]
)
def test_described_patterns_are_the_checked_ones(validator: Any, pattern: str) -> None:
    r"""Only the end differs: no client's regular expressions know \Z."""
    assert pattern == "^" + validator.regex.pattern.removesuffix(r"\Z") + "$"


def test_money_is_text_everywhere(document: Node) -> None:
    """No amount or price is ever described as a number."""
    schemas = document["components"]["schemas"]
    found = {
        f"{schema}.{name}": (member["type"], "pattern" in member)
        for schema, node in schemas.items()
        for name, member in node["properties"].items()
        if re.search("amount|price", name, re.IGNORECASE)
    }
    assert found == {
        "OrderRequest.expectedAmount": (["string", "null"], True),
        "Order.amount": ("string", True),
        "TrackedOrder.amount": ("string", True),
        "Item.unitPrice": ("string", True),
        "Product.unitPrice": ("string", True),
    }


def test_requests_are_closed_and_answers_open(document: Node) -> None:
    """An unknown member is refused where we read it; clients must bear one we add later."""
    closed = {
        name
        for name, schema in document["components"]["schemas"].items()
        if schema.get("additionalProperties") is False
    }
    assert closed == {"OrderRequest", "RequestedItem"}


def test_the_page_is_whole_and_takes_nothing_from_elsewhere(client: FlaskClient) -> None:
    """All it names lies beside it; its policy forbids every other origin."""
    with client.get("/docs") as page:
        text = page.get_data(as_text=True)
    names = re.findall(r'(?:src|href)="([^"]+)"', text)
    policy = page.headers["Content-Security-Policy"]
    assert page.status_code == 200
    assert set(names) - {"data:,"} == {
        "docs/swagger-ui.css",
        "docs/swagger-ui-bundle.js",
        "docs/start.js",
    }
    for name in sorted(set(names) - {"data:,"}):
        with client.get(f"/{name}") as asset:
            assert asset.status_code == 200, name
    assert "http" not in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("name", ["index.html", "__init__.py", "swagger-ui.js", "..%2fapp.py", ""])
def test_the_page_serves_no_other_file(client: FlaskClient, name: str) -> None:
    """What is not an asset is 404."""
    assert client.get(f"/docs/{name}").status_code == 404
