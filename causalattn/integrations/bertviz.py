"""A window of a model's attention for bertviz: exact rows of the whole softmax, and never the whole map.

A bertviz page holds every weight, in some 50 bytes, and draws every pair of tokens; much beyond 512 tokens it does not
open. Here the text may be of any length, and at most 512 tokens in a row are looked at: the more, the fewer layers and
heads fit on a page.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_square
from ..analysis import each_layer, pick_heads, window_probs
from .transformers.attention import AttentionCall

WINDOW = 512


class WindowAttention(NamedTuple):
    """What both views show; attention and tokens are what bertviz's own functions take.

    attention: [1, heads, n, n] float32 on the CPU, one a layer: weight of query i on key j, both of the window.
    tokens: the n tokens. layer_ids and head_ids: their numbers in the model, whose layers have total_heads each.
    """

    attention: list[Tensor]
    tokens: list[str]
    layer_ids: list[int]
    head_ids: list[int]
    total_heads: int


def window_attention(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    start: int = 0,
    stop: int | None = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    sequence: int = 0,
    tokens: Sequence[str] | None = None,
) -> WindowAttention:
    """Run one forward pass and return what tokens start … stop − 1 attend among themselves, in O(n·T) memory, n ≤ 512.

        A_ij = exp(S_ij − lse_i), start ≤ i, j < stop

    lse_i is over every key that token i may attend, inside the window or not: a row sums to the share of its attention
    that stays in the window, not to one. The row and the column of a padded token are 0.

    Args:
        model: a transformers model; its self-attention is read, and the model is left as it was.
        inputs: what the model's forward takes, as a tokenizer returns it with return_tensors="pt".
        start, stop: the window, at most 512 positions of the input, padding counted; stop is the end by default.
        layers: layer numbers; all by default. Of an encoder-decoder, those of the encoder or those of the decoder.
        heads: head numbers, the same in every layer; all by default.
        sequence: which of the batch.
        tokens: all T tokens of that sequence as strings; by default its input ids, else positions.

    Returns:
        WindowAttention, layers in the order of their numbers, heads as asked for.

    Raises:
        NotImplementedError: the model's family cannot be switched over, or it calls one attention module twice.
        TypeError: model is no transformers model, or inputs is no mapping.
        ValueError: a window of more than 512 tokens or outside the text; an unknown layer, head or sequence; tokens
            that do not fit; layers of different lengths; keys from a cache, so that there are more of them than tokens.

    Source: Vig 2019 (arXiv:1906.05714).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> window = window_attention(BertModel(small), {"input_ids": torch.tensor([[5, 6, 7, 8]])}, start=1, stop=3)
        >>> window.tokens, window.attention[0].shape
        (['6', '7'], torch.Size([1, 2, 2, 2]))
    """
    heads = None if heads is None else list(heads)
    sizes: dict[int, list[int]] = {}
    found: dict[int, Tensor] = {}

    def look(layer: int, call: AttentionCall, total: int) -> None:
        check_square("a window", call.q, call.k)
        sizes[layer] = size = list(call.q.shape[1:3])
        if any(other != size for other in sizes.values()):
            raise ValueError(f"layers must be of one [heads, tokens], got {sizes}: choose among them")
        call = call if heads is None else pick_heads(call, heads)
        found[layer] = window_probs(call, _range(start, stop, size[1]), sequence=sequence)[None]

    each_layer(model, inputs, layers, look)
    ids = sorted(found)
    H, T = sizes[ids[0]]
    texts = _texts(model, inputs, tokens, sequence, T)[start:stop]
    return WindowAttention([found[layer] for layer in ids], texts, ids, heads or list(range(H)), H)


def head_view(
    window: WindowAttention,
    *,
    layer: int | None = None,
    heads: Iterable[int] | None = None,
    html_action: str = "return",
    **options,
):
    """Show a window in bertviz's head view: lines between tokens, one layer at a time, a colour a head.

    bertviz writes no head numbers: its coloured boxes are window.head_ids from left to right.

    Args:
        window: from window_attention.
        layer: the number of the layer shown first; the window's first by default.
        heads: the numbers of the heads shown first; all of the window's by default.
        html_action: "return" the page, or "view" it in a notebook.
        options: of bertviz.head_view: prettify_tokens, and sentence_b_start as counted from the window's first token.

    Returns:
        IPython's HTML object, the page in its .data; None for "view".

    Raises:
        ImportError: bertviz, or the IPython it needs, is not installed.
        ValueError: a layer or head that the window does not hold.

    Example:
        page = head_view(window_attention(model, inputs, start=1000, stop=1060, layers=[5]))
        Path("heads.html").write_text(page.data, encoding="utf-8")
    """
    bertviz = _bertviz()
    if layer is not None and layer not in window.layer_ids:
        raise ValueError(f"layer must be among {window.layer_ids}, got {layer}")
    if heads is not None:
        heads = list(heads)
        if not heads or not set(heads) <= set(window.head_ids):
            raise ValueError(f"heads must be among {window.head_ids}, got {heads}")
        heads = [window.head_ids.index(head) for head in heads]
    return bertviz.head_view(
        _by_number(window.layer_ids, window.attention),
        window.tokens,
        layer=layer,
        heads=heads,
        include_layers=window.layer_ids,
        html_action=html_action,
        **options,
    )


def model_view(window: WindowAttention, *, html_action: str = "return", **options):
    """Show a window in bertviz's model view: a thumbnail a layer and head, each enlarged by a click.

    Args:
        window: from window_attention.
        html_action: "return" the page, or "view" it in a notebook.
        options: of bertviz.model_view: prettify_tokens, display_mode ("dark" or "light"), and sentence_b_start as
            counted from the window's first token.

    Returns:
        IPython's HTML object, the page in its .data; None for "view".

    Raises:
        ImportError: bertviz, or the IPython it needs, is not installed.

    Example:
        page = model_view(window_attention(model, inputs, stop=64), display_mode="light")
    """
    return _bertviz().model_view(
        _by_number(window.layer_ids, [_all_heads(window, A) for A in window.attention]),
        window.tokens,
        include_layers=window.layer_ids,
        include_heads=window.head_ids,
        html_action=html_action,
        **options,
    )


def _bertviz():
    try:
        import bertviz
    except ImportError as error:
        raise ImportError(f"the views need bertviz and IPython (pip install bertviz), got: {error}") from error
    return bertviz


def _by_number(numbers: list[int], attention: list[Tensor]) -> list[Tensor]:
    """A list with each layer's attention at its number; bertviz never shows what stands between."""
    known = dict(zip(numbers, attention, strict=True))
    return [known.get(number, attention[0]) for number in range(max(numbers) + 1)]


def _all_heads(window: WindowAttention, attention: Tensor) -> Tensor:
    """[1, total_heads, n, n] with each head at its number; bertviz never shows the zeros between."""
    n = attention.shape[-1]
    return attention.new_zeros(1, window.total_heads, n, n).index_copy_(1, torch.tensor(window.head_ids), attention)


def _range(start: int, stop: int | None, T: int) -> range:
    stop = T if stop is None else stop
    if not 0 <= start < stop <= T:
        raise ValueError(f"start and stop must be 0 ≤ start < stop ≤ {T}, got {start} and {stop}")
    if stop - start > WINDOW:
        raise ValueError(f"start and stop must be at most {WINDOW} tokens apart, got {stop - start}")
    return range(start, stop)


def _texts(model: nn.Module, inputs: Mapping, tokens: Sequence[str] | None, sequence: int, T: int) -> list[str]:
    if tokens is not None:
        if len(tokens) != T or not all(isinstance(token, str) for token in tokens):
            raise ValueError(f"tokens must be the {T} strings of sequence {sequence}, got {len(tokens)} values")
        return list(tokens)
    ids = inputs.get("input_ids")
    # of an encoder-decoder, the ids are those of one part, and a layer does not tell of which
    if ids is None or ids.shape[1] != T or getattr(model.config, "is_encoder_decoder", False):
        return [str(position) for position in range(T)]
    return [str(i) for i in ids[sequence].tolist()]
