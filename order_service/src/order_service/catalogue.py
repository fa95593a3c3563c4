"""A sku's name and price: kept here so that no client names a price."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import Connection, text

FOR_SALE = """
    SELECT sku, name_ko, name_en, unit_price FROM products
     WHERE sku = ANY(%(skus)s) AND currency = %(currency)s
"""

_LOAD = text("""
    INSERT INTO products (sku, name_ko, name_en, unit_price, currency)
    VALUES (:sku, :name_ko, :name_en, :unit_price, :currency)
    ON CONFLICT (sku) DO UPDATE
       SET name_ko = excluded.name_ko, name_en = excluded.name_en,
           unit_price = excluded.unit_price, currency = excluded.currency
""")


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A product as it is sold now."""

    sku: str
    name_ko: str
    name_en: str
    unit_price: Decimal

    def name(self, locale: str) -> str:
        """Return the Korean name for a Korean locale, else the English one."""
        return self.name_ko if locale == "ko" else self.name_en


def load(connection: Connection, entries: Sequence[CatalogueEntry], *, currency: str) -> None:
    """Insert or update products; those not named stay as they are."""
    connection.execute(
        _LOAD,
        [
            {
                "sku": entry.sku,
                "name_ko": entry.name_ko,
                "name_en": entry.name_en,
                "unit_price": entry.unit_price,
                "currency": currency,
            }
            for entry in entries
        ],
    )
