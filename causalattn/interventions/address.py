"""Where an intervention acts, as people write it: "L5H3: sank <- storm", "[2:7]", a token's text."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_EDGE = re.compile(r"\s*(?:(?:L(?P<layer>\d+))?(?:H(?P<head>\d+))?\s*:)?(?P<row>.+?)<-(?P<col>.+)", re.DOTALL)
_SPAN = re.compile(r"\[\s*(-?\d+)\s*\]|\[\s*(-?\d+)?\s*:\s*(-?\d+)?\s*\]")
_SPAN_LIKE = re.compile(r"\[[\s\d:-]*\]")
_COUNTED = re.compile(r"(?P<text>.+)#(?P<number>[1-9]\d*)", re.DOTALL)


class Address(NamedTuple):
    """What an arrow names: query rows and key columns, None for all, and the layer and head, None for every one."""

    row: str | None
    col: str | None
    layers: int | None
    heads: int | None


def parse_address(text: str) -> Address:
    """Read "L5H3: row <- col"; layer and head may be left out, and * is every row or column.

    Raises:
        ValueError: no single arrow, or nothing on one side of it.
    """
    match = _EDGE.fullmatch(text)
    if match is None or text.count("<-") != 1 or not match["row"].strip() or not match["col"].strip():
        raise ValueError(f"an edge must read like 'L5H3: sank <- storm', got {text!r}")
    sides = (None if side == "*" else side for side in (match["row"].strip(), match["col"].strip()))
    return Address(*sides, *(None if match[name] is None else int(match[name]) for name in ("layer", "head")))


def is_span(text: str) -> bool:
    """Whether a text is meant as numbers, and not as the token "[CLS]"."""
    return _SPAN_LIKE.fullmatch(text.strip()) is not None


def parse_span(text: str) -> slice:
    """Read "[5]" or "[2:7]", either end of which may be left out or negative.

    Raises:
        ValueError: anything else.
    """
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a span must read like '[5]' or '[2:7]', got {text!r}")
    if match[1] is not None:
        at = int(match[1])
        return slice(at, None if at == -1 else at + 1)
    return slice(*(int(end) if end else None for end in match.groups()[1:]))


def locate(where: tuple[int, ...] | str | None, tokens: Sequence[str]) -> tuple[int, ...] | str | None:
    """where, with a text replaced by the numbers of the tokens it names.

    Raises:
        ValueError: the text occurs never, or more than once without "#number".
    """
    if not isinstance(where, str) or is_span(where):
        return where
    plain = [plain_token(token) for token in tokens]
    found = _runs(where, plain)
    counted = _COUNTED.fullmatch(where)
    if not found and counted is not None:
        every = _runs(counted["text"], plain)
        number = int(counted["number"])
        if number > len(every):
            raise ValueError(f"{counted['text']!r} occurs {len(every)} times among the tokens, got {where!r}")
        found = every[number - 1 : number]
    if not found:
        raise ValueError(f"{where!r} is not among the tokens {' '.join(plain[:12])}{' …' * (len(plain) > 12)}")
    if len(found) > 1:
        places = ", ".join(str(run.start) for run in found[:5])
        raise ValueError(f"{where!r} occurs {len(found)} times among the tokens, at {places}: write '{where}#2', say")
    return tuple(found[0])


def plain_token(token: str) -> str:
    """A token without the marks that tokenizers put before, or in the middle of, words."""
    return re.sub(r"^(##|[Ġ▁ ])+|</w>$", "", token)


def _runs(text: str, plain: list[str]) -> list[range]:
    """The runs of whole tokens that spell the text, blanks aside."""
    wanted = "".join(text.split())
    runs = []
    for first in range(len(plain)):
        spelled = ""
        for last in range(first, len(plain)):
            spelled += plain[last].strip()
            if not plain[last].strip() or not wanted.startswith(spelled):
                break
            if spelled == wanted:
                runs.append(range(first, last + 1))
                break
    return runs
