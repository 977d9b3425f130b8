"""Every kernel compiles for every architecture without spills, within its shared memory, to tensor-core products."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".triton-oldest"


def compile_sheet(file, *options, triton_folder=None):
    """The rows of bench/kernel_sheet.py, by a process of its own: here Triton only interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(path) for path in (triton_folder, ROOT) if path)
    command = [sys.executable, ROOT / "bench" / "kernel_sheet.py", *options, "--json", file]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text())


def check(rows):
    for row in rows:
        name = f"{row['kernel']} {row['config']} {row['arch']}"
        assert row["spills"] == 0, f"{name}: {row['spills']} bytes spilled"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["occupancy"] >= 1, name
        assert row["exp"] > 0, name
        if "bfloat16" in row["config"] and row["kernel"] != "statistics.chosen":
            assert row["mma"] > 0, name
            assert row["wgmma"] > 0 or row["arch"] != "sm_90", name
        if "probs" in row["config"]:
            assert row["store_bits"] == 128, f"{name}: probs stored {row['store_bits']} bits at a time"


def test_reduced_sheet(tmp_path):
    rows = compile_sheet(tmp_path / "sheet.json", "--reduced")["rows"]
    assert {row["kernel"] for row in rows} == {
        "attention", "statistics.rows", "statistics.received", "statistics.pairs", "statistics.chosen",
    }  # fmt: skip
    assert {row["arch"] for row in rows} == {"sm_90", "sm_120", "gfx942"}
    check(rows)


@pytest.mark.full
def test_whole_sheet(tmp_path):
    rows = compile_sheet(tmp_path / "sheet.json")["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    check(rows)


# make test-all puts it there
if OLDEST.is_dir():

    @pytest.mark.full
    def test_whole_sheet_with_the_oldest_triton(tmp_path):
        result = compile_sheet(tmp_path / "sheet.json", triton_folder=OLDEST)
        assert result["triton"] == "3.6.0"
        check(result["rows"])


def test_a_row_that_spills_fails():
    row = {"kernel": "attention", "config": "D=64 float32", "arch": "sm_80", "spills": 8}
    with pytest.raises(AssertionError, match="8 bytes spilled"):
        check([row])
