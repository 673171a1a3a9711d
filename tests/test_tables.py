import io

from rich.console import Console

from dia_diffusion.tables import Table

TABLE = Table(["unit", "distance", "note"], [["none", "12.5", ""], ["dia-lstm", "3.25", ""]], "FD(digits)")


def test_a_table_for_the_console_and_for_a_page() -> None:
    kept = TABLE.without_empty_columns()
    assert kept.to_markdown() == "| unit | distance |\n| --- | ---: |\n| none | 12.5 |\n| dia-lstm | 3.25 |\n"
    console = Console(file=io.StringIO(), width=60)
    console.print(kept.to_rich())
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == ["FD(digits)", "unit      distance", "none          12.5", "dia-lstm      3.25"]
