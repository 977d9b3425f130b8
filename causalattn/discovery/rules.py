"""The orientation rules R0 … R10 for ancestral graphs, on bit sets, every match of a rule at once.

A rule reads a graph and names the marks it would turn, which are turned together, so the outcome does not depend on the
names of the tokens. Only circles turn. Of an arrow and a tail that are asked for at once, which consistent tests never
lead to, the arrow wins. Where a rule asks for an uncovered path a walk is looked for: in the graph that exact tests
give, an uncovered walk that meets no arrow against it meets no token twice.

Source: Zhang 2008, "On the completeness of orientation rules for causal discovery in the presence of latent
confounders and selection bias", Artificial Intelligence 172.
"""

from collections.abc import Callable, Iterator, Mapping

from .marks import Marks, tokens_of

# a, a set of its neighbours, and whether the marks at these become arrows (True) or tails
Turn = tuple[int, int, bool]
Rule = Callable[[Marks], Iterator[Turn]]
Sepsets = Mapping[tuple[int, int], int]


def orient_heads(marks: Marks, sepsets: Sepsets) -> None:
    """R0, then R1 … R4 to their end; sepsets: of a pair (a < b) that a test separated, the set that did it."""
    _turn(marks, _rule_0(marks, sepsets))
    _sweep(marks, _rule_1, _rule_2, _rule_3, lambda marks: _rule_4(marks, sepsets))


def orient_tails(marks: Marks, *, selection_bias: bool) -> None:
    """What R1 … R4 leave: R5 … R7 where there may be selection bias, and R8 … R10."""
    if selection_bias:
        _sweep(marks, _rule_5, _rule_6, _rule_7)
    _sweep(marks, _rule_8, _rule_9, _rule_10)


def _sweep(marks: Marks, *rules: Rule) -> None:
    """Rounds of the rules, one after another, until a round turns nothing."""
    turned = True
    while turned:
        turned = False
        for rule in rules:
            turned |= _turn(marks, rule(marks))


def _turn(marks: Marks, turns: Iterator[Turn]) -> bool:
    arrows, tails = [0] * marks.T, [0] * marks.T
    for a, ends, arrow in turns:
        (arrows if arrow else tails)[a] |= ends
    return marks.orient(arrows, tails)


def _rule_0(marks: Marks, sepsets: Sepsets) -> Iterator[Turn]:
    """a *-* c *-* b, a and b apart, c not in what separated them: a *→ c ←* b."""
    for (a, b), given in sepsets.items():
        colliders = marks.near[a] & marks.near[b] & ~given
        yield a, colliders, True
        yield b, colliders, True


def _rule_1(marks: Marks) -> Iterator[Turn]:
    """a *→ b o-* c, a and c apart: b → c."""
    for b in range(marks.T):
        into = marks.arrow_from[b]
        for c in tokens_of(marks.circle_at(b)) if into else ():
            if into & ~marks.near[c] & ~(1 << c):
                yield c, 1 << b, False
                yield b, 1 << c, True


def _rule_2(marks: Marks) -> Iterator[Turn]:
    """a → b *→ c or a *→ b → c, and a *-o c: a *→ c."""
    for a in range(marks.T):
        children, heads = marks.children(a), marks.arrow[a]
        for c in tokens_of(marks.circle(a)):
            if children & marks.arrow_from[c] or heads & marks.parents(c):
                yield a, 1 << c, True


def _rule_3(marks: Marks) -> Iterator[Turn]:
    """a *→ b ←* c, a *-o d o-* c, a and c apart, d *-o b: d *→ b."""
    for b in range(marks.T):
        into = marks.arrow_from[b]
        for d in tokens_of(marks.circle_at(b)) if into else ():
            both = into & marks.circle_at(d)
            if any(both & ~marks.near[a] & ~(1 << a) for a in tokens_of(both)):
                yield d, 1 << b, True


def _rule_4(marks: Marks, sepsets: Sepsets) -> Iterator[Turn]:
    """A path d, …, a, b, c that discriminates b: b → c where b is in what separated d and c, else a ↔ b ↔ c.

    Between d and b every token is a collider of the path and a parent of c, d and c are apart, and b o-* c.
    """
    for c in range(marks.T):
        parents = marks.parents(c)
        for b in tokens_of(marks.circle(c)) if parents else ():
            for a in tokens_of(parents & marks.arrow[b]):
                pairs = ((min(c, d), max(c, d)) for d in tokens_of(_ends_of_paths(marks, a, b, c, parents)))
                inside = {sepsets[pair] >> b & 1 for pair in pairs if pair in sepsets}
                if 1 in inside:
                    yield c, 1 << b, False
                    yield b, 1 << c, True
                if 0 in inside:
                    yield b, 1 << a | 1 << c, True
                    yield from ((a, 1 << b, True), (c, 1 << b, True))


def _ends_of_paths(marks: Marks, a: int, b: int, c: int, parents: int) -> int:
    """The tokens d at which paths d, …, a, b, c begin that discriminate b."""
    apart = ~(marks.near[c] | 1 << c)
    found, seen, to_do = 0, 1 << a | 1 << b, [a]
    while to_do:
        token = to_do.pop()
        found |= marks.arrow_from[token] & apart
        more = marks.arrow_from[token] & marks.arrow[token] & parents & ~seen
        seen |= more
        to_do += tokens_of(more)
    return found


def _rule_5(marks: Marks) -> Iterator[Turn]:
    """a o-o b on a cycle of o-o edges that no two tokens two steps apart shorten: a — b, as on all its edges."""
    both = [marks.circle(a) & marks.circle_at(a) for a in range(marks.T)]
    for a in range(marks.T):
        for b in tokens_of(both[a]):
            for first in tokens_of(both[a] & ~marks.near[b] & ~(1 << b)):
                before = _reached(marks, a, first, both.__getitem__)[b]
                if before & ~marks.near[a] & ~(1 << a):
                    yield from ((a, 1 << b, False), (b, 1 << a, False))
                    break


def _rule_6(marks: Marks) -> Iterator[Turn]:
    """a — b o-* c: b -* c."""
    for b in range(marks.T):
        if marks.tail[b] & marks.tail_from[b]:
            yield from ((c, 1 << b, False) for c in tokens_of(marks.circle_at(b)))


def _rule_7(marks: Marks) -> Iterator[Turn]:
    """a -o b o-* c, a and c apart: b -* c."""
    for b in range(marks.T):
        before = marks.circle_at(b) & marks.tail[b]
        for c in tokens_of(marks.circle_at(b)) if before else ():
            if before & ~marks.near[c] & ~(1 << c):
                yield c, 1 << b, False


def _half_directed(marks: Marks) -> Iterator[tuple[int, int]]:
    """The pairs a o→ c."""
    for c in range(marks.T):
        yield from ((a, c) for a in tokens_of(marks.arrow_from[c] & marks.circle(c)))


def _rule_8(marks: Marks) -> Iterator[Turn]:
    """a → b → c or a -o b → c, and a o→ c: a → c."""
    for a, c in _half_directed(marks):
        first = marks.children(a) | (marks.circle(a) & marks.tail_from[a])
        if first & marks.parents(c):
            yield c, 1 << a, False


def _rule_9(marks: Marks) -> Iterator[Turn]:
    """a o→ c and an uncovered path a, b, …, c that may be directed, b and c apart: a → c."""
    walks = _Walks(marks)
    for a, c in _half_directed(marks):
        firsts = marks.onward(a) & ~marks.near[c] & ~(1 << c)
        if any(walks.reached(a, b) >> c & 1 for b in tokens_of(firsts)):
            yield c, 1 << a, False


def _rule_10(marks: Marks) -> Iterator[Turn]:
    """a o→ c, b → c ← d, uncovered paths from a to b and from a to d that may be directed: a → c.

    The tokens after a on the two paths, b and d themselves perhaps, are two and apart.
    """
    walks = _Walks(marks)
    for a, c in _half_directed(marks):
        parents = marks.parents(c)
        ends = {m: walks.reached(a, m) & parents for m in tokens_of(marks.onward(a) & ~(1 << c))} if parents else {}
        ends = {m: found for m, found in ends.items() if found}
        pairs = ((m, o) for m in ends for o in ends if m < o and not marks.near[m] >> o & 1)
        if any((ends[m] | ends[o]).bit_count() > 1 for m, o in pairs):
            yield c, 1 << a, False


class _Walks:
    """What uncovered walks that may be directed reach, by their first two tokens; found once a sweep."""

    def __init__(self, marks: Marks) -> None:
        self.marks, self.found = marks, {}
        self.onward = [marks.onward(a) for a in range(marks.T)]

    def reached(self, a: int, b: int) -> int:
        if (a, b) not in self.found:
            before = _reached(self.marks, a, b, self.onward.__getitem__)
            self.found[a, b] = sum(1 << c for c, x in enumerate(before) if x)
        return self.found[a, b]


def _reached(marks: Marks, a: int, b: int, onward: Callable[[int], int]) -> list[int]:
    """Of each token, those from which an uncovered walk a, b, … steps onto it."""
    before = [0] * marks.T
    before[b] = 1 << a
    to_do = [(a, b)]
    while to_do:
        u, v = to_do.pop()
        for w in tokens_of(onward(v) & ~marks.near[u] & ~(1 << u)):
            if not before[w] >> v & 1:
                before[w] |= 1 << v
                to_do.append((v, w))
    return before
