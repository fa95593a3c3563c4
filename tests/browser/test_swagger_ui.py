"""A person opens /docs, authorises, and places an order by "Try it out"."""

import json
import uuid
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions as expected
from selenium.webdriver.support.wait import WebDriverWait

from tests.support.browser import origins, requests_made
from tests.support.world import World, eventually

PATIENCE_SECONDS = 20.0
PLACE_ORDER = "#operations-orders-placeOrder"


class Page:
    """Swagger UI as a person sees it."""

    def __init__(self, browser: Chrome, address: str) -> None:
        self.browser = browser
        self._address = address
        self._wait = WebDriverWait(browser, PATIENCE_SECONDS)

    def visit(self) -> None:
        """Come to the page, as if for the first time."""
        self.browser.get(self._address)
        self.see(PLACE_ORDER)

    def see(self, selector: str) -> WebElement:
        """Return an element once it is visible."""
        return self._wait.until(expected.visibility_of_element_located((By.CSS_SELECTOR, selector)))

    def click(self, selector: str) -> None:
        """Click as soon as it can be clicked."""
        self._wait.until(expected.element_to_be_clickable((By.CSS_SELECTOR, selector))).click()

    def value(self, selector: str) -> str:
        """Return what is filled in."""
        return self.see(selector).get_attribute("value") or ""


@pytest.fixture
def page(browser: Chrome, world: World) -> Page:
    requests_made(browser)
    browser.get_log("browser")
    page = Page(browser, f"{world.pair.api_url}/docs")
    page.visit()
    return page


def authorise(page: Page, token: str) -> None:
    page.click(".auth-wrapper button.authorize")
    page.see(".modal-ux .auth-container input").send_keys(token)
    page.click(".modal-ux button.authorize")
    page.click(".modal-ux button.btn-done")


def open_the_form(page: Page) -> None:
    page.click(f"{PLACE_ORDER} .opblock-summary-control")
    page.click(f"{PLACE_ORDER} .try-out__btn")


def execute(page: Page) -> tuple[int, dict[str, object]]:
    page.click(f"{PLACE_ORDER} button.execute")
    answer = f"{PLACE_ORDER} .live-responses-table .response"
    status = page.see(f"{answer} .response-col_status").text.split()[0]
    return int(status), json.loads(page.see(f"{answer} .highlight-code code").text)


def test_an_order_is_placed_by_trying_it_out(page: Page, world: World, tmp_path: Path) -> None:
    """With a token, everything else is filled in: 201, the order is there and is mailed."""
    authorise(page, world.token("minji"))
    open_the_form(page)
    key = page.value(f"{PLACE_ORDER} tr[data-param-name='Idempotency-Key'] input")
    body = json.loads(page.value(f"{PLACE_ORDER} textarea.body-param__text"))
    assert uuid.UUID(key).version == 4
    assert body["items"]
    status, order = execute(page)
    page.browser.save_screenshot(str(tmp_path / "swagger-ui.png"))
    assert status == 201
    with world.client("minji") as client:
        shown = client.get(f"/v1/orders/{order['id']}").json()
    assert {**shown, "event": None} == {**order, "event": None}
    eventually(lambda: world.mails([str(order["id"])]), within_seconds=10)


def test_without_a_token_trying_it_out_is_401(page: Page) -> None:
    """The page shows the problem, as any client would meet it."""
    open_the_form(page)
    status, problem = execute(page)
    assert (status, problem["type"]) == (401, "urn:order-service:problem:not-authenticated")


def test_every_visit_has_a_key_of_its_own(page: Page) -> None:
    """Whoever comes back places a new order, and is not told of the old one."""
    keys = set()
    for _ in range(2):
        page.visit()
        open_the_form(page)
        keys.add(page.value(f"{PLACE_ORDER} tr[data-param-name='Idempotency-Key'] input"))
    assert len(keys) == 2


def test_the_page_needs_nothing_from_elsewhere(page: Page, world: World) -> None:
    """Opened, authorised and tried out, it asked its own origin only, and nothing was refused."""
    authorise(page, world.token("minji"))
    open_the_form(page)
    assert execute(page)[0] == 201
    addresses = requests_made(page.browser)
    assert f"{world.pair.api_url}/v1/orders" in addresses
    assert origins(addresses) == {world.pair.api_url}
    assert [entry["message"] for entry in page.browser.get_log("browser")] == []
