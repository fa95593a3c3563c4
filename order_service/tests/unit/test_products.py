import io
from decimal import Decimal
from pathlib import Path

import pytest
from click.testing import CliRunner

from order_service.catalogue import CatalogueEntry
from order_service.cli import commands
from order_service.operate.products import read

HEADER = "sku,name_ko,name_en,unit_price\n"


def faults(lines: str, *, currency: str = "KRW", header: str = HEADER) -> list[str]:
    return read(io.StringIO(header + lines), currency=currency)[1]


def test_a_line_is_a_product_with_both_names() -> None:
    """Korean and English, commas in quotes included."""
    lines = 'TEA-GREEN-50,"녹차, 50g","Green tea, 50 g",12000\n'
    assert read(io.StringIO(HEADER + lines), currency="KRW") == (
        [CatalogueEntry("TEA-GREEN-50", "녹차, 50g", "Green tea, 50 g", Decimal(12000))],
        [],
    )


@pytest.mark.parametrize(
    ("currency", "written", "kept"),
    [
        ("KRW", "12000", "12000"),
        ("KRW", "12000.00", "12000"),
        ("USD", "8.25", "8.25"),
        ("USD", "8", "8.00"),
        ("BHD", "1.5", "1.500"),
    ],
)
def test_a_price_has_the_digits_of_its_currency(currency: str, written: str, kept: str) -> None:
    """Won have no decimals, dollars two, dinars three: mails and events show just these."""
    entries, _ = read(io.StringIO(f"{HEADER}A,가,a,{written}\n"), currency=currency)
    assert f"{entries[0].unit_price:f}" == kept


@pytest.mark.parametrize(
    ("currency", "price", "fault"),
    [
        ("KRW", "12.5", "The currency has 0 decimals."),
        ("USD", "8.255", "The currency has 2 decimals."),
        ("KRW", "-1", "Not a decimal string."),
        ("KRW", "free", "Not a decimal string."),
        ("KRW", "", "Not a decimal string."),
        ("KRW", "1e3", "Not a decimal string."),
        ("KRW", "NaN", "Not a decimal string."),
        ("KRW", "20020020021", "Must be less than 20020020020."),
    ],
)
def test_a_price_that_is_none_is_a_fault(currency: str, price: str, fault: str) -> None:
    """A price that would have to be rounded, or is no number, is named with its line."""
    assert faults(f"A,가,a,{price}\n", currency=currency) == [f"line 2: unit_price: {fault}"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("A,가,a\n", "line 2: unit_price: Field may not be null."),
        ("A,,a,1\n", "line 2: name_ko: Length must be between 1 and 200."),
        (f"A,가,{'a' * 201},1\n", "line 2: name_en: Length must be between 1 and 200."),
        ("A B,가,a,1\n", "line 2: sku: Not a sku."),
    ],
)
def test_a_line_that_is_no_product_is_a_fault(line: str, fault: str) -> None:
    """Each fault names line and column."""
    assert faults(line) == [fault]


def test_a_missing_column_is_a_fault() -> None:
    """A file without English names is not loaded with empty ones."""
    assert faults("A,가,1\n", header="sku,name_ko,unit_price\n") == [
        "line 2: name_en: Missing data for required field."
    ]


def test_every_fault_is_listed() -> None:
    """Whoever keeps the file can mend it in one go."""
    assert faults("A,가,a,x\nB,나,b,1\nC D,다,c,2\n") == [
        "line 2: unit_price: Not a decimal string.",
        "line 4: sku: Not a sku.",
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_column(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A file saved by a spreadsheet is read as it was meant: its only fault is the price."""
    path = tmp_path / "products.csv"
    path.write_text(f"{HEADER}A,가,a,x\n", encoding="utf-8-sig")
    result = CliRunner().invoke(commands, ["products", "load", str(path)], env=environment)
    assert result.output == "Error: line 2: unit_price: Not a decimal string.\n"


def test_a_file_that_is_not_utf8_is_refused_by_name(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A Korean spreadsheet may save in CP949: that is said, not thrown."""
    path = tmp_path / "products.csv"
    path.write_text(f"{HEADER}A,녹차,a,1\n", encoding="cp949")
    result = CliRunner().invoke(commands, ["products", "load", str(path)], env=environment)
    assert result.output.startswith("Error: ")


def test_a_file_that_is_no_csv_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    """A quote that never ends swallows the file: that is said, too."""
    path = tmp_path / "products.csv"
    path.write_text(f'{HEADER}A,"{"가" * 200_000}', encoding="utf-8")
    result = CliRunner().invoke(commands, ["products", "load", str(path)], env=environment)
    assert (result.exit_code, result.output.startswith("Error: ")) == (1, True)
