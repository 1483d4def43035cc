"""A table without lines, as most commands print one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich costs 0.1 s
    from rich.table import Table


def plain_table(*headings: str, words: int = 1) -> "Table":
    """A table whose first ``words`` columns are words, to the left, and the others numbers, to the right, whole."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        is_words = index < words
        table.add_column(heading, justify="left" if is_words else "right", overflow="fold", no_wrap=not is_words)
    return table
