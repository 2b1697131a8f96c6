"""Tables of text."""

import pytest

from benchmarks.text import replaced, table

ROWS = [["forward", 1.234, 128, None], ["backward", 123.4, 7, "not measured"]]


def test_plain_columns_line_up_with_numbers_on_the_right():
    assert table("pass | us | regs | measured", ROWS).splitlines() == [
        "pass        us  regs  measured",
        "--------  ----  ----  ------------",
        "forward   1.23   128  -",
        "backward   123     7  not measured",
    ]


def test_markdown_has_a_line_a_row():
    assert table("pass | us | regs | measured", ROWS, markdown=True).splitlines() == [
        "| pass | us | regs | measured |",
        "| --- | --- | --- | --- |",
        "| forward | 1.23 | 128 | - |",
        "| backward | 123 | 7 | not measured |",
    ]


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<begin>\nold\n<end>\nafter\n")
    assert replaced(page, "<begin>", "<end>", "\nnew\n") == "before\n<begin>\nnew\n<end>\nafter\n"
    assert "old" in page.read_text()
    for text in ("<begin>", "<begin><end><end>", "<begin><begin><end>"):
        page.write_text(text)
        with pytest.raises(ValueError, match="must hold these lines once each: <begin> and <end>"):
            replaced(page, "<begin>", "<end>", "new")
