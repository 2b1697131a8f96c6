"""Shared by the tests of the page: clients of the servers of a tiny run and of its export."""

import pytest
from view_client import client_of

from sagan_fast.models.checkpoint import load_generator
from sagan_fast.models.export import save_folder


@pytest.fixture(scope="session")
def client(tiny_run):
    return client_of(tiny_run)


@pytest.fixture(scope="session")
def export(tiny_run, tmp_path_factory):
    """The folder that `sagan-fast export` would write of the tiny run."""
    folder = tmp_path_factory.mktemp("export") / "exported"
    save_folder(load_generator(tiny_run), folder, {"step": 2})
    return folder


@pytest.fixture(scope="session")
def of_export(export):
    return client_of(export)
