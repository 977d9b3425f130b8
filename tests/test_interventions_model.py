"""Plans in force in transformers models: equal to eager attention with its score matrix edited by hand."""

import re
import threading

import pytest
import torch
import transformers
from tiny_models import TEXT, exact, full, other_inputs, text_inputs, tiny

import causalattn as ca
from causalattn import Do
from causalattn.integrations.transformers import use

EPS = torch.finfo(torch.float32).eps
# reachable through a window of 5, and in a sequence of 13 real tokens
PLAN = (
    Do.cut(8, 6)
    + Do.soft(None, 3, 1.5, heads=1, layers=1)
    + Do.hard(9, 7, layers=0, batch=1)
    + Do.soft(-1, -2, -1.0)
    + Do.head_off(0, layers=1, batch=0)
)


def by_hand(real, window=None):
    """PLAN as an attention function of full score matrices; real [B, T] says which tokens count."""
    order = {}

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        layer = order.setdefault(module, len(order))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            scores = scores + attention_mask
        for b in range(len(real)):
            at = real[b].nonzero()[:, 0].tolist()
            scores[b, :, at[8], at[6]] = -torch.inf
            scores[b, :, at[-1], at[-2]] -= 1
            if layer == 1:
                scores[b, 1, :, at[3]] += 1.5
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        probs = scores.softmax(-1)[..., : key.shape[2]]
        at = real[1].nonzero()[:, 0].tolist()
        if layer == 0:
            probs[1, :, at[9]] = torch.nn.functional.one_hot(torch.tensor(at[7]), key.shape[2]).to(probs)
        out = probs @ value
        if layer == 1:
            out[0, 0] = 0
        return out.transpose(1, 2).contiguous(), probs

    return attend


@pytest.mark.parametrize("padding", ["left", *full("none", "right")])
@pytest.mark.parametrize("family", TEXT)
@torch.no_grad()
def test_every_family_is_eager_edited_by_hand(family, padding):
    inputs = text_inputs(padding)
    real = inputs["attention_mask"].bool()
    transformers.AttentionInterface.register("by_hand", by_hand(real.cpu()))
    transformers.AttentionMaskInterface.register("by_hand", transformers.masking_utils.eager_mask)
    model = exact(family)
    plain = model(**inputs)[0][real]
    model.set_attn_implementation("by_hand")
    expected = model(**inputs)[0][real]
    with ca.do(PLAN) as receipt:
        result = use(model)(**inputs)[0][real]
    assert (result - expected).abs().max() <= EPS * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-3 and receipt.edges > 0 and receipt.emptied == 0


@pytest.mark.parametrize(("family", "layers"), [("vit", 2), ("whisper", 4)])
@torch.no_grad()
def test_models_without_a_text_mask(family, layers):
    model, inputs = use(tiny(family)), other_inputs(family, torch.float32)
    with ca.do(Do.cut(5, 2) + Do.soft(-1, 0, 3.0)) as receipt:
        changed = model(**inputs)[0]
    # two sequences and heads; whisper's encoder and decoder, and not what attends across
    assert receipt.items == [2 * 2 * layers] * 2 and list(receipt.layers) == list(range(layers))
    assert not torch.equal(changed, model(**inputs)[0])


@pytest.mark.parametrize("cache", ["dynamic", *full("static")])
@torch.no_grad()
def test_generate_is_the_same_as_without_a_cache(cache):
    inputs = text_inputs("left", T=9, padded=3)
    model = use(tiny("llama", torch.float64))
    plan = Do.cut(None, 2) + Do.soft(7, 4, 2.0) + Do.hard(10, 5, batch=0) + Do.cut(-1, 0, layers=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with ca.do(plan) as receipt:
        tokens = model.generate(**inputs, **options, cache_implementation=cache)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    # without a cache the prompt's end has to be named
    again = Do.cut(None, 2) + Do.soft(7, 4, 2.0) + Do.hard(10, 5, batch=0)
    again += Do.cut(8, 0, layers=1, batch=0) + Do.cut(5, 0, layers=1, batch=1)
    for _ in range(6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ca.Receipt, "items", [1] * 5)
            with ca.do(again):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(tokens, ids)
    # rows 2 to 13 and 2 to 10 of column 2; row 7 once in each; row 10 of the first; the last row of each prompt
    assert receipt.items == [2 * 4 * (12 + 9), 2 * 4 * 2, 2 * 4, 4 * 2]


@torch.no_grad()
def test_the_receipt_is_what_the_matrices_say():
    inputs = text_inputs("left")
    model = exact("bert")
    matrices = model(**inputs, output_attentions=True).attentions
    plan = Do.cut(8, 6, layers=0) + Do.soft(3, [1, 2], 2.0, layers=0)
    with ca.do(plan) as receipt:
        use(model)(**inputs)
    mass = kl = 0.0
    for b, first in ((0, 0), (1, 6)):
        for row, keys, strength in ((8, [6], -torch.inf), (3, [1, 2], 2.0)):
            old = matrices[0][b, :, first + row]
            new = old.log()
            new[:, [first + key for key in keys]] += strength
            new = new.softmax(-1)
            mass += (old - new).clamp(min=0).sum().item()
            kl += torch.special.xlogy(new, new / old).nansum().item()
    assert receipt.items == [4, 8] and receipt.edges == 12 and receipt.emptied == 0
    assert receipt.mass == pytest.approx(mass, rel=1e-6) and receipt.kl == pytest.approx(kl, rel=1e-6)
    assert list(receipt.layers) == [0] and receipt.layers[0].mass == receipt.mass
    with ca.do(Do.cut(2, layers=1)) as receipt:
        model(**inputs)
    assert receipt.emptied == 4 and receipt.kl == 0 and receipt.mass == pytest.approx(4)


def test_layers_and_heads_of_the_context_keep_to_items_that_choose_none():
    inputs = text_inputs()
    model = use(tiny("gpt2"))
    with ca.do(Do.cut(5, 2) + Do.cut(6, 2, layers=0, heads=0), layers=1, heads=1) as receipt:
        model(**inputs)
    assert receipt.items == [2, 2] and sorted(receipt.layers) == [0, 1]


def test_gradients_go_through_a_plan():
    # a norm in float32, as llama's, would spoil the difference
    model, inputs = use(tiny("gpt2", torch.float64)), text_inputs()
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def loss(x):
        with ca.do(PLAN):
            return model(inputs_embeds=x, attention_mask=inputs["attention_mask"]).logits.square().mean()

    (gradient,) = torch.autograd.grad(loss(embedded), embedded)
    step = torch.randn_like(embedded) * 1e-6
    difference = (loss(embedded + step) - loss(embedded - step)) / 2
    torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_plan_is_in_force_in_its_own_thread_and_ends_with_it():
    model, inputs = use(tiny("bert")), text_inputs()
    plain, seen = model(**inputs)[0], []
    with ca.do(Do.cut(8, 6)):
        changed = model(**inputs)[0]
        thread = threading.Thread(target=lambda: seen.append(model(**inputs)[0]))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain) and not torch.equal(changed, plain)
    with pytest.raises(KeyError), ca.do(Do.cut(8, 6)):
        raise KeyError
    assert torch.equal(model(**inputs)[0], plain)


@torch.no_grad()
def test_what_matches_nothing_is_an_error_that_names_it():
    inputs = text_inputs("left")
    model = tiny("llama")
    for plan in (Do.cut(40, 0), Do.cut(3, 5), Do.hard(2, 9)):
        with pytest.raises(ValueError, match=r"(cut|hard)\(.*matched nothing"), ca.do(Do.cut(8, 6) + plan):
            use(model)(**inputs)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="was not switched over"), ca.do(Do.cut(8, 6)):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize(("family", "layers"), [("gpt2", [0, 1]), ("whisper", [0, 1, 2, 3])])
def test_layers_heads_and_sequences_that_a_model_lacks_are_named_before_anything_is_done(family, layers):
    model = use(tiny(family))
    inputs = other_inputs(family, torch.float32) if family == "whisper" else text_inputs()
    missing = rf"must be among the model's {len(layers)}, {re.escape(str(layers))}, got \[99\]"
    for plan, says in (
        (Do.cut(5, 2, layers=[0, 99]), r"layers of cut\(5, 2, layers=\[0, 99\]\) " + missing),
        (Do.cut(5, 2) + Do.cut("L99H0: [5] <- [3]"), r"layers of cut\(5, 3, heads=0, layers=99\) " + missing),
        (Do.head_off(0) + Do.layer_off(99), r"layers of head_off\(value='zero', layers=99\) " + missing),
        (Do.cut(5, 2, heads=[0, 9]), r"heads of cut\(5, 2, heads=\[0, 9\]\) must be from 0 to 1, got \[0, 9\]"),
        (Do.cut(5, 2, batch=[0, 2]), r"batch of cut\(5, 2, batch=\[0, 2\]\) must be from 0 to 1, got \[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=says), ca.do(plan) as receipt:
            model(**inputs)
        assert receipt.edges == 0 and not receipt.layers


@torch.no_grad()
def test_a_layer_that_does_not_run_is_named_on_leaving():
    model, inputs = use(tiny("whisper")), other_inputs("whisper", torch.float32)
    with (
        pytest.raises(ValueError, match=r"cut\(5, 2, layers=\[1, 3\]\) names layers that did not run: \[3\]"),
        ca.do(Do.cut(5, 2, layers=[1, 3])),
    ):
        model.encoder(inputs["input_features"])
    # one that was never switched over as a whole has layers that only a run shows
    model = tiny("bert")
    model.set_attn_implementation("causalattn")
    with pytest.raises(ValueError, match=r"did not run: \[99\]"), ca.do(Do.cut(5, 2, layers=[0, 99])):
        model(**text_inputs())


@torch.no_grad()
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.filterwarnings("ignore:the attention mask is not one run")
def test_edges_that_a_mask_with_holes_forbids_are_not_counted(lowest):
    inputs, model = text_inputs(), use(tiny("bert"))
    mask = torch.zeros(2, 1, 19, 19, device=inputs["input_ids"].device)
    mask[:, :, :, 4] = lowest
    mask[1, :, 8, 2:6] = lowest
    inputs["attention_mask"] = mask
    with ca.do(Do.cut(8, slice(2, 7)) + Do.soft(None, [3, 4], 1.0)) as receipt:
        model(**inputs)
    # 4 of the keys 2 to 6 in one sequence and 1 in the other; column 3 but for one row; 2 heads in each of 2 layers
    assert receipt.items == [4 * (4 + 1), 4 * (19 + 18)]
    for plan in (Do.cut(None, 4), Do.soft(8, 3, 1.0, batch=1), Do.hard(8, 4)):
        with pytest.raises(ValueError, match="matched nothing"), ca.do(Do.cut(8, 6) + plan):
            model(**inputs)


@torch.no_grad()
def test_a_context_that_is_wrong_says_so():
    model = use(tiny("bert"))
    wrong = [
        ("cut", {}, TypeError, r"plan must be a causalattn Plan, such as Do.cut\(7, 2\), got str"),
        (ca.Plan(), {}, ValueError, "plan must hold at least one item"),
        (Do.cut("storm", 1), {}, ValueError, "'storm' names a token"),
        (Do.cut("storm", 1), {"tokens": ["a"]}, ValueError, "'storm' is not among the tokens"),
        (Do.cut(2, 1, heads=5), {}, ValueError, r"heads of .* must be from 0 to 1, got \[5\]"),
    ]
    for plan, options, error, says in wrong:
        with pytest.raises(error, match=says), ca.do(plan, **options):
            model(**text_inputs())
    with pytest.raises(RuntimeError, match=r"in force already: join the two with \+"), ca.do(PLAN), ca.do(PLAN):
        pass
    model.train()
    model.config.attention_probs_dropout_prob = 0.5
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    with pytest.raises(NotImplementedError, match="dropout must be 0 under a do"), ca.do(Do.cut(2, 1)):
        model(**text_inputs())
