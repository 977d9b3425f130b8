"""bench/predict.py: the arithmetic by hand, and counts that are those of the machine code."""

import os
import subprocess
import sys
from pathlib import Path

import predict as bench_predict
import pytest
from predict import DIMS, GPUS, OPERATORS, STREAMED, Count, predicted

ROOT = Path(__file__).resolve().parents[1]


def counts_of(loop, special):
    return {
        bench_predict.key(step, kernel, D, arch): Count(loop, special)
        for steps in OPERATORS.values() for step in steps for kernel in step.products for D in DIMS for arch in GPUS
    }  # fmt: skip


def test_each_pipe_in_its_turn():
    scores, second = 32 * 16384**2, 132 * 1.830e9
    for loop, special, clocks, bound in ((4, 1, 1 / 16, "exponentials"), (64, 1, 1 / 2, "instructions")):
        ms, found = predicted("dag_score", 64, "sm_90", counts_of(loop, special))
        assert found == bound and ms == pytest.approx(1e3 * scores * clocks / second)
    # 4·D FLOPs a score at 4096 a clock
    ms, found = predicted("attention", 128, "sm_90", counts_of(1, 0.5))
    assert found == "products" and ms == pytest.approx(1e3 * scores * 4 * 128 / 4096 / second)
    assert predicted("attention", 128, "sm_90", counts_of(1, 0.5), causal=True).ms == pytest.approx(ms / 2)


def test_what_is_streamed_is_bound_by_bandwidth():
    ms, found = predicted("linear attention", 64, "sm_90", {})
    assert found == "bandwidth" and ms == pytest.approx(1e3 * 8 * 32 * 16384 * 64 / 4.8e12)


def test_published_peaks():
    peaks = {gpu.name: gpu.multiprocessors * gpu.clock * gpu.flops / 1e12 for gpu in GPUS.values()}
    assert peaks == pytest.approx({"A100": 312, "H200": 989, "B200": 2250, "RTX 5090": 209.5}, rel=2e-3)


def test_the_page_has_every_case_and_what_was_measured():
    counts = bench_predict.stored()
    assert counts.keys() == counts_of(1, 1).keys()
    plain = bench_predict.page(counts, [])
    assert sum(f"| {name} | {D} |" in plain for name in (*OPERATORS, *STREAMED) for D in DIMS) == 2 * 7
    row = {"operator": "attention", "shape": [1, 32, 16384, 64], "peer": "causalattn", "ms": {"p50": 12.34}}
    others = ("a CPU", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA A100-SXM4-40GB")
    for device, count in (("NVIDIA H200", 1), ("NVIDIA A100-SXM4-80GB", 1), *((name, 0) for name in others)):
        page = bench_predict.page(counts, [row | {"device": device}])
        assert page.count(", measured 12.3") == count


def check_counts(*options):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench" / "predict.py", "--check", *options]
    return subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.mark.full
def test_counts_are_those_of_the_machine_code():
    done = check_counts()
    assert done.returncode == 0, done.stderr
