"""Every target holds for some inputs in the daily tests, and for a minute of them, in bounded memory, in the slow ones."""

import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings

from tests import ROOT
from tests.fuzz.targets import TARGETS

SECONDS = float(os.environ.get("QBERT_FUZZ_SECONDS", "60"))


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs(name):
    strategy, check = TARGETS[name]
    seen = []

    @settings(max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy())
    def holds(drawn):
        seen.append(check(drawn))

    holds()
    assert seen


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_for_a_while_in_bounded_memory():
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--seconds", str(SECONDS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
