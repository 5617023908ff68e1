"""Local harness tasks of every kind, their data made here: nothing is fetched."""

import json
import random
from pathlib import Path

COLOURS = ("red", "dark blue", "green", "violet-ish")
FUNCTIONS = """
def add_hint(dataset):
    return dataset.map(lambda doc: {"hint": doc["q"][::-1]})


def judged(doc, results):
    (text,) = results
    return {"starts": float(text[:1] == doc["a"][:1]), "length": len(text)}


def answer(doc):
    return doc["a"]
"""
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/choice.jsonl, train: {data}/shots.jsonl}}}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
num_fewshot: {shots}
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
SUMMED_UP = """
include: choice.yaml
task: tiny_brier
metric_list:
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: tiny_group
task: [tiny_choice, tiny_written]
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/written.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - name: begins
    filter:
      - {function: regex, regex_pattern: "(..)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
JUDGED = """
task: tiny_judged
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/written.jsonl}}
output_type: generate_until
test_split: test
process_docs: !function functions.add_hint
doc_to_text: "{{hint}} {{q}}"
doc_to_target: !function functions.answer
process_results: !function functions.judged
generation_kwargs: {until: ["z"], max_gen_toks: 5}
metric_list:
  - {metric: starts, aggregation: mean, higher_is_better: true}
  - {metric: length, aggregation: mean, higher_is_better: false}
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/written.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
LAST = """
task: tiny_last
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/written.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{q}}"
doc_to_target: " {{a}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def write_tasks(folder: Path, rows: int = 24, written: list[str] | None = None) -> Path:
    """A folder for `--lm-eval-include`.

    Args:
        rows: documents a task.
        written: the answers of the first documents that are written; made up by default.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def lines(name, docs):
        (folder / name).write_text("".join(json.dumps(doc) + "\n" for doc in docs))

    def question(i):
        return f"{i * 7919 % 101} over {i} {'é' * (i % 3)}?"

    g = random.Random(0)

    def options(count):  # of like length, so that no choice wins by being short
        return ["".join(g.choices("abcdefgh", k=4 + i % 2)) for i in range(count)]

    choice = [
        {"q": question(i), "choices": options(2 + i % 3), "gold": i % 2} for i in range(rows + 8)
    ]
    lines("choice.jsonl", choice[:rows])
    lines("shots.jsonl", choice[rows:])
    answers = (written or []) + [COLOURS[i % 4] for i in range(rows)]
    lines("written.jsonl", [{"q": question(i), "a": answers[i]} for i in range(rows)])
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "choice.yaml").write_text(CHOICE.format(data=folder, shots=0))
    shots = CHOICE.replace("tiny_choice", "tiny_shots").format(data=folder, shots=2)
    (folder / "shots.yaml").write_text(shots)
    (folder / "brier.yaml").write_text(SUMMED_UP)
    (folder / "group.yaml").write_text(GROUP)
    for name, text in (
        ("written", WRITTEN), ("judged", JUDGED), ("rolling", ROLLING), ("last", LAST),
    ):  # fmt: skip
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(folder)))
    return folder
