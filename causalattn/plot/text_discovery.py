"""The graph of the head that is furthest from its null."""

import torch

from ..text_discovery import TextDiscovery
from .drawing import Drawing
from .pag import draw_pag


def draw_best(result: TextDiscovery) -> Drawing:
    """That graph, an edge as wide as it is strong."""
    best = result.best()
    null = best.edges - best.beyond
    title = f"layer {result.layer}, head {best.head}: {best.edges} edges, {null:.1f} in its null"
    strengths = torch.from_numpy(best.found.strength).nan_to_num(0).clamp(max=10).numpy()
    return draw_pag(best.found.pag, strengths=strengths, title=title)
