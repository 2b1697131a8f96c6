"""What `sagan-fast info` prints."""

import torch

from sagan_fast import cli


def test_info_says_versions_device_and_why(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out and "device" in out
    assert "64x64, 128 channels, pooled: " in out and "maps of 4096 x 1024" in out
