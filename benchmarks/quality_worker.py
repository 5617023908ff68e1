"""What `merge_quality.py` has each of its processes do: train, merge, score, on one device."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lori_manager import models
from lori_manager.adapters import lori
from lori_manager.calibrating import grown_mask
from lori_manager.config import Config
from lori_manager.consolidation import answered as answered_rows
from lori_manager.consolidation import input_grams, prompts_of
from lori_manager.engine.codec import decode_adapter, encode_adapter
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.update import concat_updates
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.forward import Forward, place
from lori_manager.iteris import ITERIS
from lori_manager.layerwise import LAYERWISE
from lori_manager.merging.interference import energy
from lori_manager.merging.methods import MergeOptions, load_all
from lori_manager.repair import repair
from lori_manager.routed import RoutedModel
from lori_manager.routing import merge_routed
from lori_manager.scoring import score_rows
from lori_manager.soups import SOUPS
from lori_manager.tasks.encoding import Encoded, encode_rows
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import scorers
from lori_manager.tasks.sources import read_source
from lori_manager.training import fit

TRAIN, PROBE, EVAL = 3000, 256, 500
CALIBRATION_ROWS, CALIBRATION_STEPS = 1024, 20  # of every mask in the logs; later ones take all


@dataclass(frozen=True)
class Split:
    """A part of a task: rows, and their tokens."""

    rows: list[Row]
    encoded: list[Encoded]


def neutral(row: Row) -> Row:
    """The row in the one template for all tasks, which does not announce its task."""
    prompt = re.sub(r"\n[A-Z][A-Za-z]*:$", "\nAnswer:", row.prompt)
    prompt = re.sub(r"(^|\n)(?!Answer:)[A-Z][A-Za-z]*: ", r"\1Text: ", prompt)
    return replace(row, prompt=prompt)


def outcomes(hits: np.ndarray) -> dict:
    """Every row's outcome as bits in hexadecimal, and their mean."""
    bits = np.packbits(hits.astype(bool)).tobytes().hex()
    return {"score": float(hits.mean()), "rows": len(hits), "bits": bits}


class Worker:
    """One base on one device, and what was trained on it."""

    def __init__(self, base: Path, data: Path, work: Path, template: str) -> None:
        self.base = models.load_base(base, "auto")
        self.data, self.work, self.template = data.resolve(), work, template
        work.mkdir(parents=True, exist_ok=True)

    # ---- data

    @functools.cache  # noqa: B019 - a worker lives as long as its process
    def task(self, name: str) -> Mapping[str, Split]:
        """train, probe and eval of a task."""
        train = read_source(self.data / name / "train.jsonl", root=self.data)
        held = read_source(self.data / name / "eval.jsonl", root=self.data)[:EVAL]
        probe = train[-PROBE:]
        parts = {"train": train[:-PROBE][:TRAIN], "probe": probe, "eval": held}
        if self.template == "neutral":
            parts = {name: [neutral(row) for row in rows] for name, rows in parts.items()}
        return {
            part: Split(rows, encode_rows(self.base.tokenizer, rows, max_length=512,
                                          context=self.base.context))
            for part, rows in parts.items()
        }  # fmt: skip

    @functools.cache  # noqa: B019
    def prose(self) -> list[Encoded]:
        """General English text in pieces of 256 tokens: the manual that comes with Python."""
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        ids = self.base.tokenizer(text)["input_ids"]
        return [Encoded(ids[i : i + 256], 1) for i in range(0, len(ids) - 256, 256)]

    def general(self, count: int) -> list[Encoded]:
        """Pieces to merge by; `perplexity` never sees them."""
        return self.prose()[:-128:3][:count]

    # ---- adapters

    def path(self, kind: str, task: str, seed: int) -> Path:
        return self.work / f"{kind}-{task}-{seed}.safetensors"

    @functools.cache  # noqa: B019
    def adapter(self, kind: str, task: str, seed: int) -> AdapterWeights:
        return decode_adapter(self.path(kind, task, seed).read_bytes())[0]

    def learn(
        self, kind: str, rows: Sequence[Encoded], config: Config, rate: float, line: str
    ) -> tuple[AdapterWeights, float]:
        """An adapter trained from the base, and the seconds that it took, calibration too."""
        begin = time.monotonic()
        if kind.startswith("lora"):
            found = self._lora(rows, config, rate)
        else:
            block = lori.first_block(self.base, config, line)
            mask = None
            if kind.startswith("lori-s"):
                mask, _ = grown_mask(self.base, block, rows[:CALIBRATION_ROWS], config,
                                     steps=config.calibration_steps)  # fmt: skip
            layers = lori.trainable_layers(self.base.model, block, mask)
            with lori.in_training(self.base, layers) as parameters:
                fit(self.base, parameters, rows, config, steps=config.steps, peak=rate)
            trained = lori.trained_block(block, lori.trained_B(layers), mask, "bf16")
            found = AdapterWeights((trained,))
        return found, time.monotonic() - begin

    def _lora(self, rows: Sequence[Encoded], config: Config, rate: float) -> AdapterWeights:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        torch.manual_seed(config.seed)
        model = self.base.model
        before = dict(model.named_modules())
        layers = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear",
                            task_type="CAUSAL_LM")  # fmt: skip
        inject_adapter_in_model(layers, model)
        wanted = {n: p for n, p in model.named_parameters() if "lora_" in n}
        for p in wanted.values():
            p.data = p.data.float()
            p.requires_grad_(True)
        fit(self.base, wanted, rows, config, steps=config.steps, peak=rate)
        A, B = {}, {}
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                A[name] = module.lora_A["default"].weight.detach().bfloat16().cpu()
                B[name] = module.lora_B["default"].weight.detach().bfloat16().cpu()
        for name in A:
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, before[name])
        model.requires_grad_(False)
        del model.peft_config
        return AdapterWeights((Block(B, config.scaling, tensors=A),))

    # ---- scores

    def score(self, weights: AdapterWeights | None, tasks: Sequence[str], part: str) -> dict:
        """Outcomes of every task's rows, as bits in hexadecimal, and their means."""
        layers = {} if weights is None else low_rank_layers(self.base.model, weights.updates())
        out = {}
        with attached(self.base.model, layers):
            for name in tasks:
                held = self.task(name)[part]
                hits, _ = score_rows(self.base, held.rows, held.encoded,
                                     scorers.get("exact_match"), 128)  # fmt: skip
                out[name] = outcomes(hits)
        return out

    def perplexity(self, weights: AdapterWeights | None) -> float:
        """Of general text that no merge saw."""
        layers = {} if weights is None else low_rank_layers(self.base.model, weights.updates())
        forward, total, count = Forward(self.base), 0.0, 0
        with attached(self.base.model, layers), torch.inference_mode(), forward.ready():
            pieces = self.prose()[-120:]
            for i in range(0, len(pieces), 24):
                batch = forward.batch(pieces[i : i + 24])
                _, nll = forward.scores(place(batch, self.base.device))
                total += float(nll.double().sum())
                count += int(batch.counts.sum())
        return math.exp(total / count)

    # ---- inputs to merge by

    @functools.cache  # noqa: B019
    def probe(self, kind: str, task: str, seed: int, count: int, answered: bool) -> list[Encoded]:
        """Probe prompts of a task; `answered`: with what its own adapter writes after them."""
        prompts = prompts_of(self.task(task)["probe"].encoded[:count])
        if not answered:
            return prompts
        kept = self.work / f"answers-{kind}-{task}-{seed}.json"
        if kept.is_file():
            said = json.loads(kept.read_text())
        else:
            every = self.task(task)["probe"].encoded
            updates = self.adapter(kind, task, seed).updates()
            rows = answered_rows(self.base, updates, every, 128)
            said = [[int(i) for i in row.ids] for row in rows]
            kept.write_text(json.dumps(said))
        return [Encoded(ids, row.prompt_length) for ids, row in zip(said, prompts, strict=False)]

    def merge(self, spec: Mapping) -> AdapterWeights:
        """The members merged as `spec` says."""
        kind, seed, tasks = spec["kind"], spec["seed"], spec["tasks"]
        members = [self.adapter(kind, task, seed) for task in tasks]
        options = dict(spec.get("options", {}))
        shares = [options.pop("weight", 1 / len(members))] * len(members)
        count, answered = options.pop("rows", 64), options.pop("answered", False)
        general = self.general(options.pop("pieces", 0))

        told = MergeOptions(**options)
        method = next(
            e for e in (*load_all(), LAYERWISE, ITERIS, SOUPS) if e.name == spec["method"]
        )
        needs = method.facts.get("needs")
        if needs is None:
            return method.item(members, shares, told)
        rows = [self.probe(kind, task, seed, count, answered) for task in tasks]
        if needs == "labels":
            rows = [self.task(task)["probe"].encoded[:count] for task in tasks]
        if needs == "grams":
            grams = [
                input_grams(self.base, member.updates(), own, 64)
                for member, own in zip(members, rows, strict=True)
            ]
            return method.item(members, shares, replace(told, grams=grams))
        return method.item(self.base, members, shares, rows, told, general=general)

    # ---- what a spec asks for

    def run(self, spec: dict) -> dict:
        """Do it; gives the spec with what was found."""
        return spec | getattr(self, f"run_{spec['what'].replace('-', '_')}")(spec)

    def run_base(self, spec: Mapping) -> dict:
        return {"scores": self.score(None, spec["tasks"], "eval"),
                "perplexity": self.perplexity(None)}  # fmt: skip

    def run_train(self, spec: Mapping) -> dict:
        """One task's own adapter, kept; scored on its own probe rows, or on eval rows too."""
        task, kind, seed = spec["task"], spec["kind"], spec["seed"]
        config = self.config(spec, len(self.task(task)["train"].encoded))
        found, seconds = self.learn(kind, self.task(task)["train"].encoded, config,
                                    spec["rate"], task)  # fmt: skip
        parts = ("probe",) if spec.get("search") else ("probe", "eval")
        out = {part: self.score(found, [task], part)[task] for part in parts}
        if not spec.get("search"):
            self.path(kind, task, seed).write_bytes(encode_adapter(found, {}))
        return out | {"seconds": seconds, "steps": config.steps}

    def run_joint(self, spec: Mapping) -> dict:
        """One adapter trained on all tasks' rows together."""
        rows = [e for task in spec["tasks"] for e in self.task(task)["train"].encoded]
        config = self.config(spec, len(rows))
        found, seconds = self.learn(spec["kind"], rows, config, spec["rate"], "joint")
        return {"scores": self.score(found, spec["tasks"], "eval"), "seconds": seconds,
                "steps": config.steps, "perplexity": self.perplexity(found)}  # fmt: skip

    def run_merge(self, spec: Mapping) -> dict:
        begin = time.monotonic()
        merged = self.merge(spec)
        seconds = time.monotonic() - begin
        return {
            "scores": self.score(merged, spec["tasks"], "eval"),
            "probe": self.score(merged, spec["tasks"], "probe"),
            "perplexity": self.perplexity(merged),
            "seconds": seconds,
            "rank": merged.rank,
            "bytes": len(encode_adapter(merged, {})),
        }

    def run_routed(self, spec: Mapping) -> dict:
        """All members kept, each row by the one that its prompt goes to."""
        tasks, kind, seed = spec["tasks"], spec["kind"], spec["seed"]
        members = [self.adapter(kind, task, seed) for task in tasks]
        rows = [self.task(task)["probe"].encoded[: spec.get("rows", PROBE)] for task in tasks]
        begin = time.monotonic()
        merged = merge_routed(self.base, members, [1 / len(tasks)] * len(tasks), rows)
        seconds = time.monotonic() - begin
        model = RoutedModel(self.base, merged, tasks)
        scores, routing = {}, {}
        for number, task in enumerate(tasks):
            held = self.task(task)["eval"]
            routes = model.routes(held.encoded, 128)
            routing[task] = float((routes == number).mean())
            hits, _ = model.score_rows(held.rows, held.encoded, scorers.get("exact_match"), 128,
                                       routes=routes)  # fmt: skip
            scores[task] = outcomes(hits)
        return {"scores": scores, "routing": routing, "held_out": model.router.accuracy,
                "reads": model.router.reads, "seconds": seconds, "rank": merged.rank,
                "bytes": len(encode_adapter(merged, {}))}  # fmt: skip

    def run_repair(self, spec: Mapping) -> dict:
        """A merge, or a fresh adapter as control, trained briefly on probe rows of all tasks."""
        tasks, kind, seed = spec["tasks"], spec["kind"], spec["seed"]
        members = [self.adapter(kind, task, seed) for task in tasks]
        rows = [self.task(task)["probe"].encoded[: spec["rows"]] for task in tasks]
        fresh = spec.get("fresh")
        start = self.fresh(kind, seed, fresh) if fresh else self.merge(spec)
        begin = time.monotonic()
        config = Config(seed=seed, batch=32, score_batch=128, steps=spec["steps"])
        found, result = repair(self.base, start, members, rows, config, steps=spec["steps"],
                               peak=spec["rate"], labels=spec["labels"])  # fmt: skip
        seconds = time.monotonic() - begin
        return {"scores": self.score(found, tasks, "eval"), "seconds": seconds,
                "loop": result.seconds, "rank": found.rank,
                "loss": statistics.fmean(result.losses[-10:]),
                "bytes": len(encode_adapter(found, {})),
                "perplexity": self.perplexity(found)}  # fmt: skip

    def fresh(self, kind: str, seed: int, rank: int) -> AdapterWeights:
        """An untrained adapter with a random A of its own."""
        config = Config(seed=seed, rank=rank, alpha=2.0 * rank)
        block = lori.fresh_block(self.base.linear_shapes, config, "fresh")
        return AdapterWeights((block,))

    # ---- what was to be expected of a merge

    @functools.lru_cache(maxsize=12)  # noqa: B019 - half a gigabyte each
    def grams(self, kind: str, task: str, seed: int) -> Mapping[str, torch.Tensor]:
        """Moments of the inputs of an adapter's modules on what it answers to 32 prompts."""
        rows = self.probe(kind, task, seed, 32, True)
        return input_grams(self.base, self.adapter(kind, task, seed).updates(), rows, 64)

    def run_forecast(self, spec: Mapping) -> dict:
        """A merge, what could be told of it without its evaluation rows, and what it scores.

        Per member: `error`, module by module, what the merge gets wrong of the member's own
        update on its own inputs, against that update; `agrees` and `nats`, how often and how
        far it says what the member says on 32 prompts that no method was fitted to.
        """
        tasks, kind, seed = spec["tasks"], spec["kind"], spec["seed"]
        merged = self.merge(spec)
        whole = merged.updates()
        layers = low_rank_layers(self.base.model, whole)
        told = {}
        for task in tasks:
            own = self.adapter(kind, task, seed).updates()
            grams = self.grams(kind, task, seed)
            error = []
            for name in sorted(own):
                off = concat_updates([whole[name], own[name]], [1.0, -1.0])
                error.append(round(energy(off, grams[name]) / energy(own[name], grams[name]), 4))
            told[task] = {"error": error}
            said = self.probe(kind, task, seed, PROBE, True)[-32:]
            held = self.task(task)["probe"].rows[-32:]
            own_layers = low_rank_layers(self.base.model, own)
            for scorer, label in (("exact_match", "agrees"), ("perplexity", "nats")):
                values = []
                for having in (layers, own_layers):
                    with attached(self.base.model, having):
                        got, _ = score_rows(self.base, held, said, scorers.get(scorer), 128)
                    values.append(round(float(got.mean()), 5))
                told[task][label] = values
        return {
            "told": told,
            "scores": self.score(merged, tasks, "eval"),
            "rank": merged.rank,
        }

    def run_sequence(self, spec: Mapping) -> dict:
        from quality_sequence import sequence

        return sequence(self, spec)

    def config(self, spec: Mapping, rows: int) -> Config:
        passes = spec.get("epochs", 2)
        dense = spec.get("dense_rate", 2e-3)
        return Config(
            seed=spec["seed"], batch=32, steps=max(1, math.ceil(rows * passes / 32)),
            rank=spec.get("rank", 32), alpha=2.0 * spec.get("rank", 32),
            dense_learning_rate=dense, calibration_steps=CALIBRATION_STEPS,
            init=spec.get("init", "random"),
        )  # fmt: skip
