from sagan_fast.kernels import tuned


def test_rows_are_found_by_their_key(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuned, "FILE", path)
    tuned.rows.cache_clear()
    try:
        assert tuned.tuned("forward", 90, "bf16", (32, 64), "large") is None
        tuned.rows.cache_clear()
        path.write_text('{"forward sm_90 bf16 32x64 large": {"config": [128, 64, 64, 8, 2, null, true]}}')
        assert tuned.tuned("forward", 90, "bf16", (32, 64), "large") == (128, 64, 64, 8, 2, None, True)
        for other in (
            (80, "bf16", (32, 64), "large"),
            (90, "bf16", (32, 64), "small"),
            (90, "tf32", (32, 64), "large"),
        ):
            assert tuned.tuned("forward", *other) is None
    finally:
        monkeypatch.undo()
        tuned.rows.cache_clear()
