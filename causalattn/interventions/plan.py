"""What to change in an attention map: items of one kind each, over rows, columns, heads and layers, joined with +."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

from torch import Tensor

from .address import is_span, locate, parse_address
from .arguments import (
    Probabilities,
    Where,
    ablation,
    by_layer,
    column,
    finite,
    numbers,
    pairs,
    place,
    probabilities,
    vector,
)  # fmt: skip

VERSION = 1


@dataclass(frozen=True, eq=False)
class Item:
    """One intervention: what is done, and where; None is everywhere.

    row and col are token numbers, a text that names tokens, or "[2:7]" for a span; edges are (row, col) pairs. source
    has outputs for a patch, [B or 1, H, T, V], and probabilities for patch_edges, [B or 1, H or 1, rows, cols].
    """

    do: str
    row: tuple[int, ...] | str | None = None
    col: tuple[int, ...] | str | None = None
    edges: tuple[tuple[int, int], ...] | None = None
    strength: float | None = None
    delta: Tensor | None = None
    value: str | None = None
    source: Tensor | Mapping[int, Tensor] | None = None
    heads: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    batch: tuple[int, ...] | None = None

    def __str__(self) -> str:
        places = [_shown(x) for x in (self.row, self.col, self.edges) if x is not None]
        if self.do in ("hard", "soft", "cut", "patch_edges") and self.edges is None:
            places = [_shown(self.row), _shown(self.col)]
        if self.strength is not None:
            places.append(f"{self.strength:g}")
        given = ((name, getattr(self, name)) for name in ("value", "heads", "layers", "batch"))
        return f"{self.do}({', '.join(places + [f'{name}={_shown(x)}' for name, x in given if x is not None])})"

    def on(self, layer: int) -> "Item":
        """The item as it is on one of its layers."""
        source = self.source[layer] if isinstance(self.source, Mapping) else self.source
        return replace(self, layers=None, source=source)


@dataclass(frozen=True, eq=False)
class Plan:
    """Interventions that are made together; on one row cuts come first, then softs, whose strengths add, then
    patched edges, then a hard.

    Example:
        >>> plan = Do.cut(None, "storm", layers=5) + Do.soft(7, 2, strength=3.0)
        >>> print(plan)
        cut(*, 'storm', layers=5) + soft(7, 2, 3)
        >>> print(plan.locate(["the", "storm", "sank"]))
        cut(*, 1, layers=5) + soft(7, 2, 3)
    """

    items: tuple[Item, ...] = ()

    def __add__(self, other: "Plan") -> "Plan":
        if not isinstance(other, Plan):
            return NotImplemented
        return Plan(self.items + other.items)

    def __str__(self) -> str:
        return " + ".join(map(str, self.items))

    def within(self, *, layers: int | Iterable[int] | None = None, heads: int | Iterable[int] | None = None) -> "Plan":
        """The same plan kept to these layers and heads, where an item does not choose its own."""
        scope = {"layers": numbers("layers", layers), "heads": numbers("heads", heads)}

        def kept(item: Item) -> Item:
            open_ = {name: x for name, x in scope.items() if getattr(item, name) is None}
            return replace(item, **open_)

        return Plan(tuple(map(kept, self.items)))

    def at(self, layer: int) -> dict[int, Item]:
        """The items that act on a layer, by their place in the plan."""
        return {n: item for n, item in enumerate(self.items) if item.layers is None or layer in item.layers}

    def locate(self, tokens: Sequence[str]) -> "Plan":
        """The same plan with every text replaced by the numbers of the tokens it names.

        Args:
            tokens: one sequence's real tokens, as a tokenizer gives them; their word marks (Ġ, ▁) do not count, and
                the letters of a byte-level vocabulary are read as the bytes they stand for. A text may name several
                tokens in a row, from the beginning of a word on; "##ship" is a word's continuation, and "ship#2" the
                second occurrence.

        Raises:
            ValueError: a text that occurs never, or more than once without saying which.
        """

        def found(item: Item) -> Item:
            return replace(item, row=locate(item.row, tokens), col=locate(item.col, tokens))

        return Plan(tuple(map(found, self.items)))

    def to_json(self) -> str:
        """The plan as JSON that `from_json` reads.

        Raises:
            TypeError: a patch of outputs, whose tensors belong in no text file.
        """
        return json.dumps({"version": VERSION, "items": [_written(item) for item in self.items]}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that a JSON text describes: {"items": [{"do": "cut", "edge": "L5H3: sank <- storm"}, …]}.

        An item has "do" and the arguments of the method of `Do` with that name; "edge" stands for row, col, layers and
        heads, as text.

        Raises:
            ValueError: no JSON, another version, an unknown "do" or argument, or a value that `Do` refuses.
        """
        try:
            read = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a plan must be JSON, got {error.msg} at line {error.lineno}") from error
        if not isinstance(read, dict) or not isinstance(read.get("items"), list) or not read["items"]:
            raise ValueError('a plan must be an object with a list "items" of at least one item')
        if extra := sorted(read.keys() - {"version", "items"}):
            raise ValueError(f'a plan has "version" and "items", got {extra[0]!r} too')
        if read.get("version", VERSION) != VERSION:
            raise ValueError(f"a plan must have version {VERSION}, got {read['version']!r}")
        return sum((_read(item) for item in read["items"]), Plan())


class Do:
    """Makes plans of one item; row is a query and col a key, by token number, text or "[2:7]", None for all of them.

    Every method takes `heads`, `layers` and `batch` (numbers, one or several; all by default). In place of row and col
    stands one text such as "L5H3: sank <- storm". Negative numbers count from the end, in generate from the end of the
    prompt; an open span such as slice(5, None) reaches generated tokens too.

    Raises:
        ValueError: an address that cannot be read, a strength that is not finite.
        TypeError: what is neither a number nor an address.

    Source: the hard and soft do on a row of attention; Pearl 2009, Causality, for the operator.
    """

    @staticmethod
    def hard(row: Where = None, col: Where = None, *, edges=None, heads=None, layers=None, batch=None) -> Plan:
        """Row i attends key j alone: o_i = v_j."""
        return _edge_plan("hard", row, col, edges, heads, layers, batch)

    @staticmethod
    def soft(
        row: Where = None, col: Where = None, strength: float | None = None, *,
        edges=None, heads=None, layers=None, batch=None,
    ) -> Plan:  # fmt: skip
        """The score S_ij gets +strength, in natural units: o_i = (o + w v_j)/(1 + w) with w = A_ij (e^strength − 1)."""
        return _edge_plan("soft", row, col, edges, heads, layers, batch, strength=finite("strength", strength))

    @staticmethod
    def cut(row: Where = None, col: Where = None, *, edges=None, heads=None, layers=None, batch=None) -> Plan:
        """Row i may not attend key j, and the rest of the row is made to sum to one again."""
        return _edge_plan("cut", row, col, edges, heads, layers, batch)

    @staticmethod
    def causal(*, heads=None, layers=None, batch=None) -> Plan:
        """Cut every key after the query's own: the causal mask as a do."""
        return _plan("causal", heads, layers, batch)

    @staticmethod
    def key_edit(col: Where, delta: Tensor | Sequence[float], *, heads=None, layers=None, batch=None) -> Plan:
        """k_j becomes k_j + delta, [D], for every row: a soft do of strength scale·q_i·delta on all of column j."""
        return _plan("key_edit", heads, layers, batch, col=column(col), delta=vector(delta))

    @staticmethod
    def value_edit(col: Where, delta: Tensor | Sequence[float], *, heads=None, layers=None, batch=None) -> Plan:
        """v_j becomes v_j + delta, [V], for every row: o_i + A_ij delta."""
        return _plan("value_edit", heads, layers, batch, col=column(col), delta=vector(delta))

    @staticmethod
    def head_off(heads: int | Sequence[int], *, value: str = "zero", layers=None, batch=None) -> Plan:
        """The heads' own outputs, before the output projection, become 0 or, "mean", their mean over the call's rows.

        A step of generate has one row, which is its mean.
        """
        if heads is None:
            raise TypeError("heads must be a number or numbers, got None: Do.layer_off takes all of a layer")
        return _plan("head_off", heads, layers, batch, value=ablation(value))

    @staticmethod
    def layer_off(layers: int | Sequence[int], *, value: str = "zero", batch=None) -> Plan:
        """`head_off` for every head of the layers."""
        return _plan("head_off", None, layers, batch, value=ablation(value))

    @staticmethod
    def patch(source: Tensor | Mapping[int, Tensor], row: Where = None, *, heads=None, layers=None, batch=None) -> Plan:
        """Outputs of rows are taken from source: [B or 1, H, T, V], or one such tensor a layer, of another run."""
        sources = list(source.values()) if isinstance(source, Mapping) else [source]
        if not sources or any(not isinstance(x, Tensor) or x.ndim != 4 for x in sources):
            raise TypeError("source must be a tensor [B, H, T, V], or a mapping of layers to such tensors")
        return _plan("patch", heads, layers, batch, row=place("row", row), source=source)

    @staticmethod
    def patch_edges(
        source: Probabilities | Mapping[int, Probabilities], row: Where = None, col: Where = None, *,
        edges=None, heads=None, layers=None, batch=None,
    ) -> Plan:  # fmt: skip
        """A_ij becomes c_ij of source, such as a clean run's, and the rest of the row keeps its proportions.

            o_i = (1 − Σ c)·(o − Σ p v_j)/(1 − Σ p) + Σ c v_j over the row's edges, p = A_ij

        source is a number, lists or a tensor that broadcast to [B, H, rows, cols], or to [B, H, edges], such as
        `attention_rows`(…)[..., cols]; or a mapping of layers to such. In a model it may have fewer rows or columns
        than a span, whose others stay. It comes after cuts and softs. Where the row keeps nothing else c is
        divided by its sum, and lse is that of the patched keys. c and its sum in a row must be from 0 to 1; on a GPU,
        where they cannot be looked at, a larger sum is divided by itself.
        """
        source = by_layer(source) if isinstance(source, Mapping) else probabilities(source)
        return _edge_plan("patch_edges", row, col, edges, heads, layers, batch, source=source)


def _edge_plan(kind: str, row: Where, col: Where, edges, heads, layers, batch, **values) -> Plan:
    if edges is not None:
        if row is not None or col is not None:
            raise ValueError("edges stand in place of row and col, got both")
        return _plan(kind, heads, layers, batch, edges=pairs(edges), **values)
    if isinstance(row, str) and "<-" in row:
        address = parse_address(row)
        if col is not None:
            raise ValueError(f"col must be left out beside {row!r}, got {col!r}")
        row, col = address.row, address.col
        heads = address.heads if heads is None else heads
        layers = address.layers if layers is None else layers
    if col is None and kind != "cut":
        raise ValueError(f"{kind} needs a col, got None")
    if row is None and col is None:
        raise ValueError("cut needs a row or a col, got neither")
    return _plan(kind, heads, layers, batch, row=place("row", row), col=place("col", col), **values)


def _plan(kind: str, heads, layers, batch, **arguments) -> Plan:
    scope = {name: numbers(name, x) for name, x in (("heads", heads), ("layers", layers), ("batch", batch))}
    for name, chosen in scope.items():
        if chosen is not None and min(chosen) < 0:
            raise ValueError(f"{name} must count from 0, got {min(chosen)}")
    return Plan((Item(kind, **arguments, **scope),))


def _shown(x) -> str:
    if x is None:
        return "*"
    return str(x[0]) if isinstance(x, tuple) and len(x) == 1 else repr(x) if isinstance(x, str) else str(list(x))


def _written(item: Item) -> dict:
    if item.do == "patch":
        raise TypeError("a patch cannot be written as JSON: it holds tensors")
    given = {field.name: getattr(item, field.name) for field in fields(item)}
    if item.delta is not None:
        given["delta"] = item.delta.tolist()
    if isinstance(item.source, Mapping):
        given["source"] = {layer: x.tolist() for layer, x in item.source.items()}
    elif item.source is not None:
        given["source"] = item.source.tolist()
    return {name: x for name, x in given.items() if x is not None}


def _read(item) -> Plan:
    kinds = ("hard", "soft", "cut", "causal", "key_edit", "value_edit", "head_off", "patch_edges")
    if not isinstance(item, dict) or item.get("do") not in kinds:
        raise ValueError(f'an item must have "do" among {", ".join(kinds)}, got {item!r}')
    arguments = {name: x for name, x in item.items() if name != "do"}
    if "edge" in arguments:
        if "row" in arguments:
            raise ValueError(f"an item has edge or row and col, got both in {item!r}")
        arguments["row"] = arguments.pop("edge")
        if not isinstance(arguments["row"], str) or "<-" not in arguments["row"]:
            raise ValueError(f"edge must read like 'L5H3: sank <- storm', got {arguments['row']!r}")
    make = getattr(Do, item["do"])
    if item["do"] == "head_off" and "heads" not in arguments:
        make = Do.layer_off
        arguments.setdefault("layers", None)
    try:
        return make(**arguments)
    except TypeError as error:
        raise ValueError(f"the plan's item {json.dumps(item, ensure_ascii=False)} is wrong: {error}") from error


def check_plan(do: Plan) -> Plan:
    """do as a plan of numbers only, for tensors: what acts on a model's tokens needs the model."""
    if not isinstance(do, Plan):
        raise TypeError(f"do must be a causalattn Plan, such as Do.cut(7, 2), got {type(do).__name__}")
    texts = (x for x in chain.from_iterable((item.row, item.col) for item in do.items) if isinstance(x, str))
    if unknown := [x for x in texts if not is_span(x)]:
        raise ValueError(f"{unknown[0]!r} names a token, and tensors have none: use plan.locate(tokens) first")
    return do
