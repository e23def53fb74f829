"""What the fault campaign damages: tiny random models of every architecture."""

from tests.model.conftest import folder, llava, lvlm  # noqa: F401  fixtures
