"""Rollout against products of matrices; derivatives of a readout against autograd and edits by hand."""

import copy

import pytest
import torch
from test_experiments import CLOSE, FAMILIES, read, run
from tiny_models import NO_DROPOUT, SMALL, exact, other_inputs, text_inputs, tiny
from transformers import BertConfig, BertModel

from causalattn.analysis import capture
from causalattn.attention import attention
from causalattn.experiments import influence, rollout, token_influence

# of gradients: Llama's norms and rotary positions are float32 even in a float64 model
ROUNDING = {"bert": 1e-8, "llama": 1e-5}
CASES = ["bert-none", "llama-left", "gpt_oss-right"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Captured calls of float64, the product of ½(A + I) over the layers, and which tokens are real."""
    family, padding = request.param.split("-")
    inputs = text_inputs(padding)
    calls = capture(exact(family), inputs)
    product = torch.eye(19, dtype=torch.float64)
    for call in calls.values():
        A = attention(call.q, call.k, call.v, **call.options(), return_probs=True).probs.mean(1)
        product = (A + torch.eye(19, dtype=torch.float64)) / 2 @ product
    return calls, product, inputs["attention_mask"].bool()


def test_a_rollout_is_a_row_of_the_product(case):
    calls, product, real = case
    for position in (9, -8):
        torch.testing.assert_close(rollout(calls, position), product[:, position], rtol=0, atol=1e-12)
    last = real.int().argmax(-1) + real.sum(-1) - 1
    torch.testing.assert_close(rollout(calls, last), product[torch.arange(2), last], rtol=0, atol=1e-12)
    torch.testing.assert_close(token_influence(calls, rows=[7, -9]), product[:, [7, -9]].mean(1), rtol=0, atol=1e-12)
    every = torch.stack([rows[kept].mean(0) for rows, kept in zip(product, real, strict=True)])
    torch.testing.assert_close(token_influence(calls), every, rtol=0, atol=1e-12)


def test_a_rollout_through_some_layers():
    calls = capture(exact("llama"), text_inputs())
    torch.testing.assert_close(rollout(calls, 5, layers=[1]), rollout({1: calls[1]}, 5), **CLOSE)
    assert rollout(calls, 5)[:, 6:].abs().max() == 0
    torch.testing.assert_close(rollout(calls, 5).sum(-1), torch.ones(2, dtype=torch.float64), **CLOSE)


def test_a_rollout_of_half_precision_is_summed_in_float32():
    calls = capture(tiny("gpt_oss", torch.bfloat16), text_inputs())
    wide = {
        layer: call._replace(**{name: getattr(call, name).double() for name in ("q", "k", "v", "sink")})
        for layer, call in calls.items()
    }
    assert rollout(calls, 5).dtype == torch.float32
    torch.testing.assert_close(rollout(calls, 5).double(), rollout(wide, 5), rtol=1e-5, atol=1e-6)


def test_bad_rollouts_are_named():
    calls = capture(tiny("bert"), text_inputs("right"))
    with pytest.raises(ValueError, match="position must be from -19 to 18, got 19"):
        rollout(calls, 19)
    with pytest.raises(ValueError, match=r"position must be one number, or 2, one a sequence, got 0\.5"):
        rollout(calls, 0.5)
    with pytest.raises(ValueError, match="position -1 is padding in sequence 1"):
        rollout(calls, -1)
    with pytest.raises(ValueError, match=r"layers must be among \[0, 1\], got \[3\]"):
        rollout(calls, 0, layers=[3])
    with pytest.raises(ValueError, match=r"rows must be numbers from -19 to 18, got \[\]"):
        token_influence(calls, rows=[])
    with pytest.raises(TypeError, match=r"calls must be what capture returns, .* got Tensor"):
        rollout(calls[0].q, 0)
    calls = capture(tiny("whisper"), other_inputs("whisper", torch.float32))
    with pytest.raises(ValueError, match="the same tokens as queries and keys in every layer, got T = 9, S = 9"):
        rollout(calls, 0)


@FAMILIES
@pytest.mark.parametrize("direction", ["own", "random"])
def test_what_each_token_is_worth(family, direction):
    model, inputs = exact(family), text_inputs("right", 11, 3)
    x = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {"inputs_embeds": x, "attention_mask": inputs["attention_mask"]}
    (slope,) = torch.autograd.grad(read(model(**rest)).sum(), x)
    u = x
    if direction == "random":
        u = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        u = torch.nn.functional.normalize(u, dim=-1)
    found = influence(model, inputs, read, direction=direction, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.derivative, (slope * u).sum(-1).detach(), **CLOSE)
    torch.testing.assert_close(found.norm, slope.norm(dim=-1), **CLOSE)
    assert found.names is None and found.derivative.shape == (2, 11)
    assert found.disagreement < ROUNDING[family] and found.difference.abs().max() > 1e-3
    # padding is read by nobody
    assert found.difference[1, 8:].abs().max() == 0


def test_a_readout_of_all_sequences_has_the_same_derivatives():
    model, inputs = tiny("llama"), text_inputs(T=9)
    one, whole = (influence(model, inputs, readout) for readout in (read, lambda outputs: read(outputs).sum()))
    for name in ("norm", "derivative", "difference"):
        torch.testing.assert_close(getattr(one, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
    assert 0 < one.disagreement < 1e-4 and 0 < whole.disagreement < 1e-4


@FAMILIES
def test_what_each_parameter_is_worth(family):
    model, inputs = exact(family), text_inputs()
    found = influence(model, inputs, read, of="parameters")
    parameters = dict(model.named_parameters())
    slopes = torch.autograd.grad(read(model(**inputs)).sum(), list(parameters.values()), allow_unused=True)
    slopes = [torch.zeros_like(p) if s is None else s for p, s in zip(parameters.values(), slopes, strict=True)]
    assert found.names == list(parameters)
    norms = torch.stack([s.norm() for s in slopes])
    worth = torch.stack([(s * p).sum() for s, p in zip(slopes, parameters.values(), strict=True)])
    torch.testing.assert_close(found.norm, norms.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.derivative, worth.detach(), rtol=1e-9, atol=1e-9)
    assert found.disagreement < ROUNDING[family]
    assert all(p.grad is None for p in parameters.values())


def test_a_random_direction_of_frozen_parameters():
    model, inputs, seen = tiny("bert").requires_grad_(False), text_inputs(), []
    arguments = {"of": "parameters", "direction": "random", "progress": lambda *x: seen.append(x)}
    found = influence(model, inputs, read, **arguments)
    count = len(found.names)
    assert found.disagreement < 1e-4 and seen == [(n, count) for n in range(1, count + 1)]
    assert (found.derivative.abs() <= found.norm * (1 + 1e-9)).all() and not any(
        p.requires_grad for p in model.parameters()
    )


def test_a_wrong_gradient_is_seen():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return 2 * slope

    found = influence(exact("bert"), text_inputs(T=9), lambda outputs: Doubled.apply(read(outputs)))
    assert found.disagreement == pytest.approx(1, abs=1e-6)


def test_differences_of_half_precision_are_of_its_own_weights():
    probe = torch.linspace(-1, 1, 32)
    model, inputs = tiny("llama", torch.bfloat16), text_inputs(T=9)
    half, wide = (
        influence(m, inputs, lambda outputs: outputs.logits[:, 7, :32].to(probe.dtype) @ probe, method="difference")
        for m in (model, copy.deepcopy(model).double())
    )
    # the readout's own float32 is widened too
    torch.testing.assert_close(half.difference, wide.difference, rtol=1e-6, atol=1e-7)


def test_one_method_alone_leaves_the_other_out():
    model, inputs = tiny("bert"), text_inputs(T=9)
    before = run(model, inputs)
    slope = influence(model, inputs, read, method="gradient")
    steps = influence(model, inputs, read, method="difference")
    assert slope.difference is slope.disagreement is steps.norm is steps.derivative is steps.disagreement is None
    torch.testing.assert_close(slope.derivative, steps.difference, rtol=1e-3, atol=1e-4)
    assert torch.equal(run(model, inputs), before) and model.dtype == torch.float32


class Twice(BertModel):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(super().forward(input_ids, attention_mask).last_hidden_state[..., 0].long().abs() % 9)


def test_bad_influences_are_named():
    model, inputs = tiny("bert"), text_inputs()
    for arguments, text in (
        ({"of": "heads"}, "of must be among tokens, parameters, got 'heads'"),
        ({"method": "exact"}, "method must be among both, gradient, difference, got 'exact'"),
        ({"direction": "up"}, "direction must be among own, random, got 'up'"),
    ):
        with pytest.raises(ValueError, match=text):
            influence(model, inputs, read, **arguments)
    for of in ("tokens", "parameters"):
        with pytest.raises(ValueError, match="readout must be a differentiable function of the model's outputs"):
            influence(model, inputs, lambda outputs: read(outputs).detach(), of=of)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    with pytest.raises(ValueError, match=r"what the model's input embedding takes, got \['inputs_embeds'\]"):
        influence(model, embedded, read)
    with pytest.raises(NotImplementedError, match="bert embeds its input 2 times a forward pass"):
        influence(Twice(BertConfig(**SMALL, **NO_DROPOUT, max_position_embeddings=64)), inputs, read)
