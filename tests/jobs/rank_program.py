"""Trainings of every kind, done by however many processes have been started for this.

torchrun --nproc-per-node 2 rank_program.py TOLD.json WORKSPACE...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lori_manager.extras import find_spec
from lori_manager.kinds import KINDS
from lori_manager.ranks import joined
from lori_manager.teaching import TrainOptions
from lori_manager.workspace import Workspace

SHORT = {"steps": 6, "calibration_steps": 3, "batch": 5}  # 5 rows are 3 and 2
SEQUENCE = ["words", "size"]


def cases() -> dict[str, dict[str, Any]]:
    """Name -> tasks, settings, options and sequence of a training."""
    able = [k for k, kind in KINDS.items() if kind.base_bits != 4 or find_spec("bitsandbytes")]
    found: dict[str, dict[str, Any]] = {kind: {"settings": {"kind": kind}} for kind in able}
    found |= {
        "dense": {"options": {"dense": True}},
        "parts": {"settings": {"micro_batch": 2}},
        "one row a step": {"settings": {"batch": 1}},  # the second process has none
        "packed": {"settings": {"packing": "on"}},
        "nullspace": {
            "tasks": SEQUENCE, "sequence": "apart",
            "settings": {"projection": "nullspace", "nullspace_energy": 0.9},
        },
        "orthogonal": {
            "tasks": SEQUENCE, "sequence": "turned", "settings": {"projection": "orthogonal"},
        },
        "replay": {"tasks": SEQUENCE, "sequence": "again", "options": {"replay": 2}},
        "placed": {"settings": {"targets": ("plop:2",)}},
    }  # fmt: skip
    return found


def trainings(ws: Workspace, chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Do them; the loss of every step, scores and outcomes of each."""
    told = {}
    for name, case in chosen.items():
        losses: list[float] = []
        ws.on_progress = lambda state, kept=losses: kept.append(state.loss)
        trained = ws.train(
            case.get("tasks", ["words"]),
            ws.settings.config.replace(**(SHORT | case.get("settings", {}))),
            TrainOptions(**case.get("options", {})),
            sequence=case.get("sequence"),
        )
        told[name] = {
            "losses": [loss for loss in losses if loss == loss],  # scoring has none
            "scores": [(s.task, s.value, s.rows) for one in trained for s in one.scores],
            "outcomes": [
                ws.store.outcomes(s)[0].tolist() for one in trained for s in one.scores
            ],
        }  # fmt: skip
    return told


def main() -> None:
    """What all workspaces come to, written by rank 0."""
    told, *folders = sys.argv[1:]
    with joined() as group:
        found = {}
        for folder in folders:
            with Workspace.open(folder) as ws:
                language = ws.store.base().model_type == "llama"
                found[Path(folder).name] = trainings(ws, cases() if language else {"lori": {}})
        if group.first:
            Path(told).write_text(json.dumps({"processes": group.world, "told": found}))


if __name__ == "__main__":
    main()
