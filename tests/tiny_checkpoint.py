"""A tiny random model saved with a word-level tokenizer made on the fly, as the command line loads them."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "Because the storm intensified , ship finally sank . <b> $x$ & harbour lamp wave rope".split()


def save_checkpoint(
    folder: Path, family: str = "bert", *, positions: int = 64, layers: int = 2, heads: int = 2,
    head: bool = False,
) -> Path:  # fmt: skip
    """Save the model and its tokenizer into folder; weights are large, so that attention is far from uniform.

    head: the one that predicts tokens too.
    """
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    vocabulary, heads = len(WORDS) + 1, 2
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 8 * heads, "n_layer": layers, "n_head": heads, "n_positions": positions}
        config = transformers.GPT2Config(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **sizes)
        model = (transformers.GPT2LMHeadModel if head else transformers.GPT2Model)(config)
    elif family == "bloom":
        sizes = {"hidden_size": 8 * heads, "n_layer": layers, "n_head": heads}
        model = transformers.BloomModel(transformers.BloomConfig(vocab_size=vocabulary, **sizes))
    else:
        sizes = {"hidden_size": 8 * heads, "num_hidden_layers": layers, "num_attention_heads": heads}
        config = transformers.BertConfig(
            vocab_size=vocabulary, max_position_embeddings=positions, intermediate_size=16, **sizes
        )
        model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(n: int) -> str:
    """A text of n tokens."""
    generator = torch.Generator().manual_seed(3)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())
