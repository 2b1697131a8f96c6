"""The model of scaling: its limits, and that the page shows what it gives."""

import pytest

from benchmarks import scaling
from benchmarks.scaling import CLUSTERS, GPUS, Cluster, all_reduce_s, step_s


def test_the_flop_of_a_step_are_those_counted():
    assert pytest.approx(154.9e9, rel=0.005) == scaling.FLOPS
    assert pytest.approx(0.089, rel=0.01) == 256 * scaling.FLOPS / scaling.FLOP_PER_S


def test_an_all_reduce_takes_twice_the_bytes_over_the_slowest_link():
    cluster = Cluster("x", 8, nvlink=100e9, network=10e9)
    assert all_reduce_s(cluster, 1, 1e9) == 0
    assert all_reduce_s(cluster, 8, 1e9) == pytest.approx(2 * 7 / 8 * 1e9 / 80e9, rel=0.01)
    assert all_reduce_s(cluster, 16, 1e9) == pytest.approx(2 * 15 / 16 * 1e9 / 8e9, rel=0.01)
    assert all_reduce_s(cluster, 512, 0) == pytest.approx(20e-6 + 6 * 10e-6)


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda c: c.name)
@pytest.mark.parametrize("gpus", GPUS)
def test_hiding_more_is_never_slower_and_one_gpu_talks_to_nobody(cluster, gpus):
    step = step_s(cluster, gpus, 64)
    assert step.compute <= step.ideal <= step.ours <= step.exposed
    assert (step.compute == step.exposed) == (gpus == 1)
    assert step_s(cluster, gpus, 64, sync_norm=True).ours >= step.ours


def test_the_page_shows_what_the_model_gives(capsys):
    assert scaling.main([]) == 0
    assert capsys.readouterr().out.strip() in scaling.PAGE.read_text()


def test_writing_changes_nothing_else(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    monkeypatch.setattr(scaling, "PAGE", page)
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    assert scaling.main(["--write"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and scaling.tables() in text
