"""Steps over limited links: the links are made and removed, the providers compute the same, records become a table."""

import os
import shutil
import subprocess

import pytest

from benchmarks import bench_ddp
from benchmarks.report import ddp_table

OPTIONS = {"preset": "tiny-imagenet-64", "images": 8, "bucket_cap_mb": 1.0}


def test_every_process_has_a_link_of_its_own_limited_both_ways():
    lines = [" ".join(command) for command in bench_ddp.link_commands(3, 200.0, "sf7")]
    for rank in range(3):
        mine = [line for line in lines if f"sf7h{rank}" in line or f"sf7n{rank}" in line]
        limits = [line for line in mine if "tbf rate 200.0mbit" in line]
        assert len(limits) == 2 and f"ip netns exec sf7{rank}" in limits[1] and "netns" not in limits[0]
        assert any(f"10.97.0.{rank + 1}/24" in line for line in mine)
    assert all(len(f"sf{os.getpid() % 100000}h3") <= 15 for _ in lines)  # Linux' limit of a name


def test_links_are_removed_when_one_cannot_be_made(monkeypatch):
    calls = []

    def run(command, check=False, **options):
        calls.append(command)
        if check and len(calls) == 5:
            raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(bench_ddp.subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError), bench_ddp.links(2, 100.0):
        pytest.fail("made")
    assert [call[:3] for call in calls[5:]] == [["ip", "netns", "del"], ["ip", "netns", "del"], ["ip", "link", "del"]]


def test_the_table_says_what_buckets_save():
    samples = {name: [1e3 * ms] * 5 for name, ms in {"compute": 100, "one-all-reduce": 200, "ours": 125}.items()}
    found = {"samples": samples, "relative_rms": 1e-7, "buckets": [3, 4], "megabytes": 20.0}
    made = [vars(record) for record in bench_ddp.records(2, 300.0, OPTIONS, found)]
    (row,) = ddp_table(made).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "2" and cells[2:5] == ["300", "20", "3 and 4"]
    assert cells[5:] == ["100", "200", "125", "nan", "1.60", "75%"]
    assert ddp_table([]) == "not measured"


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("tc"), reason="needs root, ip and tc")
def test_real_links(tmp_path, capfd):
    small = ["--channels", "4", "--images", "4", "--rounds", "2", "--bucket-cap-mb", "0.1", "--mbit", "100"]
    assert bench_ddp.main(["--processes", "2", *small, "--results", str(tmp_path)]) == 0
    assert capfd.readouterr().out.count("tiny-imagenet-64-2-processes") == len(bench_ddp.PROVIDERS)
    named = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"sf{os.getpid() % 100000}" not in named and (tmp_path / "cpu.jsonl").read_text().count("\n") == 4
