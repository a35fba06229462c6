"""What a step of a model does on a GPU, seen on a fake one: nothing on the wrong device, no wait, no copy but one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake GPU would stand beside a real one")


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "helpers" / "fake_gpu.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_fake_gpu_notices(found):
    """Without this, the tests below could not fail."""
    assert found["a value read"] == found["a comparison"] == "DataDependentOutputException"
    assert found["two devices"] == "FakeTensorDeviceMismatchError"
    assert found["three copies"] == 3


@pytest.mark.parametrize("kind", ["contiguous", "int8", "paged", "paged-int8"])
def test_a_step_waits_for_nothing(found, kind):
    """Caches alone, our module, and models of transformers with padding. What a paged cache has decided on the host
    goes over once, for all layers."""
    steps = {name: copies for name, copies in found.items() if name.endswith(" " + kind)}
    assert len(steps) == 6
    assert steps == dict.fromkeys(steps, 1 if kind.startswith("paged") else 0)
