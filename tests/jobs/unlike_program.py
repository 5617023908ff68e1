"""What processes on unlike machines begin their trainings with: each of these rounds differently.

torchrun --nproc-per-node 2 unlike_program.py FOLDER WORKSPACE

Every rank writes FOLDER/RANK.json: name -> digest of what it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from lori_manager import feature_norms
from lori_manager.adapters import spectra
from lori_manager.adapters.kind import module_of
from lori_manager.by_base import rows_of
from lori_manager.engine import nullspace
from lori_manager.kinds import resolved
from lori_manager.placing import place
from lori_manager.projecting import start_of
from lori_manager.ranks import joined
from lori_manager.training import fit
from lori_manager.workspace import Workspace


def digest(tensors: dict[str, torch.Tensor]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].detach().float().numpy().tobytes())
    return h.hexdigest()


def make_unlike(rank: int) -> None:
    """Let this machine's scores, singular vectors and projections be a little its own."""
    norms, svd, outside = feature_norms.feature_norms, spectra.top_svd, nullspace.outside

    def other_norms(*args, **options):
        return {name: one * (1 + 0.01 * rank) for name, one in norms(*args, **options).items()}

    def other_svd(*args):
        found = svd(*args)
        return type(found)(found.U, found.s * (1 + 0.01 * rank), found.V * (-1) ** rank, 1.0)

    feature_norms.feature_norms = other_norms
    spectra.top_svd = other_svd
    nullspace.outside = lambda *args: outside(*args).roll(rank, 0)


def begun(ws: Workspace, rank: int) -> dict[str, str]:
    config = ws.settings.config
    found = {"placement": repr(sorted(place(ws, "words", config).scores.items()))}
    words = ws.store.task("words")
    for name, changes in (
        ("svd", {"init": "svd"}),
        ("nullspace", {"projection": "nullspace", "nullspace_energy": 0.9}),
    ):
        start = start_of(ws, words, config.replace(**changes), name)
        found[name] = digest(start.block.tensors)
    lora = resolved(config.replace(kind="lora"))
    base, rows = ws.model(lora), rows_of(ws, words, "train", lora)
    with module_of("lora").training(base, lora, steps=2) as training:
        with torch.no_grad():
            for p in training.parameters.values():
                p.add_(0.01 * rank)
        fit(base, training.parameters, rows, lora, steps=2, peak=1e-3, training=training)
        found["trained"] = digest(dict(training.parameters))
    return found


def main() -> None:
    folder, workspace = map(Path, sys.argv[1:])
    with joined() as group:
        os.environ["LORI_CACHE"] = str(folder / f"cache-{group.rank}")
        with Workspace.open(workspace) as ws:
            ws.train(["size"], ws.settings.config.replace(steps=2, calibration_steps=1))
            make_unlike(group.rank)
            found = begun(ws, group.rank)
        (folder / f"{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
