"""What the server answers, and what it refuses."""

import base64
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from view_client import client_of

STATIC = Path(__file__).parents[2] / "sagan_fast" / "view" / "static"


def pixels(src):
    return Image.open(io.BytesIO(base64.b64decode(src.removeprefix("data:image/png;base64,"))))


def png_bytes(size=(50, 40), kind="PNG"):
    out = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(out, kind)
    return out.getvalue()


def test_everything_that_the_page_asks_for_is_there(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assets = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    scripts = {f"/static/{path.name}" for path in STATIC.glob("*.js")}
    assert {"/static/style.css", "/static/page.js"} == set(assets) and scripts >= {"/static/page.js"}
    for path in (*assets, *scripts, "/api/about", "/api/status", "/parts/curves", "/parts/scores"):
        assert client.get(path).status_code == 200, path
    for path in STATIC.iterdir():
        assert not re.search(r"https?://", path.read_text()), "nothing comes from another host"


def test_every_answer_carries_the_policy(client):
    for path in ("/", "/static/page.js", "/api/about", "/none", "/pictures/none.png", "/api/samples?seed=x"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';") and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8321"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1234"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_pages_are_refused(client, headers):
    assert client.get("/api/about", headers=headers).status_code in (400, 403)
    assert client.post("/api/reload", headers=headers).status_code in (400, 403)


def test_the_page_itself_and_links_to_it_are_not_refused(client):
    own = {"origin": "http://127.0.0.1:8321", "sec-fetch-site": "same-origin"}
    assert client.get("/api/about", headers=own).status_code == 200
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    assert client.get("/api/about", headers={"host": "localhost:9"}).status_code == 200


def test_no_path_outside_the_run_is_readable(tiny_run, tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret.png"
    shutil.copytree(tiny_run, run)
    secret.write_bytes(b"secret")
    os.symlink(secret, run / "samples" / "0000009.png")
    (run / "data.png").unlink(missing_ok=True)
    os.symlink(secret, run / "data.png")
    client = client_of(run)
    for place in ("/pictures/", "/static/", "/parts/", "/"):
        for path in ("../secret.png", "..%2fsecret.png", "..%2f..%2fsecret.png", "%2e%2e/secret.png", "0000009.png",
                     "data.png", "..%5csecret.png", "/etc/passwd", "%2fetc%2fpasswd", "config.yaml",
                     "..%2fconfig.yaml", "..%2fcheckpoints%2flast.pt", "page.py", "..%2fserver.py"):  # fmt: skip
            answer = client.get(place + path.lstrip("/"))
            assert b"secret" not in answer.content and b"root:" not in answer.content
            assert answer.status_code == 404, place + path
    assert client.get("/pictures/0000002.png").status_code == 200


def test_nothing_is_written(tiny_run, tmp_path, monkeypatch, client):
    def state(folder):
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}

    monkeypatch.chdir(tmp_path)
    before = state(tiny_run)
    for path in ("/", "/api/status", "/api/samples", "/api/between?start=0.0.0&end=1.0.0", "/parts/curves",
                 "/api/attention?of=0.0.0&x=3&y=3"):  # fmt: skip
        assert client.get(path).status_code == 200
    assert client.post("/api/image", content=png_bytes()).status_code == 200
    assert client.post("/api/reload").status_code == 200
    assert state(tiny_run) == before and state(tmp_path) == {}
    for path in ("/", "/api/samples", "/pictures/0000002.png"):
        assert client.put(path).status_code == client.delete(path).status_code == 405


def test_samples_are_of_their_class_and_seed(client):
    model = client.get("/api/about").json()["model"]
    assert len(model["classes"]) == 10 and model["step"] == 2 and model["layers"] == {
        "g": ["attentions.16"], "d": ["attentions.16"]}  # fmt: skip
    found = client.get("/api/samples", params={"seed": 3, "truncation": "0.5"}).json()
    assert len(found["samples"]) == len(found["rows"]) * found["columns"]
    assert found["samples"][0]["id"] == "0.3.0" and pixels(found["samples"][0]["src"]).size == (32, 32)
    again = client.get("/api/samples", params={"seed": 3, "truncation": "0.5", "class": 4}).json()["samples"]
    assert {sample["id"].split(".")[0] for sample in again} == {"4"}
    other = client.get("/api/samples", params={"seed": 3, "truncation": "1.5", "class": 4}).json()["samples"]
    assert again[0]["src"] != other[0]["src"]


def test_a_real_image_is_looked_at_by_the_discriminator(client):
    kept = client.post("/api/image", content=png_bytes((64, 40), "JPEG")).json()
    assert pixels(kept["src"]).size == (32, 32)
    assert kept["said"] == "64 x 40 pixels, cropped to its centre and resized to 32 x 32 as in training"
    values = {"network": "d", "of": kept["of"], "x": 31, "y": 0, "class": 3}
    found = client.get("/api/attention", params=values).json()
    assert found["layer"] == "attentions.16" and found["x"] == 31 and found["y"] == 1 and found["score"] is not None
    assert client.post("/api/image", content=png_bytes((32, 32))).json()["said"] == "32 x 32 pixels"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/samples?seed=-1", "seed must be a whole number"),
        ("/api/samples?seed=4294967296", "seed must be a whole number"),
        ("/api/samples?seed=0000000000000000000099999999999999999999999", "seed must be a whole number"),
        ("/api/samples?first=10", "first must be a whole number from 0 to 9, got '10'"),
        ("/api/samples?class=10", "class must be 0 to 9, got 10"),
        ("/api/samples?truncation=0", "truncation must be none or a number"),
        ("/api/samples?truncation=nan", "truncation must be a number"),
        ("/api/between?start=1.0.0&end=11.0.0", "class must be 0 to 9, got 11"),
        ("/api/between?start=1.0.64&end=1.0.0", "a sample must be named like 3.0.5"),
        ("/api/between?start=-.0.0&end=1.0.0", "must have a class"),
        ("/api/attention?of=1.0.0&x=32&y=0", "points must lie in the image"),
        ("/api/attention?of=1.0.0&x=a&y=0", "x must be a number, got 'a'"),
        ("/api/attention?of=1.0.0&x=0&y=0&layer=7", "has no attention layer '7'"),
        ("/api/attention?of=1.0.0&x=0&y=0&network=e", "network must be g or d"),
        ("/api/attention?of=real.99&x=0&y=0&network=d", "no longer kept"),
        ("/api/attention?of=real.1&x=0&y=0&network=g", "choose the discriminator"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(client, path, message):
    answer = client.get(path)
    assert answer.status_code == 400 and message in answer.json()["error"]


def test_what_is_no_image_is_one_sentence(client, monkeypatch):
    for content in (b"", b"no image", png_bytes()[:200]):
        answer = client.post("/api/image", content=content)
        assert answer.status_code == 400 and answer.json()["error"].startswith("the file cannot be shown: ")
    monkeypatch.setattr("sagan_fast.view.server.LARGEST", 1000)
    answer = client.post("/api/image", content=b"x" * 1001)
    assert answer.status_code == 400 and "drop a smaller image" in answer.json()["error"]


def test_an_export_has_no_discriminator_and_no_run(of_export):
    about = of_export.get("/api/about").json()
    assert about["run"] is False and list(about["model"]["layers"]) == ["g"] and about["model"]["step"] == 2
    assert of_export.get("/api/attention?of=1.0.0&x=0&y=0").status_code == 200
    refused = of_export.get("/api/attention?of=1.0.0&x=0&y=0&network=d")
    assert "an exported generator has no discriminator" in refused.json()["error"]
    assert "no discriminator" in of_export.post("/api/image", content=png_bytes()).json()["error"]
    assert of_export.get("/api/status").json()["newer"] is False


def test_a_newer_checkpoint_is_offered_and_loaded(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    last = run / "checkpoints" / "last.pt"
    whole = last.read_bytes()
    for path in last.parent.iterdir():
        path.unlink()
    client = client_of(run)
    assert client.get("/api/about").json()["missing"] == "This run has no checkpoint yet. Its curves are below."
    assert "no checkpoint yet" in client.get("/api/samples").json()["error"]
    last.write_bytes(whole[:1000])
    assert client.get("/api/status").json()["newer"] is True
    assert "is no checkpoint of sagan-fast" in client.post("/api/reload").json()["error"]
    last.write_bytes(whole)
    assert client.post("/api/reload").status_code == 200
    assert client.get("/api/about").json()["model"]["step"] == 2
    assert client.get("/api/status").json()["newer"] is False
    assert torch.is_grad_enabled()
