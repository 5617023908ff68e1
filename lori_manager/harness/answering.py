"""A model and frozen harness rows -> outcomes, by the harness's own loop and judgement."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lori_manager.errors import BadData, LoriError
from lori_manager.extras import load_extra
from lori_manager.harness.definitions import EXTRA, SUMMED, definition, failed, quiet
from lori_manager.harness.freezing import requests_of
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import RequestScorer

if TYPE_CHECKING:
    from lori_manager.models import BaseModel

_WHAT = "lm-evaluation-harness"


class _Documents(list[Mapping[str, Any]]):
    """The documents as a data set shows itself to a task."""

    @property
    def features(self) -> Mapping[str, Any]:
        """Its columns, by name."""
        return self[0]


def answered(
    base: BaseModel,
    rows: Sequence[Row],
    scorer: RequestScorer,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float]]:
    """(outcome, weight) of every row, as `lm_eval.simple_evaluate` finds them.

    The requests go to the model as it now is, adapter layers included, through the harness's
    own `HFLM`; its `evaluate` filters the answers and judges them.

    Args:
        base: the model; not changed.
        rows: made by `freeze`.
        batch: sequences a forward. on_batch: called with (requests done, in all).
    Raises:
        BadData: rows that `freeze` did not make, or the task's own code fails.
    """
    if not rows:
        return []
    evaluator = load_extra("lm_eval.evaluator", EXTRA, _WHAT)
    try:
        with quiet():
            task, requests = _task(scorer, rows)
            found = evaluator.evaluate(
                _model(base, batch, requests, on_batch),
                {"tasks": {scorer.task: task}},
                bootstrap_iters=0,
                log_samples=True,
            )
            samples = found["samples"][scorer.task]
        told = {s["doc_id"]: s for s in samples if s["filter"] == scorer.filter}
        return [_outcome(scorer, told[i][scorer.metric]) for i in range(len(rows))]
    except LoriError:
        raise
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise failed(scorer.task, "cannot be scored", e) from e


def _task(scorer: RequestScorer, rows: Sequence[Row]) -> tuple[Any, int]:
    """The harness's task over the rows' documents, and how many requests it makes."""
    api = load_extra("lm_eval.api.task", EXTRA, _WHAT)
    instance = load_extra("lm_eval.api.instance", EXTRA, _WHAT).Instance
    kept = [requests_of(row) for row in rows]
    documents = _Documents(doc for doc, _ in kept)
    told = copy.deepcopy(definition(scorer.task, scorer.include)) | {
        "custom_dataset": lambda **_: {"test": documents},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {},
    }
    for key in ("dataset_kwargs", "training_split", "validation_split", "fewshot_split",
                "fewshot_config", "process_docs"):  # fmt: skip
        told.pop(key, None)

    class FrozenTask(api.ConfigurableTask):  # type: ignore[name-defined, misc]
        """Asks what was frozen."""

        def build_all_requests(self, **_: Any) -> None:
            """They are there."""

        def aggregation(self) -> dict[str, Callable[[Any], float]]:
            """Nothing is summed up here: some metrics fail on rows that are not all of them."""
            return dict.fromkeys(super().aggregation(), lambda _: 0.0)

    task = FrozenTask(config=told)
    metadata = task.get_config("repeats")
    task._instances = [
        instance(kind, doc, copy.deepcopy(arguments), i, (scorer.task, number, metadata))
        for number, (doc, asked) in enumerate(kept)
        for i, (kind, arguments) in enumerate(asked)
    ]
    return task, len(task._instances) * metadata


def _model(
    base: BaseModel, batch: int, requests: int, on_batch: Callable[[int, int], None] | None
) -> Any:
    """The harness's wrapper around the model; it counts what is answered and shows no bars."""
    wrapper = load_extra("lm_eval.models.huggingface", EXTRA, _WHAT).HFLM

    class Wrapped(wrapper):  # type: ignore[misc, valid-type]
        """Without bars."""

        def loglikelihood(self, asked: Any, disable_tqdm: bool = True) -> Any:
            """As the harness's."""
            return super().loglikelihood(asked, disable_tqdm=True)

        def loglikelihood_rolling(self, asked: Any, disable_tqdm: bool = True) -> Any:
            """As the harness's."""
            return super().loglikelihood_rolling(asked, disable_tqdm=True)

        def generate_until(self, asked: Any, disable_tqdm: bool = True) -> Any:
            """As the harness's."""
            return super().generate_until(asked, disable_tqdm=True)

    # A copy of the tokenizer: the wrapper gives it a padding token where it has none.
    model = Wrapped(
        pretrained=base.model, tokenizer=copy.deepcopy(base.tokenizer), batch_size=batch
    )
    if on_batch is not None:
        model.set_cache_hook(_Counter(requests, batch, on_batch))
    return model


class _Counter:
    """Stands where the harness hands every answer to a cache."""

    def __init__(self, total: int, every: int, on_batch: Callable[[int, int], None]) -> None:
        self.done, self.total, self.every, self.on_batch = 0, total, every, on_batch

    def add_partial(self, *_: Any) -> None:
        """One more is answered."""
        self.done = min(self.done + 1, self.total)
        if self.done % self.every == 0 or self.done == self.total:
            self.on_batch(self.done, self.total)


def _outcome(scorer: RequestScorer, said: Any) -> tuple[float, float]:
    """(outcome, weight) of what the harness says of one row."""
    if scorer.metric in SUMMED:
        return SUMMED[scorer.metric].row(said)
    try:
        return float(said), 1.0
    except (TypeError, ValueError) as e:
        raise BadData(
            f"the harness task {scorer.task!r} says {said!r:.60} of a row by {scorer.metric!r}, "
            "which is no number: choose another metric when adding it"
        ) from e
