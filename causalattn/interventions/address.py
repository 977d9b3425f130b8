"""Where an intervention acts, as people write it: "L5H3: sank <- storm", "[2:7]", a token's text."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_EDGE = re.compile(r"\s*(?:(?=[LH])(?:L(?P<layer>\d+))?(?:H(?P<head>\d+))?\s*:)?(?P<row>.+?)<-(?P<col>.+)", re.DOTALL)
_SPAN = re.compile(r"\[\s*(-?\d+)\s*\]|\[\s*(-?\d+)?\s*:\s*(-?\d+)?\s*\]")
_SPAN_LIKE = re.compile(r"\[[\s\d:-]*\]")
_MARKS = re.compile(r"^(##|[Ġ▁ ])+|</w>$")
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
# GPT-2's letters for bytes: printable ones are themselves, the others follow from 256 on
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_ALPHABET = {chr(n): n for n in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
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
    found = _runs(where, tokens)
    counted = _COUNTED.fullmatch(where)
    if not found and counted is not None:
        every = _runs(counted["text"], tokens)
        number = int(counted["number"])
        if number > len(every):
            raise ValueError(f"{counted['text']!r} occurs {len(every)} times among the tokens, got {where!r}")
        found = every[number - 1 : number]
    if not found:
        raise ValueError(f"{where!r} is not among the tokens {_shown(tokens)}{' …' * (len(tokens) > 12)}")
    if len(found) > 1:
        places = ", ".join(str(run.start) for run in found[:5])
        raise ValueError(f"{where!r} occurs {len(found)} times among the tokens, at {places}: write '{where}#2', say")
    return tuple(found[0])


def _runs(text: str, tokens: Sequence[str]) -> list[range]:
    """The runs of whole tokens that spell the text, blanks aside: by their letters, else by the bytes they stand for.

    A run begins a word, unless the text itself begins with ##.
    """
    inner = text.startswith("##")
    wanted = "".join(text.split()).removeprefix("##").encode()
    for read in (_letters, _bytes):
        spelled = [b"".join(read(token).split()) for token in tokens]
        runs = []
        for first, token in enumerate(tokens):
            if spelled[first] and token.startswith("##") == inner:
                runs += _run_from(first, wanted, spelled)
        if runs:
            return runs
    return []


def _run_from(first: int, wanted: bytes, spelled: list[bytes]) -> list[range]:
    """The run from this token on that spells wanted, if there is one; blank tokens within it do not count."""
    so_far = b""
    for last in range(first, len(spelled)):
        so_far += spelled[last]
        if so_far == wanted:
            return [range(first, last + 1)]
        if not wanted.startswith(so_far):
            break
    return []


def _shown(tokens: Sequence[str]) -> str:
    """The first tokens as people read them."""
    try:
        b"".join(map(_bytes, tokens)).decode()
    except UnicodeDecodeError:
        return " ".join(_letters(token).decode() for token in tokens[:12])
    return " ".join(_bytes(token).decode(errors="replace") for token in tokens[:12])


def _letters(token: str) -> bytes:
    """A token without the marks that tokenizers put before, or in the middle of, words."""
    return _MARKS.sub("", token).encode()


def _bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary, or of SentencePiece's byte fallback, stands for; else its letters."""
    fallback = _FALLBACK.fullmatch(token)
    if fallback is not None:
        return bytes([int(fallback[1], 16)])
    if all(letter in _ALPHABET for letter in token):
        raw = bytes(_ALPHABET[letter] for letter in token)
        if not raw.isascii() or raw != token.encode():
            return raw.strip()
    return _letters(token)
