"""analyze and capture on tiny models, against the matrices of the same models."""

import json

import numpy as np
import pytest
import torch
import transformers
from tiny_models import DEVICE, NO_DROPOUT, SMALL, exact, full, other_inputs, text_inputs, tiny

from causalattn.analysis import analyze, capture
from causalattn.integrations.transformers.attention import recorder

EPS = torch.finfo(torch.float32).eps
CASES = ["bert-left", "gpt2-right", "gpt_oss-left", *full("bert-none", "llama-left", "gemma2-right")]


def softmax_of(call, allowed):
    """[B, H, T, S] float64 probabilities of a captured layer under any mask [B or 1, T, S]."""
    scores = call.q.double() @ call.k.double().repeat_interleave(call.q.shape[1] // call.k.shape[1], 1).mT
    scores = scores * (call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    if call.sink is not None:
        sink = call.sink.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    return scores.softmax(-1).nan_to_num(0)[..., : call.k.shape[2]]


def below_share(A):
    return A.tril(-1).sum((-2, -1)) / A.sum((-2, -1))


def asymmetry_ratio(A):
    return (A - A.mT).norm(dim=(-2, -1)) / (A + A.mT).norm(dim=(-2, -1))


def null_of(A, allowed):
    """Mean and standard deviation of the DAG score under row permutations, from MATH §4, row by row."""
    A, allowed = A.cpu().numpy(), np.broadcast_to(allowed.cpu().numpy()[:, None], A.shape)
    weights = np.tril(np.ones(A.shape[-2:]), -1)
    mean, variance = np.zeros(A.shape[:2]), np.zeros(A.shape[:2])
    for b, h, i in np.ndindex(A.shape[:3]):
        p, w = A[b, h, i, allowed[b, h, i]], weights[i, allowed[b, h, i]]
        if len(p):
            mean[b, h] += p.sum() * w.mean()
        if len(p) > 1:
            variance[b, h] += ((w - w.mean()) ** 2).sum() * (np.sum(p**2) - p.sum() ** 2 / len(p)) / (len(p) - 1)
    total = A.sum((-2, -1))
    return mean / total, np.sqrt(variance) / total


def column(report, name):
    """A column of the table as [L, B, H]."""
    B, H = report.intervals[0].start.shape[0], len(report.head_ids[0])
    return np.array([row[name] for row in report.rows()], dtype=float).reshape(-1, B, H)


def assert_close(ours, expected):
    expected = np.asarray([x.cpu().numpy() if isinstance(x, torch.Tensor) else x for x in expected])
    # both are float64 up to the head's own numbers
    assert np.abs(ours - expected).max() <= EPS * max(1.0, np.abs(expected).max())


@pytest.fixture(scope="module", params=CASES)
def case(request):
    family, padding = request.param.split("-")
    inputs = text_inputs(padding)
    model = exact(family)
    calls = capture(model, inputs)
    return family, inputs, calls, analyze(model, inputs)


def test_every_row_is_what_the_matrices_say(case):
    _, inputs, calls, report = case
    real = inputs["attention_mask"].bool()
    first = real.int().argmax(-1)
    allowed = {layer: call.intervals.to_dense(19) for layer, call in calls.items()}
    matrices = [softmax_of(call, allowed[layer]) for layer, call in calls.items()]
    rows = real.sum(-1)[:, None]

    assert report.layer_ids == [0, 1] and report.head_ids == [list(range(calls[0].q.shape[1]))] * 2
    assert_close(column(report, "dag_score"), [below_share(A) for A in matrices])
    assert_close(column(report, "entropy"), [torch.special.entr(A).sum((-2, -1)) / rows for A in matrices])
    sink = torch.nn.functional.one_hot(first, 19)[:, None, None]
    assert_close(column(report, "sink_mass"), [(A * sink).sum((-2, -1)) / rows for A in matrices])
    assert_close(column(report, "asymmetry"), [asymmetry_ratio(A) for A in matrices])

    nulls = [null_of(A, allowed[layer]) for layer, A in enumerate(matrices)]
    assert_close(column(report, "null"), [mean for mean, _ in nulls])
    assert_close(column(report, "null_std"), [std for _, std in nulls])
    lift = column(report, "dag_score") - column(report, "null")
    assert_close(column(report, "lift"), lift)
    assert_close(column(report, "z"), lift / column(report, "null_std"))


def test_the_twin_without_its_sink(case):
    _, inputs, calls, report = case
    first = inputs["attention_mask"].int().argmax(-1)
    rest = torch.arange(19, device=DEVICE) != first[:, None, None]
    allowed = [call.intervals.to_dense(19) & rest for call in calls.values()]
    matrices = [softmax_of(call, seen) for call, seen in zip(calls.values(), allowed, strict=True)]
    assert_close(column(report, "sink_removed"), [below_share(A) for A in matrices])
    nulls = [null_of(A, seen) for A, seen in zip(matrices, allowed, strict=True)]
    assert_close(column(report, "sink_removed_null"), [mean for mean, _ in nulls])
    assert_close(column(report, "sink_removed_null_std"), [std for _, std in nulls])


def test_scores_without_the_causal_mask(case):
    family, inputs, calls, report = case
    real = inputs["attention_mask"].bool()
    allowed = real[:, None] & real[:, :, None]
    assert {row["causal"] for row in report.rows()} == {family != "bert"}
    if family == "bert":
        assert all(row["unmasked"] is row["unmasked_asymmetry"] is None for row in report.rows())
    else:
        matrices = [softmax_of(call, allowed) for call in calls.values()]
        assert_close(column(report, "unmasked"), [below_share(A) for A in matrices])
        assert_close(column(report, "unmasked_null"), [null_of(A, allowed)[0] for A in matrices])
        assert_close(column(report, "unmasked_asymmetry"), [asymmetry_ratio(A) for A in matrices])
    scores = [
        (call.q @ call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1).mT) * allowed[:, None]
        for call in calls.values()
    ]
    assert_close(column(report, "score_asymmetry"), [asymmetry_ratio(s) for s in scores])


def test_received_tokens_are_named(case):
    _, inputs, calls, report = case
    for row in report.rows():
        call, b, h = calls[row["layer"]], row["sequence"], row["head"]
        allowed = call.intervals.to_dense(19).expand(2, -1, -1)
        mean = softmax_of(call, allowed)[b, h].sum(0) / allowed[b].sum(0).clamp(min=1)
        best = mean.argsort(descending=True, stable=True)[:3]
        assert [token["index"] for token in row["received"]] == best.tolist()
        assert [token["token"] for token in row["received"]] == [str(i) for i in inputs["input_ids"][b, best].tolist()]


def test_a_sequence_does_not_feel_its_batch_mates():
    model, inputs = exact("llama"), text_inputs("right")
    together = analyze(model, inputs, layers=[1])
    alone = analyze(model, {"input_ids": inputs["input_ids"][1:, :13]}, layers=[1])
    of_second = [row for row in together.rows() if row["sequence"] == 1]
    for a, b in zip(of_second, alone.rows(), strict=True):
        assert a["dag_score"] == pytest.approx(b["dag_score"], rel=EPS) and a["z"] == pytest.approx(b["z"], rel=EPS)
        assert [token["index"] for token in a["received"]] == [token["index"] for token in b["received"]]


def test_layers_and_heads_keep_their_numbers():
    model, inputs = tiny("llama"), text_inputs("right")
    everything, part = analyze(model, inputs), analyze(model, inputs, layers=[1], heads=[3, 1])
    assert part.layer_ids == [1] and part.head_ids == [[3, 1]]
    chosen = {(row["layer"], row["head"], row["sequence"]): row for row in everything.rows()}
    assert len(part.rows()) == 4
    for row in part.rows():
        expected = chosen[row["layer"], row["head"], row["sequence"]]
        assert row["dag_score"] == pytest.approx(expected["dag_score"], rel=4 * EPS)
        assert row["received"][0]["index"] == expected["received"][0]["index"]


def test_want_keeps_only_what_it_names():
    model, inputs = tiny("bert"), text_inputs()
    stats = analyze(model, inputs, want=("entropy",)).layers[0]
    assert [name for name in stats._fields if getattr(stats, name) is not None] == ["entropy"]
    assert all(value is not None for value in analyze(model, inputs, want="all").layers[0])


def test_without_nulls():
    rows = analyze(tiny("gpt2"), text_inputs(), null=False).rows()
    assert all(row["z"] is row["sink_removed"] is row["unmasked"] is None and row["dag_score"] > 0 for row in rows)


def test_a_mask_with_holes_has_no_exact_null():
    inputs = text_inputs()
    inputs["attention_mask"][1, 8:11] = 0
    with pytest.warns(UserWarning, match="kept as an additive bias"):
        rows = analyze(tiny("llama"), inputs).rows()
    assert all(row["z"] is None and row["dag_score"] > 0 for row in rows)


def test_encoder_and_decoder_layers_are_counted_and_cross_attention_is_left_out():
    report = analyze(tiny("whisper"), other_inputs("whisper", torch.float32), tokens=[list("abcdefghi")] * 2)
    assert report.layer_ids == [0, 1, 2, 3]
    assert [stats.lse.shape[2] for stats in report.layers] == [21, 21, 9, 9]
    assert [scores.causal for scores in report.scores] == [False, False, True, True]
    # the encoder's frames are not the decoder's tokens
    named = {row["layer"]: row["received"][0]["token"] for row in report.rows()}
    assert named[0] is None and named[3] in "abcdefghi"


def test_pictures_have_positions_for_tokens():
    report = analyze(tiny("vit"), other_inputs("vit", torch.float32), layers=[0])
    assert report.tokens == [[str(n) for n in range(26)]] * 2
    assert report.rows()[0]["received"][0]["token"] in report.tokens[0]


def test_the_model_is_left_as_it_was():
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    model.train()
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    analyze(model, text_inputs())
    for inputs in (text_inputs(), {"no_such_input": torch.zeros(1)}):
        with pytest.raises((ValueError, TypeError)):
            analyze(model, inputs, want=("no_such_statistic",))
        assert model.config._attn_implementation == "sdpa"
        assert [part.training for part in model.modules()] == modes
        assert recorder.get() is None


def test_logits_are_the_same_before_and_after():
    model, inputs = tiny("llama"), text_inputs()
    model.set_attn_implementation("sdpa")
    expected = model(**inputs).logits
    analyze(model, inputs)
    assert torch.equal(model(**inputs).logits, expected)


def test_progress_counts_the_chosen_layers():
    seen = []
    analyze(tiny("bert"), text_inputs(), progress=lambda done, total: seen.append((done, total)))
    analyze(tiny("bert"), text_inputs(), layers=[1], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2), (1, 1)]


def test_json_is_strict_and_holds_the_rows():
    # one real token: no null has a variance, and a number that is not finite must not appear
    report = analyze(tiny("bert"), {"input_ids": torch.tensor([[5]], device=DEVICE)}, tokens=["only"])
    parsed = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert parsed["tokens"] == [["only"]] and parsed["rows"] == report.rows()
    assert parsed["rows"][0]["received"] == [{"index": 0, "token": "only", "mean": 1.0}]


def test_a_model_that_repeats_a_layer_is_refused():
    config = transformers.AlbertConfig(**SMALL, **NO_DROPOUT, embedding_size=16, max_position_embeddings=64)
    with pytest.raises(NotImplementedError, match=r"albert attends in .* more than once a forward pass"):
        analyze(transformers.AlbertModel(config), text_inputs())


def test_capture_returns_what_attention_was_computed_from():
    model, inputs = exact("gemma2"), text_inputs("left")
    matrices = model(**inputs, output_attentions=True).attentions
    calls = capture(model, inputs, layers=[1])
    assert list(calls) == [1]
    real = inputs["attention_mask"].bool()
    ours = softmax_of(calls[1], calls[1].intervals.to_dense(19))
    assert (ours - matrices[1])[real.nonzero(as_tuple=True)[0], :, real.nonzero(as_tuple=True)[1]].abs().max() <= EPS


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"layers": [0, 7]}, ValueError, r"layers must be among \[0, 1\], got \[7\]"),
        ({"layers": []}, ValueError, r"layers must be among \[0, 1\], got \[\]"),
        ({"heads": [4]}, ValueError, r"heads must be different numbers from 0 to 1, got \[4\]"),
        ({"heads": [1, 1]}, ValueError, r"heads must be different numbers from 0 to 1, got \[1, 1\]"),
        ({"heads": []}, ValueError, r"heads must be different numbers from 0 to 1, got \[\]"),
        ({"want": ("nonsense",)}, ValueError, "nonsense"),
        ({"want": "nonsense"}, ValueError, "nonsense"),
        ({"tokens": ["a", "b"]}, ValueError, r"tokens must hold \[2, 19\] strings, got lengths \[2\]"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        analyze(tiny("bert"), text_inputs(), **arguments)


def test_bad_models_and_inputs_are_named():
    with pytest.raises(TypeError, match=r"inputs must map names to tensors, .* got str"):
        analyze(tiny("bert"), "some text")
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        analyze(torch.nn.Linear(2, 2), text_inputs())


@pytest.mark.parametrize("family", ["bert", "gemma2", "gpt_oss"])
def test_layers_measured_at_once_are_those_measured_one_by_one(family, monkeypatch):
    # gemma2's and gpt_oss's layers have two masks, gpt_oss's a sink each
    model, inputs = tiny(family).cpu(), {name: x.cpu() for name, x in text_inputs("right").items()}
    at_once = analyze(model, inputs, want="all")
    monkeypatch.setattr("causalattn.analysis.fits_one_tile", lambda q, k: False)
    one_by_one = analyze(model, inputs, want="all")
    assert at_once.layer_ids == one_by_one.layer_ids
    torch.testing.assert_close(at_once[4:], one_by_one[4:])
    torch.testing.assert_close(tuple(at_once.layers), tuple(one_by_one.layers))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt_oss"])
def test_short_texts_are_measured_as_long_ones(family, monkeypatch):
    model, inputs = exact(family).cpu(), {name: x.cpu() for name, x in text_inputs("left").items()}
    short = analyze(model, inputs)
    monkeypatch.setattr("causalattn.analysis.is_short", lambda q, k: False)
    for ours, tiled in zip(short.rows(), analyze(model, inputs).rows(), strict=True):
        assert [token.pop("mean") for token in ours["received"]] == pytest.approx(
            [token.pop("mean") for token in tiled["received"]], rel=EPS
        )
        for name, value in tiled.items():
            assert ours[name] == (pytest.approx(value, rel=EPS) if isinstance(value, float) else value)
