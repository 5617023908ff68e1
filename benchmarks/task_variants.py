"""More tasks out of the shared ones: subsets and relabelled variants, for merges of many tasks.

    python benchmarks/task_variants.py FOLDER

Reads wikisql, snips, clinc150, sentiment_uci, sms_spam and clinc_domain in FOLDER and writes ten
more folders beside them, each with train.jsonl and eval.jsonl in its own template and labels.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "orange")
Pair = tuple[str, str]
Change = Callable[[dict], Pair | None]  # a row's new prompt and completion, or None


def ordered(rows: list[dict]) -> list[str]:
    """All completions of a task, in order."""
    return sorted({row["completion"] for row in rows})


def headed(prompt: str, first: str, last: str) -> str:
    """The prompt with other words before its text and before its answer."""
    prompt = re.sub(r"^[A-Z][A-Za-z]*: ", f"{first}: ", prompt)
    return re.sub(r"\n[A-Z][A-Za-z]*:$", f"\n{last}:", prompt)


def variants(read: Callable[[str], list[dict]]) -> dict[str, tuple[str, Change]]:
    """Name -> the task it is made of, and what to make of its rows."""
    intents, commands = ordered(read("clinc150")), ordered(read("snips"))
    domains = ordered(read("clinc_domain"))

    def relabelled(first: str, last: str, words: dict[str, str]) -> Change:
        return lambda row: (headed(row["prompt"], first, last), " " + words[row["completion"]])

    def subset(part: int) -> Change:
        kept = set(intents[part::3])

        def row_of(row: dict) -> Pair | None:
            if row["completion"] not in kept:
                return None
            letter = "ABC"[part]
            return headed(row["prompt"], f"Request {letter}", "Wanted"), row["completion"]

        return row_of

    def cut(pattern: str, last: str) -> Change:
        def row_of(row: dict) -> Pair | None:
            found = re.search(pattern, row["completion"])
            return found and (headed(row["prompt"], "Table", last), " " + found[1].strip())

        return row_of

    return {
        "snips_code": ("snips", relabelled("Text", "Code", {
            word: f"K{number}" for number, word in enumerate(commands, 1)})),
        "domain_colour": ("clinc_domain", relabelled("Text", "Colour", dict(
            zip(domains, COLOURS, strict=True)))),
        "sentiment_yes": ("sentiment_uci", relabelled("Opinion", "Liked", {
            " positive": "yes", " negative": "no"})),
        "spam_action": ("sms_spam", relabelled("Message", "Action", {
            " ham": "keep", " spam": "drop"})),
        "clinc_letter": ("clinc150", relabelled("Text", "Letter", {
            word: word.strip()[0].upper() for word in intents})),
        "clinc_a": ("clinc150", subset(0)),
        "clinc_b": ("clinc150", subset(1)),
        "clinc_c": ("clinc150", subset(2)),
        "wikisql_select": ("wikisql", cut(r"SELECT (.*?) FROM", "Selects")),
        "wikisql_where": ("wikisql", cut(r"WHERE \[(.*?)\]", "Filters by")),
    }  # fmt: skip


def rows_of(file: Path) -> Iterator[dict]:
    """The rows of a JSONL file."""
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def main() -> None:
    folder = Path(sys.argv[1])
    made = variants(lambda name: list(rows_of(folder / name / "train.jsonl")))
    for name, (source, row_of) in made.items():
        (folder / name).mkdir(exist_ok=True)
        counts = []
        for part in ("train.jsonl", "eval.jsonl"):
            found = []
            for row in rows_of(folder / source / part):
                pair = row_of(row)
                if pair is not None:
                    found.append(json.dumps({"prompt": pair[0], "completion": pair[1]}))
            (folder / name / part).write_text("\n".join(found) + "\n", encoding="utf-8")
            counts.append(len(found))
        print(f"{name}: {counts[0]} and {counts[1]} rows of {source}")


if __name__ == "__main__":
    main()
