"""Tasks of labelled images in a workspace whose base is an image encoder."""

import json

import numpy as np
import pytest
import torch
from encoders import encoder, squares
from PIL import Image
from small_workspaces import copied

from lori_manager.errors import BadData, InvalidInput, NotFound
from lori_manager.labelling import Labelling
from lori_manager.models import image_format
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "rank": 8, "alpha": 16.0, "steps": 40, "calibration_steps": 10, "batch": 16,
    "learning_rate": 1e-2, "head_learning_rate": 1e-2, "checkpoint_seconds": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return squares(tmp_path_factory.mktemp("images") / "squares", ("red", "blue", "green"), 60, 0)


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    home = tmp_path_factory.mktemp("vit")
    ws = Workspace.create(home / "w", str(encoder(home / "base", "vit")))
    lines = [f"{key} = {json.dumps(value)}" for key, value in SETTINGS.items()]
    (home / "w" / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n")
    return ws


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "w")


def test_lori_learns_labels_of_images_and_merges_and_exports_them(ws, folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    added = ws.add_image_task("squares", folder, eval_share=0.25)
    task = added.task
    assert task.labels == ("blue", "green", "red")
    assert (task.scorer, task.splits["eval"].rows) == ("label_accuracy", 45)
    rows, _ = ws.labelled(task, "eval")
    assert {label: sum(r.completion == label for r in rows) for label in task.labels} == {
        "blue": 15, "green": 15, "red": 15}  # fmt: skip
    (trained,) = ws.train(["squares"])
    assert trained.scores[0].value > 0.9
    assert trained.adapter.facts["tokens"] == 40 * 16 - lacking(task, 40)
    ws.add_image_task("two", squares(tmp_path / "two", ("red", "green"), 40, 5))
    ws.train(["two"])
    for method in ("regmean", "layerwise"):
        merged = ws.merge([], names=["squares", "two"], method=method)
        found = {s.task: s.value for s in merged.scores if s.subject == merged.adapter.ref}
        assert min(found.values()) > 0.7  # both are asked of the same kind of images
    out = ws.export("main@1", tmp_path / "out", task="two")
    model = AutoModelForImageClassification.from_pretrained(
        ws.base_folder, dtype=torch.float32, **json.loads((out / "labels.json").read_text())
    )
    peft = PeftModel.from_pretrained(model, out).eval()
    base = ws.base_model(ws.settings.config)
    labelling = Labelling(base)
    own = ws.store.task("two")
    batch = labelling.place(labelling.batch(ws.labelled(own, "eval")[1]))
    with torch.no_grad():
        theirs = peft(**batch.inputs).logits.argmax(1)
    (score,) = ws.score(["main@1"], ["two"])
    assert np.array_equal(ws.store.outcomes(score)[0], (theirs == batch.labels).float().numpy())
    assert list(ws.verify()) == []
    flips = ws.diff("base", "squares@1", "squares", rows=3).tasks[0].flips
    for flip in flips:
        assert flip.answer_after == flip.expected
        assert flip.prompt.startswith(f"{flip.expected}/")


def lacking(task, steps):
    """Rows fewer than full batches of 16 have in so many steps."""
    rows, short, left = task.splits["train"].rows, 0, steps
    while left > 0:
        full, rest = divmod(rows, 16)
        if rest and left > full:
            short += 16 - rest
        left -= full + bool(rest)
    return short


def test_pixels_are_the_image_processors_own(untaught, folder):
    import transformers

    # Later versions keep the one that needs no torchvision under another name.
    named = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    processor = named.from_pretrained(untaught.base_folder)
    path = folder / "red" / "0.png"
    base = untaught.base_model(untaught.settings.config)
    from lori_manager.tasks.labelled import LabelledImage

    labelling = Labelling(base)
    row = LabelledImage("d", 1, path.read_bytes)
    ours = labelling.place(labelling.batch([row])).inputs["pixel_values"][0]
    plain = Image.open(path).resize((16, 16), Image.Resampling.LANCZOS)
    theirs = processor(plain, do_resize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_an_interrupted_training_goes_on_to_the_same_digest(untaught, folder, tmp_path):
    digests = []
    for name in ("whole", "stopped"):
        ws = copied(untaught, tmp_path / name)
        ws.add_image_task("squares", folder)
        config = ws.settings.config.replace(steps=6, calibration_steps=2)
        if name == "stopped":
            ws.on_progress = stop_at_three
            with pytest.raises(KeyboardInterrupt):
                ws.train(["squares"], config)
            ws.on_progress = lambda told: None
        digests.append(ws.train(["squares"], config)[0].adapter.digest)
    assert digests[0] == digests[1]


def stop_at_three(told):
    if told.phase.startswith("training") and told.step == 3:
        raise KeyboardInterrupt


def test_labels_may_stand_in_metadata_and_the_same_again_changes_nothing(ws, folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    lines = []
    for path in sorted(folder.rglob("*.png"))[::9]:
        name = f"{path.parent.name}-{path.name}"
        (flat / name).write_bytes(path.read_bytes())
        lines.append({"file_name": name, "label": path.parent.name})
    metadata = flat / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = ws.add_image_task("flat", flat, scorer="label_nll", probe_rows=2)
    assert first.task.labels == ("blue", "green", "red")
    assert first.task.splits["probe"].rows == 2
    assert not ws.add_image_task("flat", flat, scorer="label_nll", probe_rows=2).new
    metadata.write_text(json.dumps(lines[0] | {"label": 0.5}) + "\n")
    with pytest.raises(BadData, match=r"metadata.jsonl, line 1: `label` must be"):
        ws.add_image_task("flat", flat)
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(BadData, match=r"metadata\.jsonl does not name it"):
        ws.add_image_task("flat", flat)


def test_what_is_learned_is_not_scored(ws, folder, tmp_path):
    other = squares(tmp_path / "other", ("red", "blue"), 3, 9)
    (other / "red" / "same.png").write_bytes((folder / "red" / "0.png").read_bytes())
    with pytest.raises(BadData, match="what is learned must not be scored"):
        ws.add_image_task("squares", folder, eval_images=other)
    (other / "red" / "same.png").unlink()
    (other / "red").rename(other / "round")
    with pytest.raises(BadData, match="no training row has the label 'round'"):
        ws.add_image_task("squares", folder, eval_images=other)
    (folder / "loose.png").write_bytes((folder / "red" / "0.png").read_bytes())
    with pytest.raises(BadData, match=r"loose.png: the image lies in no label's folder"):
        ws.add_image_task("squares", folder)
    (folder / "loose.png").unlink()


def test_text_and_image_bases_refuse_each_others_tasks(ws, folder, tmp_path):
    expected = (
        "needs a language model or a text encoder; the base of this workspace is an image encoder"
    )
    with pytest.raises(InvalidInput, match=expected):
        ws.add_task("colour", eval="none.jsonl")
    with pytest.raises(InvalidInput, match="scorer `exact_match` reads tokens, which an image"):
        ws.add_image_task("squares", folder, scorer="exact_match")
    text = Workspace.create(tmp_path / "t", str(encoder(tmp_path / "b", "roberta")))
    with pytest.raises(InvalidInput, match="diffusion pipeline or an image encoder as the base"):
        text.add_image_task("squares", folder)


def test_the_format_of_images_is_read_or_asked_for(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(NotFound, match="save the model's image processor there"):
        image_format(tmp_path)
    told = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
    for size, found in (
        ({"size": 32}, 32),
        ({"size": {"shortest_edge": 40}}, 40),
        ({"size": {"height": 24, "width": 24}}, 24),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28},
          "do_center_crop": True}, 28),
    ):  # fmt: skip
        path.write_text(json.dumps(told | size))
        assert image_format(tmp_path).size == found
    assert image_format(tmp_path).mean == (0.4, 0.5, 0.6)
    path.write_text(json.dumps(told | {"size": 8, "do_normalize": False}))
    assert image_format(tmp_path).std == (1.0, 1.0, 1.0)
    path.write_text(json.dumps({"size": 8}))
    with pytest.raises(NotFound, match="image_mean"):
        image_format(tmp_path)
