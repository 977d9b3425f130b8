"""Windows against the whole matrices of the same models, and what bertviz is handed."""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import assert_within_reference_error, plain_attention, score_roundings, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import DEVICE, NO_DROPOUT, PADDINGS, SMALL, TEXT, exact, full, other_inputs, text_inputs, tiny

from causalattn import analysis
from causalattn.analysis import capture
from causalattn.integrations.bertviz import WindowAttention, head_view, model_view, window_attention

EPS = torch.finfo(torch.float32).eps
T = 19


class FakeBertviz:
    """bertviz's two functions as 1.4.1 has them: they keep what they are given, and pick from it as it does."""

    def __init__(self):
        self.given = None

    def head_view(self, attention, tokens, sentence_b_start=None, layer=None, heads=None, include_layers=None,
                  html_action="view"):  # fmt: skip
        shown = torch.stack([attention[number].squeeze(0) for number in include_layers])
        self.given = SimpleNamespace(**locals())
        return "head page"

    def model_view(self, attention, tokens, sentence_b_start=None, display_mode="dark", include_layers=None,
                   include_heads=None, html_action="view"):  # fmt: skip
        total_heads = attention[0][0].size(0)
        shown = torch.stack([attention[number].squeeze(0)[include_heads] for number in include_layers])
        self.given = SimpleNamespace(**locals())
        return "model page"


@pytest.fixture
def fake(monkeypatch):
    fake = FakeBertviz()
    monkeypatch.setitem(sys.modules, "bertviz", fake)
    return fake


@pytest.fixture(scope="module")
def llama_window():
    return window_attention(tiny("llama"), text_inputs(), start=4, stop=15, layers=[1], heads=[3, 1])


def cut(matrices, window, sequence, real=None):
    """A window of whole matrices [B, H, T, T], with the rows of padded queries empty."""
    rows = slice(window.start, window.stop)
    if real is not None:
        matrices = [A * real[:, None, :, None] for A in matrices]
    return [A[sequence : sequence + 1, :, rows, rows] for A in matrices]


def assert_rounded(ours, expected):
    """Float32 values of a float64 model: both are float64 until the last rounding."""
    assert len(ours) == len(expected)
    for A, whole in zip(ours, expected, strict=True):
        assert A.dtype == torch.float32 and A.device.type == "cpu" and A.shape == whole.shape
        assert (A.double() - whole.cpu()).abs().max() <= EPS


@pytest.mark.parametrize("padding", ["left", "right", *full("none")])
@pytest.mark.parametrize("family", TEXT)
@torch.no_grad()
def test_a_window_is_cut_from_the_matrices_of_eager(family, padding):
    inputs, window = text_inputs(padding), range(4, 15)
    model = exact(family)
    matrices = model(**inputs, output_attentions=True).attentions
    for sequence in range(2):
        ours = window_attention(model, inputs, start=window.start, stop=window.stop, sequence=sequence)
        assert_rounded(ours.attention, cut(matrices, window, sequence, inputs["attention_mask"]))
        assert ours.tokens == [str(i) for i in inputs["input_ids"][sequence, 4:15].tolist()]
        assert ours.layer_ids == [0, 1] and ours.head_ids == list(range(ours.total_heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "gpt_oss", *full("llama", "gemma2", "mistral")])
def test_weights_are_float32_whatever_the_model_runs_in(family, dtype):
    model, inputs = tiny(family, dtype), text_inputs("left")
    ours = window_attention(model, inputs, start=3, sequence=1)
    for A, call in zip(ours.attention, capture(model, inputs).values(), strict=True):
        options = {"scale": call.scale, "softcap": call.softcap, "sink": call.sink}
        seen = call.intervals.to_dense(T).expand(2, T, T)
        q, k, v = call.q, call.k, call.v
        _, _, plain = plain_attention(q.float(), k.float(), v.float(), seen, **options)
        _, _, expected = plain_attention(q.double(), k.double(), v.double(), seen, **options)
        plain, expected = cut([plain, expected], range(3, T), 1)
        assert A.dtype == torch.float32
        roundings = score_roundings(q, k, call.scale)
        assert_within_reference_error(A, plain, to_numpy(expected), axis=None, roundings=roundings)


@given(st.integers(0, T - 1), st.integers(1, T), st.sampled_from(["bert", "gemma2"]), st.sampled_from(PADDINGS))
def test_every_window_is_a_part_of_the_whole(a, b, family, padding):
    window = range(min(a, b - 1), max(a + 1, b))
    model, inputs = exact(family), text_inputs(padding)
    whole = window_attention(model, inputs, sequence=1)
    part = window_attention(model, inputs, start=window.start, stop=window.stop, sequence=1)
    assert part.tokens == whole.tokens[window.start : window.stop]
    for A, expected in zip(part.attention, cut(whole.attention, window, 0), strict=True):
        assert (A - expected).abs().max() <= EPS


def test_a_mask_with_holes():
    inputs, window = text_inputs(), range(6, 17)
    inputs["attention_mask"][1, 8:11] = 0
    model = exact("llama")
    with torch.no_grad():
        matrices = model(**inputs, output_attentions=True).attentions
    with pytest.warns(UserWarning, match="kept as an additive bias"):
        ours = window_attention(model, inputs, start=6, stop=17, sequence=1)
    assert_rounded(ours.attention, cut(matrices, window, 1, inputs["attention_mask"]))


def test_512_tokens_of_a_longer_text_and_no_more():
    torch.manual_seed(0)
    sizes = SMALL | NO_DROPOUT | {"num_hidden_layers": 1, "max_position_embeddings": 600}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).to(DEVICE, torch.float64).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.randint(64, (1, 600), device=DEVICE)}
    with torch.no_grad():
        matrices = model(**inputs, output_attentions=True).attentions
    ours = window_attention(model, inputs, start=70, stop=582)
    assert_rounded(ours.attention, cut(matrices, range(70, 582), 0))
    assert (ours.attention[0].sum(-1) < 1).all()
    for arguments, apart in (({}, 600), ({"start": 87}, 513), ({"stop": 513}, 513)):
        with pytest.raises(ValueError, match=f"start and stop must be at most 512 tokens apart, got {apart}"):
            window_attention(model, inputs, **arguments)


def test_whole_rows_are_held_for_one_head_at_a_time(monkeypatch):
    shapes, rows_of = [], analysis.attention_rows

    def recording(q, k, rows, **options):
        probs = rows_of(q, k, rows, **options)
        shapes.append(tuple(probs.shape))
        return probs

    monkeypatch.setattr(analysis, "attention_rows", recording)
    window_attention(tiny("llama"), text_inputs(), start=4, stop=15)
    assert shapes == [(1, 1, 11, T)] * 8


def test_layers_and_heads_keep_their_numbers(llama_window):
    everything = window_attention(tiny("llama"), text_inputs(), start=4, stop=15)
    assert (llama_window.layer_ids, llama_window.head_ids, llama_window.total_heads) == ([1], [3, 1], 4)
    assert torch.equal(llama_window.attention[0], everything.attention[1][:, [3, 1]])
    assert not torch.equal(everything.attention[0], everything.attention[1])


def test_tokens_are_those_of_the_window():
    named = [f"word{i}" for i in range(T)]
    assert window_attention(tiny("bert"), text_inputs(), start=17, tokens=named).tokens == ["word17", "word18"]
    picture = other_inputs("vit", torch.float32)
    assert window_attention(tiny("vit"), picture, start=24).tokens == ["24", "25"]


def test_an_encoder_and_a_decoder_are_looked_at_one_by_one():
    model, inputs = tiny("whisper"), other_inputs("whisper", torch.float32)
    decoder = window_attention(model, inputs, layers=[2, 3], start=5)
    # cross-attention is left out: these rows look at the decoder's own tokens
    assert [A.shape for A in decoder.attention] == [(1, 2, 4, 4)] * 2 and not decoder.attention[0].triu(1).any()
    assert decoder.tokens == ["5", "6", "7", "8"]
    with pytest.raises(ValueError, match=r"layers must be of one \[heads, tokens\], got \{0: \[2, 21\], .*2: \[2, 9\]"):
        window_attention(model, inputs)


def test_the_ids_of_an_encoder_do_not_name_a_decoders_tokens():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = transformers.BartModel(transformers.BartConfig(vocab_size=64, **sizes, **heads)).to(DEVICE)
    assert window_attention(model, text_inputs(), stop=2).tokens == ["0", "1"]


def test_keys_from_a_cache_are_refused():
    model, ids = tiny("gpt2"), text_inputs()["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a window needs as many queries as keys, got T = 1 and S = 19"):
        window_attention(model, {"input_ids": ids[:, -1:], "past_key_values": cache})


def test_the_model_is_left_as_it_was():
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    model.train()
    window_attention(model, text_inputs())
    with pytest.raises(ValueError, match="start and stop"):
        window_attention(model, text_inputs(), stop=99)
    assert model.config._attn_implementation == "sdpa" and all(part.training for part in model.modules())


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"start": -1}, "start and stop must be 0 ≤ start < stop ≤ 19, got -1 and 19"),
        ({"start": 19}, "start and stop must be 0 ≤ start < stop ≤ 19, got 19 and 19"),
        ({"stop": 20}, "start and stop must be 0 ≤ start < stop ≤ 19, got 0 and 20"),
        ({"start": 5, "stop": 5}, "start and stop must be 0 ≤ start < stop ≤ 19, got 5 and 5"),
        ({"layers": [0, 7]}, r"layers must be among \[0, 1\], got \[7\]"),
        ({"heads": [4]}, r"heads must be different numbers from 0 to 1, got \[4\]"),
        ({"heads": []}, r"heads must be different numbers from 0 to 1, got \[\]"),
        ({"sequence": 2}, "sequence must be from 0 to 1, got 2"),
        ({"sequence": -1}, "sequence must be from 0 to 1, got -1"),
        ({"tokens": ["a", "b"]}, "tokens must be the 19 strings of sequence 0, got 2 values"),
        ({"tokens": range(19)}, "tokens must be the 19 strings of sequence 0, got 19 values"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        window_attention(tiny("bert"), text_inputs(), **arguments)


def test_bad_models_and_inputs_are_named():
    with pytest.raises(TypeError, match=r"inputs must map names to tensors, .* got str"):
        window_attention(tiny("bert"), "some text")
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        window_attention(torch.nn.Linear(2, 2), text_inputs())


def test_head_view_shows_the_windows_numbers(llama_window, fake):
    assert head_view(llama_window) == "head page"
    assert torch.equal(fake.given.shown, torch.cat(llama_window.attention))
    assert fake.given.tokens == llama_window.tokens and fake.given.include_layers == [1]
    assert fake.given.layer is fake.given.heads is None and fake.given.html_action == "return"


def test_head_view_takes_numbers_of_the_model(llama_window, fake):
    head_view(llama_window, layer=1, heads=[1], html_action="view", sentence_b_start=3)
    # bertviz counts the boxes it draws, and here the second is head 1
    assert (fake.given.layer, fake.given.heads) == (1, [1])
    assert (fake.given.html_action, fake.given.sentence_b_start) == ("view", 3)
    head_view(llama_window, heads=[3])
    assert fake.given.heads == [0]


def test_model_view_shows_the_windows_numbers(llama_window, fake):
    assert model_view(llama_window, display_mode="light") == "model page"
    assert torch.equal(fake.given.shown, torch.cat(llama_window.attention))
    assert (fake.given.include_layers, fake.given.include_heads, fake.given.total_heads) == ([1], [3, 1], 4)
    assert fake.given.tokens == llama_window.tokens
    assert fake.given.display_mode == "light" and fake.given.html_action == "return"


def test_views_of_every_layer_and_head(fake):
    window = window_attention(tiny("bert"), text_inputs())
    for view in (head_view, model_view):
        view(window)
        assert torch.equal(fake.given.shown, torch.cat(window.attention)) and fake.given.include_layers == [0, 1]


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"layer": 0}, r"layer must be among \[1\], got 0"),
        ({"heads": [0]}, r"heads must be among \[3, 1\], got \[0\]"),
        ({"heads": []}, r"heads must be among \[3, 1\], got \[\]"),
    ],
)
def test_a_view_of_what_the_window_lacks(arguments, text, llama_window, fake):
    with pytest.raises(ValueError, match=text):
        head_view(llama_window, **arguments)


@pytest.mark.parametrize("view", [head_view, model_view])
def test_without_bertviz(view, monkeypatch):
    monkeypatch.setitem(sys.modules, "bertviz", None)
    window = WindowAttention([torch.ones(1, 1, 1, 1)], ["a"], [0], [0], 1)
    with pytest.raises(ImportError, match=r"views need bertviz and IPython \(pip install bertviz\), got: .*bertviz"):
        view(window)
