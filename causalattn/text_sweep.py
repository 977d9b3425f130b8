"""The edges that a text's last hidden states hang on most, as a table."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experiments import KnockoutSweep, knockout_sweep


class TextSweep(NamedTuple):
    """tokens [T], what was read out, and the sweep of it."""

    tokens: list[str]
    readout: str
    sweep: KnockoutSweep

    def rows(self) -> list[dict]:
        """One dict an edge, the largest screened effect first."""
        found = zip(self.sweep.edges.tolist(), self.sweep.screened.tolist(), self.sweep.verified.tolist(), strict=True)
        return [
            {"layer": layer, "head": head, "row": row, "col": col, "screened": screened, "verified": verified}
            for (_, layer, head, row, col), screened, verified in found
        ]

    def to_json(self) -> str:
        agreement = {"agreement": self.sweep.agreement, "size_agreement": self.sweep.size_agreement}
        agreement = {name: None if x != x else x for name, x in agreement.items()}
        whole = {"tokens": self.tokens, "readout": self.readout, "baseline": float(self.sweep.baseline)}
        return json.dumps(whole | agreement | {"edges": self.rows()}, ensure_ascii=False)


def sweep_text(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    tokens: Sequence[str],
    *,
    against: Mapping[str, Tensor] | None = None,
    top: int = 20,
    kind: str = "cut",
    strength: float | None = None,
    layers: Iterable[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextSweep:
    """Sweep every edge of one text for its effect on the text's mean last hidden state h.

    The readout is cos(h, g), with g the mean of the text `against`, else a random direction that the width of the model
    alone decides: h's own would have no slope.

    Args, Raises:
        As `knockout_sweep`; inputs is one sequence without padding, and tokens are its strings.
    """
    if against is None:
        name = "cosine of the mean last hidden state to a fixed random direction"
        goal = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    else:
        name = "cosine of the mean last hidden states of the two texts"
        with torch.no_grad():
            goal = _mean(model(**against))[0]

    def readout(outputs) -> Tensor:
        h = _mean(outputs)
        return F.cosine_similarity(h, goal.to(h), dim=-1)

    options = {"top": top, "kind": kind, "strength": strength, "layers": layers, "progress": progress}
    return TextSweep(list(tokens), name, knockout_sweep(model, inputs, readout, **options))


def table(result: TextSweep) -> list[str]:
    """An edge a line, and how far screening and verification agree."""
    sweep = result.sweep
    lines = [f"readout: {result.readout}, {float(sweep.baseline):.4f}", "layer  head    screened    verified  edge"]
    for row in result.rows():
        edge = f"{result.tokens[row['row']]} @{row['row']} <- {result.tokens[row['col']]} @{row['col']}"
        effects = f"{row['screened']:>+10.5f}  {row['verified']:>+10.5f}"
        lines.append(f"{row['layer']:>5}  {row['head']:>4}  {effects}  {edge}")
    agreement = f"rank agreement {sweep.agreement:.3f}, of their sizes {sweep.size_agreement:.3f}"
    lines.append(f"screened is first order, verified a forward pass; {agreement}")
    return lines


def _mean(outputs) -> Tensor:
    return outputs.last_hidden_state.mean(1)
