"""Tables of text."""

from benchmarks.text import table

ROWS = [["forward", 1.234, 128, None], ["backward", 123.4, 7, "not measured"]]


def test_plain_columns_line_up_with_numbers_on_the_right():
    assert table(["pass", "us", "regs", "measured"], ROWS).splitlines() == [
        "pass        us  regs  measured",
        "--------  ----  ----  ------------",
        "forward   1.23   128  -",
        "backward   123     7  not measured",
    ]


def test_markdown_has_a_line_a_row():
    assert table(["pass", "us", "regs", "measured"], ROWS, markdown=True).splitlines() == [
        "| pass | us | regs | measured |",
        "| --- | --- | --- | --- |",
        "| forward | 1.23 | 128 | - |",
        "| backward | 123 | 7 | not measured |",
    ]
