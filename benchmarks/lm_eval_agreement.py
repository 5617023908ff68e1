"""Do lori and lm-evaluation-harness, run by itself, say the same of every row?

    python benchmarks/lm_eval_agreement.py --base MODEL [--steps 40] [--rank 32] [--limit N]

The demo's three tasks are written down as harness tasks of two kinds: multiple choice (acc and
acc_norm) and generation (exact_match). One adapter is trained on each; lori scores the base
and every adapter through `lori add-task --lm-eval`, and `lm_eval.simple_evaluate` scores the
base's folder and the exported PEFT adapter by itself. Rows whose outcomes differ are counted.
Needs the extra `lm-eval`; no network.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from heading import heading

from lori_manager.workspace import Workspace

DATA = Path(__file__).parents[1] / "examples" / "data"
TASKS = ("clinc_domain", "snips", "sentiment_uci")
HEAD = """
task: {name}_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: "{{choices.index(answer)}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "written": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
filter_list:
  - name: stripped
    filter: [{function: remove_whitespace}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
MEASURED = (("choice", "acc"), ("choice", "acc_norm"), ("written", "exact_match"))


def alone(base: str, folder: Path, peft: Path | None, args: argparse.Namespace) -> dict:
    """Task -> the harness's samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    told = {"pretrained": base, "dtype": "bfloat16" if torch.cuda.is_available() else "float32"}
    found = simple_evaluate(
        model="hf",
        model_args=told | ({"peft": str(peft)} if peft else {}),
        tasks=[f"{name}_{kind}" for name in TASKS for kind in KINDS],
        task_manager=TaskManager(include_path=[str(folder)], include_defaults=False),
        batch_size=args.batch,
        device="cuda" if torch.cuda.is_available() else "cpu",
        limit=args.limit,
        bootstrap_iters=0,
    )
    return found["samples"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="a model's folder")
    parser.add_argument("--steps", type=int, default=40, help="of training")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, help="documents a task; all by default")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    libraries = ("torch", "transformers", "peft", "lm-eval")
    print(heading(0, libraries=libraries))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tasks"
        folder.mkdir()
        for name in TASKS:
            for kind, text in KINDS.items():
                head = HEAD.format(name=name, kind=kind, rows=DATA / name / "eval.jsonl")
                (folder / f"{name}_{kind}.yaml").write_text(head + text)
        ws = Workspace.create(Path(place) / "ws", args.base)
        config = ws.settings.config.replace(
            steps=args.steps, score_batch=args.batch, rank=args.rank
        )
        for name in TASKS:
            files = {split: str(DATA / name / f"{split}.jsonl") for split in ("train", "eval")}
            ws.add_task(name, **files)
            for kind, metric in MEASURED:
                ws.add_task(
                    f"{name}-{metric}", lm_eval=f"{name}_{kind}", lm_eval_include=str(folder),
                    lm_eval_metric=metric, lm_eval_limit=args.limit,
                )  # fmt: skip
        trained = [t.adapter.ref for t in ws.train(list(TASKS), config)]
        total = differ = 0
        print(f"\n{'subject':<18}{'task':<16}{'metric':<14}{'score':>7}{'rows':>6}{'differ':>8}")
        for subject in ("base", *trained):
            peft = None
            if subject != "base":
                peft = Path(place) / subject
                ws.export(subject, peft)
            samples = alone(args.base, folder, peft, args)
            for name in TASKS:
                for kind, metric in MEASURED:
                    (score,) = ws.score([subject], [f"{name}-{metric}"], config)
                    own = ws.store.outcomes(score)[0].tolist()
                    theirs = {s["doc_id"]: float(s[metric]) for s in samples[f"{name}_{kind}"]}
                    unlike = sum(x != theirs[i] for i, x in enumerate(own))
                    if len(own) != len(theirs):
                        raise SystemExit(f"{len(own)} rows here and {len(theirs)} there")
                    total, differ = total + len(own), differ + unlike
                    print(f"{subject:<18}{name:<16}{metric:<14}{score.value:>7.3f}"
                          f"{len(own):>6}{unlike:>8}", flush=True)  # fmt: skip
        print(f"\n{differ} of {total} outcomes differ")


if __name__ == "__main__":
    main()
