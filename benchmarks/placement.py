"""What `lori place` chooses on a real model, how surely, and how long it takes.

    python benchmarks/placement.py --base MODEL_FOLDER [--data FOLDER] [--tasks a,b,c]
        [--prompts 64] [--draws 5] [--top 3]

Each task's layers are scored on several draws of prompts (seeds 0, 1, ...), in a workspace of
its own, on whatever device and in whatever precision lori chooses. The time of a draw is that of
`Workspace.place` with the base loaded: reading and drawing rows, forwards, norms of weights;
the processor's own seconds stand beside it, for machines that others use too.
FOLDER holds a folder a task with train.jsonl and eval.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from heading import heading

from lori_manager.models import best_device
from lori_manager.placement import Placement
from lori_manager.workspace import Workspace

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
# Of SmolLM2-135M on prompts of mathematics, by a script of its own.
KNOWN = {"v_proj": 0.61, "up_proj": 0.95, "down_proj": 1.05}
SECONDS = 15.0


Seconds = list[tuple[float, float]]  # by the clock, of the processor


def draws(ws: Workspace, task: str, count: int, prompts: int) -> tuple[list[Placement], Seconds]:
    """The placements of seeds 0, 1, ... and their seconds."""
    found, seconds = [], []
    for seed in range(count):
        begin, used = time.perf_counter(), time.process_time()
        found.append(ws.place(task, ws.settings.config.replace(seed=seed), prompts=prompts))
        seconds.append((time.perf_counter() - begin, time.process_time() - used))
    return found, seconds


def report(found: list[Placement], seconds: Seconds, top: int) -> None:
    """One task's scores over all draws, its choices and times."""
    first = found[0]
    names = [one.name for one in first.types]
    by_draw = [{one.name: one.score for one in draw.types} for draw in found]
    print(f"\n{first.task}: {first.prompts} prompts, {first.tokens} tokens in the first draw\n")
    print("| type | mean score | least - most | known | off |\n|---|---|---|---|---|")
    for name in names:
        scores = [draw[name] for draw in by_draw]
        known = KNOWN.get(name)
        mean = statistics.fmean(scores)
        told = ("", "") if known is None else (f"{known:.2f}", f"{mean / known - 1:+.1%}")
        print(f"| {name} | {mean:.3f} | {min(scores):.3f} - {max(scores):.3f} "
              f"| {' | '.join(told)} |")  # fmt: skip
    choices = {draw.targets(top) for draw in found}
    same = len({frozenset(choice) for choice in choices}) == 1
    margin = min(draw.types[top].score - draw.types[top - 1].score for draw in found)
    said = "the same types in every draw" if same else "not the same types in every draw"
    print(f"\nchosen: {'; '.join(', '.join(choice) for choice in sorted(choices))} ({said}; the "
          f"next type at least {margin:.3f} higher)")  # fmt: skip
    clock, processor = (list(column) for column in zip(*seconds, strict=True))
    print(f"seconds a draw: median {statistics.median(clock):.2f}, {min(clock):.2f} to "
          f"{max(clock):.2f} (goal {SECONDS:g}); of the processor's, all cores together, median "
          f"{statistics.median(processor):.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", required=True)
    add("--data", type=Path, default=DATA)
    add("--tasks", default="clinc_domain,snips,sentiment_uci")
    add("--prompts", type=int, default=64)
    add("--draws", type=int, default=5)
    add("--top", type=int, default=3)
    args = parser.parse_args()
    print(heading(f"0 to {args.draws - 1}", device=best_device(),
                  libraries=("torch", "transformers")))  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        Workspace.create(Path(folder) / "ws", args.base) as ws,
    ):
        begin = time.perf_counter()
        base = ws.base_model(ws.settings.config)
        print(f"{base.precision} on {base.device.type}; loaded in "
              f"{time.perf_counter() - begin:.1f} s, not counted below")  # fmt: skip
        for task in args.tasks.split(","):
            source = args.data.resolve() / task
            ws.add_task(task, train=str(source / "train.jsonl"), eval=str(source / "eval.jsonl"),
                        allow_overlap=True)  # fmt: skip
            report(*draws(ws, task, args.draws, args.prompts), args.top)


if __name__ == "__main__":
    main()
