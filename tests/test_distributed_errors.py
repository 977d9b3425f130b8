"""Wrong arguments, ranks that disagree and ranks that die: every rank is told, and none waits for ever."""

import pytest
from processes import Ranks


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("mesh", TypeError, "mesh must be a torch.distributed DeviceMesh, got str"),
        ("order", ValueError, "order must be 'contiguous' or 'zigzag', got 'striped'"),
        ("shard order", ValueError, "order must be 'contiguous' or 'zigzag', got 'striped'"),
        ("zigzag", ValueError, r"order='zigzag' needs \[1, 0\] of 1 tokens on the ranks, as shard gives, got \[0, 1\]"),
        ("tokens", ValueError, "k must have q's 4 tokens on each rank, got 3"),
        ("gradient", NotImplementedError, "no gradient: pass detached tensors, as q.detach"),
        ("gradient of v", NotImplementedError, "no gradient: pass detached tensors"),
        ("gradient of scans", NotImplementedError, "no gradient: pass detached tensors"),
        (
            "rows",
            ValueError,
            r"mask must be for the 8 tokens of all ranks, from position 0, got \[1, 4\] from position 0",
        ),
        ("mask", TypeError, "mask must be a causalattn Mask or Intervals, got str"),
        ("map", ValueError, "want must be names among row, column, topk of a sharded sequence, got 'map'"),
        ("slopes", NotImplementedError, "asymmetry of a sharded sequence takes no alibi_slopes"),
        ("n", ValueError, "n must be at least 1, got 0"),
        ("n of a kind", TypeError, "n must be an int, got float"),
        ("decay", ValueError, "causal=False takes no decay"),
        ("state", ValueError, r"initial_state.s must have shape \[1, 2, 8, 8\], got \[1, 2, 8, 7\]"),
        ("state of a scan", ValueError, r"initial_state must have shape \[1, 6, 4\], got \[1, 6, 3\]"),
        ("backend", ValueError, "backend must be"),
        ("interval", ValueError, "mask must lie in 0…8, got 0…108"),
        ("dim", ValueError, "dim must be in -1…0, got 2"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(ranks, case, kind, message):
    ranks.start(2, "wrong", case)
    answers = [ranks.answer(rank) for rank in range(2)]
    for answer in answers:
        with pytest.raises(kind, match=message):
            raise answer.rebuilt()


DISAGREEMENTS = {
    "dtype": "dtype must be the same on every rank, got torch.",
    "dim": "the head dim must be the same on every rank, got",
    "order": "order must be the same on every rank, got '",
    "causal": "causal must be the same on every rank, got",
    "scale": "scale must be the same on every rank, got",
    "operator": "the operator must be the same on every rank, got 'attention",
    "unshard": "the other axes must be the same on every rank, got",
    "n": "n must be the same on every rank, got",
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_that_disagree_are_all_told(ranks, case):
    ranks.start(2, "disagreeing", case)
    for answer in [ranks.answer(rank) for rank in range(2)]:
        with pytest.raises(ValueError, match=DISAGREEMENTS[case]):
            raise answer.rebuilt()


@pytest.mark.parametrize("case", ["v", "sink", "state", "backend"])
def test_one_rank_that_is_wrong_keeps_nobody_waiting(ranks, case):
    ranks.start(3, "wrong_alone", case)
    answers = [ranks.answer(rank) for rank in range(3)]
    assert "must" in answers[1].text and not answers[1].text.startswith("rank ")
    for answer in (answers[0], answers[2]):
        with pytest.raises(ValueError, match="rank 1 refused its arguments, and says which"):
            raise answer.rebuilt()


@pytest.mark.parametrize("kind", ["attention", "linear_attention"])
def test_a_killed_rank_ends_the_others_with_a_clear_error(kind):
    own = Ranks(3, seconds=20)
    try:
        own.start(3, "killed", 1, kind)
        for rank in (0, 2):
            with pytest.raises(RuntimeError, match="failed, another rank may be gone, late or in another call: "):
                raise own.answer(rank).rebuilt()
        assert own.processes[1].wait() == -9
    finally:
        own.close()
