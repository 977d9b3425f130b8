"""Experiments on an encoder and a decoder, whose layers share numbers of their own, against models edited by hand."""

import pytest
import torch
import transformers
from test_experiments import CLOSE
from tiny_models import exact, other_inputs

from causalattn.experiments import ablate, knockout_sweep, patch, patch_edges
from causalattn.integrations.transformers.families import self_attention

# whisper: encoder layers 0 and 1 with 21 positions, decoder layers 2 and 3 with 9; two heads of 16
T = {0: 21, 1: 21, 2: 9, 3: 9}


def read(outputs):
    x = outputs["last_hidden_state"]
    return x[:, 7] @ torch.linspace(-1, 1, x.shape[2], dtype=x.dtype, device=x.device)


def whisper():
    model = exact("whisper")
    return model, {layer: model.get_submodule(name) for layer, name in self_attention(model).items()}


def inputs_of():
    return other_inputs("whisper", torch.float64)


@torch.no_grad()
def run(model, inputs, module=None, edit=None):
    """The readout, with edit(x) in place of the heads x [B, T, H, V] that reach a module's output projection."""

    def hook(projection, arguments):
        x = arguments[0].unflatten(-1, (2, 16)).clone()
        edit(x)
        return x.flatten(-2)

    handle = module and module.out_proj.register_forward_pre_hook(hook)
    try:
        return read(model(**inputs)).cpu()
    finally:
        if handle:
            handle.remove()


def test_each_head_of_both_halves_is_switched_off():
    (model, modules), inputs = whisper(), inputs_of()
    found, baseline = ablate(model, inputs, read), run(model, inputs)
    assert found.layers == [0, 1, 2, 3] and found.effect.shape == (4, 2, 2)
    for layer, module in modules.items():
        for head in (0, 1):
            changed = run(model, inputs, module, lambda x, head=head: x[:, :, head].zero_())
            torch.testing.assert_close(found.effect[layer, head], changed - baseline, **CLOSE)
    assert found.effect.abs().min() > 1e-6


def test_each_position_of_both_halves_is_patched():
    (model, modules), clean = whisper(), inputs_of()
    corrupt = {
        "input_features": clean["input_features"].flip(-1),
        "decoder_input_ids": clean["decoder_input_ids"].flip(-1),
    }
    positions = [0, 7, 15, -1, -12]
    found = patch(model, clean, corrupt, read, over="position", positions=positions)
    for layer, module in modules.items():
        heads = {}
        run(model, clean, module, lambda x, heads=heads: heads.update(x=x.clone()))
        for n, position in enumerate(positions):
            if not -T[layer] <= position < T[layer]:
                assert found.patched[layer, n].isnan().all()
                continue

            def edit(x, heads=heads, position=position):
                x[:, position] = heads["x"][:, position]

            torch.testing.assert_close(found.patched[layer, n], run(model, corrupt, module, edit), **CLOSE)
    assert found.patched.isnan().sum() == 2 * 2 * 2


def test_edges_that_the_decoder_lacks_are_not_patched():
    (model, _), clean = whisper(), inputs_of()
    corrupt = clean | {"input_features": clean["input_features"].flip(-1)}
    found = patch_edges(model, clean, corrupt, read, [(5, 2), (20, 3)], layers=[1, 2])
    assert found.patched.shape == (2, 2, 2, 2)
    assert torch.equal(found.patched[..., 0].isnan().any(1), torch.tensor([[False, False], [False, True]]))
    only = patch_edges(model, clean, corrupt, read, [(5, 2)], layers=[2])
    assert torch.equal(only.patched[0, :, 0], found.patched[1, :, 0])


@pytest.mark.parametrize("layers", [[0], [1, 2], None])
def test_edges_of_both_halves_are_verified(layers, monkeypatch):
    (model, modules), inputs = whisper(), inputs_of()
    found = knockout_sweep(model, inputs, read, top=12, layers=layers)
    assert set(found.edges[:, 1].tolist()) <= set(layers or range(4))
    baseline = run(model, inputs)
    for (b, layer, head, row, col), verified in zip(found.edges.tolist(), found.verified, strict=True):
        where = (b, head, row, col)

        def attend(module, query, key, value, attention_mask, scaling=None, where=where, at=modules[layer], **_):
            scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask < 0, -torch.inf)
            if module is at:
                scores[where] = -torch.inf
            probs = scores.softmax(-1).nan_to_num(0)
            return (probs @ value).transpose(1, 2).contiguous(), probs

        monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "dense_float64", attend)
        torch.testing.assert_close(verified, (run(model, inputs) - baseline)[b], **CLOSE)
        monkeypatch.undo()
