import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers.uptraining import parent_and_windows


def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path):
    folder, windows = parent_and_windows(tmp_path)
    np.save(tmp_path / "windows.npy", windows[:48])
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    program = [sys.executable, str(Path(__file__).with_name("killer.py")), str(folder), str(tmp_path / "windows.npy")]
    ended = subprocess.run(
        [*program, str(tmp_path / "out"), str(seed), "6"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all of them equal" in ended.stdout
