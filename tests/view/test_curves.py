"""Curves as SVG: what is drawn, with which numbers, and what is left out."""

import json
import math
import re
import xml.etree.ElementTree as ET
from html import unescape

import pytest

from sagan_fast.view.curves import POINTS, charts, number, ticks


def svgs(text):
    return [ET.fromstring(f"<x>{svg}</x>")[0] for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def data_of(svg):
    return json.loads(svg.attrib["data-lines"])


def test_a_line_goes_where_its_values_are():
    lines = [{"step": step, "d_loss": value} for step, value in ((10, 0.0), (20, 2.0), (30, 1.0))]
    (svg,) = svgs(charts(lines))
    places = [tuple(map(float, place.split(","))) for place in svg.find("polyline").attrib["points"].split()]
    assert [x for x, _ in places] == data_of(svg)[0]["at"] and places[0][0] < places[1][0] < places[2][0]
    assert places[1][1] < places[2][1] < places[0][1], "larger values are higher up"
    assert math.isclose(places[2][1], (places[0][1] + places[1][1]) / 2, abs_tol=0.2)
    assert data_of(svg)[0]["values"] == ["0", "2", "1"] and data_of(svg)[0]["steps"] == [10, 20, 30]
    assert "from step 10 to 30" in svg.attrib["aria-label"] and "D loss 1" in svg.attrib["aria-label"]


def test_long_logs_are_averaged(rng):
    values = rng.normal(size=3 * POINTS).tolist()
    (svg,) = svgs(charts([{"step": i, "d_loss": value} for i, value in enumerate(values)]))
    found = data_of(svg)[0]
    assert len(found["steps"]) == POINTS and found["steps"][:2] == [2, 5]
    assert float(found["values"][7]) == pytest.approx(sum(values[21:24]) / 3, rel=1e-3)


def test_values_that_are_not_finite_break_a_line():
    values = (1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0)
    (svg,) = svgs(charts([{"step": i, "g_loss": value} for i, value in enumerate(values)]))
    assert [len(line.attrib["points"].split()) for line in svg.findall("polyline")] == [2, 2]
    assert len(svg.findall("circle")) == 1
    assert svgs(charts([{"step": 1, "g_loss": math.nan}]))[0].find("polyline") is None


def test_every_name_has_one_chart_and_strange_ones_are_escaped():
    line = {"step": 1, "time": 3.0, "eval/fid": 3.0, "eval/kid": 0.1, "gamma/g.attentions.32": 0.1,
            "gamma/<b>'\"": 0.2, "rollbacks": 0, "note": "text"}  # fmt: skip
    text = charts([line])
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["FID", "Other scores", "Gamma of attention"]
    assert "<b>'" not in text and "<b>&#x27;&quot;" not in text and "generator 32" in unescape(text)


def test_an_empty_log_is_a_sentence():
    assert charts([]) == '<p class="none">The log has no lines yet.</p>'


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] or ticks(0, 10) == [0, 5, 10]
    for low, high in ((-1.3, 0.9), (0.001, 0.0013), (5.0, 7e6), (-3.0, -2.0)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 6 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found), (low, high, found)
    assert (number(1234567.0), number(0.123456), number(math.nan)) == ("1,234,567", "0.1235", "nan")
