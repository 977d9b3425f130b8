"""Every kernel compiles for every architecture without spills, within its shared memory, to tensor-core products."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".triton-oldest"
# they multiply no tiles
WITHOUT_PRODUCTS = {"_block_bounds_kernel", "_chosen_probs_kernel", "_dense_rows_kernel", "_dense_pairs_kernel"}
WITHOUT_PRODUCTS |= {"_group_ends_kernel", "_carry_kernel", "_selective_scan_kernel", "_sum_parts_kernel"}
WITHOUT_PRODUCTS |= {"_scan_kernel", "_cumulate_kernel", "_unit_kernel", "_decay_bwd_kernel"}
WITHOUT_PRODUCTS |= {"_group_gradients_kernel", "_states_kernel", "_selective_scan_bwd_kernel"}
# a state of 32 rows is too low for wgmma
STATES = {"_channel_kernel", "_group_states_kernel"}
# they mask every tile
WITHOUT_SPLIT = {"_scores_kernel", "_attention_map_kernel", "_attention_topk_kernel"}
WITHOUT_SPLIT |= {"_edge_rows_kernel", "_edge_columns_kernel", "_edge_map_kernel"}
WITHOUT_SPLIT |= {"_panel_kernel", "_products_kernel"}
# an SM issues 128 lanes a clock beside 16 exponentials, and beside the products of 8 scores where D + V is 256
LOOPS = {
    "_row_statistics_kernel D=64 bfloat16": 8,
    "_row_statistics_kernel D=128 bfloat16": 8,
    "_attention_fwd_kernel D=128 bfloat16": 16,
}


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
        name = f"{row['function']} {row['config']} {row['arch']}"
        assert row["spills"] == 0, f"{name}: {row['spills']} bytes spilled"
        assert row["local"] == 0, f"{name}: {row['local']} instructions on local memory"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["occupancy"] >= 1, name
        if row["function"] not in WITHOUT_PRODUCTS and "bfloat16" in row["config"]:
            assert row["mma"] > 0, name
            # its tiles of 32 rows are too low for wgmma: instructions, not products, bound it
            low = "D=256" in name and {"softcap", "probs"} <= {*row["config"].split()}
            low |= "D=32 " in name and row["function"] in STATES
            # beside float32 values every tile is float32's
            low |= row["function"] == "_attention_fwd_kernel" and "rest" in row["config"]
            assert row["wgmma"] > 0 or row["arch"] != "sm_90" or low, name
        # float32 is bound by its products; at D = 256 a tile 16 keys wide leaves a thread 64 bits of a row
        if row["function"] == "_attention_fwd_kernel" and {"probs", "bfloat16"} <= {*row["config"].split()}:
            bits = 64 if "D=256" in name else 128
            assert row["store"] >= bits, f"{name}: probs stored {row['store']} bits at a time"
        if row["function"] == "_panel_kernel" and "bfloat16" in row["config"] and row["store"]:
            assert row["store"] >= 128, f"{name}: a panel stored {row['store']} bits at a time"


def check_split(rows):
    """A tile off the diagonal costs less than one on it."""
    for row in rows:
        # beside four products of a pair of tiles, or those of float32 values, every tile is masked
        split = row["function"] not in WITHOUT_PRODUCTS | WITHOUT_SPLIT
        split &= {"pairs", "rest"}.isdisjoint(row["config"].split())
        if not split or "bfloat16" not in row["config"] or not row["loop"]:
            continue
        for whole, masked in zip(row["loop"], row["masked"], strict=True):
            assert whole < masked, f"{row['function']} {row['config']}: {whole} instructions a score, masked {masked}"


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    return compile_sheet(tmp_path_factory.mktemp("sheet") / "sheet.json", "--reduced")["rows"]


def test_reduced_sheet(reduced):
    assert {row["arch"] for row in reduced} == {"sm_90", "sm_120", "gfx942"}
    check(reduced)


def test_tiles_off_the_diagonal_cost_less(reduced):
    check_split(reduced)


@pytest.mark.parametrize("name", LOOPS)
def test_loop_hides_behind_its_exponentials_and_products(reduced, name):
    (loop,) = [
        row["loop"] for row in reduced if f"{row['function']} {row['config']}" == name and row["arch"] == "sm_90"
    ]
    assert loop[0] <= LOOPS[name]


@pytest.mark.full
def test_whole_sheet(tmp_path):
    rows = compile_sheet(tmp_path / "sheet.json")["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    check(rows)
    check_split(rows)


# make test-all puts it there
if OLDEST.is_dir():

    @pytest.mark.full
    def test_whole_sheet_with_the_oldest_triton(tmp_path):
        result = compile_sheet(tmp_path / "sheet.json", triton_folder=OLDEST)
        assert result["triton"] == "3.6.0"
        check(result["rows"])


def test_the_loop_counted_is_the_one_without_a_mask():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from sass import Code
    finally:
        sys.path.pop(0)
    # a masked copy, whole tiles, whose store is wide unless the tile is an edge; the way out is no loop
    code = """
        /*0000*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ ;
        /*0010*/ ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0014*/ ISETP.LT.AND P0, PT, R1, R2, PT ;
        /*0018*/ FSEL R3, R3, R4, P0 ;
        /*001c*/ FSEL R3, R3, R4, P0 ;
        /*0030*/ MUFU.EX2 R5, R3 ;
        /*0040*/ @P1 BRA 0x0000 ;
        /*0050*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ ;
        /*0060*/ MUFU.EX2 R5, R3 ;
        /*0070*/ @P2 BRA 0x00a0 ;
        /*0080*/ STG.E.128 [R6], R8 ;
        /*0090*/ BRA 0x00e0 ;
        /*00a0*/ STG.E.U16 [R6], R8 ;
        /*00b0*/ STG.E.U16 [R6+0x2], R9 ;
        /*00c0*/ STG.E.U16 [R6+0x4], R10 ;
        /*00d0*/ STG.E.U16 [R6+0x6], R11 ;
        /*00e0*/ @P3 BRA 0x0050 ;
        /*00f0*/ EXIT ;
    """
    ((whole, masked),) = Code(code).passes()
    assert [x.opcode for x in whole] == ["HGMMA.64x64x16.F32.BF16", "MUFU.EX2", "BRA", "STG.E.128", "BRA", "BRA"]
    assert [x.kind for x in masked] == ["mma", "integer", "integer", "fp32", "fp32", "exp", "sync"]
    assert Code(code).store_bits() == 128


def test_a_row_that_spills_fails():
    row = {"function": "_attention_fwd_kernel", "config": "D=64 float32", "arch": "sm_80", "spills": 8}
    with pytest.raises(AssertionError, match="8 bytes spilled"):
        check([row])
