"""Counterfactual weights and knocked-out edges, against models edited by hand in eager attention."""

import copy

import pytest
import torch
import transformers
from test_experiments import CLOSE, FAMILIES, attention_of, read, run
from tiny_models import exact, other_inputs, text_inputs, tiny

from causalattn.analysis import analyze
from causalattn.experiments import counterfactual, knockout_sweep
from causalattn.experiments.knockout import _spearman
from causalattn.integrations.transformers.attention import watcher


def projections(model, layer):
    attention, _ = attention_of(model, layer)
    return (attention.query, attention.key) if hasattr(attention, "query") else (attention.q_proj, attention.k_proj)


@torch.no_grad()
def outputs_of(model, inputs):
    outputs = model(**inputs)
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def assert_same_stats(ours, expected):
    for name in ("lse", "entropy", "below", "received", "dag_score"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


@FAMILIES
@pytest.mark.parametrize("role", ["query", "key", "both"])
def test_other_weights_are_a_model_edited_by_hand(family, role):
    model, inputs = exact(family), text_inputs("left")
    edited = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    edits = {}
    for name, projection in zip(("query", "key"), projections(edited, 1), strict=True):
        if role not in (name, "both"):
            continue
        out, of = projection.weight.shape
        U, V = (torch.randn(n, 2, generator=generator, dtype=torch.float64) / 2 for n in (out, of))
        edits[name] = (U, V) if name == "query" else projection.weight.detach() + U @ V.mT
        with torch.no_grad():
            projection.weight += U @ V.mT
    found = counterfactual(model, inputs, 1, **edits)
    assert_same_stats(found.before.stats, analyze(model, inputs).layers[1])
    assert_same_stats(found.after.stats, analyze(edited, inputs).layers[1])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.before.outputs[real], outputs_of(model, inputs)[real], **CLOSE)
    torch.testing.assert_close(found.after.outputs[real], outputs_of(edited, inputs)[real], **CLOSE)
    assert (found.after.outputs - found.before.outputs)[real].abs().max() > 1e-3


def test_a_counterfactual_leaves_the_model_alone():
    model, inputs = tiny("llama").train(), text_inputs()
    weight = projections(model, 0)[0].weight
    held, kept = weight, weight.detach().clone()
    found = counterfactual(model, inputs, 0, query=torch.zeros(32, 32), want="entropy")
    assert found.after.stats.lse is None and found.after.stats.entropy is not None
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        counterfactual(model, {"input_ids": None}, 0, query=torch.zeros(32, 32))
    assert projections(model, 0)[0].weight is held and torch.equal(held, kept)
    assert model.training and model.config._attn_implementation == "eager" and watcher.get() is None


def test_layers_of_an_encoder_and_a_decoder():
    model, inputs = tiny("whisper"), other_inputs("whisper", torch.float32)
    found = counterfactual(model, inputs, 3, key=torch.zeros(32, 32), want=("entropy",))
    allowed = torch.arange(1.0, 10).log().expand(2, 2, -1)
    torch.testing.assert_close(found.after.stats.entropy, allowed, rtol=0, atol=1e-5)


def test_bad_counterfactuals_are_named():
    model, inputs, W = tiny("bert"), text_inputs(), torch.zeros(32, 32)
    for layer, arguments, error, text in (
        (0, {}, ValueError, "counterfactual needs an edit of query or key, got neither"),
        (5, {"query": W}, ValueError, r"layers must be among \[0, 1\], got \[5\]"),
        (0, {"query": W[:3]}, ValueError, r"query must have shape \[32, 32\], got \[3, 32\]"),
        (0, {"key": (W, W[:, :3])}, ValueError, r"key must be \(U \[32, r\], V \[32, r\]\), got shapes \[\[32, 32\], "),
        (0, {"key": (W[0], W)}, ValueError, r"key must be \(U \[32, r\], V \[32, r\]\), got shapes \[\[32\], "),
        (0, {"key": 3.0}, TypeError, r"key must be a tensor, or a pair \(U, V\) of tensors, got float"),
        (0, {"key": (W, W, W)}, TypeError, r"key must be a tensor, or a pair \(U, V\) of tensors, got tuple"),
        (0, {"key": W, "want": "nonsense"}, ValueError, "nonsense"),
    ):
        with pytest.raises(error, match=text):
            counterfactual(model, inputs, layer, **arguments)
    with pytest.raises(TypeError, match="inputs must map names to tensors, as a tokenizer returns them, got list"):
        counterfactual(model, [1], 0, query=W)


@pytest.mark.parametrize("family, module", [("gpt2", "GPT2Attention"), ("gpt_neox", "GPTNeoXAttention")])
def test_a_fused_projection_is_refused(family, module):
    with pytest.raises(NotImplementedError, match=f"{family} is not supported: {module} has no separate weights"):
        counterfactual(tiny(family), text_inputs(), 0, query=torch.zeros(32, 32))


def edit_scores(monkeypatch, model, layer, edit):
    """The model attends in eager float64, one layer's scores [B, H, T, S] as edit leaves them; without a key, 0."""
    wanted = attention_of(model, layer)[0]

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask < 0, -torch.inf)
        probs = (edit(scores) if module is wanted else scores).softmax(-1).nan_to_num(0)
        return (probs @ value).transpose(1, 2).contiguous(), probs

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "dense_float64", attend)


@FAMILIES
@pytest.mark.parametrize("kind, strength", [("cut", None), ("soft", 1.5), ("hard", None)])
def test_verified_effects_are_those_of_edited_scores(family, kind, strength, monkeypatch):
    model, inputs = exact(family), text_inputs("left")
    found = knockout_sweep(model, inputs, read, top=6, kind=kind, strength=strength)
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    baseline = run(model, inputs)
    torch.testing.assert_close(found.baseline, baseline, **CLOSE)
    for (b, layer, head, row, col), verified in zip(found.edges.tolist(), found.verified.tolist(), strict=True):

        def edit(scores, b=b, head=head, row=row + padding[b], col=col + padding[b]):
            scores = scores.clone()
            if kind == "hard":
                kept = scores[b, head, row, col].clone()
                scores[b, head, row] = -torch.inf
                scores[b, head, row, col] = kept
            else:
                scores[b, head, row, col] += -torch.inf if strength is None else strength
            return scores

        edit_scores(monkeypatch, model, layer, edit)
        assert verified == pytest.approx(float((run(model, inputs) - baseline)[b]), rel=1e-8, abs=1e-10)


@FAMILIES
def test_the_screening_is_first_order(family):
    # a soft do so weak that the readout is linear in it; Llama's norms are float32, so not weaker than that
    found = knockout_sweep(exact(family), text_inputs("right"), read, top=20, kind="soft", strength=1e-3)
    torch.testing.assert_close(found.screened, found.verified, rtol=2e-2, atol=1e-9)
    assert found.agreement > 0.999 and found.size_agreement > 0.98
    sizes = found.screened.abs()
    assert len(found.edges) == 20 == len(found.edges.unique(dim=0)) and (sizes.diff() <= 0).all()


def test_the_last_layer_is_exact_where_the_readout_is_linear():
    model, inputs = exact("llama"), text_inputs()
    # read straight from the output projection, with no norm and no MLP between, first order is all there is
    seen = {}
    hook = attention_of(model, 1)[1].register_forward_hook(lambda module, arguments, out: seen.update(out=out))
    found = knockout_sweep(model, inputs, lambda _: seen["out"][:, 7] @ torch.ones(32).double(), top=30, layers=[1])
    hook.remove()
    torch.testing.assert_close(found.screened, found.verified, rtol=1e-9, atol=1e-11)
    assert found.agreement == pytest.approx(1) and (found.edges[:, 3] == 7).all() and (found.edges[:, 1] == 1).all()


def test_a_readout_of_all_sequences_and_frozen_parameters():
    model, inputs, seen = exact("bert").requires_grad_(False), text_inputs(), []
    one = knockout_sweep(model, inputs, read, top=5)
    whole = knockout_sweep(
        model, inputs, lambda outputs: read(outputs).sum(), top=5, progress=lambda *x: seen.append(x)
    )
    assert torch.equal(one.edges, whole.edges) and seen == [(n, 5) for n in range(1, 6)]
    torch.testing.assert_close(one.screened, whole.screened, **CLOSE)
    torch.testing.assert_close(one.verified, whole.verified, **CLOSE)
    assert not any(p.requires_grad for p in model.parameters()) and whole.baseline.shape == ()


def test_a_model_of_few_edges():
    inputs = {"input_ids": torch.tensor([[5, 6]])}
    found = knockout_sweep(exact("llama"), inputs, lambda outputs: outputs.logits[:, 1, 0], top=100)
    # two layers of four heads with three edges each
    assert len(found.edges) == 24


def test_rank_correlation():
    x = torch.tensor([1.0, 2, 3, 4, 5])
    assert _spearman(x, x.exp()) == pytest.approx(1) and _spearman(x, -x) == pytest.approx(-1)
    # ties share their mean rank: ranks 0.5 0.5 2 3 4 against 0 1 2 3 4
    assert _spearman(torch.tensor([1.0, 1, 3, 4, 5]), x) == pytest.approx(9.5 / (9.5 * 10) ** 0.5)
    assert _spearman(x, torch.ones(5)) != _spearman(x, torch.ones(5))


def test_bad_sweeps_are_named():
    model, inputs = tiny("bert"), text_inputs()
    for arguments, error, text in (
        ({"top": 0}, ValueError, "top must be at least 1, got 0"),
        ({"kind": "value"}, ValueError, "kind must be 'cut', 'soft' or 'hard', got 'value'"),
        ({"kind": "soft"}, ValueError, "strength must be a finite number with kind='soft', got None"),
        ({"layers": [4]}, ValueError, r"layers must be among \[0, 1\], got \[4\]"),
    ):
        with pytest.raises(error, match=text):
            knockout_sweep(model, inputs, read, **arguments)
    with pytest.raises(ValueError, match="readout must be a differentiable function of the model's outputs"):
        knockout_sweep(model, inputs, lambda outputs: read(outputs).detach())
