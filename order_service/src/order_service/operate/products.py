"""`products load`: the catalogue from a CSV."""

import csv
from decimal import Decimal
from pathlib import Path
from typing import TextIO

import click
from babel.numbers import get_currency_precision
from marshmallow import Schema, ValidationError, fields, validate

from order_service import catalogue
from order_service.catalogue import CatalogueEntry
from order_service.models import make_engine
from order_service.operate.output import examples
from order_service.schemas import MAX_ITEMS, MAX_QUANTITY, SKU, Money
from order_service.settings import Settings

NAME = validate.Length(min=1, max=200)
# The largest order must come to an amount that the contract can say: 15 digits.
PRICE = validate.Range(max=10**15 // (MAX_ITEMS * MAX_QUANTITY), max_inclusive=False)


class _Row(Schema):
    sku = fields.String(required=True, validate=SKU)
    name_ko = fields.String(required=True, validate=NAME)
    name_en = fields.String(required=True, validate=NAME)
    unit_price = Money(required=True, validate=PRICE)


@click.group()
def products() -> None:
    """Keep the catalogue."""


@products.command(epilog=examples("order-service products load products.csv"))
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def load(path: Path) -> None:
    """Insert or update the products of a CSV: sku,name_ko,name_en,unit_price.

    Prices are in SHOP_CURRENCY. When a line is wrong nothing is loaded.
    """
    settings = Settings.from_environment()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            entries, faults = read(file, currency=settings.shop_currency)
    except (UnicodeDecodeError, csv.Error) as error:
        raise click.ClickException(f"{path} is no CSV in UTF-8: {error}") from error
    if not entries and not faults:
        faults = ["there is no product in it"]
    if faults:
        raise click.ClickException("\n".join(faults))
    with make_engine(settings.database_url).begin() as connection:
        catalogue.load(connection, entries, currency=settings.shop_currency)
    click.echo(f"{len(entries)} products loaded")


def read(file: TextIO, *, currency: str) -> tuple[list[CatalogueEntry], list[str]]:
    """Return the products of a CSV and every fault with its line."""
    entries, faults = [], []
    scale = get_currency_precision(currency)
    rows = csv.DictReader(file)
    for row in rows:
        try:
            values = _Row().load(row)
            values["unit_price"] = _to_scale(values["unit_price"], scale)
            entries.append(CatalogueEntry(**values))
        except ValidationError as error:
            for name, messages in error.normalized_messages().items():
                faults.append(f"line {rows.line_num}: {name}: {' '.join(messages)}")
    return entries, faults


def _to_scale(price: Decimal, scale: int) -> Decimal:
    rounded = price.quantize(Decimal(1).scaleb(-scale))
    if rounded != price:
        raise ValidationError(f"The currency has {scale} decimals.", "unit_price")
    return rounded
