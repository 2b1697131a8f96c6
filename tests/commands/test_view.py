"""`sagan-fast view`: the port, what is refused, and the end by Ctrl-C."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from sagan_fast import cli
from sagan_fast.commands.view import HOST, open_port
from sagan_fast.errors import InputError


def test_the_port_is_on_loopback_and_a_used_one_is_refused():
    with open_port(0) as taken:
        host, port = taken.getsockname()
        assert host == HOST == "127.0.0.1"
        with pytest.raises(InputError, match=f"port {port} cannot be used .*: choose another with --port"):
            open_port(port)


def test_without_a_port_a_free_one_is_found(monkeypatch):
    with open_port(0) as taken:
        monkeypatch.setattr("sagan_fast.commands.view.PORT", taken.getsockname()[1])
        with open_port(None) as other:
            assert other.getsockname()[1] not in (0, taken.getsockname()[1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none"], "there is no run folder or checkpoint"),
        (["run", "--port", "70000"], "port must be 0 to 65535, got 70000"),
        (["run", "--port", "many"], "port must be a whole number"),
        (["broken"], "is no checkpoint of sagan-fast"),
        ([], "checkpoint must be given"),
    ],
)
def test_bad_input_is_a_sentence(tiny_run, tmp_path, sentence, args, message):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "broken" / "checkpoints").mkdir(parents=True)
    whole = (tiny_run / "checkpoints" / "last.pt").read_bytes()
    (tmp_path / "broken" / "checkpoints" / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert cli.main(["view", *(str(tmp_path / arg) if not i else arg for i, arg in enumerate(args))]) == 2
    assert message in sentence()


def test_a_port_in_use_is_a_sentence(tiny_run, sentence):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        assert cli.main(["view", str(tiny_run), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another with --port" in sentence()


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_extra_is_a_sentence(tiny_run, monkeypatch, sentence, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["view", str(tiny_run)]) == 2
    assert f"the page needs the package {package}: pip install 'sagan_fast[view]'" in sentence()


def test_ctrl_c_is_a_good_end(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: signal.raise_signal(signal.SIGINT))
    assert cli.main(["view", str(tiny_run), "--port", "0", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("http://127.0.0.1:") and str(tiny_run) in told.out and told.err == ""


@pytest.mark.slow
def test_a_process_of_its_own_serves_until_ctrl_c(tiny_run):
    command = [sys.executable, "-m", "sagan_fast.cli", "view", str(tiny_run), "--port", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            said = server.stdout.readline()
            assert said.startswith("http://127.0.0.1:") and str(tiny_run) in said
            with urllib.request.urlopen(said.split()[0] + "api/about") as answer:
                assert b'"step":2' in answer.read()
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0 and errors == ""
