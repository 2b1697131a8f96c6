"""A client of the server of the page, without a network."""

from pathlib import Path

import torch
from starlette.testclient import TestClient

from sagan_fast.view.server import application
from sagan_fast.view.source import View

BASE = "http://127.0.0.1:8321"


def client_of(source: Path) -> TestClient:
    """Return a client of the page of `source`, whose requests name the host and port that a browser would."""
    return TestClient(application(View(source, torch.device("cpu"))), base_url=BASE)
