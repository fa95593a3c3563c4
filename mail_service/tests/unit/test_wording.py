"""The template folder: what it may change, and what ends a replica at its start."""

from dataclasses import replace
from pathlib import Path

import pytest
from jinja2 import DictLoader, Environment

from mail_service.confirmation import SAMPLE, SAMPLE_AT, CannotRender, Confirmation, Shop
from mail_service.wording import Templates, Wording

PACKAGED = Path(__file__).parents[2] / "src/mail_service/templates"


def confirmation(folder: Path | None) -> Confirmation:
    """Build a shop's mails with a template folder of its own."""
    return Confirmation(
        Shop(
            name="Tea House",
            url="https://shop.example",
            locale="en",
            time_zone="Asia/Seoul",
            currency="KRW",
            mail_from="orders@shop.example",
            reply_to=None,
            bounce_to=None,
            templates=folder,
        )
    )


def say(confirmation: Confirmation, language: str) -> Wording:
    """Return the sample's mail in a language."""
    return confirmation.word(replace(SAMPLE, locale=language), event_at=SAMPLE_AT)


@pytest.mark.parametrize("language", ["ko", "en"])
def test_the_html_needs_nothing_from_elsewhere(language: str) -> None:
    """Styles are in the tags but for the dark ones, nothing is loaded, links are the shop's."""
    rich = say(confirmation(None), language).html

    assert "jinja" not in rich
    assert "var(" not in rich
    assert rich.count("<style>") == 1
    assert "@media (prefers-color-scheme: dark)" in rich
    assert 'style="' in rich
    for loader in ("<img", "<link", "url(", "@import", "<iframe", " src="):
        assert loader not in rich
    assert rich.count('href="') == rich.count('href="https://shop.example')


def test_a_file_of_ones_own_takes_the_place_of_the_packaged_one(tmp_path: Path) -> None:
    """The others stay."""
    words = (PACKAGED / "words.en.txt").read_text(encoding="utf-8")
    (tmp_path / "words.en.txt").write_text(
        words.replace("Thank you for your order", "Steeped for you"), encoding="utf-8"
    )
    own = confirmation(tmp_path)

    english, korean = (say(own, language) for language in ("en", "ko"))
    assert "Steeped for you" in english.html
    assert "Steeped for you" in english.text
    assert "주문해 주셔서 감사합니다" in korean.html


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("words.ko.txt", "{% set greeting %}안녕{% endset %}", "introduction"),
        ("words.en.txt", "{% set subject %}never closed", "TemplateSyntaxError"),
        ("confirmation.txt", "{{ coupon }}", "'coupon' is undefined"),
        ("confirmation.html", "<p>{{ item.name }}</p>", "'item' is undefined"),
        ("confirmation.html", "<p>{% for item in items %}</p>", "TemplateSyntaxError"),
        ("confirmation.txt", b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_a_broken_template_fails_at_the_start(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    """Not with the first customer's mail, and in the language too that nobody has ordered in."""
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)

    with pytest.raises(CannotRender, match=reason):
        confirmation(tmp_path)


FIXED = {"shop_name": "Tea & <House>", "shop_url": "https://shop.example"}
VARYING = {"order_id": "order-7", "items": [{"name": "Green"}, {"name": "<Black>"}], "amount": "₩7"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param("{% set a %}fixed{% endset %}", "{{ words.a }}", id="fixed"),
        pytest.param("{% set a %}of {{ shop_name }}{% endset %}", "{{ words.a }}", id="shop"),
        pytest.param("{% set a %}no {{ order_id }}{% endset %}", "{{ words.a }}", id="order"),
        pytest.param("{% set a = shop_name %}", "{{ words.a }}", id="not a block"),
        pytest.param("{% set a | upper %}x{% endset %}", "{{ words.a }}", id="filtered block"),
        pytest.param(
            "{% set a %}x{% endset %}{% if amount %}{% set a %}y{% endset %}{% endif %}",
            "{{ words.a }}",
            id="given twice",
        ),
        pytest.param(
            "{% set a %}{% if amount %}yes{% else %}no{% endif %}{% endset %}",
            "{{ words.a }}",
            id="on a condition",
        ),
        pytest.param(
            "{% set a %}x{% endset %}", "{{ words['a'] }}{{ words.a | upper }}", id="item"
        ),
        pytest.param("", "{% set shop_name = order_id %}{{ shop_name }}", id="name taken"),
        pytest.param(
            "", "{% for shop_name in items %}{{ shop_name.name }}{% endfor %}", id="loop takes it"
        ),
        pytest.param(
            "{% set a %}x{% endset %}",
            "{% set words = {'a': order_id} %}{{ words.a }}",
            id="words taken",
        ),
        pytest.param(
            "{% macro m(shop_url) %}{{ shop_url }}{% endmacro %}{% set a %}x{% endset %}",
            "{{ words.m(order_id) }}, {{ shop_url }}",
            id="macro",
        ),
        pytest.param("", "{{ shop_name | upper }} {{ shop_name.split(' ')[0] }}", id="filtered"),
        pytest.param("", "{% if shop_name == 'other' %}a{% else %}b{% endif %}", id="compared"),
        pytest.param("", "{{ shop_name ~ '<br>' | safe }}", id="joined with HTML"),
        pytest.param("", "{{ shop_name | e ~ ' ' ~ shop_url }}", id="escaped and joined"),
        pytest.param("{% set a %}&{% endset %}", "{{ words.a ~ '<b>' | safe }}", id="words joined"),
        pytest.param("", "{% from 'own.txt' import shop_name %}{{ shop_name }}", id="imported"),
        pytest.param(
            "{% set a %}x{% endset %}",
            "{% import 'own.txt' as words %}{{ words.a }}",
            id="words imported",
        ),
        pytest.param(
            "", "{% macro shop_name() %}x{% endmacro %}{{ shop_name() }}", id="a macro's name"
        ),
        pytest.param(
            "{% extends 'words.txt' %}{% set a %}x{% endset %}",
            "{{ words.a }}",
            id="words extended",
        ),
        pytest.param(
            "",
            "{% extends 'base.txt' %}{% block part %}{{ shop_name }}{% endblock %}",
            id="given in a base",
        ),
    ],
)
def test_what_is_put_in_its_place_early_reads_as_ever(
    tmp_path: Path, words: str, text: str
) -> None:
    """As plain Jinja has it, whatever a shop's own templates do with a name."""
    sources = {
        "words.en.txt": f"{words}{{% set subject %}}of {{{{ order_id }}}}{{% endset %}}",
        "confirmation.txt": text,
        "confirmation.html": f"<p>{text}</p>",
        "own.txt": "{% set shop_name = 'imported' %}{% set a = 'imported' %}",
        "words.txt": "{% set a %}of the base{% endset %}",
        "base.txt": "{% set shop_name = 'of the base' %}{% block part %}{% endblock %}",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    facts = {**FIXED, **VARYING}
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=lambda name: name == "confirmation.html",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    said = environment.get_template("words.en.txt").make_module(facts)

    wording = Templates("en", tmp_path, FIXED).say(facts)

    expected = environment.get_template("confirmation.txt").render(facts, words=said)
    assert (wording.subject, wording.text) == ("of order-7", expected)
    in_html = environment.get_template("confirmation.html").render(facts, words=said)
    assert in_html in wording.html
