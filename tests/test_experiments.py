"""Ablation and patching of tiny models, against the same models edited by hand in eager attention."""

import pytest
import torch
import transformers
from tiny_models import NO_DROPOUT, SMALL, exact, text_inputs, tiny

from causalattn.experiments import ablate, patch, patch_edges
from causalattn.integrations.transformers.attention import watcher

FAMILIES = pytest.mark.parametrize("family", ["bert", "llama"])
# two exact runs in float64
CLOSE = {"rtol": 0, "atol": 1e-11}


def attention_of(model, layer):
    """The layer's attention module and its output projection, which sees the heads side by side."""
    if model.config.model_type == "bert":
        attention = model.encoder.layer[layer].attention
        return attention.self, attention.output.dense
    attention = model.model.layers[layer].self_attn
    return attention, attention.o_proj


def read(outputs):
    """One number a sequence: some direction of the first token's last state, or of its logits."""
    x = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return x[:, 7] @ torch.linspace(-1, 1, x.shape[2], dtype=x.dtype, device=x.device)


@torch.no_grad()
def run(model, inputs):
    return read(model(**inputs)).cpu()


def heads_of(model, layer):
    return model.config.num_attention_heads, attention_of(model, layer)[
        1
    ].in_features // model.config.num_attention_heads


class Heads:
    """While in force, edit(x) in place of the heads x [B, T, H, V] that reach a layer's output projection."""

    def __init__(self, model, layer, edit):
        H, V = heads_of(model, layer)

        def hook(module, arguments):
            x = arguments[0].unflatten(-1, (H, V)).clone()
            edited = edit(x)
            return (x if edited is None else edited).flatten(-2)

        self.handle = attention_of(model, layer)[1].register_forward_pre_hook(hook)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@FAMILIES
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_head_off_is_its_columns_of_the_projection_at_zero(family, padding):
    model, inputs = exact(family), text_inputs(padding)
    found = ablate(model, inputs, read)
    expected = torch.zeros_like(found.effect)
    baseline = run(model, inputs)
    for layer in (0, 1):
        projection = attention_of(model, layer)[1].weight
        H, V = heads_of(model, layer)
        for head in range(H):
            kept = projection.detach().clone()
            with torch.no_grad():
                projection[:, head * V : (head + 1) * V] = 0
            expected[layer, head] = run(model, inputs) - baseline
            with torch.no_grad():
                projection.copy_(kept)
    assert found.layers == [0, 1] and found.effect.shape == (2, H, 2)
    torch.testing.assert_close(found.baseline, baseline, **CLOSE)
    torch.testing.assert_close(found.effect, expected, **CLOSE)
    assert found.effect.abs().min() > 1e-6


@FAMILIES
@pytest.mark.parametrize("value", ["zero", "mean"])
def test_a_layer_off(family, value):
    model, inputs = exact(family), text_inputs()
    found = ablate(model, inputs, read, unit="layer", value=value, layers=[1])
    baseline = run(model, inputs)
    with Heads(model, 1, lambda x: (x.mean(1, keepdim=True) if value == "mean" else 0 * x).expand_as(x)):
        expected = run(model, inputs) - baseline
    assert found.layers == [1]
    torch.testing.assert_close(found.effect, expected[None], **CLOSE)


def test_a_readout_of_all_sequences_and_progress():
    model, inputs, seen = exact("bert"), text_inputs(), []
    whole = ablate(model, inputs, lambda outputs: read(outputs).sum(), progress=lambda *x: seen.append(x))
    torch.testing.assert_close(whole.effect, ablate(model, inputs, read).effect.sum(-1), **CLOSE)
    assert whole.baseline.shape == () and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_head_that_a_layer_lacks_has_no_effect():
    model = exact("bert")
    model.encoder.layer[1].attention.self.attention_head_size = 8
    effect = ablate(model, text_inputs(), read).effect
    assert effect.shape == (2, 4, 2) and torch.equal(
        effect.isnan()[..., 0], torch.tensor([[0, 0, 1, 1], [0] * 4]).bool()
    )


def test_a_head_that_a_layer_lacks_is_not_patched():
    model = exact("bert")
    model.encoder.layer[1].attention.self.attention_head_size = 8
    found = patch(model, text_inputs(), corrupted(text_inputs()), read, heads=[3, 0])
    assert found.heads == [3, 0]
    assert torch.equal(found.recovery.isnan()[..., 0], torch.tensor([[True, False], [False, False]]))


def corrupted(inputs):
    ids = inputs["input_ids"].clone()
    ids[:, 2] = (ids[:, 2] + 7) % 50 + 3
    return inputs | {"input_ids": ids}


def clean_heads(model, inputs):
    """{layer: [B, T, H, V]} of an eager run."""
    found = {}
    with Heads(model, 0, lambda x: found.update({0: x})), Heads(model, 1, lambda x: found.update({1: x})):
        run(model, inputs)
    return found


@FAMILIES
@pytest.mark.parametrize("over", ["layer", "head", "position", "head_position"])
def test_a_patch_is_a_hook_that_copies(family, over):
    model, clean = exact(family), text_inputs("right")
    corrupt = corrupted(clean)
    positions = [0, 2, 7, -1] if "position" in over else None
    found = patch(model, clean, corrupt, read, over=over, positions=positions, layers=[1, 0])
    heads, real = clean_heads(model, clean), clean["attention_mask"].sum(1).tolist()
    M, M_corrupt = run(model, clean), run(model, corrupt)

    def patched(layer, head, position):
        def edit(x):
            for b, count in enumerate(real):
                rows = slice(None) if position is None else position % count
                x[b, rows, head] = heads[layer][b, rows, head]

        with Heads(model, layer, edit):
            return run(model, corrupt)

    H = heads_of(model, 0)[0]
    chosen = range(H) if "head" in over else [slice(None)]
    expected = torch.stack(
        [
            torch.stack([torch.stack([patched(layer, h, p) for p in positions or [None]]) for h in chosen])
            for layer in (0, 1)
        ]
    )
    assert found.layers == [0, 1] and found.positions == positions
    assert found.heads == (list(chosen) if "head" in over else None)
    torch.testing.assert_close(found.clean, M, **CLOSE)
    torch.testing.assert_close(found.corrupt, M_corrupt, **CLOSE)
    torch.testing.assert_close(found.patched, expected.view_as(found.patched), **CLOSE)
    torch.testing.assert_close(found.recovery, (found.patched - M_corrupt) / (M - M_corrupt), rtol=1e-9, atol=1e-9)


@FAMILIES
def test_a_patched_edge_is_a_map_edited_by_hand(family, monkeypatch):
    model, clean = exact(family), text_inputs("left")
    ids, edges = clean["input_ids"].clone(), [(7, 2), (1, 1), (14, 2)]
    ids[:, 6] = (ids[:, 6] + 7) % 50 + 3
    corrupt = clean | {"input_ids": ids}
    found = patch_edges(model, clean, corrupt, read, edges, layers=[1, 0], heads=[1])
    maps = model(**clean, output_attentions=True).attentions
    assert found.layers == [0, 1] and found.heads == [1] and found.edges == edges
    dense = transformers.AttentionInterface._global_mapping["dense_float64"]
    # the second sequence begins at 6, and has no row 14
    for layer in (0, 1):
        for n, (row, col) in enumerate(edges):

            def attend(module, query, key, value, *rest, layer=layer, row=row, col=col, **options):
                _, A = dense(module, query, key, value, *rest, **options)
                for b, first in ((0, 0), (1, 6)):
                    i, j = row + first, col + first
                    if module is attention_of(model, layer)[0] and i < 19:
                        c, p = maps[layer][b, 1, i, j], A[b, 1, i, j].clone()
                        A[b, 1, i] *= (1 - c) / (1 - p)
                        A[b, 1, i, j] = c
                value = value.repeat_interleave(A.shape[1] // value.shape[1], 1)
                return (A @ value).transpose(1, 2).contiguous(), A

            monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "dense_float64", attend)
            torch.testing.assert_close(found.patched[layer, 0, n], run(model, corrupt), **CLOSE)
            monkeypatch.undo()
    recovery = (found.patched - found.corrupt) / (found.clean - found.corrupt)
    assert torch.equal(found.recovery, recovery) and found.recovery[0, 0, 0, 0].abs() > 1e-6


def test_edges_that_cannot_be_patched_are_named():
    model, clean = tiny("llama"), text_inputs()
    for edges, error, says in (
        ([], ValueError, r"edges must hold at least one \(row, col\), got none"),
        ([(3, -1)], ValueError, r"edges must count from 0, got \(3, -1\)"),
        ([(3, 1), (19, 2)], ValueError, r"edges must lie among the tokens, got \[\(19, 2\)\]"),
        ([(3, 1.5)], TypeError, r"edges must hold \(row, col\) pairs of numbers, got \(3, 1.5\)"),
        ([(3, 5)], ValueError, r"patch_edges\(\(3, 5\), heads=0, layers=0\) matched nothing: .*the mask forbids"),
    ):
        with pytest.raises(error, match=says):
            patch_edges(model, clean, corrupted(clean), read, edges)


def test_a_patch_reaches_what_a_causal_model_lets_it_reach():
    model, clean = exact("llama"), text_inputs()
    ids = clean["input_ids"].clone()
    ids[:, 2] = 5
    corrupt = clean | {"input_ids": ids}
    found = patch(model, clean, corrupt, read, over="position", layers=[0])
    assert found.positions == list(range(19)) and found.recovery.shape == (1, 19, 2)
    # causal: what comes after the token that is read changes nothing, what comes before the change neither
    for nothing in (found.recovery[:, 8:], found.recovery[:, :2]):
        torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-9)
    assert found.recovery[0, 2:8].abs().min() > 1e-6


def test_the_model_is_left_as_it_was():
    model, inputs = tiny("llama").train(), text_inputs()
    model.set_attn_implementation("sdpa")
    ablate(model, inputs, read, unit="layer")
    patch(model, inputs, corrupted(inputs), read, over="layer")
    for readout in (read, lambda outputs: outputs.nothing):
        with pytest.raises((ValueError, AttributeError)):
            ablate(model, inputs, readout, value="nothing")
        assert model.config._attn_implementation == "sdpa" and model.training and watcher.get() is None


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"unit": "edge"}, "unit must be 'head' or 'layer', got 'edge'"),
        ({"value": "noise"}, "value must be 'zero' or 'mean', got 'noise'"),
        ({"layers": [2]}, r"layers must be among \[0, 1\], got \[2\]"),
        ({"layers": []}, r"layers must be among \[0, 1\], got \[\]"),
        ({"readout": lambda outputs: outputs[0]}, r"or 2, one a sequence, got torch.float32 of shape \[2, 19, 32\]"),
        ({"readout": lambda outputs: torch.tensor([1, 2])}, r"one real number, .* got torch.int64 of shape \[2\]"),
    ],
)
def test_bad_arguments_of_ablate_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        ablate(tiny("bert"), text_inputs(), **{"readout": read} | arguments)


def test_bad_models_inputs_and_readouts_are_named():
    with pytest.raises(TypeError, match="inputs must map names to tensors, as a tokenizer returns them, got Tensor"):
        ablate(tiny("bert"), torch.tensor([[5]]), read)
    with pytest.raises(TypeError, match="readout must be a function of the model's outputs, got int"):
        ablate(tiny("bert"), text_inputs(), 3)
    with pytest.raises(TypeError, match="readout must return a tensor, got float"):
        ablate(tiny("bert"), text_inputs(), lambda outputs: 1.0)
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        ablate(torch.nn.Linear(2, 2), text_inputs(), read)
    config = transformers.AlbertConfig(**SMALL, **NO_DROPOUT, embedding_size=16, max_position_embeddings=64)
    with pytest.raises(NotImplementedError, match=r"albert attends in .* more than once a forward pass"):
        ablate(transformers.AlbertModel(config), text_inputs(), read)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"over": "edge"}, "over must be among layer, head, position, head_position, got 'edge'"),
        ({"heads": [2]}, r"heads must be numbers from 0 to 1, got \[2\]"),
        ({"heads": []}, r"heads must be numbers from 0 to 1, got \[\]"),
        ({"positions": [19]}, r"positions must be numbers from -19 to 18, got \[19\]"),
    ],
)
def test_bad_arguments_of_patch_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        patch(tiny("bert"), text_inputs(), corrupted(text_inputs()), read, **arguments)


def test_inputs_that_cannot_be_patched_are_named():
    model, clean = tiny("bert"), text_inputs()
    with pytest.raises(ValueError, match=r"as many sequences and tokens, got \[2, 19\] and \[2, 17\]"):
        patch(model, clean, {name: x[:, :17] for name, x in clean.items()}, read)
    with pytest.raises(ValueError, match="clean and corrupt must have their padding in the same places"):
        patch(model, text_inputs("left"), corrupted(text_inputs("right")), read)
    with pytest.raises(ValueError, match="recovery is undefined where the clean and corrupt readouts are equal"):
        patch(model, clean, dict(clean), read)
