"""Does `lori merge --method auto` choose well? Its choice against the best known afterwards.

    python benchmarks/auto_regret.py --base MODEL --data FOLDER --work FOLDER --log FILE
        [--kind lora+low] [--seed 0] [--tasks a,b,c]

Takes the adapters that `merge_quality.py --plan train` left in --work into a new workspace, one
a task, merges them by `auto` on 256 probe rows a task, then by each of its candidates on all of
those rows, and scores all of it on evaluation rows that none of it read. Regret is the best
retention among the candidates less that of what `auto` chose; one JSON line goes to the log.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from merge_quality import TASKS, chances

from lori_manager import Workspace
from lori_manager.combining import CANDIDATES
from lori_manager.engine.codec import decode_adapter, encode_adapter
from lori_manager.records import NewAdapter, Score

ROWS = 256


def filled(args: argparse.Namespace, folder: str, tasks: list[str]) -> Workspace:
    """A workspace with the tasks, their last rows as probe rows, and one adapter each."""
    ws = Workspace.create(folder, args.base)
    base = ws.store.base().fingerprint
    for task in tasks:
        lines = (args.data / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
        for name, part in (("train", lines[:-ROWS][:3000]), ("probe", lines[-ROWS:])):
            (Path(folder) / f"{task}-{name}.jsonl").write_text("\n".join(part) + "\n")
        ws.add_task(
            task,
            train=f"{folder}/{task}-train.jsonl",
            probe=f"{folder}/{task}-probe.jsonl",
            eval=str(args.data / task / "eval.jsonl"),
            allow_overlap=True,
        )
        content = (args.work / f"{args.kind}-{task}-{args.seed}.safetensors").read_bytes()
        weights, _ = decode_adapter(content)
        ws.store.add_adapter(
            NewAdapter(
                line=task, origin="trained", task=task, task_revision=1, mask=None, parents=(),
                method=args.kind.partition("+")[0], rank=weights.rank, projection=None, base=base,
            ),
            encode_adapter(weights, {"base": base}),
        )  # fmt: skip
    return ws


def retention(scores: tuple[Score, ...], ref: str, chance: dict[str, float]) -> float:
    """The mean over tasks of what a merge keeps above chance, at most 1 each."""
    own = {s.task: s.value for s in scores if s.subject.startswith(f"{s.task}@")}
    kept = [
        min(1.0, max(s.value - chance[s.task], 0.0) / (own[s.task] - chance[s.task]))
        for s in scores
        if s.subject == ref and own[s.task] - chance[s.task] >= 0.1
    ]
    return statistics.fmean(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", required=True)
    add("--data", type=Path, required=True)
    add("--work", type=Path, required=True)
    add("--log", type=Path, required=True)
    add("--kind", default="lora+low")
    add("--seed", type=int, default=0)
    add("--tasks", default=",".join(TASKS))
    args = parser.parse_args()
    tasks = args.tasks.split(",")
    chance = chances(args.data, tasks)
    with tempfile.TemporaryDirectory() as folder, filled(args, folder, tasks) as ws:
        ws.on_message = lambda text: print(text, flush=True)
        begin = time.monotonic()
        found = ws.merge([], names=tasks, method="auto", probe_rows=ROWS)
        seconds = time.monotonic() - begin
        config = found.adapter.config
        chose = (found.adapter.method, config["settings"].get("max_rank"))
        kept = {"auto": retention(found.scores, found.adapter.ref, chance)}
        for trial in config["tried"]:
            changes = next(
                c for n, c in CANDIDATES if n == trial["name"] and dict(c) == trial["options"]
            )
            if (trial["name"], changes.get("max_rank")) == chose:
                kept[json.dumps(chose)] = kept["auto"]
                continue
            one = ws.merge([], names=tasks, method=trial["name"], options=changes,
                           weights=[trial["weight"]] * len(tasks), probe_rows=ROWS)  # fmt: skip
            label = json.dumps((trial["name"], changes.get("max_rank")))
            kept[label] = retention(one.scores, one.adapter.ref, chance)
    best = max(kept, key=kept.__getitem__)
    result = {
        "what": "auto", "kind": args.kind, "seed": args.seed, "tasks": tasks, "seconds": seconds,
        "chose": list(chose), "kept": kept, "best": best, "regret": kept[best] - kept["auto"],
        "tried": [
            {k: trial[k] for k in ("name", "options", "weight", "kept")}
            for trial in config["tried"]
        ],
    }  # fmt: skip
    with args.log.open("a") as f:
        f.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
