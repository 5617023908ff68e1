"""What weights answer to single rows, in words; kept, so that no row is run twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.evaluation import counted_progress
from lori_manager.records import Adapter, Task
from lori_manager.refs import BASE

if TYPE_CHECKING:
    from lori_manager.models import BaseModel
    from lori_manager.tasks.encoding import Encoded
    from lori_manager.tasks.rows import Row
    from lori_manager.tasks.scorers import Scorer

SPARE = 16  # tokens beyond the longest completion that an answer may have
# By these a row is right if and only if the answer is the completion itself.
RIGHT_IS_THE_COMPLETION = frozenset({"exact_match", "choice_accuracy", "label_accuracy"})
NO_HEAD = "(no head for this task)"


def in_words(ws: Context, task: Task) -> bool:
    """Whether the task's rows are answered in words; by perplexity, a row's outcome is all."""
    scorer = ws.scorer(task)
    return scorer.reads == "text" or (scorer.reads in ("tokens", "labels") and scorer.binary)


def known_answers(
    ws: Context,
    adapter: Adapter | None,
    task: Task,
    rows: Sequence[int],
    precision: str,
    encoding: str,
) -> dict[int, str]:
    """Row -> answer, of the rows that were run before."""
    return ws.store.answers(
        digest=_digest(ws, adapter),
        task=task,
        scorer_version=str(ws.scorer(task).version),
        precision=precision,
        encoding=encoding,
        rows=rows,
    )


def run_answers(
    ws: Context, adapter: Adapter | None, task: Task, rows: Sequence[int], config: Config
) -> dict[int, str]:
    """Row -> what the model answers to it now; kept.

    Text is decoded greedily, up to 16 tokens more than the task's longest completion or what
    the scorer allows. Of rows with choices it is the completion of the most likely one, of rows
    with labels the likeliest label.

    Args:
        adapter: None is the base.
        rows: indices of eval rows.
        config: precision, bits and batch as for scoring.
    """
    scorer = ws.scorer(task)
    if scorer.reads == "labels":
        found = dict(zip(rows, _labels(ws, adapter, task, rows, config), strict=True))
    else:
        found = _said(ws, adapter, task, scorer, rows, config)
    ws.store.add_answers(
        digest=_digest(ws, adapter),
        task=task,
        scorer_version=str(scorer.version),
        precision=ws.score_precision(config),
        encoding=ws.encoding,
        found=found,
    )
    return found


def _labels(
    ws: Context, adapter: Adapter | None, task: Task, rows: Sequence[int], config: Config
) -> list[str]:
    """The likeliest label of each row, the first of those that are alike."""
    from lori_manager.adapters.applying import applied
    from lori_manager.classification import label_logits

    weights = None if adapter is None else ws.stored(adapter)
    head = None if weights is None else weights.heads.get(task.name)
    if head is None:
        return [NO_HEAD] * len(rows)
    _, encoded = ws.labelled(task, "eval")
    base = ws.base_model(config)
    with applied(base, weights):
        logits = label_logits(base, head, [encoded[i] for i in rows], config.score_batch)
    return [head.labels[place] for place in logits.argmax(axis=1)]


def _said(
    ws: Context,
    adapter: Adapter | None,
    task: Task,
    scorer: Scorer,
    rows: Sequence[int],
    config: Config,
) -> dict[int, str]:
    """Row -> what the model writes or chooses."""
    base = ws.base_model(config)
    every, encoded = ws.rows(task, "eval")
    most = _new_tokens(scorer, encoded)
    told = counted_progress(ws, f"{adapter.ref if adapter else BASE} answers rows of {task.name}")
    found: dict[int, str] = {}
    for numbers in _acting(ws, base, adapter, rows, encoded, config):
        texts = _texts(
            base,
            scorer,
            [every[i] for i in numbers],
            [encoded[i] for i in numbers],
            most,
            config.score_batch,
        )
        found |= dict(zip(numbers, texts, strict=True))
        told(len(found), len(rows))
    return found


def _digest(ws: Context, adapter: Adapter | None) -> str:
    return adapter.digest if adapter is not None else ws.store.base().fingerprint


def _acting(
    ws: Context,
    base: BaseModel,
    adapter: Adapter | None,
    rows: Sequence[int],
    encoded: Sequence[Encoded],
    config: Config,
) -> Iterator[list[int]]:
    """The rows in portions, each while what answers it is in the model."""
    from lori_manager.adapters.applying import applied
    from lori_manager.routed import RoutedModel

    if adapter is not None and "routing" in adapter.facts:
        routed = RoutedModel(base, ws.weights(adapter))
        routes = routed.routes([encoded[i] for i in rows], config.score_batch, config.packing)
        for number in sorted(set(routes.tolist())):
            with routed.member(number):
                yield [row for row, own in zip(rows, routes, strict=True) if own == number]
        return
    with applied(base, None if adapter is None else ws.stored(adapter)):
        for start in range(0, len(rows), config.score_batch):
            yield list(rows[start : start + config.score_batch])


def _new_tokens(scorer: Scorer, encoded: Sequence[Encoded]) -> int:
    from lori_manager.tasks.room import MOST_NEW_TOKENS

    if scorer.reads == "text":
        return scorer.new_tokens(encoded)
    longest = max(len(e.ids) - e.prompt_length for e in encoded)
    return min(longest + SPARE, MOST_NEW_TOKENS)


def _texts(
    base: BaseModel,
    scorer: Scorer,
    rows: Sequence[Row],
    encoded: Sequence[Encoded],
    most: int,
    batch: int,
) -> list[str]:
    from lori_manager.generation import completions

    if scorer.reads == "tokens":
        sequences = [
            scorer.sequences(base.tokenizer, r, e) for r, e in zip(rows, encoded, strict=True)
        ]
        if len(sequences[0]) > 1:
            return _chosen(base, rows, sequences, batch)
    return [said for said, _ in completions(base, encoded, most, batch)]


def _chosen(
    base: BaseModel, rows: Sequence[Row], sequences: Sequence[list[Encoded]], batch: int
) -> list[str]:
    """The most likely candidate completion of each row; the right one only if it is alone."""
    from lori_manager.scoring import cut_alike, token_stats
    from lori_manager.tasks.rows import candidate_completions

    flat = [s for own in sequences for s in cut_alike(own, base.context)]
    stats = iter(token_stats(base, flat, batch))
    out = []
    for row, own in zip(rows, sequences, strict=True):
        texts, right = candidate_completions(row)
        texts = [texts[right], *texts[:right], *texts[right + 1 :]]  # as the scorer orders them
        likelihood = [-float(next(stats).nll.sum()) for _ in own]
        best = max(likelihood)
        out.append(texts[len(texts) - 1 - likelihood[::-1].index(best)])
    return out
