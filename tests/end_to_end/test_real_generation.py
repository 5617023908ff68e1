"""SmolLM2-135M-Instruct writes the same whatever the batch, and what it writes is scored."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from lori_manager.generation import generate
from lori_manager.models import load_base
from lori_manager.scoring import score_rows
from lori_manager.tasks.encoding import encode_rows
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import scorers
from lori_manager.tasks.sources import read_source

pytestmark = pytest.mark.real
DATA = Path(__file__).parents[2] / "examples" / "data"
NEW = 12


def test_batches_of_1_and_8_and_whole_forwards_write_the_same(base_folder):
    base = load_base(base_folder, "fp32", "cpu")
    rows = []
    for task in ("snips", "sentiment_uci"):
        rows += islice(read_source(DATA / task / "eval.jsonl", root=DATA), 4)
    encoded = encode_rows(base.tokenizer, rows, max_length=512, context=base.context)
    prompts = [[int(i) for i in e.ids[: e.prompt_length]] for e in encoded]
    assert len({len(prompt) for prompt in prompts}) > 4
    alone = generate(base, prompts, NEW, 1)
    assert generate(base, prompts, NEW, 8) == alone
    shortest = min(range(8), key=lambda i: len(prompts[i]))
    with torch.inference_mode():
        ids = torch.tensor([prompts[shortest] + alone[shortest]])
        best = base.model(ids, use_cache=False).logits[0].argmax(-1).tolist()
    assert best[len(prompts[shortest]) - 1 :][: len(alone[shortest])] == alone[shortest]

    # Whole words of its own stand in what it writes; the data's labels mostly do not.
    said = [base.tokenizer.decode(tokens).rpartition(" ")[0] for tokens in alone]
    own = [Row(row.prompt, text) for row, text in zip(rows, said, strict=True)][:4]
    assert all(row.completion.strip() for row in own)
    for task, right in ((own, True), (rows[:4], False)):
        tokens = encode_rows(base.tokenizer, task, max_length=512, context=base.context)
        outcomes, weights = score_rows(base, task, tokens, scorers.get("contains"), 4)
        assert weights is None
        assert outcomes.all() == right
