"""What a client, a foreign producer and an operator see of the pair when nothing fails."""

import json
import time
from pathlib import Path

import httpx
from confluent_kafka import Producer

from tests.support.world import World, eventually, order, place

CONTRACT = Path(__file__).parents[2] / "shared_schemas"


def test_an_order_is_completed_and_mailed_within_two_seconds(
    world: World, alice: httpx.Client
) -> None:
    """Two seconds after its 201 every order's event is COMPLETED, on all three partitions.

    A machine that stalls for a second may delay some; of three rounds one must be in time.
    """

    def is_all_done(order_ids: list[str]) -> bool:
        states = {world.outbox(order_id)["state"] for order_id in order_ids}
        mailed = sorted(mail.order_id or "" for mail in world.mails(order_ids))
        return (states, mailed) == ({"COMPLETED"}, sorted(order_ids))

    is_in_time = False
    for _ in range(3):
        responses = [place(alice) for _ in range(24)]
        assert {response.status_code for response in responses} == {201}
        order_ids = [response.json()["id"] for response in responses]
        time.sleep(2)
        is_in_time = is_all_done(order_ids)
        eventually(lambda placed=order_ids: is_all_done(placed), within_seconds=15)
        assert {world.outbox(each)["partition"] for each in order_ids} == {0, 1, 2}
        if is_in_time:
            break
    assert is_in_time


def test_the_api_shows_how_far_the_event_is(world: World, alice: httpx.Client) -> None:
    """GET of an order carries the state of its event, never a bare status."""
    response = place(alice)
    location = response.headers["Location"]
    eventually(
        lambda: alice.get(location).json()["event"]["state"] == "COMPLETED", within_seconds=15
    )
    shown = alice.get(location).json()
    row = world.outbox(shown["id"])
    assert shown["event"] == row
    assert {**response.json(), "event": row} == shown


def test_the_same_key_twice_is_one_order_and_one_mail(world: World, alice: httpx.Client) -> None:
    """A replay answers the same bytes, says that it is one, and mails nobody."""
    headers = {"Idempotency-Key": "once"}
    first = alice.post("/v1/orders", json=order(), headers=headers)
    second = alice.post("/v1/orders", json=order(), headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.content == second.content
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    order_id = first.json()["id"]
    eventually(lambda: world.mails([order_id]), within_seconds=15)
    time.sleep(1)
    assert len(world.mails([order_id])) == 1


def test_a_key_with_another_body_is_422(alice: httpx.Client) -> None:
    """The key stands for the first payload."""
    headers = {"Idempotency-Key": "reused"}
    assert alice.post("/v1/orders", json=order(), headers=headers).status_code == 201
    other = alice.post("/v1/orders", json=order(locale="en"), headers=headers)
    assert other.status_code == 422
    assert other.headers["Content-Type"] == "application/problem+json"


def test_the_key_of_one_user_is_not_the_key_of_another(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    """Keys are scoped to who uses them."""
    headers = {"Idempotency-Key": "shared"}
    ours = alice.post("/v1/orders", json=order(), headers=headers)
    theirs = bob.post("/v1/orders", json=order(), headers=headers)
    assert theirs.status_code == 201
    assert ours.json()["id"] != theirs.json()["id"]


def test_without_a_token_it_is_401(world: World) -> None:
    """Nobody orders anonymously."""
    response = httpx.post(
        f"{world.pair.api_url}/v1/orders", json=order(), headers={"Idempotency-Key": "anonymous"}
    )
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_another_users_order_looks_like_no_order(alice: httpx.Client, bob: httpx.Client) -> None:
    """The answer is that for an id that never was."""
    order_id = place(alice).json()["id"]
    foreign = bob.get(f"/v1/orders/{order_id}")
    unknown = bob.get("/v1/orders/00000000-0000-7000-8000-000000000000")
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.content == unknown.content


def test_a_client_cannot_name_a_price(alice: httpx.Client) -> None:
    """A price or an amount in the body is refused."""
    item = {"sku": "TEA-GREEN-50", "quantity": 1}
    for body in (
        order(amount="1"),
        order(items=[{**item, "unitPrice": "1"}]),
        order(items=[{**item, "price": 1}]),
    ):
        response = alice.post("/v1/orders", json=body, headers={"Idempotency-Key": "cheap"})
        assert response.status_code == 422
        assert response.json()["errors"]


def test_a_record_of_a_spring_producer_becomes_a_good_mail(world: World) -> None:
    """Four fields, integers, a foreign type header, no key and no ce_ headers are enough."""
    example = json.loads((CONTRACT / "examples/valid/from-spring.json").read_text())
    producer = Producer({"bootstrap.servers": world.addresses.kafka_bootstrap_servers})
    producer.produce(
        "order-created",
        value=json.dumps(example["value"]).encode(),
        headers=list(example["headers"].items()),
    )
    assert producer.flush(10) == 0
    order_id = str(example["value"]["orderId"])
    eventually(lambda: world.mails([order_id]), within_seconds=10)
    (mail,) = world.mails([order_id])
    assert mail.recipient == example["value"]["email"]
    assert mail.message_id == f"<order-confirmation.{order_id}@teahouse.example>"
