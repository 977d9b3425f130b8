"""Ranks in a ring: what one holds goes to the next while the one before is worked on."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Tensors = tuple[Tensor, ...]
# numbers of 8 bytes that every call begins with
HEADER = 24


@dataclass
class Traffic:
    """Bytes that this rank has sent: to its neighbour in the ring, and as its part of what all ranks gather."""

    ring: int = 0
    gathered: int = 0


_traffic: ContextVar[Traffic | None] = ContextVar("causalattn_traffic", default=None)


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what this rank sends inside the `with` block.

    Example:
        >>> with traffic() as sent:
        ...     pass
        >>> sent.ring
        0
    """
    counted = Traffic()
    token = _traffic.set(counted)
    try:
        yield counted
    finally:
        _traffic.reset(token)


class Ring:
    """The ranks of a one-dimensional mesh, each sending to the next."""

    def __init__(self, mesh: DeviceMesh):
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one axis, the ranks that share the sequence, got {mesh.ndim}")
        self.group = mesh.get_group()
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._next, self._before = (
            dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, self.size - 1)
        )

    def visits(self, own: Tensors, lengths: Sequence[int], axis: int = 2, hops: int | None = None) -> Iterator:
        """(owner, its tensors) of every rank, or of the `hops` before this one, itself first.

        lengths are those of each rank's tensors along axis; the next visit's are under way while the caller works.
        """
        held = own
        last = self.size - 1 if hops is None else hops
        for step in range(last + 1):
            owner = (self.rank - step) % self.size
            waiting = None
            if step < last:
                waiting = self._start(held, [_like(x, axis, lengths[owner - 1]) for x in held])
            try:
                yield owner, held
            finally:
                # also where the caller gave up: what is under way must not meet what comes later
                if waiting is not None:
                    held = self._finish(*waiting)

    def shift(self, held: Tensors, lengths: Sequence[int], axis: int, owner: int) -> Tensors:
        """Hand owner's tensors to the next rank, and take those of the owner before from the one before."""
        if self.size == 1:
            return held
        return self._finish(*self._start(held, [_like(x, axis, lengths[owner - 1]) for x in held]))

    def agree(self, name: str, length: int, check: Callable[[], dict[str, object]]) -> list[int]:
        """How many tokens each rank holds, once every rank's own arguments are checked and what must be alike is.

        check raises what is wrong with this rank's arguments, or says what the others must have too.
        """
        facts, refusal = {}, None
        try:
            facts = {"the operator": name, **check()}
        except Exception as error:
            refusal = error
        header = [refusal is not None, length, *(zlib.crc32(repr(fact).encode()) for fact in facts.values())]
        header = torch.tensor(header + [0] * (HEADER - len(header)), device=self.device)
        ranks = torch.stack(self.gather(header)).tolist()
        if refusal is not None:
            raise refusal
        for rank, theirs in enumerate(ranks):
            if theirs[0]:
                raise ValueError(f"rank {rank} refused its arguments, and says which")
        for n, (what, own) in enumerate(facts.items(), 2):
            other = next((rank for rank, theirs in enumerate(ranks) if theirs[n] != ranks[self.rank][n]), None)
            if other is not None:
                raise ValueError(f"{what} must be the same on every rank, got {own!r}, and another on rank {other}")
        return [theirs[1] for theirs in ranks]

    @property
    def device(self) -> torch.device:
        """Where the ranks exchange numbers: NCCL knows no tensors on a CPU."""
        cuda = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def gather(self, x: Tensor) -> list[Tensor]:
        """x of every rank, all of one shape."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _told("all_gather"):
            dist.all_gather(parts, x.contiguous(), group=self.group)
        _count("gathered", x.nbytes * (self.size - 1))
        return parts

    def gather_ragged(self, x: Tensor, lengths: Sequence[int], axis: int) -> list[Tensor]:
        """x of every rank, of so many along axis."""
        whole = _like(x, axis, max(lengths, default=0))
        whole.narrow(axis, 0, x.shape[axis]).copy_(x)
        return [part.narrow(axis, 0, length) for part, length in zip(self.gather(whole), lengths, strict=True)]

    def total(self, x: Tensor) -> Tensor:
        """Σ over the ranks, in their order, the same bits on each."""
        return torch.stack(self.gather(x)).sum(0)

    def largest(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x)).amax(0)

    def _start(self, held: Sequence[Tensor], incoming: list[Tensor]) -> tuple[list[dist.Work], list[Tensor], object]:
        # as bytes: gloo does not know every dtype; kept until they are sent
        leaving = [_bytes(x.contiguous()) for x in held]
        operations = [dist.P2POp(dist.isend, x, self._next, self.group, tag) for tag, x in enumerate(leaving) if len(x)]
        operations += [
            dist.P2POp(dist.irecv, _bytes(x), self._before, self.group, tag)
            for tag, x in enumerate(incoming)
            if x.numel()
        ]
        _count("ring", sum(map(len, leaving)))
        with _told("a ring exchange"):
            return dist.batch_isend_irecv(operations) if operations else [], incoming, leaving

    def _finish(self, works: list[dist.Work], incoming: list[Tensor], leaving: object) -> Tensors:
        with _told("a ring exchange"):
            for work in works:
                work.wait()
        return tuple(incoming)


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()
        said = reason[0] if reason else repr(error)
        raise RuntimeError(f"{what} failed, another rank may be gone, late or in another call: {said}") from error


def _like(x: Tensor, axis: int, length: int) -> Tensor:
    return x.new_empty(*x.shape[:axis], length, *x.shape[axis + 1 :])


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _count(field: str, amount: int) -> None:
    counted = _traffic.get()
    if counted is not None:
        setattr(counted, field, getattr(counted, field) + amount)
