"""What a kernel's steady loop issues, read from NVIDIA machine code as cuobjdump prints it.

A pass over the tiles compiles to up to three copies of one loop, masked and whole; inside a copy, branches lead around
the store of an edge tile. What counts of a copy is the cheapest way around it that still does all of its products and
stores. Software pipelining moves loads into the previous iteration and leaves the number a tile as it is.
"""

import re
from collections import Counter
from typing import NamedTuple

# the first that matches
_KINDS = (
    ("mma", r"[A-Z]{1,2}MMA\b|UTC\w*MMA\b"),
    ("exp", r"MUFU\.EX2\b"),
    # the rest of what shares the pipe of exp2
    ("mufu", r"(?:MUFU|F2F|F2I|I2F|FRND)\b"),
    ("fp64", r"D(?:ADD|MUL|FMA|SETP|MNMX)\b"),
    ("local", r"(?:LDL|STL)\b"),
    ("memory", r"U?LD|STG|STS|STT|ST\b|SHFL|ATOM|RED|UTMA|UBLK|MOVM|UTCCP|CCTL"),
    ("sync", r"BAR|\w*DEPBAR|WARP|FENCE|MEMBAR|ERRBAR|SYNCS|UTCBAR|BSSY|BSYNC|BRA|NANOSLEEP|ELECT|ARRIVES|NOP|YIELD"),
    ("fp32", r"F(?:ADD|MUL|FMA|MNMX|SEL|SETP|SET|SWZADD|2FP)|H(?:ADD|MUL|FMA)2"),
    ("integer", r""),
)
KINDS = tuple(kind for kind, _ in _KINDS)
_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*?)\s*;")


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str
    kind: str
    stored: int  # bits that a thread writes to global memory


class Loop(NamedTuple):
    head: int
    body: frozenset[int]


class Pass(NamedTuple):
    """Once around the copies of one loop: the cheapest of them, and the dearest."""

    whole: list[Instruction]
    masked: list[Instruction]


class Code:
    """A kernel's instructions, the edges of its control flow and its loops."""

    def __init__(self, sass: str):
        found = _LINE.finditer(sass)
        # operands end where hints to the scheduler begin
        self.instructions = [
            _instruction(int(m[1], 16), m[2] or "", m[3], re.split("[&?]", m[4])[0].strip()) for m in found
        ]
        self._successors = _successors(self.instructions)
        self._postorder, self._retreating = _walk(self._successors)
        self._loops = self._find_loops()

    def passes(self) -> list[Pass]:
        """Every pass over the tiles, in the order of the code.

        Copies of one loop are known by the number of their products, or of their exponentials where they have none.
        """
        copies: dict[tuple[str, int], list[list[Instruction]]] = {}
        for loop in self._working():
            around = self.around(loop)
            counts = Counter(x.kind for x in around)
            kind = "mma" if counts["mma"] else "exp"
            copies.setdefault((kind, counts[kind]), []).append(around)
        return [Pass(min(group, key=len), max(group, key=len)) for group in copies.values()]

    def store_bits(self) -> int | None:
        """The narrowest store of a loop to global memory, edge tiles aside."""
        working = self._working()
        ways = [whole for whole, _ in self.passes()]
        ways += [self.around(loop) for loop in _innermost(self._loops) if loop not in working]
        return min((x.stored for way in ways for x in way if x.stored), default=None)

    def around(self, loop: Loop) -> list[Instruction]:
        """The cheapest way around loop that does its products, or exponentials where it has none, and its stores."""
        kind = "mma" if self._holds(loop, "mma") else "exp"
        best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
        for n in self._postorder:
            if n not in loop.body:
                continue
            ahead = [(best[t][0], t) for t in self._successors[n] if t in best and (n, t) not in self._retreating]
            if (n, loop.head) in self._retreating:
                ahead.append(((0, 0, 0), None))
            if ahead:
                (work, stored, issued), after = max(ahead, key=lambda way: way[0])
                x = self.instructions[n]
                best[n] = (work + (x.kind == kind), stored + x.stored, issued - 1), after
        way, n = [], loop.head
        while n is not None:
            way.append(self.instructions[n])
            n = best[n][1]
        return way

    def _holds(self, loop: Loop, kind: str) -> bool:
        return any(self.instructions[n].kind == kind for n in loop.body)

    def _working(self) -> list[Loop]:
        """Innermost loops with products, or else with exponentials; the longest innermost loop where there is none."""
        for kind in ("mma", "exp"):
            if loops := [loop for loop in self._loops if self._holds(loop, kind)]:
                return _innermost(loops)
        return sorted(_innermost(self._loops), key=lambda loop: len(self.around(loop)))[-1:]

    def _find_loops(self) -> list[Loop]:
        predecessors: list[set[int]] = [set() for _ in self.instructions]
        for n, after in enumerate(self._successors):
            for t in after:
                predecessors[t].add(n)
        bodies: dict[int, set[int]] = {}
        for latch, head in self._retreating:
            # not a jump back into straight code, such as from a rare case moved to the end
            if latch not in _reached(self._successors, 0, without=head):
                bodies.setdefault(head, {head}).update(_reached(predecessors, latch, without=head))
        return [Loop(head, frozenset(body)) for head, body in sorted(bodies.items())]


def _instruction(address: int, predicate: str, opcode: str, operands: str) -> Instruction:
    stored = 0
    if re.match(r"STG\b", opcode):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
        stored = int(width[1]) if width else 32
    kind = next(kind for kind, pattern in _KINDS if re.match(pattern, opcode))
    return Instruction(address, predicate, opcode, operands, kind, stored)


def _innermost(loops: list[Loop]) -> list[Loop]:
    return [loop for loop in loops if not any(other.body < loop.body for other in loops)]


def _successors(code: list[Instruction]) -> list[list[int]]:
    at = {x.address: n for n, x in enumerate(code)}
    edges = []
    for n, x in enumerate(code):
        after = [n + 1] if n + 1 < len(code) else []
        if re.match(r"BRA\b|JMP\b", x.opcode):
            target = re.search(r"(?:^|[\s,])0x([0-9a-f]+)$", x.operands)
            # BRA P1, 0x… has a second predicate before its target
            always = not x.predicate and target.start() == 0
            edges.append([at[int(target[1], 16)]] if always else [at[int(target[1], 16)], *after])
        elif re.match(r"EXIT\b|RET\b|BRX\b|KILL\b", x.opcode):
            edges.append(after if x.predicate else [])
        else:
            edges.append(after)
    return edges


def _walk(successors: list[list[int]]) -> tuple[list[int], set[tuple[int, int]]]:
    """Depth first from the entry: nodes, each after all that it leads to, and the edges that go back."""
    order, retreating = [], set()
    unfinished, seen = {0}, {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        n, rest = stack[-1]
        t = next(rest, None)
        if t is None:
            stack.pop()
            unfinished.discard(n)
            order.append(n)
        elif t in unfinished:
            retreating.add((n, t))
        elif t not in seen:
            seen.add(t)
            unfinished.add(t)
            stack.append((t, iter(successors[t])))
    return order, retreating


def _reached(edges, first: int, *, without: int) -> set[int]:
    seen, todo = {without}, [first]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo += edges[n]
    return seen - {without}
