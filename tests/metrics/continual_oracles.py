"""Makes continual_oracles.json: other libraries' figures of random matrices, by their own code.

In an environment of its own, because the libraries want old versions of much:

    python -m venv oracles && oracles/bin/pip install torch numpy typing-extensions
    oracles/bin/pip install --no-deps avalanche-lib==0.6.0 fusion-bench==0.2.33
    oracles/bin/python tests/metrics/continual_oracles.py > tests/metrics/continual_oracles.json

avalanche is driven as its training loop does: its plugins hear of every stage trained and
of every task evaluated, and read the scores from the matrix. What else the libraries
import (torchvision and the like) takes no part and is replaced by empty modules.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch  # noqa: F401 - the real one, before anything is replaced

UNUSED = (
    "torchvision", "torchmetrics", "pytorchcv", "gdown", "bs4", "quadprog", "qpsolvers", "wandb",
    "tensorboard", "google", "GPUtil", "dill", "setproctitle", "sklearn", "matplotlib", "psutil",
)  # fmt: skip


class Empty(types.ModuleType):
    """A module that has any name, each a class that takes anything."""

    __path__ = []  # noqa: RUF012

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(
            name, (), {"__init__": lambda *_, **__: None, "__call__": lambda *_, **__: None}
        )


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """First in line, for what takes no part."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in UNUSED or name == "torch.utils.tensorboard":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


def avalanche_figures(R, base):
    """Stream forgetting, BWT and forward transfer after the last stage."""
    from avalanche.evaluation.metrics.forgetting_bwt import StreamBWT, StreamForgetting
    from avalanche.evaluation.metrics.forward_transfer import StreamForwardTransfer

    scores = {}
    reading = {
        "metric_update": lambda self, strategy: None,
        "metric_result": lambda self, strategy: scores[strategy.experience.current_experience],
    }
    figures = {}
    for name, kind in (
        ("forgetting", StreamForgetting), ("bwt", StreamBWT), ("fwt", StreamForwardTransfer)
    ):  # fmt: skip
        plugin = type(kind.__name__, (kind,), reading)()
        strategy = types.SimpleNamespace(experience=None, eval_every=0)

        def evaluate(row, plugin=plugin, strategy=strategy):
            plugin.before_eval(strategy)
            for task, score in enumerate(row):
                scores[task] = float(score)
                strategy.experience = types.SimpleNamespace(current_experience=task)
                plugin.before_eval_exp(strategy)
                plugin.after_eval_iteration(strategy)
                plugin.after_eval_exp(strategy)

        if name == "fwt":
            evaluate(base)
            plugin.at_init = False
        for stage, row in enumerate(R):
            strategy.experience = types.SimpleNamespace(current_experience=stage)
            plugin.before_training_exp(strategy)
            evaluate(row)
        figures[name] = float(plugin.result())
    return figures


def fusion_bench_figures(R):
    """Its one function, over all tasks, from its file alone."""
    package = Path(importlib.util.find_spec("fusion_bench").origin).parent
    path = package / "metrics" / "continual_learning" / "backward_transfer.py"
    spec = importlib.util.spec_from_file_location("backward_transfer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    last = {str(i): float(R[-1, i]) for i in range(len(R))}
    own = {str(i): float(R[i, i]) for i in range(len(R))}
    return {"bwt": float(module.compute_backward_transfer(last, own))}


def main():
    random = np.random.default_rng(11)
    cases = []
    for tasks in (2, 3, 5, 8):
        R, base = random.random((tasks, tasks)).round(3), random.random(tasks).round(3)
        cases.append(
            {"R": R.tolist(), "base": base.tolist(), "fusion_bench": fusion_bench_figures(R)}
        )
    sys.meta_path.insert(0, Unused())
    for case in cases:
        case["avalanche"] = avalanche_figures(np.array(case["R"]), np.array(case["base"]))
    versions = {n: importlib.metadata.version(n) for n in ("avalanche-lib", "fusion-bench")}
    lines = ",\n".join(json.dumps(case) for case in cases)
    print(f'{{"versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}')


if __name__ == "__main__":
    main()
