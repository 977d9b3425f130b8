"""Tiny randomly initialised transformers models, one a family, and inputs for them with and without padding."""

import pytest
import torch
import transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = SIZES | {"vocab_size": VOCAB, "intermediate_size": 48}
GROUPED = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}


def _bert(t):
    return t.BertModel(t.BertConfig(**SMALL, **NO_DROPOUT, max_position_embeddings=64))


def _gpt2(t):
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, **ENDS))


def _llama(t):
    return t.LlamaForCausalLM(t.LlamaConfig(**GROUPED))


def _mistral(t):
    return t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=5))


def _qwen3(t):
    return t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED))


def _gemma2(t):
    scores = {"sliding_window": 5, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    return t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, **LAYER_TYPES, **scores))


def _gpt_neox(t):
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, max_position_embeddings=64))


def _opt(t):
    rest = {"vocab_size": VOCAB, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return t.OPTForCausalLM(t.OPTConfig(**SIZES, **rest, dropout=0.0))


def _gpt_oss(t):
    config = t.GptOssConfig(**GROUPED, **LAYER_TYPES, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)
    config._experts_implementation = "eager"  # the grouped product has no float64
    return t.GptOssForCausalLM(config)


def _vit(t):
    picture = {"image_size": 20, "patch_size": 4, "num_channels": 1}
    return t.ViTModel(t.ViTConfig(**SIZES, **NO_DROPOUT, **picture, intermediate_size=48))


def _whisper(t):
    config = t.WhisperConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=21,
        max_target_positions=32,
        num_mel_bins=4,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return t.WhisperModel(config)


BIDIRECTIONAL = {"bert": _bert}
CAUSAL = {
    "gpt2": _gpt2, "llama": _llama, "mistral": _mistral, "qwen3": _qwen3, "gemma2": _gemma2, "gpt_neox": _gpt_neox,
    "opt": _opt, "gpt_oss": _gpt_oss,
}  # fmt: skip
TEXT = BIDIRECTIONAL | CAUSAL
UNPADDED = {"vit": _vit, "whisper": _whisper}
PADDINGS = ("none", "left", "right")


def full(*values):
    """Parameters that only the full run takes."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """The family's model in eager attention and eval mode; weights depend on the seed alone, and are large."""
    torch.manual_seed(seed)
    model = (TEXT | UNPADDED)[family](transformers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # the usual 0.02 gives scores near zero, and attention so uniform that a wrong mask hardly shows
            if parameter.ndim > 1 or "sinks" in name:
                parameter.normal_(0, 0.5 if "embed" in name or "wte" in name else parameter.shape[-1] ** -0.5 * 2)
    model.set_attn_implementation("eager")
    return model.to(DEVICE, dtype).eval()


def dense_float64(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """The oracle: attention by its definition, with the model's own mask; some models' eager softmax is float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1).double()
    scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    probs = scores.softmax(-1)[..., : key.shape[2]]
    return (probs @ value).transpose(1, 2).contiguous().to(query.dtype), probs


def exact(family: str):
    """The family's model in float64, its attention by the oracle."""
    transformers.AttentionInterface.register("dense_float64", dense_float64)
    transformers.AttentionMaskInterface.register("dense_float64", transformers.masking_utils.eager_mask)
    model = tiny(family, torch.float64)
    model.set_attn_implementation("dense_float64")
    return model


def text_inputs(padding: str = "none", T: int = 19, padded: int = 6) -> dict[str, torch.Tensor]:
    """Two sequences of T tokens; with padding the second has only T − padded real ones."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, T), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, padded) if padding == "left" else slice(T - padded, T)] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def other_inputs(family: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 1, 20, 20, generator=generator).to(DEVICE, dtype)}
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator).to(DEVICE)
    return {"input_features": torch.randn(2, 4, 42, generator=generator).to(DEVICE, dtype), "decoder_input_ids": ids}
