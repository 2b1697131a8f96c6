"""Every width has a config, each launch one row, and a measured row comes before the others."""

from dataclasses import replace
from itertools import product

import pytest

from sagan_fast.kernels import configs
from sagan_fast.kernels.configs import FILE, LaunchConfig, Row, format_rows, lookup, read_rows, served_by
from sagan_fast.kernels.tiles import arithmetic

OWNERS = ("attention_fwd", "attention_bwd_dkv", "attention_bwd_dq")


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """A function that makes other rows the shipped ones, for this test."""
    caches = (configs._configs, configs.lookup, configs.lookup_size, configs.has_fast_float32)

    def clear():
        for cache in caches:
            cache.cache_clear()

    def use(rows):
        path = tmp_path / "configs.csv"
        path.write_text(format_rows(rows))
        monkeypatch.setattr(configs, "FILE", path)
        clear()

    yield use
    clear()


SERVED = {80: 80, 86: 80, 87: 80, 89: 80, 90: 90, 100: 100, 103: 100, 110: 100, 120: 80, 121: 80}
"""Compute capability to the one that has its instructions. tests/ops/test_backends.py holds that 7.5 is refused."""


@pytest.mark.parametrize("arch", [*SERVED, 130])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "tf32", "fp16", "bf16"])
def test_every_width_and_size_has_configs(arch, precision):
    for D_QK in (1, 16, 32, 33, 64):
        for D_V in (1, 32, 64, 128, 129, 256):
            for size in (1, 256, 257, 16384):
                for kernel in OWNERS:
                    config = lookup(kernel, arch, precision, D_QK, D_V, size)
                    assert config.BLOCK_N >= 16 and config.BLOCK_M >= 16 and config.num_warps in (4, 8)
                assert lookup("attention_fwd", arch, precision, D_QK, D_V, size).BLOCK_C >= 16
            projection = lookup("projection_fwd", arch, precision, D_QK, D_V)
            assert projection.BLOCK_M >= 16 and projection.BLOCK_C >= 16
            assert lookup("attention_bwd_preprocess", arch, precision, 1, D_V).BLOCK_C >= 16


def test_architectures_without_rows_of_their_own_run_those_of_their_instructions():
    assert {arch: served_by(arch) for arch in SERVED} == SERVED == configs.SERVED_BY
    assert [served_by(arch) for arch in (75, 101, 130)] == [80, 100, 80]
    own = {arch for row in read_rows(FILE) for arch in row.serves[0]} - {"any", "gfx"}
    assert own <= {str(arch) for arch in SERVED} and {str(arch) for arch in SERVED.values()} <= own


@pytest.mark.parametrize("arch", SERVED)
def test_each_launch_is_the_row_of_the_capability_itself_or_else_of_its_server(arch):
    rows = {key: row.config for row in read_rows(FILE) for key in row.keys}
    for kernel in OWNERS:
        for (D_QK, D_V), (size, positions) in product(configs.WIDTHS, {"small": 256, "large": 257}.items()):
            for precision in ("bf16", "tf32", "fp32"):
                keys = [(kernel, str(one), precision, f"{D_QK}x{D_V}", size) for one in (arch, SERVED[arch])]
                found = lookup(kernel, arch, precision, D_QK, D_V, positions)
                assert found == next(rows[key] for key in keys if key in rows)


@pytest.mark.parametrize("kernel", ["projection_fwd", *OWNERS])
def test_wider_heads_are_refused_and_sdpa_is_named(kernel):
    message = rf"{kernel}: D_QK and D_V must be at most 64 and 256 \(backend 'sdpa' takes any\), got 65, 8"
    with pytest.raises(ValueError, match=message):
        lookup(kernel, 90, "bf16", 65, 8, 1)
    with pytest.raises(ValueError, match="got 8, 257"):
        lookup(kernel, 90, "bf16", 8, 257, 1)


def test_the_file_is_as_the_rows_are_written_and_says_where_each_comes_from():
    rows = read_rows(FILE)
    assert format_rows(rows) == FILE.read_text()
    assert all(row.origin == "from the machine code" or row.origin.startswith("measured on ") for row in rows)
    assert len({key for row in rows for key in row.keys}) == sum(len(row.keys) for row in rows)


def test_a_config_is_the_same_after_writing_and_reading():
    config = LaunchConfig(BLOCK_N=128, BLOCK_M=64, num_warps=4, maxnreg=255, sum_by_product=True)
    assert str(config) == "BLOCK_N=128 BLOCK_M=64 num_warps=4 num_stages=2 maxnreg=255 sum_by_product"
    assert LaunchConfig.parse(str(config)) == config


def test_a_row_of_the_architecture_itself_comes_first(rows_of):
    own = LaunchConfig(BLOCK_N=16, BLOCK_M=16)
    key = ("attention_bwd_dq", "86", "bf16", "16x64", "large")
    rows_of([*read_rows(FILE), Row(key[0], tuple((cell,) for cell in key[1:]), own, "measured on a card, today")])
    assert lookup("attention_bwd_dq", 86, "fp16", 16, 64, 1024) == own
    for arch, precision, D_V, N in ((80, "bf16", 64, 1024), (86, "tf32", 64, 1024), (86, "bf16", 65, 1024)):
        assert lookup("attention_bwd_dq", arch, precision, 16, D_V, N) != own


def test_two_rows_for_one_launch_are_refused(rows_of):
    rows = read_rows(FILE)
    rows_of([*rows, rows[0]])
    with pytest.raises(ValueError, match="one row, got two for "):
        lookup("attention_fwd", 90, "bf16", 16, 64, 1)


def test_without_a_launch_a_row_serves_all_its_others():
    row = Row("k", (("80", "90"), ("bf16",), ("a", "b", "c"), ("small", "large")), LaunchConfig(BLOCK_N=16), "o")
    for key in row.keys:
        rest = [other for part in row.without(key) for other in part.keys]
        assert sorted(rest) == sorted(other for other in row.keys if other != key)


def test_merged_rows_serve_the_same():
    rows = [part for row in configs.read_rows(configs.FILE) for part in row.without(next(iter(row.keys)))]
    rows += [configs.Row(k[0], tuple((v,) for v in k[1:]), row.config, row.origin) for row in rows for k in row.keys]

    def served(found):
        return {key: (row.config, row.origin) for row in found for key in row.keys}

    assert served(configs.merged(rows)) == served(rows)
    assert len(configs.merged(rows)) < len(rows)


def test_no_row_of_amd_asks_for_three_tf32_products():
    rest = ("attention_second_dkv", 80, "fp32", 32, 128, 64)
    assert configs.lookup(*rest).tf32x3
    for chip in configs.AMD:
        assert configs.lookup(rest[0], chip, *rest[2:]) == replace(configs.lookup(*rest), tf32x3=False)


def test_float32_is_fast_where_every_row_takes_three_tf32_products(rows_of):
    rows = read_rows(FILE)
    assert not configs.has_fast_float32(90)
    fast = [row._replace(config=replace(row.config, tf32x3="fp32" in row.serves[1])) for row in rows]
    rows_of(fast)
    assert configs.has_fast_float32(90) and configs.has_fast_float32(80)
    slow = next(i for i, row in enumerate(fast) if row.kernel == "attention_bwd_dq" and "fp32" in row.serves[1])
    rows_of([*fast[:slow], rows[slow], *fast[slow + 1 :]])
    assert not all(configs.has_fast_float32(arch) for arch in (80, 90, 100))


@pytest.mark.parametrize(
    "precision, tf32x3, said",
    [("fp32", True, "tf32x3"), ("fp32", False, "ieee"), ("tf32", True, "tf32"), ("bf16", True, "ieee")],
)
def test_only_float32_is_three_tf32_products(precision, tf32x3, said):
    assert arithmetic(precision, LaunchConfig(tf32x3=tf32x3))["PRECISION"] == said


@pytest.mark.parametrize("arch", configs.AMD)
def test_amd_runs_a_row_of_its_own_before_ampere_s(arch, rows_of):
    assert lookup("attention_fwd", arch, "bf16", 32, 64, 4096) == lookup("attention_fwd", 80, "bf16", 32, 64, 4096)
    own = LaunchConfig(BLOCK_N=16, BLOCK_M=16, num_warps=4)
    key = (("gfx",), ("bf16",), ("32x64",), ("large",))
    rows_of([*read_rows(FILE), Row("attention_fwd", key, own, "a test")])
    assert lookup("attention_fwd", arch, "bf16", 32, 64, 4096) == own
