"""Settings of Hypothesis: the same examples every time; ``HYPOTHESIS_PROFILE=explore`` looks for new ones. Machine code."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from shira_format._core import compiled

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

_SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

settings.register_profile("repeat", derandomize=True, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("explore", max_examples=1000, deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture(autouse=True)
def no_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether an earlier test has loaded numba's functions must not matter to the next one."""
    monkeypatch.setattr(compiled, "_kernels", None)


@pytest.fixture(params=["machine code", "numpy"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, no_machine_code: None) -> str:
    """Run a test with numba's functions, and as if numba were not installed."""
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "load", lambda: False)
    else:
        assert compiled.load()
    return str(request.param)
