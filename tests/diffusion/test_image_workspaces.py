import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is missing: install the extra `diffusion`")

from PIL import Image
from tiny_pipeline import make_pipeline, write_images
from typer.testing import CliRunner

from lori_manager import models, pipelines
from lori_manager.adapters.diffusers_export import METADATA_KEY, WEIGHTS_FILE
from lori_manager.cli.app import app
from lori_manager.diffusion.noise_loss import held_out_losses
from lori_manager.diffusion.pipeline import load_pipeline
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.errors import BadData, InvalidInput, NotFound
from lori_manager.kind_comparison import RateSearch
from lori_manager.probing import halves
from lori_manager.workspace import Workspace


def test_the_base_is_known_by_all_its_parts(taught, pipeline, tmp_path):
    base = taught.store.base()
    assert base.model_type == "stable-diffusion"
    assert base.fingerprint == models.fingerprint(pipeline)
    marks = {base.fingerprint}
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):  # fmt: skip
        copy = tmp_path / part
        _copy(pipeline, copy)
        file = copy / part / f"{name}.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        marks.add(models.fingerprint(copy))
    assert len(marks) == 4


def _copy(folder, target):
    import shutil

    shutil.copytree(folder, target)


def test_parts_whose_tensors_have_one_name_are_told_apart(tmp_path):
    from safetensors.torch import save_file

    marks = set()
    for number, (unet, vae, text) in enumerate(
        [
            ({"w": 1}, {"w": 2}, {"w": 3}),
            ({"w": 9}, {"w": 2}, {"w": 3}),
            ({"w": 1}, {"w": 9}, {"w": 3}),
            ({"w": 1}, {"w": 2}, {"w": 9}),
            ({"w": 2}, {"w": 1}, {"w": 3}),
            ({"a": 1, "b": 2}, {"c": 3}, {"w": 3}),
            ({"a": 1}, {"b": 2, "c": 3}, {"w": 3}),
        ]
    ):
        folder = tmp_path / str(number)
        for name, tensors in (("unet/diffusion_pytorch_model", unet),
                              ("vae/diffusion_pytorch_model", vae),
                              ("text_encoder/model", text)):  # fmt: skip
            file = folder / f"{name}.safetensors"
            file.parent.mkdir(parents=True)
            save_file({key: torch.tensor([value]) for key, value in tensors.items()}, file)
        (folder / pipelines.INDEX).write_text("{}")
        marks.add(models.fingerprint(folder))
    assert len(marks) == 7


def test_settings_of_the_scheduler_are_part_of_what_a_score_is_known_by(pipeline, tmp_path):
    before = models.encoding_digest(pipeline, 512)
    assert before == models.encoding_digest(pipeline, 64)
    _copy(pipeline, tmp_path / "p")
    path = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"_diffusers_version": "9"}))
    assert models.encoding_digest(tmp_path / "p", 512) == before
    path.write_text(json.dumps(told | {"prediction_type": "v_prediction"}))
    assert models.encoding_digest(tmp_path / "p", 512) != before


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, InvalidInput, "one text encoder"),
        ({"unet": ["diffusers", "UNet2DModel"]}, InvalidInput, "'unet' of .* is a UNet2DModel"),
        ({"vae": None}, NotFound, "lacks the part 'vae'"),
    ],
)
def test_other_pipelines_are_refused(pipeline, tmp_path, change, kind, says):
    _copy(pipeline, tmp_path / "p")
    path = tmp_path / "p" / pipelines.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(kind, match=says):
        Workspace.create(tmp_path / "ws", str(tmp_path / "p"))


def test_pickled_weights_are_not_taken(pipeline, tmp_path):
    _copy(pipeline, tmp_path / "p")
    file = tmp_path / "p" / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(NotFound, match=r"lacks diffusion_pytorch_model\.safetensors"):
        models.locate(str(tmp_path / "p"))


def test_a_hub_pipeline_is_fetched_without_its_variants(monkeypatch, pipeline):
    asked = []

    def snapshot(source, **options):
        asked.append(options)
        return str(pipeline)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert models.locate("owner/name")[0] == pipeline
    assert [a["allow_patterns"] for a in asked] == [[pipelines.INDEX], pipelines.HUB_FILES]
    assert asked[1]["ignore_patterns"] == pipelines.HUB_VARIANTS


def test_lori_toml_names_the_cross_attention(pipeline, tmp_path):
    with Workspace.create(tmp_path / "ws", str(pipeline)) as ws:
        config = ws.settings.config
        assert config.targets == pipelines.CROSS_ATTENTION
        shapes = load_pipeline(pipeline, "fp32", "cpu").linear_shapes
        chosen = models.resolve_targets(shapes, config.targets)
    assert len(chosen) == 28  # seven blocks
    assert all(".attn2.to_" in name for name in chosen)


def test_only_cross_attention_is_trained_and_scores_are_kept(taught):
    adapter = taught.adapter("water@1")
    weights = taught.weights(adapter)
    assert len(weights.modules) == 28
    assert all(".attn2." in name for name in weights.modules)
    assert weights.blocks[0].projection is not None
    kept = sum(int(m.sum()) for m in weights.blocks[0].mask.values())
    total = sum(m.numel() for m in weights.blocks[0].mask.values())
    assert kept == round(0.1 * total)
    (score,) = taught.store.scores(subject="water@1")
    assert score.rows == taught.store.task("water").splits["eval"].rows == 4
    assert score.facts == {"higher_is_better": False, "unit": "mean squared error"}
    outcomes, weighed = taught.store.outcomes(score)
    assert weighed is None
    assert score.value == pytest.approx(float(np.mean(outcomes)), rel=1e-6)


def test_training_lowers_the_loss_on_what_was_learned(styles):
    pictures = styles.pictures(styles.store.task("water"), "train")
    config = styles.settings.config.replace(steps=25, learning_rate=0.02)
    (trained,) = styles.train(["water"], config)
    base = styles.pipeline(config)
    before = held_out_losses(base, pictures, 8, 64)
    with attached(base.model, low_rank_layers(base.model, _updates(styles, trained.adapter))):
        after = held_out_losses(base, pictures, 8, 64)
    assert (after < before).all()


def _updates(ws, adapter):
    return ws.weights(adapter).updates()


@pytest.mark.parametrize("kind", ["lori", "lora"])
def test_an_interrupted_training_ends_at_the_same_digest(styles, kind):
    config = styles.settings.config.replace(kind=kind, steps=5, checkpoint_seconds=0.0, seed=3)
    from lori_manager.teaching import TrainOptions

    (whole,) = styles.train(["oil"], config, TrainOptions(line="whole"))

    def interrupt(told):
        if told.phase.startswith("training") and told.step == 3:
            raise KeyboardInterrupt

    if kind == "lori":  # the same A and mask for both
        config = config.replace(projection="shared")
        (whole,) = styles.train(["oil"], config, TrainOptions(line="again"))
    styles.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        styles.train(["oil"], config, TrainOptions(line="cut"))
    steps = []
    styles.on_progress = lambda told: steps.append((told.phase, told.step))
    (cut,) = styles.train(["oil"], config, TrainOptions(line="cut"))
    assert ("training oil", 3) not in steps
    assert ("training oil", 5) in steps
    assert cut.adapter.digest == whole.adapter.digest


@pytest.mark.parametrize("kind", ["rslora", "pissa", "adalora", "svfit"])
def test_other_low_rank_kinds_train_and_are_exported(styles, tmp_path, kind):
    config = styles.settings.config.replace(kind=kind, steps=8)
    (trained,) = styles.train(["water"], config)
    assert trained.adapter.method == kind
    assert trained.scores[0].task == "water"
    styles.export(trained.adapter.ref, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS_FILE).is_file()


def test_kinds_are_compared_and_settings_suggested_by_held_out_images(styles, tmp_path):
    styles.add_image_task("ink", write_images(tmp_path / "ink", "ink", 16), eval_share=0.25)
    config = styles.settings.config.replace(steps=8, learning_rate=0.02)
    found = styles.compare_kinds("ink", ["lori", "lora"], seeds=1, config=config,
                                 search=RateSearch(points=2, share=1.0))  # fmt: skip
    assert (found.scorer, found.rows, found.higher_is_better) == ("noise_loss", 4, False)
    task = styles.store.task("ink")
    parts = halves(styles, task, config)
    assert (len(parts.rows), len(parts.held)) == (9, 3)
    untaught = held_out_losses(styles.pipeline(config), parts.held, 8, 16).mean()
    for kind in found.kinds:
        assert min(loss for _, loss in kind.tried) < untaught
        assert kind.adapters == (f"ink.{kind.entry}@1",)
    suggested = styles.suggest("ink", budget=60, config=config.replace(kind="lora", steps=4))
    assert suggested.base_loss == pytest.approx(untaught, rel=1e-6)
    assert min(p.loss for p in suggested.probes) < untaught
    (targets,) = [c for c in suggested.choices if c.setting == "targets"]
    assert targets.value == list(config.targets)
    assert "a diffusion pipeline" in targets.why


def test_a_may_begin_with_the_singular_vectors(styles):
    (trained,) = styles.train(["water"], styles.settings.config.replace(init="svd", steps=1))
    assert trained.adapter.method == "lori-s"


def test_other_targets_may_be_named(styles):
    config = styles.settings.config.replace(targets=("attn1.to_v", "attn2.to_v"), steps=1)
    (trained,) = styles.train(["water"], config)
    names = styles.weights(trained.adapter).modules
    assert {name.split(".")[-2] for name in names} == {"attn1", "attn2"}


def test_a_sequence_is_scored_on_every_style_at_every_stage(styles):
    config = styles.settings.config.replace(steps=1)
    results = styles.train(["water", "oil"], config, sequence="both")
    assert [len(r.scores) for r in results] == [2, 2]
    audit = styles.audit("both@2", ["water", "oil"])
    assert {t.task for t in audit.tasks} == {"water", "oil"}


@pytest.mark.parametrize("method", ["concat", "svd", "ties", "tsv", "knots"])
def test_two_styles_merge(styles, method):
    merged = styles.merge(["water@1", "oil@1"], method=method)
    assert {s.task for s in merged.scores} == {"water", "oil"}
    assert merged.adapter.method == method


REFUSED = {
    "regmean": lambda ws: ws.merge(["water@1", "oil@1"], method="regmean"),
    "routed": lambda ws: ws.merge(["water@1", "oil@1"], method="routed"),
    "auto": lambda ws: ws.merge(["water@1", "oil@1"], method="auto"),
    "search": lambda ws: ws.merge(["water@1", "oil@1"], weights="search"),
    "dry run": lambda ws: ws.forecast(["water@1", "oil@1"]),
    "text": lambda ws: ws.add_task("words", eval="words.jsonl"),
    "full": lambda ws: ws.export("water@1", ws.root / "out", full=True),
    "import": lambda ws: ws.import_adapters([ws.root]),
    "base_bits": lambda ws: ws.score(["base"], config=ws.settings.config.replace(base_bits=4)),
    "precision": lambda ws: ws.train(["oil"], ws.settings.config.replace(precision="fp8")),
    "nullspace": lambda ws: ws.train(
        ["oil"], ws.settings.config.replace(projection="nullspace")
    ),
    "place": lambda ws: ws.place("oil"),
    "plop": lambda ws: ws.train(["oil"], ws.settings.config.replace(targets=("plop",))),
    "bench": lambda ws: ws.bench(["oil@1"]),
    "compare": lambda ws: ws.compare_kinds("oil", ["lori", "dora"]),
    "kind": lambda ws: ws.train(["oil"], ws.settings.config.replace(kind="prefix")),
    "qlora": lambda ws: ws.train(["oil"], ws.settings.config.replace(kind="qlora")),
    "replay": lambda ws: ws.train(["oil"], options=_replay(), sequence=None),
}  # fmt: skip


def _replay():
    from lori_manager.teaching import TrainOptions

    return TrainOptions(start="water@1", replay=5)


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_a_language_model_is_refused_in_a_sentence(styles, what):
    with pytest.raises(InvalidInput, match=r"language model") as e:
        REFUSED[what](styles)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["qlora", "dora", "ia3", "full", "bottleneck"])
def test_kinds_of_encoders_and_language_models_are_refused_as_such(styles, kind):
    expected = f"^kind `{kind}` needs a language model or an encoder; the base of this workspace is"
    config = styles.settings.config.replace(kind=kind)
    with pytest.raises(InvalidInput, match=expected):
        styles.train(["oil"], config)
    with pytest.raises(InvalidInput, match=expected):
        styles.compare_kinds("oil", ["lori", kind])


def test_images_need_a_pipeline(tiny_base, folders, tmp_path):
    with (
        Workspace.create(tmp_path / "ws", str(tiny_base)) as ws,
        pytest.raises(InvalidInput, match="diffusion pipeline"),
    ):
        ws.add_image_task("water", folders["water"])


def test_the_same_images_again_change_nothing(styles, folders):
    assert not styles.add_image_task("water", folders["water"], eval_share=0.4).new
    other = styles.add_image_task("water", folders["water"], eval_share=0.5)
    assert (other.new, other.task.ref) == (True, "water#2")


def test_rows_stay_what_they_were_when_the_folder_changes(styles, folders, tmp_path):
    folder = write_images(tmp_path / "new", "ink", 4)
    styles.add_image_task("ink", folder)
    before = [p.read() for p in styles.pictures(styles.store.task("ink"), "train")]
    for path in folder.iterdir():
        path.unlink()
    assert [p.read() for p in styles.pictures(styles.store.task("ink"), "train")] == before


def test_what_is_learned_is_not_scored(styles, folders, tmp_path):
    other = write_images(tmp_path / "eval", "pen", 3)
    task = styles.add_image_task("pen", folders["oil"], eval_images=other).task
    assert (task.splits["train"].rows, task.splits["eval"].rows) == (8, 3)
    with pytest.raises(BadData, match="must not be scored"):
        styles.add_image_task("both", folders["oil"], eval_images=folders["oil"])


def test_verify_knows_the_images(styles):
    assert list(styles.verify()) == []
    picture = styles.pictures(styles.store.task("oil"), "train")[0]
    path = styles.store.objects.path(picture.digest)
    path.write_bytes(b"something else")
    assert [(f.kind, f.subject) for f in styles.verify()] == [("damaged", "oil#1 train")]
    path.unlink()
    assert [(f.kind, f.subject) for f in styles.verify()] == [("missing", "oil#1 train")]
    digest = styles.store.objects.put(b"nobody's")
    assert ("orphan", digest) in {(f.kind, f.subject) for f in styles.verify()}


def unet_output(unet, texts):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(x, torch.tensor([10, 700]), encoder_hidden_states=texts).sample


@pytest.mark.parametrize("merged", [False, True])
def test_diffusers_reads_what_is_exported(styles, pipeline, tmp_path, merged):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    ref = "water@1"
    if merged:
        ref = styles.merge([ref, "oil@1"], weights=[1.0, 0.5]).adapter.ref
    styles.export(ref, tmp_path / "out")
    base = load_pipeline(pipeline, "fp32", "cpu")
    texts = base.texts(["a water picture", "an oil picture"])
    plain = unet_output(base.model, texts)
    updates = styles.weights(styles.adapter(ref)).updates()
    with attached(base.model, low_rank_layers(base.model, updates)):
        ours = unet_output(base.model, texts)
    assert (ours - plain).abs().max() > 1e-4

    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    unet.load_lora_adapter(
        tmp_path / "out", prefix="unet", weight_name=WEIGHTS_FILE, use_safetensors=True
    )
    torch.testing.assert_close(unet_output(unet, texts), ours, rtol=0, atol=1e-5)

    pipe = StableDiffusionPipeline.from_pretrained(
        pipeline, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(unet_output(pipe.unet, texts), ours, rtol=0, atol=1e-5)
    (config,) = pipe.unet.peft_config.values()
    assert config.lora_alpha == config.r


def test_the_export_says_its_rank_and_modules_as_diffusers_does(styles, tmp_path):
    from safetensors import safe_open

    styles.export("water@1", tmp_path / "out")
    with safe_open(tmp_path / "out" / WEIGHTS_FILE, "pt") as file:
        told = json.loads(file.metadata()[METADATA_KEY])
        keys = list(file.keys())
    assert told["unet.r"] == told["unet.lora_alpha"] == 4
    assert len(told["unet.target_modules"]) == 28
    assert all(k.startswith("unet.") and ".attn2." in k for k in keys)


def test_a_grid_has_a_row_for_the_base_and_each_adapter(styles, tmp_path):
    path = tmp_path / "grid.png"
    options = {"steps": 2, "seed": 1}
    sampled = styles.sample(["water@1", "oil@1"], ["a b", "c"], path=path, **options)
    assert sampled.rows == ("base", "water@1", "oil@1")
    first = path.read_bytes()
    styles.sample(["water@1", "oil@1"], ["a b", "c"], path=path, **options)
    assert path.read_bytes() == first
    cells = _cells(path, 3, 2)
    assert not np.array_equal(cells[0][0], cells[0][1])  # prompts and noise differ
    assert not np.array_equal(cells[0][0], cells[1][0])  # the adapter acts
    assert np.abs(cells[0][0].astype(int) - cells[1][0]).mean() < 20  # from the same noise
    styles.sample(["base"], ["a b", "c"], path=path, **options)
    assert np.array_equal(_cells(path, 1, 2)[0][1], cells[0][1])


def _cells(path, rows, columns):
    """The images of a grid, 160 pixels each behind gaps of 8, from its lower right corner."""
    pixels = np.asarray(Image.open(path))
    height, width = pixels.shape[:2]
    return [
        [
            pixels[height - (rows - r) * 168 : height - (rows - r) * 168 + 160,
                   width - (columns - c) * 168 : width - (columns - c) * 168 + 160]
            for c in range(columns)
        ]
        for r in range(rows)
    ]  # fmt: skip


def test_captions_of_the_tasks_are_the_prompts_where_none_are_given(styles, tmp_path):
    merged = styles.merge(["water@1", "oil@1"]).adapter.ref
    sampled = styles.sample([merged], path=tmp_path / "grid.png", steps=1)
    assert len(sampled.prompts) == 4
    assert {p.split()[1] for p in sampled.prompts} == {"water", "oil"}


def run(ws, *args):
    return CliRunner().invoke(app, ["-C", str(ws.root), *map(str, args)])


def test_the_commands(styles, folders, tmp_path):
    added = run(styles, "add-task", "ink", "--images", folders["oil"], "--seed", "5")
    assert added.exit_code == 0, added.output
    assert "tokens" not in added.stdout
    clash = run(styles, "add-task", "ink", "--images", folders["oil"], "--scorer", "bleu")
    assert clash.exit_code == 2
    lost = run(styles, "add-task", "ink", "--eval-share", "0.5")
    assert lost.exit_code == 2
    grid = tmp_path / "g.png"
    shown = run(styles, "sample", "water@1", "--prompts", "a; b;", "--steps", "1", "-o", grid)
    assert shown.exit_code == 0, shown.output
    assert "2 rows (base, water@1), 2 prompts" in shown.stdout
    assert Image.open(grid).format == "PNG"
    for args in (["report", "-o", tmp_path / "r.html"], ["audit"], ["verify"]):
        done = run(styles, *args)
        assert done.exit_code == 0, done.output
    diff = run(styles, "diff", "base", "water@1", "--json")
    assert diff.exit_code == 0, diff.output


def test_bf16_is_told_apart(styles):
    config = styles.settings.config.replace(precision="bf16", steps=2)
    (trained,) = styles.train(["water"], config)
    assert trained.scores[0].precision == "bf16"
    assert styles._pipeline.model.dtype == torch.bfloat16


def test_a_pipeline_with_other_words_is_another_base(pipeline, styles, tmp_path):
    other = make_pipeline(tmp_path / "other", seed=1)
    from lori_manager.errors import WrongBase

    with pytest.raises(WrongBase):
        styles.move_base(str(other))
