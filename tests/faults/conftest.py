"""What the fault campaign damages: tiny random models of every architecture."""

import pytest
from architectures import ARCHITECTURES, write

from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory) -> str:
    """A tiny random model of every architecture, on disk."""
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, request.param)
    return str(folder)


@pytest.fixture(scope="module")
def lvlm(folder) -> LVLM:
    """The same, loaded."""
    return loading.load(folder)
