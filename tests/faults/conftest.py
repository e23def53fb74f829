"""What the fault campaign damages: the toy project of the engine's tests, tiny random models of every architecture."""

from tests.engine.conftest import project  # noqa: F401
from tests.model.conftest import folder, llava, lvlm  # noqa: F401
