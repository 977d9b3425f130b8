"""causalattn inside transformers: the same outputs on real tokens, and statistics of what really happened."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from tiny_models import CAUSAL, DEVICE, PADDINGS, SMALL, TEXT, UNPADDED, exact, full, other_inputs, text_inputs, tiny
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import causalattn.integrations.transformers.masks as masks_module
from causalattn.integrations.transformers import register, use
from causalattn.integrations.transformers.attention import attention_function
from causalattn.integrations.transformers.masks import ModelMask, dense_mask, model_mask
from causalattn.statistics import AttentionStats

EPS = torch.finfo(torch.float32).eps


def hidden(outputs):
    return outputs["last_hidden_state"] if "last_hidden_state" in outputs else outputs["logits"]


@torch.no_grad()
def assert_as_good_as_eager(family, inputs_of, real=...):
    """Our float32 error is at most twice eager's, plus one rounding, all root mean squares over the real tokens."""
    expected = hidden(exact(family)(**inputs_of(torch.float64)))[real]
    model = tiny(family)
    eager = hidden(model(**inputs_of(torch.float32)))[real]
    ours = hidden(use(model)(**inputs_of(torch.float32)))[real]
    error, eager_error, band = (x.square().mean().sqrt() for x in (ours - expected, eager - expected, EPS * expected))
    assert error <= 2 * eager_error + band


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", TEXT)
def test_outputs_are_those_of_eager(family, padding):
    inputs = text_inputs(padding)
    assert_as_good_as_eager(family, lambda dtype: inputs, inputs["attention_mask"].bool())


@pytest.mark.parametrize("family", UNPADDED)
def test_outputs_without_a_text_mask(family):
    assert_as_good_as_eager(family, lambda dtype: other_inputs(family, dtype))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen3", "gpt_neox", "opt", "vit", "whisper"])
@torch.no_grad()
def test_plain_layers_are_bit_for_bit_sdpa(family):
    inputs = text_inputs() if family in TEXT else other_inputs(family, torch.float32)
    model = tiny(family)
    model.set_attn_implementation("sdpa")
    expected = hidden(model(**inputs))
    assert torch.equal(hidden(use(model)(**inputs)), expected)
    assert torch.equal(hidden(model(**inputs, output_attentions=True)), expected)


def statistics_of(A, real_rows, first):
    """Every statistic of MATH §1 that a matrix gives, in NumPy; padded queries emptied."""
    A = np.where(real_rows[:, None, :, None], A, 0.0)
    T, S = A.shape[-2:]
    rows, columns = np.arange(T)[:, None] + S - T, np.arange(S)
    below = (A * (columns < rows)).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(A > 0, A * np.log(A), 0.0).sum(-1)
    return {
        "max": A.max(-1), "mass": A.sum(-1), "entropy": entropy, "sum_sq": (A**2).sum(-1), "below": below,
        "diag": (A * (columns == rows)).sum(-1), "distance": (A * abs(rows - columns)).sum(-1),
        "columns": (A * (columns == first[:, None, None, None])).sum(-1)[..., None],
        "dag_score": below.sum(-1) / A.sum((-2, -1)),
    }  # fmt: skip


@pytest.mark.parametrize("padding", ["left", "right", *full("none")])
@pytest.mark.parametrize("family", TEXT)
@torch.no_grad()
def test_statistics_are_those_of_the_matrices(family, padding):
    inputs = text_inputs(padding)
    model = exact(family)
    matrices = model(**inputs, output_attentions=True).attentions
    statistics = use(model)(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool().cpu().numpy()
    assert len(statistics) == len(matrices) == 2
    for stats, A in zip(statistics, matrices, strict=True):
        assert isinstance(stats, AttentionStats)
        for name, expected in statistics_of(A.cpu().numpy(), real, real.argmax(-1)).items():
            error = np.abs(getattr(stats, name).cpu().numpy() - expected).max()
            # both are float64, and layers differ by less than one float32 rounding
            assert error <= EPS * max(1, np.abs(expected).max()), name


def test_statistics_only_when_asked():
    outputs = use(tiny("gpt2"))(**text_inputs())
    assert outputs.attentions is None


def test_statistics_of_cross_attention():
    outputs = use(tiny("whisper"))(**other_inputs("whisper", torch.float32), output_attentions=True)
    kinds = (outputs[f"{kind}_attentions"] for kind in ("encoder", "decoder", "cross"))
    lengths = [[stats.lse.shape[2] for stats in layers] for layers in kinds]
    assert lengths == [[21, 21], [9, 9], [9, 9]]


def hole(T):
    real = torch.ones(2, T, dtype=torch.bool)
    real[1, T // 2 : T // 2 + 2] = False
    return real


def left(T):
    return torch.arange(T) >= torch.tensor([[0], [3]])


def right(T):
    return torch.arange(T) < torch.tensor([[T], [T - 4]])


def packed(function):
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    segments = masking_utils.find_packed_sequence_indices(positions)
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(function, positions, segments)
    # before transformers 5.22
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(segments))


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "two-sided": masking_utils.sliding_window_bidirectional_mask_function(3),
    "chunked": masking_utils.chunked_causal_mask_function(5, torch.tensor([0, 3])),
}
SHAPES = {"square": (12, 12, 0, 0), "decode": (1, 12, 11, 0), "static": (3, 12, 5, 0), "sliding": (2, 6, 10, 6)}


def assert_reads(function, T, S, q_offset, kv_offset, real, use_vmap=False):
    arguments = {"batch_size": 2, "q_length": T, "kv_length": S, "q_offset": q_offset, "kv_offset": kv_offset}
    arguments |= {"mask_function": function, "attention_mask": real, "use_vmap": use_vmap, "device": "cpu"}
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = model_mask(**arguments)
    dense = mask.outputs.to_dense(S)[:, None]
    if mask.bias is not None:
        dense = dense & (mask.bias == 0)
    assert torch.equal(dense.expand(2, 1, T, S), expected)
    assert (mask.outputs.stop <= S).all() and (mask.outputs.start >= 0).all()
    assert mask.outputs.offset == q_offset - kv_offset
    return mask


@pytest.mark.parametrize("padding", [None, left, right, hole])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_masks_are_read_exactly(function, shape, padding):
    T, S, q_offset, kv_offset = shape
    real = None if padding is None else padding(kv_offset + S)
    mask = assert_reads(function, *shape, real)
    if real is not None:
        cross = function is FUNCTIONS["bidirectional"] and q_offset + T != kv_offset + S
        padded = ~real[:, q_offset : q_offset + T] & (not cross)
        rows = mask.outputs.stop.expand(2, -1).masked_fill(padded, 0)
        assert torch.equal(mask.statistics.stop, rows)
        assert torch.equal(mask.outputs.first[:, 0], real.int().argmax(-1) - kv_offset)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_packed_masks_are_read_exactly(function):
    mask = assert_reads(packed(function), 12, 12, 0, 0, None)
    assert mask.outputs.first[0].tolist() == [0] * 5 + [5] * 7
    assert mask.last[1].tolist() == [2] * 2 + [12] * 10


def prefix_of_three(batch, head, query, key):
    return key < 3


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("padding", [None, left, right, hole])
def test_unknown_functions_are_probed_in_row_chunks(padding, use_vmap, monkeypatch):
    monkeypatch.setattr(masks_module, "PROBE", 2 * 12 * 5)  # five rows at a time
    function = masking_utils.or_masks(masking_utils.causal_mask_function, prefix_of_three)
    assert_reads(function, 12, 12, 0, 0, padding and padding(12), use_vmap)


def test_unknown_function_that_is_no_run_of_keys():
    def every_other(batch, head, query, key):
        return (query - key) % 2 == 0

    mask = assert_reads(masking_utils.and_masks(every_other, masking_utils.causal_mask_function), 12, 12, 0, 0, None)
    assert mask.bias.shape == (2, 1, 12, 12)


@pytest.mark.parametrize("name", ["causal", "bidirectional", "window", "chunked"])
def test_a_long_mask_is_never_evaluated(name, monkeypatch):
    def refuse(**kwargs):
        raise AssertionError("a mask of 10^10 entries was evaluated")

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)
    T = 100_000
    real = torch.arange(T) >= torch.tensor([[0], [777]])
    mask = model_mask(2, T, T, mask_function=FUNCTIONS[name], attention_mask=real)
    assert mask.bias is None and mask.outputs.start.shape == (2, T)


def test_a_mask_object_comes_back_unchanged():
    mask = model_mask(1, 4, 4)
    assert model_mask(1, 4, 4, attention_mask=mask) is mask
    assert mask.contiguous() is mask and mask.ndim == 4


def test_plain_masks_are_recognised():
    ones = torch.ones(2, 6, dtype=torch.bool)
    assert model_mask(2, 6, 6, attention_mask=ones).plain == "causal"
    assert model_mask(2, 1, 6, q_offset=5).plain == "full"
    assert model_mask(2, 6, 6, mask_function=FUNCTIONS["bidirectional"]).plain == "full"
    assert model_mask(2, 6, 6, mask_function=masking_utils.sliding_window_causal_mask_function(6)).plain == "causal"
    assert model_mask(2, 6, 6, mask_function=masking_utils.sliding_window_causal_mask_function(5)).plain is None
    assert model_mask(2, 3, 6, q_offset=2).plain is None
    assert model_mask(2, 6, 6, attention_mask=left(6)).plain is None


@pytest.mark.parametrize("cached", ["dynamic-left", "dynamic-right", "static-left", *full("static-none")])
@pytest.mark.parametrize("family", CAUSAL)
def test_generate_gives_the_tokens_of_eager(family, cached):
    cache, padding = cached.split("-")
    # a window shorter than the padding would leave rows that eager fills uniformly, and generate reads the last one
    inputs = text_inputs(padding, T=11, padded=3)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    options |= {"eos_token_id": None, "disable_compile": True}
    if family == "opt":
        options["use_cache"] = True
    model = tiny(family)
    expected = model.generate(**inputs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(use(model).generate(**inputs, **options), expected)


@torch.no_grad()
def test_a_hole_in_the_padding_costs_one_warning():
    inputs = text_inputs()
    inputs["attention_mask"][1, 8:11] = 0
    model = use(tiny("llama"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for T in (15, 17, 19):
            model(**{name: value[:, :T] for name, value in inputs.items()})
        assert_as_good_as_eager("llama", lambda dtype: inputs, inputs["attention_mask"].bool())
    assert ["kept as an additive bias" in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize("family", ["llama", "mistral", *full("gemma2")])
@torch.no_grad()
def test_packed_sequences_are_those_alone(family):
    ids = text_inputs()["input_ids"][:1]
    positions = torch.cat([torch.arange(7), torch.arange(12)])[None].to(DEVICE)
    packed_inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert_as_good_as_eager(family, lambda dtype: packed_inputs)

    model = use(tiny(family, torch.float64))
    together = model(**packed_inputs, output_attentions=True)
    alone = [model(input_ids=part, output_attentions=True) for part in (ids[:, :7], ids[:, 7:])]
    assert (together.logits - torch.cat([one.logits for one in alone], 1)).abs().max() <= EPS
    for stats, *parts in zip(together.attentions, *(one.attentions for one in alone), strict=True):
        sink_mass = torch.cat([part.columns for part in parts], 2)
        assert (stats.columns - sink_mass).abs().max() <= EPS


def user_mask(kind, dtype):
    """A causal mask that also keeps two sequences apart, as a user would write it."""
    allowed = torch.ones(19, 19, dtype=torch.bool).tril()
    allowed[8:, :8] = False
    if kind == "holes":
        allowed[12:, 9:11] = False
    mask = torch.zeros(19, 19, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    if kind == "values":
        mask = mask - 0.3 * (torch.arange(19)[:, None] - torch.arange(19)).abs() * allowed
    return mask.expand(2, 1, 19, 19).to(DEVICE)


@pytest.mark.parametrize("kind", ["runs", "holes", "values"])
@pytest.mark.parametrize("family", ["bert", "gpt_oss", *full("llama", "gemma2")])
def test_a_users_own_mask(family, kind):
    def inputs_of(dtype):
        return text_inputs() | {"attention_mask": user_mask(kind, dtype)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind != "runs" else "error")
        assert_as_good_as_eager(family, inputs_of)


def test_a_users_boolean_mask_and_a_mask_a_head():
    mask = user_mask("runs", torch.float32)
    by_value, by_truth = dense_mask(mask, 19, 19), dense_mask(mask == 0, 19, 19)
    assert by_value.bias is by_truth.bias is None
    assert all(torch.equal(a, b) for a, b in zip(by_value.outputs[:3], by_truth.outputs[:3], strict=True))
    heads = torch.cat([mask, user_mask("holes", torch.float32)], 1)
    with pytest.warns(UserWarning, match="B·T·S"):
        assert dense_mask(heads, 19, 19).bias.shape == (2, 2, 19, 19)


def test_a_mask_of_the_wrong_shape_is_named():
    layer = torch.nn.Identity()
    q = torch.randn(2, 4, 6, 8)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, H or 1, 6, 6\], got \[2, 6\]"):
        attention_function(layer, q, q, q, torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"Identity: the mask was made for \[T, S\] = \[5, 5\], got \[6, 6\]"):
        attention_function(layer, q, q, q, model_mask(2, 5, 5))


def refused_models():
    t = transformers
    return {
        "falcon": lambda: t.FalconModel(
            t.FalconConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        ),
        "gptj": lambda: t.GPTJModel(t.GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)),
        "bloom": lambda: t.BloomModel(t.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)),
        "mpt": lambda: t.MptModel(t.MptConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=2)),
        "t5": lambda: t.T5EncoderModel(t.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        "mpnet": lambda: t.MPNetModel(
            t.MPNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
    }


@pytest.mark.parametrize("family", refused_models())
def test_families_that_cannot_work_are_refused_by_name(family):
    model = refused_models()[family]()
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=f"^{family} is not supported: "):
        use(model)
    assert model.config._attn_implementation == before


def test_a_model_that_computes_with_its_mask_says_so():
    config = transformers.DogeConfig(**SMALL, num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
    with pytest.raises(AttributeError, match="this model reads dtype of its attention mask"):
        use(transformers.DogeModel(config))(**text_inputs())


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        use(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["position_bias", "cache", "block_table"])
def test_what_a_layer_cannot_do_is_refused(name):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=f"Identity: attention with {name} is not supported"):
        attention_function(torch.nn.Identity(), q, q, q, None, **{name: torch.zeros(1)})


def test_dropout_goes_to_sdpa_or_is_refused():
    module = torch.nn.Identity()
    q = torch.randn(1, 2, 5, 4)
    torch.manual_seed(0)
    out, _ = attention_function(module, q, q, q, None, dropout=0.5)
    torch.manual_seed(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True)
    assert torch.equal(out, expected.transpose(1, 2))
    with pytest.raises(NotImplementedError, match=r"Identity: dropout must be 0 .* got 0\.5"):
        attention_function(module, q, q, q, None, dropout=0.5, softcap=3.0)


def test_without_its_mask_function_padding_would_be_lost(monkeypatch):
    inputs = text_inputs("left")
    real = inputs["attention_mask"].bool()
    model = use(tiny("llama"))
    before = hidden(model(**inputs))[real]
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "causalattn")
    without = hidden(model(**inputs))[real]
    assert (before - without).abs().max() > 1000 * EPS * before.abs().max()


def test_register_is_idempotent():
    register()
    functions = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    register()
    assert functions == (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    assert isinstance(functions[1]["causalattn"](1, 2, 2), ModelMask)


def test_import_registers_nothing():
    code = (
        "import sys, causalattn.integrations.transformers, causalattn.analysis\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AttentionInterface\n"
        "assert 'causalattn' not in AttentionInterface._global_mapping\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
