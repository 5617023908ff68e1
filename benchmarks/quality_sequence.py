"""Tasks taught one after another in one adapter, for `merge_quality.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from quality_worker import CALIBRATION_ROWS

from lori_manager.adapters import lori
from lori_manager.calibrating import grown_mask
from lori_manager.config import Config
from lori_manager.consolidation import input_grams, prompts_of
from lori_manager.distillation import own_words, taught_rows, teacher_words
from lori_manager.engine.nullspace import leading_directions, outside
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.layerwise import merge_layerwise
from lori_manager.merging.methods import MergeOptions
from lori_manager.repair import repair
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import fit

if TYPE_CHECKING:
    from quality_worker import Worker


def sequence(worker: Worker, spec: Mapping) -> dict:
    """Scores of all tasks after every stage.

    `replay` puts so many rows of every earlier task among the new ones, `passes` times, probe
    rows first, with what the adapter of that task's own stage says as teacher, and `prose` so
    many pieces of general text, taught by the base; `protect` keeps masks apart; with
    `projection` "nullspace" every stage has a block of its own whose A avoids `energy` of what
    earlier tasks' prompts span.
    With `consolidate` every stage merges the own adapters of all tasks so far instead.
    """
    if spec.get("consolidate"):
        return consolidated(worker, spec)
    base, order, kind = worker.base, spec["order"], spec["kind"]
    begin = time.monotonic()
    stages: list[AdapterWeights] = []
    matrix = []
    for task in order:
        rows = worker.task(task)["train"].encoded
        earlier = list(zip(order, stages, strict=False))
        parts = [own_words(rows)]
        if spec.get("replay"):
            for old, stage in earlier:
                split = worker.task(old)
                kept = [*split["probe"].encoded, *split["train"].encoded][: spec["replay"]]
                parts.append(teacher_words(base, stage.updates(), kept, 128,
                                           labels=spec.get("labels", 0.5)))  # fmt: skip
        if spec.get("prose"):
            pieces = [Encoded(p.ids[i : i + 48], 1) for p in worker.general(120) for i in (0, 96)]
            parts.append(teacher_words(base, {}, pieces[: spec["prose"]], 128))
        taught, table = taught_rows(parts, base.device)
        taught += taught[len(rows) :] * (spec.get("passes", 1) - 1)
        config = worker.config(spec, len(taught))
        beside = stages[-1] if spec.get("projection") == "nullspace" and stages else None
        if not stages:
            block = lori.fresh_block(base.linear_shapes, config, "sequence")
        elif beside is None:
            block = lori.continued_block(stages[-1], config)
        else:
            fresh = lori.fresh_block(base.linear_shapes, config, f"sequence/{task}")
            block = avoiding(worker, fresh, beside, [old for old, _ in earlier], spec["energy"])
        mask = None
        if kind.startswith("lori-s"):
            used = lori.used_entries(block) if spec.get("protect") and stages else None
            mask, _ = grown_mask(
                base, block, rows[:CALIBRATION_ROWS], config, steps=config.calibration_steps,
                exclude=used, beside=beside,
            )  # fmt: skip
        layers = lori.trainable_layers(base.model, block, mask, beside)
        with lori.in_training(base, layers) as parameters:
            fit(base, parameters, taught, config, steps=config.steps, peak=spec["rate"],
                soft=table)  # fmt: skip
        trained = lori.trained_block(block, lori.trained_B(layers), mask, "bf16")
        stages.append(AdapterWeights((*(beside.blocks if beside else ()), trained)))
        found = worker.score(stages[-1], order[: len(stages)], "eval")
        matrix.append({name: got["score"] for name, got in found.items()})
    return {
        "matrix": matrix,
        "seconds": time.monotonic() - begin,
        "scores": found,
        "rank": stages[-1].rank,
        "perplexity": worker.perplexity(stages[-1]),
    }


def consolidated(worker: Worker, spec: Mapping) -> dict:
    """Every stage: the own adapters of all tasks so far, merged to one rank and repaired."""
    order, kind, seed = spec["order"], spec["kind"], spec["seed"]
    begin = time.monotonic()
    matrix = []
    for count in range(1, len(order) + 1):
        tasks = order[:count]
        members = [worker.adapter(kind, task, seed) for task in tasks]
        stage = members[0]
        if count > 1:
            rows = [worker.probe(kind, task, seed, 256, True) for task in tasks]
            options = MergeOptions(max_rank=spec["rank"])
            stage = merge_layerwise(worker.base, members, [1.0] * count, rows, options,
                                    general=worker.general(120))  # fmt: skip
            if spec.get("steps"):
                labelled = [worker.task(task)[spec.get("part", "probe")].encoded for task in tasks]
                labelled = [rows[: spec.get("rows", 256)] for rows in labelled]
                config = Config(seed=seed, batch=32, score_batch=128, steps=spec["steps"])
                stage, _ = repair(worker.base, stage, members, labelled, config,
                                  steps=spec["steps"], peak=spec["rate"], labels=0.5)  # fmt: skip
        found = worker.score(stage, tasks, "eval")
        matrix.append({name: got["score"] for name, got in found.items()})
    return {
        "matrix": matrix,
        "seconds": time.monotonic() - begin,
        "scores": found,
        "rank": stage.rank,
        "perplexity": worker.perplexity(stage),
    }


def avoiding(
    worker: Worker, fresh: Block, beside: AdapterWeights, earlier: Sequence[str], energy: float
) -> Block:
    """The block with its A outside of what earlier tasks' prompts span, rows as long as before."""
    bases: dict[str, torch.Tensor] = {}
    leaders: dict[str, str] = {}
    for old in earlier:
        prompts = prompts_of(worker.task(old)["probe"].encoded[:64])
        moments = input_grams(worker.base, beside.updates(), prompts, 64)
        first: dict[int, str] = {}
        leaders = {name: first.setdefault(id(gram), name) for name, gram in moments.items()}
        for name in sorted(set(leaders.values())):
            bases[name] = leading_directions(moments[name], energy, bases.get(name))
    tensors = {}
    for name, before in fresh.A.items():
        A = outside(before, bases[leaders[name]])
        scale = math.sqrt(float(before.double().square().sum()) / float(A.square().sum()))
        tensors[name] = (A * scale).float().cpu().contiguous()
    return replace(fresh, projection=None, tensors=tensors)
