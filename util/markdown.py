"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that ends in a line break; floats with three significant digits, None as an empty cell."""

    def text(cell: object) -> str:
        if cell is None:
            return ""
        return f"{cell:.3g}" if isinstance(cell, float) and cell < 1000 else str(cell)

    body = [f"| {' | '.join(map(text, row))} |\n" for row in (head, *rows)]
    return "".join([body[0], "|" + "---|" * len(head) + "\n", *body[1:]])
