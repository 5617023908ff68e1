"""Pictures of what adapters do: the same prompts and noise, a row for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.evaluation import counted_progress
from lori_manager.refs import BASE
from lori_manager.store.files import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PROMPTS = 4  # captions taken where no prompts are given


@dataclass(frozen=True)
class Sampled:
    """A grid of images as written.

    Attributes:
        path: the PNG.
        rows: what made each row: "base", then adapters.
        prompts: of the columns.
    """

    path: Path
    rows: tuple[str, ...]
    prompts: tuple[str, ...]


def sample(
    ws: Context,
    refs: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    path: str | Path = "grid.png",
    seed: int = 0,
    steps: int = 20,
    guidance: float = 7.5,
    config: Config | None = None,
) -> Sampled:
    """Images of every prompt by the base and by each adapter, in one PNG.

    The columns of a row differ in prompt and noise, the rows in the adapter alone.

    Args:
        refs: adapters; the base comes first by itself.
        prompts: a column each; where None, first captions that the adapters' tasks are scored
            on, of each task in turn.
        path: of the PNG; a file there is replaced.
        seed: of the noise.
        steps: of the pipeline's own scheduler.
        guidance: classifier-free, arXiv:2207.12598; 1 is off.
        config: its precision counts here; the workspace's own where None.
    Raises:
        InvalidInput: the base is a language model, nothing to show.
    """
    from lori_manager.diffusion.grid import grid, png
    from lori_manager.diffusion.images import Painter
    from lori_manager.engine.layers import attached, low_rank_layers

    if steps < 1:
        raise InvalidInput(f"`steps` must be at least 1, got {steps}")
    base = ws.pipeline(config or ws.settings.config)
    adapters = [ws.adapter(ref) for ref in refs if ref != BASE]
    for adapter in adapters:
        ws.check_single(adapter)
    names = list(dict.fromkeys(name for a in adapters for name in ws.tasks_of(a)))
    if prompts is None:
        prompts = _captions(ws, names)
    if not prompts or not all(p.strip() for p in prompts):
        raise InvalidInput("nothing to show: give `--prompts 'one;another'`")
    painter = Painter(base, steps=steps, guidance=guidance, seed=seed)
    told = counted_progress(ws, "sampling", rate=False)
    acting = [{}, *(low_rank_layers(base.model, ws.weights(a).updates()) for a in adapters)]
    rows: list[list[Image]] = []
    for layers in acting:
        with attached(base.model, layers):
            row = []
            for number, prompt in enumerate(prompts):
                row.append(painter.paint(prompt, number))
                told(len(rows) * len(prompts) + len(row), len(acting) * len(prompts))
        rows.append(row)
    labels = [BASE, *(a.ref for a in adapters)]
    target = Path(path)
    write_atomic(target, png(grid(rows, labels, prompts)))
    return Sampled(target, tuple(labels), tuple(prompts))


def _captions(ws: Context, names: Sequence[str]) -> list[str]:
    """Up to `MOST_PROMPTS` captions of tasks' eval images, taken in turn."""
    own = [[p.caption for p in ws.pictures(ws.store.task(name), "eval")] for name in names]
    turns = [caption for turn in zip_longest(*own) for caption in turn if caption is not None]
    return list(dict.fromkeys(turns))[:MOST_PROMPTS]
