"""A transformers model on a sequence that several ranks share: every layer's tokens stay where they are."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .._backend import accumulator, use_triton
from ..analysis import SCORED, WANT, HeadScores, Report, cheapest, head_scores, resolve_tokens, to_cpu
from ..integrations.transformers.attention import Takeover, takeover
from ..integrations.transformers.families import self_attention, using
from ..masks import Intervals, Mask, causal, full, sliding_window
from ..statistics import AttentionStats
from ..statistics.results import wanted
from .attention import attend_all
from .blocks import Blocks
from .layout import Layout, Order, assembled, shard
from .ring import Ring
from .statistics import measure

PROBE = 8


def analyze(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    mesh: DeviceMesh,
    order: Order | None = None,
    want: str | Iterable[str] = WANT,
    layers: Iterable[int] | None = None,
    null: bool = True,
    tokens: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Report what every head does on a sequence of which each rank holds some, as `causalattn.analyze` does on one.

    Every rank has the whole model and calls this with the same inputs, of which it takes its part: embeddings,
    projections and feed-forward layers see the rank's own tokens, attention those of all ranks.

    Args:
        model: a transformers model that takes position_ids, the same on every rank.
        inputs: one sequence without padding, [1, T] each, the same on every rank.
        mesh: one axis, the ranks that share the sequence.
        order: as in `shard`; by default zig-zag where a layer is causal, else contiguous.
        want, layers, null, tokens, progress: as in `causalattn.analyze`.

    Returns:
        Report of all tokens, the same on every rank.

    Raises:
        As `causalattn.analyze`. ValueError: more than one sequence, padding, or fewer tokens than the ranks need.
        NotImplementedError: a model without position_ids, or one in which a token's queries and keys depend on the
        tokens beside it otherwise than through attention (convolutions, recurrences, positions scaled by the longest).
        RuntimeError: another rank is gone, or later than the group's timeout.
    """
    want = wanted(want)
    texts = resolve_tokens(inputs, tokens)
    ring = Ring(mesh)
    T = _length(inputs, ring.size)
    numbers = self_attention(model)
    chosen = set(numbers) if layers is None else set(layers)
    if not chosen or not chosen <= set(numbers):
        raise ValueError(f"layers must be among {sorted(numbers)}, got {sorted(chosen - set(numbers))}")
    modules = {model.get_submodule(name): layer for layer, name in numbers.items()}
    order = order or ("zigzag" if any(_is_causal(module) for module in modules) else "contiguous")
    found: dict[int, tuple] = {}

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, options: dict) -> Tensor:
        mask = _mask(module, options)
        given = (mesh, order, False, mask, None, scaling, options.get("softcap"), options.get("s_aux"), "auto")
        blocks = Blocks(type(module).__name__, q, k, *given)
        layer = modules.get(module)
        if layer in found:
            family = model.config.model_type
            raise NotImplementedError(f"{family} attends in {numbers[layer]} more than once a forward pass")
        if layer in chosen:
            scores = _scored(blocks, q, k, want, null)
            found[layer] = to_cpu((*scores, blocks.intervals)), [*range(q.shape[1])]
            if progress is not None:
                progress(len(found), len(chosen))
        out = attend_all(blocks, q, k, v, "auto", wide=not use_triton("auto", q))[0]
        return out.to(v.dtype).transpose(1, 2).contiguous()

    with using(model), torch.no_grad():
        _check_model(model, inputs, T)
        local = _at(inputs, shard(torch.arange(T), mesh=mesh, order=order, dim=0))
        with _taking_over(attend):
            model(**cheapest(model, local))
    ids = sorted(found)
    stats, scores, intervals = ([found[layer][0][part] for layer in ids] for part in range(3))
    return Report(stats, ids, [found[layer][1] for layer in ids], texts or [[*map(str, range(T))]], scores, intervals)


def _scored(blocks: Blocks, q: Tensor, k: Tensor, want: set[str], null: bool) -> tuple[AttentionStats, HeadScores]:
    """The statistics of all tokens and the scores beside their nulls, as on one device."""

    def gathered(intervals: Intervals, names: set[str], columns: tuple = ()) -> AttentionStats:
        return _assembled(blocks, measure(blocks.with_mask(intervals), q, k, names, columns, "auto"))

    stats = gathered(blocks.intervals, want | {*SCORED, "columns"}, ("sink",))
    T = blocks.layout.T
    last = torch.full_like(blocks.intervals.stop, T)
    symmetry = _score_asymmetry(blocks, q, k)
    scores = head_scores(gathered, stats, blocks.intervals, last, T, null, "asymmetry" in want, symmetry)
    return stats._replace(**{name: None for name in stats._fields if name not in want}), scores


def _assembled(blocks: Blocks, stats: AttentionStats) -> AttentionStats:
    """Of every statistic of a row, a key or a token all of them, in their order."""
    layout: Layout = blocks.layout

    def whole(x: Tensor | None) -> Tensor | None:
        return x if x is None else assembled(blocks.ring.gather_ragged(x, layout.lengths, 2), layout, 2)

    found = {name: x for name, x in stats._asdict().items() if name not in ("dag_score", "asymmetry")}
    asymmetry = stats.asymmetry and stats.asymmetry._replace(net_flow=whole(stats.asymmetry.net_flow))
    return stats._replace(**{name: whole(x) for name, x in found.items()}, asymmetry=asymmetry)


def _score_asymmetry(blocks: Blocks, q: Tensor, k: Tensor) -> Tensor:
    """As `causalattn.score_asymmetry`, of sums of D × D products over the ranks."""
    Q, K = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    products = blocks.ring.total(torch.stack([Q.mT @ Q, K.mT @ K, K.mT @ Q]))
    norm = (products[0] * products[1]).sum((-1, -2))
    inner = (products[2] * products[2].mT).sum((-1, -2))
    return torch.sqrt((norm - inner).clamp(min=0) / (norm + inner)).to(accumulator(q))


def _mask(module: nn.Module, options: dict) -> Mask:
    window = options.get("sliding_window")
    if _is_causal(module, options):
        return causal() if window is None else sliding_window(window)
    if window is not None:
        raise NotImplementedError(f"{type(module).__name__}: a window on both sides is not supported on shards")
    return full()


def _is_causal(module: nn.Module, options: Mapping | None = None) -> bool:
    said = None if options is None else options.get("is_causal")
    return getattr(module, "is_causal", True) if said is None else said


def _length(inputs: Mapping[str, Tensor], ranks: int) -> int:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must map names to tensors, as a tokenizer returns them, got {type(inputs).__name__}")
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if ids is None or ids.shape[0] != 1:
        got = "neither input_ids nor inputs_embeds" if ids is None else f"{ids.shape[0]} sequences"
        raise ValueError(f"inputs must hold one sequence, got {got}")
    T = ids.shape[1]
    if (inputs.get("attention_mask", torch.ones(1)) == 0).any():
        raise ValueError("inputs must hold no padding, got an attention_mask with zeros")
    positions = inputs.get("position_ids")
    if positions is not None and not positions.flatten().equal(torch.arange(T, device=positions.device)):
        raise ValueError(f"inputs must hold one text, its positions 0 to {T - 1}, got other position_ids")
    if T < 2 * ranks:
        raise ValueError(f"inputs must hold at least two tokens a rank, {2 * ranks}, got {T}")
    return T


def _at(inputs: Mapping[str, Tensor], positions: Tensor) -> dict:
    """The tokens at some positions and, in position_ids, those; no mask, for nothing is padded."""
    given = {name: x for name, x in inputs.items() if name not in ("attention_mask", "position_ids")}
    device = next(iter(inputs.values())).device
    given = {
        name: x[:, positions.to(x.device)] if isinstance(x, Tensor) and x.ndim > 1 else x for name, x in given.items()
    }
    return given | {"position_ids": positions[None].to(device)}


def _check_model(model: nn.Module, inputs: Mapping[str, Tensor], T: int) -> None:
    """What a rank computes of its tokens must be what the whole text gives: all but attention a token at a time."""
    family, config = model.config.model_type, model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise NotImplementedError(f"{family} takes no position_ids, which a part of a sequence needs")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "attention_chunk_size", None):
        kind = next(iter(sorted(kinds)), "chunked_attention")
        raise NotImplementedError(f"{family} is not supported on shards: it has layers of {kind}")
    first = _at(inputs, torch.arange(min(PROBE, T)))
    counted = {name: x for name, x in first.items() if name != "position_ids"}
    if not torch.allclose(*(model(**cheapest(model, x))[0] for x in (first, counted)), rtol=1e-3, atol=1e-5):
        raise NotImplementedError(f"{family} does not count its positions from 0, so a part of a sequence has none")
    some = torch.tensor([0, 1, 2, T - 1])
    together = _queries_and_keys(model, _at(inputs, some))
    for n in range(len(some)):
        for x, own in zip(together, _queries_and_keys(model, _at(inputs, some[n : n + 1])), strict=True):
            if not (x[:, :, n : n + 1] - own).abs().max() <= 1e-3 * x.abs().max():
                raise NotImplementedError(
                    f"{family} is not supported on shards: a token's queries and keys depend on those beside it"
                )


def _queries_and_keys(model: nn.Module, inputs: dict) -> list[Tensor]:
    """q and k of every layer where attention gives each token its own value."""
    found = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, options: dict) -> Tensor:
        found.extend((q, k))
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2).contiguous()

    with _taking_over(attend):
        model(**cheapest(model, inputs))
    return found


@contextmanager
def _taking_over(attend: Takeover) -> Iterator[None]:
    token = takeover.set(attend)
    try:
        yield
    finally:
        takeover.reset(token)
