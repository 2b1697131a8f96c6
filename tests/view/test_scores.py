"""Tables of scores: one for each protocol, the best marked, everything escaped."""

import re

from sagan_fast.view.scores import entries, tables


def result(step, fid, **protocol):
    base = {"name": "clean", "count": 100, "reference_count": 200, "truncation": None,
            "features": {"name": "inception"}, "real": {"data": "shapes"},
            "generated": {"step": step, "sha256": str(step)}}  # fmt: skip
    return {"fid": fid, "kid": fid / 100, "kid_std": 0.001, "is": 10 - fid, "protocol": base | protocol}


def rows(text):
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]


def test_one_protocol_is_one_table_whose_best_is_marked():
    text = tables([result(10, 5.0), result(20, 3.0), result(30, 4.0)])
    assert rows(text) == [
        ["Step", "FID", "KID", "IS"],
        ["10", "5", "0.05 ± 0.001", "5"],
        ["20", "3", "0.03 ± 0.001", "7"],
        ["30", "4", "0.04 ± 0.001", "6"],
    ]
    assert re.findall(r'<td class="best">(.*?)</td>', text) == ["3", "0.03 ± 0.001", "7"]
    assert "protocol clean; 100 generated images against 200 of shapes; features inception; no truncation" in text
    assert "cannot be compared" not in text


def test_two_protocols_are_two_tables():
    text = tables([result(10, 5.0), result(10, 4.0, count=50, truncation=0.5), result(20, 3.0)])
    assert text.count("<table>") == 2 and "cannot be compared" in text and "truncation 0.5" in text
    assert [row[0] for row in rows(text)] == ["Step", "10", "20", "Step", "10"]


def test_missing_scores_notes_and_markup():
    partial = result(10, 5.0, name="<script>")
    del partial["is"]
    partial["notes"] = ["<i>too few</i>"]
    odd = {"fid": "many", "protocol": {"features": None, "generated": "in memory"}}
    text = tables([partial, result(20, 3.0, name="<script>"), odd])
    assert "<script>" not in text and "<i>" not in text and "&lt;i&gt;too few" in text
    assert rows(text)[1] == ["10", "5", "0.05 ± 0.001", "-"]
    assert rows(text)[-1] == ["-", "-"]


def test_no_results_say_how_to_get_some():
    assert "sagan-fast evaluate" in tables([])


def test_nested_entries_are_flat():
    assert entries({"a": {"b": 1}, "c": [2, "<"]}) == "<dt>a.b</dt><dd>1</dd><dt>c</dt><dd>[2, &#x27;&lt;&#x27;]</dd>"
