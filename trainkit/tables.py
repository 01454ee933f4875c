"""Tables as text."""


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as lines: first column to the left, the others to the right. Every row has the same length."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
