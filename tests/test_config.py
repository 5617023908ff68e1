"""Settings: every unusable value named in one line, and a template that means the defaults."""

import dataclasses
import json
import math

import pytest

from lori_manager.config import (
    COMMENTS,
    Config,
    Settings,
    default_toml,
    load_settings,
    types_to_place,
)
from lori_manager.engine import mask
from lori_manager.errors import InvalidInput

FIELDS = [f.name for f in dataclasses.fields(Config)]
FLOATS = [f.name for f in dataclasses.fields(Config) if isinstance(f.default, float)]


def written(tmp_path, text):
    path = tmp_path / "lori.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_scaling_is_alpha_over_rank():
    assert Config().scaling == 2.0
    assert Config(rank=8, alpha=12.0).scaling == 1.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0), ("rank", -1), ("rank", 1.0), ("rank", True), ("rank", "32"), ("alpha", 0.0),
        ("alpha", "64"), ("sparsity", 1.0), ("sparsity", -0.1), ("scope", "row"), ("targets", ()),
        ("targets", ("q", "")), ("targets", ["q"]), ("projection", ""), ("seed", -1),
        ("seed", 2**63), ("batch", 0), ("steps", -1), ("epochs", 0.0), ("calibration_steps", -1),
        ("calibration_rows", -1), ("learning_rate", -1e-3), ("dense_learning_rate", -1.0),
        ("schedule", "step"), ("warmup", 1.0), ("weight_decay", -0.1), ("clip", -1.0),
        ("max_length", 1), ("precision", "fp16"), ("store_dtype", "int8"), ("score_batch", 0),
        ("checkpoint_seconds", -1.0), ("nullspace_energy", 1.0), ("nullspace_energy", -0.1),
        ("nullspace_scale", "columns"), ("base_bits", 8), ("base_bits", "4"), ("base_bits", 4.0),
        ("targets", ("plop", "q")), ("targets", ("plop:0",)), ("targets", ("plop:x",)),
        ("targets", ("plop:",)), ("targets", ("plop:3", "plop:4")),
    ],
)  # fmt: skip
def test_an_unusable_value_is_refused_by_name_with_what_was_expected(key, value):
    with pytest.raises(InvalidInput, match=rf"^`{key}` must be .*, got "):
        Config(**{key: value})


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_must_be_finite(key, value):
    with pytest.raises(InvalidInput, match=f"`{key}` must be "):
        Config(**{key: value})


def test_the_edges_that_are_allowed_are_allowed():
    Config(rank=1, sparsity=0.0, steps=0, warmup=0.0, clip=0.0, max_length=2, seed=2**63 - 1,
           checkpoint_seconds=0.0, weight_decay=0.0)  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("plop",), 3), (("plop:1",), 1), (("plop:12",), 12), (("ploppy",), None), (("q", "v"), None)],
)
def test_plop_leaves_so_many_types_of_layers_to_be_chosen(targets, count):
    assert types_to_place(Config(targets=targets).targets) == count


def test_replace_takes_what_is_given_and_leaves_none():
    config = Config(rank=8).replace(rank=None, alpha=16.0, sparsity=0.0)
    assert (config.rank, config.alpha, config.sparsity) == (8, 16.0, 0.0)
    with pytest.raises(InvalidInput, match="`rank`"):
        config.replace(rank=0)


def test_settings_return_from_json_as_they_were():
    config = Config(rank=8, targets=("q", "v"), epochs=0.5)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_whole_numbers_serve_as_numbers_and_a_text_as_a_list_of_targets():
    config = Config.from_json({"alpha": 16, "clip": 1, "targets": "q_proj, v_proj"})
    assert (config.alpha, config.targets) == (16.0, ("q_proj", "v_proj"))
    assert type(config.alpha) is float
    for key in FLOATS:
        with pytest.raises(InvalidInput, match=f"`{key}` must be a number, got True"):
            Config.from_json({key: True})


@pytest.mark.parametrize("key", FLOATS)
def test_a_whole_number_is_taken_wherever_a_number_is_wanted(key):
    usable = 0 if key in ("sparsity", "warmup", "nullspace_energy") else 1
    assert getattr(Config.from_json({key: usable}), key) == float(usable)


@pytest.mark.parametrize("targets", [3, [1], ["q", 1], {"q": 1}, [], ""])
def test_targets_that_are_no_names_are_refused(targets):
    with pytest.raises(InvalidInput, match="`targets` must be a list of module names"):
        Config.from_json({"targets": targets})


def test_an_unknown_setting_is_refused_with_those_there_are():
    with pytest.raises(
        InvalidInput, match=r"unknown setting 'ranks'; there are: alpha, base_bits, batch, "
    ):
        Config.from_json({"ranks": 3})


def test_a_missing_file_gives_the_defaults(tmp_path):
    assert load_settings(tmp_path / "none.toml") == Settings()


def test_defaults_and_tasks_are_read(tmp_path):
    path = written(tmp_path, '[defaults]\nrank = 4\n[tasks.a]\ntrain = "x"\nprobe_rows = 3\n')
    assert load_settings(path) == Settings(Config(rank=4), {"a": {"train": "x", "probe_rows": 3}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank = [", "is not TOML"),
        ("rank = 4", "unknown section 'rank'; expected"),
        ("[default]\nrank = 4", "unknown section 'default'"),
        ("defaults = 3", "must be tables"),
        ("tasks = 3", "must be tables"),
        ("[tasks]\na = 3", r"\[tasks.a\] must be a table"),
        ("[tasks.a]\ntrian = 'x'", r"unknown key 'trian' in \[tasks.a\]; known: allow_overlap"),
        ("[defaults]\nrank = 0", "`rank` must be at least 1, got 0"),
        ("[defaults]\nalpha = inf", "`alpha` must be finite, got inf"),
        ("[defaults]\nranks = 1", "unknown setting 'ranks'"),
    ],
)
def test_an_unusable_file_is_one_line_that_names_it(tmp_path, text, message):
    with pytest.raises(InvalidInput, match=message) as e:
        load_settings(written(tmp_path, text))
    assert "lori.toml" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_is_no_text_or_no_file_is_one_line(tmp_path):
    path = tmp_path / "lori.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match=r"cannot read .*lori\.toml"):
        load_settings(path)
    with pytest.raises(InvalidInput, match="cannot read"):
        load_settings(tmp_path)


def test_the_written_template_means_the_defaults(tmp_path):
    assert load_settings(written(tmp_path, default_toml())) == Settings()


def test_the_written_template_with_every_line_in_force_means_the_defaults_too(tmp_path):
    lines = default_toml().split("# [tasks.safety]")[0].splitlines()
    text = "\n".join(line.removeprefix("# ") if " = " in line else line for line in lines)
    assert sum(" = " in line for line in lines) == len(FIELDS)
    assert load_settings(written(tmp_path, text)) == Settings()


def test_the_tasks_of_the_written_template_are_read_when_in_force(tmp_path):
    text = default_toml().partition("# [tasks.safety]")[1:]
    text = "\n".join(line.removeprefix("# ") for line in "".join(text).splitlines())
    assert set(load_settings(written(tmp_path, text)).tasks["safety"]) == {
        "train", "eval", "scorer",
    }  # fmt: skip


def test_only_settings_are_explained():
    assert set(COMMENTS) <= set(FIELDS)


def test_the_engine_and_the_settings_know_the_same_scopes():
    from lori_manager.config import SCOPES

    assert SCOPES == mask.SCOPES
