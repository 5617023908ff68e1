"""Settings: the defaults, `lori.toml` and flags, checked once, frozen after."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lori_manager import foreign
from lori_manager.errors import InvalidInput
from lori_manager.refs import check_name

SCOPES = ("model", "layer", "projection", "matrix")
PRECISIONS = ("auto", "fp32", "bf16", "fp8")
BASE_BITS = (16, 4)
PROJECTIONS = ("task", "shared", "orthogonal", "nullspace")
NULLSPACE_SCALES = ("rows", "inputs")
INITS = ("random", "svd")
SCHEDULES = ("constant", "linear", "cosine")
SWITCHES = ("auto", "off")
PACKING = ("auto", "on", "off")
CHECKPOINTING = ("off", "on")
STORE_DTYPES = ("bf16", "fp32")
PLOP = "plop"
PLOP_TYPES = 3


@dataclass(frozen=True)
class Config:
    """Everything that decides what a training run computes.

    Learning rates are per optimizer step of AdamW; a `learning_rate` of 0 is the usual one of
    the kind, see `kinds.resolved`. `steps` counts optimizer steps; 0 means `epochs` passes
    over the training rows. `calibration_steps` of 0 are as many as the training's.
    """

    kind: str = "lori"
    kind_options: dict[str, Any] = field(default_factory=dict)
    rank: int = 32
    alpha: float = 64.0
    sparsity: float = 0.9
    scope: str = "model"
    targets: tuple[str, ...] = ("all-linear",)
    init: str = "random"
    projection: str = "task"
    nullspace_energy: float = 0.99
    nullspace_scale: str = "rows"
    seed: int = 0
    batch: int = 16
    micro_batch: int = 0
    steps: int = 0
    epochs: float = 2.0
    calibration_steps: int = 0
    calibration_rows: int = 0
    learning_rate: float = 0.0
    dense_learning_rate: float = 2e-3
    head_learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int = 512
    precision: str = "auto"
    base_bits: int = 16
    packing: str = "auto"
    graphs: str = "auto"
    kernels: str = "auto"
    checkpointing: str = "off"
    store_dtype: str = "bf16"
    score_batch: int = 64
    run_code: bool = False
    checkpoint_seconds: float = 15.0

    def __post_init__(self) -> None:
        def need(ok: bool, key: str, expected: str) -> None:
            if not ok:
                got = getattr(self, key)
                raise InvalidInput(f"`{key}` must be {expected}, got {got!r}")

        for f in dataclasses.fields(self):
            given = getattr(self, f.name)
            if isinstance(f.default, float) and type(given) is int:
                object.__setattr__(self, f.name, _as_float(f.name, given))
            need(type(given) is not int or abs(given) < 2**63, f.name, "less than 2**63")
            default = {} if f.name == "kind_options" else f.default
            _check_type(f.name, getattr(self, f.name), default)
        need(self.rank >= 1, "rank", "at least 1")
        need(self.alpha > 0, "alpha", "above 0")
        need(0 <= self.sparsity < 1, "sparsity", "in [0, 1)")
        need(self.scope in SCOPES, "scope", f"one of {', '.join(SCOPES)}")
        need(bool(self.targets) and all(self.targets), "targets", "a list of module names")
        need(self.init in INITS, "init", f"one of {', '.join(INITS)}")
        types_to_place(self.targets)
        need(self.projection in PROJECTIONS, "projection", f"one of {', '.join(PROJECTIONS)}")
        need(0 <= self.nullspace_energy < 1, "nullspace_energy", "a share in [0, 1)")
        scales = ", ".join(NULLSPACE_SCALES)
        need(self.nullspace_scale in NULLSPACE_SCALES, "nullspace_scale", f"one of {scales}")
        need(0 <= self.seed < 2**63, "seed", "in [0, 2**63)")
        for key in ("batch", "score_batch"):
            need(getattr(self, key) >= 1, key, "at least 1")
        need(self.calibration_steps >= 0, "calibration_steps", "0 (as the training) or more")
        need(self.calibration_rows >= 0, "calibration_rows", "0 (all) or more")
        need(self.micro_batch >= 0, "micro_batch", "0 (all of a step's rows) or more")
        for key in ("graphs", "kernels"):
            need(getattr(self, key) in SWITCHES, key, f"one of {', '.join(SWITCHES)}")
        need(self.packing in PACKING, "packing", f"one of {', '.join(PACKING)}")
        need(self.checkpointing in CHECKPOINTING, "checkpointing", "on or off")
        need(self.steps >= 0, "steps", "0 (then `epochs` counts) or more")
        need(self.epochs > 0, "epochs", "above 0")
        need(self.learning_rate >= 0, "learning_rate", "above 0, or 0 for the kind's usual one")
        need(self.dense_learning_rate > 0, "dense_learning_rate", "above 0")
        need(self.head_learning_rate > 0, "head_learning_rate", "above 0")
        need(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}")
        need(0 <= self.warmup < 1, "warmup", "a share of the steps in [0, 1)")
        need(self.weight_decay >= 0, "weight_decay", "0 or more")
        need(self.clip >= 0, "clip", "0 (off) or more")
        need(self.max_length >= 2, "max_length", "at least 2")
        need(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        need(self.base_bits in BASE_BITS, "base_bits", f"one of {', '.join(map(str, BASE_BITS))}")
        need(self.precision != "fp8" or self.base_bits == 16, "base_bits", "16 with precision fp8")
        need(self.store_dtype in STORE_DTYPES, "store_dtype", f"one of {', '.join(STORE_DTYPES)}")
        need(self.checkpoint_seconds >= 0, "checkpoint_seconds", "0 (every step) or more")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            need(not isinstance(value, float) or math.isfinite(value), f.name, "finite")

    @property
    def scaling(self) -> float:
        """alpha / rank, the factor before B A (arXiv:2106.09685, section 4.1)."""
        return self.alpha / self.rank

    def replace(self, **changes: Any) -> Config:
        """A copy with those settings; None leaves a setting as it is."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the fields."""
        out = dataclasses.asdict(self)
        out["targets"] = list(self.targets)
        return out

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of `to_json`; unknown keys are an InvalidInput."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidInput(
                    f"unknown setting {key!r}; there are: {', '.join(sorted(known))}"
                )
        values = dict(values)
        if "targets" in values:
            targets = values["targets"]
            if isinstance(targets, str):
                targets = [t.strip() for t in targets.split(",")]
            if not isinstance(targets, (list, tuple)) or not all(
                isinstance(t, str) for t in targets
            ):
                raise InvalidInput(f"`targets` must be a list of module names, got {targets!r}")
            values["targets"] = tuple(targets)
        return cls(**values)


def types_to_place(targets: Sequence[str]) -> int | None:
    """How many types of layers `targets` leave to PLoP; None where they name layers.

    Args:
        targets: "plop" is `PLOP_TYPES` of them, "plop:5" five.
    Raises:
        InvalidInput: such a word beside others, or not followed by a number of 1 or more.
    """
    words = [target for target in targets if target.partition(":")[0] == PLOP]
    if not words:
        return None
    count = words[0].partition(":")[2] if ":" in words[0] else str(PLOP_TYPES)
    if len(targets) > 1 or not count.isdecimal() or int(count) < 1:
        raise InvalidInput(
            f'`targets` must be names of layers, or "{PLOP}" or "{PLOP}:N" (N types of layers) '
            f"alone, got {', '.join(targets)}"
        )
    return int(count)


def _as_float(key: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError as e:
        raise InvalidInput(f"`{key}` is a number of {len(hex(value))} hexadecimal digits: "
                           "give a smaller one") from e  # fmt: skip


def _check_type(key: str, value: object, default: object) -> None:
    expected = type(default)
    if type(value) is not expected:
        names = {
            int: "a whole number", float: "a number", str: "text", tuple: "a list",
            bool: "true or false", dict: "a table",
        }  # fmt: skip
        raise InvalidInput(f"`{key}` must be {names[expected]}, got {value!r}")


UNDECIDED = ("warn", "refuse")


@dataclass(frozen=True)
class GateRule:
    """What a task must keep before an alias may move."""

    margin: float = 0.02  # in the scorer's unit: a drop up to this is tolerated
    confidence: float = 0.95
    minimum: float | None = None  # of the score; of one that is better when lower, the maximum
    must_stay: str | None = None  # a file of examples that have to stay right

    def __post_init__(self) -> None:
        for name in ("margin", "confidence", "minimum"):
            value = getattr(self, name)
            if type(value) is int:
                value = _as_float(name, value)
                object.__setattr__(self, name, value)
            optional = name == "minimum" and value is None
            if not optional and (type(value) is not float or not math.isfinite(value)):
                raise InvalidInput(f"`{name}` of a gate must be a number, got {value!r}")
        if self.margin < 0:
            raise InvalidInput(f"`margin` of a gate must be at least 0, got {self.margin}")
        if not 0.5 < self.confidence < 1:
            raise InvalidInput(
                f"`confidence` of a gate must be above 0.5 and below 1, got {self.confidence}"
            )
        if self.must_stay is not None and not isinstance(self.must_stay, str):
            raise InvalidInput(f"`must_stay` of a gate must be a file, got {self.must_stay!r}")


@dataclass(frozen=True)
class Gate:
    """`[gate]` of `lori.toml`: rules for all tasks, and for some of their own."""

    rules: Mapping[str, Any] = field(default_factory=dict)
    undecided: str = "warn"
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rule(self, task: str) -> GateRule:
        """Of one task: its own settings, then those for all."""
        return GateRule(**{**self.rules, **self.tasks.get(task, {})})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Gate:
        """Check every key; raises InvalidInput."""
        rules = dict(values)
        undecided, tasks = rules.pop("undecided", "warn"), rules.pop("tasks", {})
        if undecided not in UNDECIDED:
            known_words = ", ".join(UNDECIDED)
            raise InvalidInput(f"`undecided` must be one of {known_words}, got {undecided!r}")
        tables = tasks.values() if isinstance(tasks, Mapping) else (None,)
        if not all(isinstance(table, Mapping) for table in tables):
            raise InvalidInput("[gate.tasks] must hold a table a task, such as [gate.tasks.safety]")
        known = {f.name for f in dataclasses.fields(GateRule)}
        own = ((f"[gate.tasks.{name}]", table) for name, table in tasks.items())
        for where, given in (("[gate]", rules), *own):
            for key in given:
                if key not in known or (where == "[gate]" and key == "must_stay"):
                    raise InvalidInput(
                        f"unknown key {key!r} in {where}; known: {', '.join(sorted(known))}"
                    )
        found = cls(rules, undecided, tasks)
        for name in ("", *tasks):
            found.rule(name)
        return found


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer of the user's own: a function in a file.

    Attributes:
        file, name: of the function. unit: of what it says.
        new_tokens: that a model may write beyond the task's longest completion.
    """

    file: str
    name: str
    higher_is_better: bool = True
    unit: str = "score"
    new_tokens: int = 128

    @classmethod
    def from_toml(cls, value: object) -> ScorerEntry:
        """`"FILE.py:FUNCTION"`, or a table with that as `function` and other fields.

        Raises:
            InvalidInput: anything else.
        """
        told = {"function": value} if isinstance(value, str) else value
        usual = {f.name: f.default for f in dataclasses.fields(cls)[2:]}
        if not isinstance(told, dict) or not told.keys() <= usual.keys() | {"function"}:
            keys = ", ".join(["function", *usual])
            raise InvalidInput(f'expected "FILE.py:FUNCTION" or a table of {keys}, got {value!r}')
        file, colon, name = str(told.get("function", "")).rpartition(":")
        if not (colon and file.endswith(".py") and name.isidentifier()):
            raise InvalidInput(
                f'expected a function as "FILE.py:FUNCTION", got {told.get("function")!r}'
            )
        given = {key: value for key, value in told.items() if key != "function"}
        for key, value in given.items():
            _check_type(key, value, usual[key])
        if given.get("new_tokens", 1) < 1:
            raise InvalidInput(f"`new_tokens` must be at least 1, got {given['new_tokens']}")
        return cls(file, name, **given)


@dataclass(frozen=True)
class Settings:
    """A workspace's `lori.toml`: training's defaults, tasks' files, own scorers, the gate."""

    config: Config = field(default_factory=Config)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scorers: Mapping[str, ScorerEntry] = field(default_factory=dict)
    gate: Gate = field(default_factory=Gate)


# Key of [tasks.NAME] -> a value of its type.
TASK_KEYS: Mapping[str, str | int | bool] = {
    **dict.fromkeys(
        ("train", "eval", "calibration", "probe", "scorer", "description", "lm_eval",
         "lm_eval_include", "lm_eval_metric"), ""
    ),
    **dict.fromkeys(("probe_rows", "lm_eval_fewshot", "lm_eval_limit"), 0),
    "allow_overlap": False,
}  # fmt: skip
SETTINGS_BYTES = 4 << 20


def load_settings(path: Path) -> Settings:
    """Read `lori.toml`; a missing file gives the defaults.

    Raises:
        InvalidInput: not TOML, or an unknown or unusable key, named.
    """
    try:
        text = foreign.read_whole(path, SETTINGS_BYTES).decode()
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, foreign.Malformed) as e:
        raise InvalidInput(f"cannot read {path}: {e}; mend or remove the file") from e
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # also numbers and dates that no computer holds
        raise InvalidInput(f"{path} is not TOML: {e}") from e
    tasks = data.pop("tasks", {})
    defaults = data.pop("defaults", {})
    scorers = data.pop("scorers", {})
    gate = data.pop("gate", {})
    if data:
        raise InvalidInput(
            f"{path}: unknown section {next(iter(data))!r}; expected [defaults], [tasks.NAME], "
            "[scorers] and [gate]"
        )
    if not all(isinstance(section, dict) for section in (tasks, defaults, scorers, gate)):
        raise InvalidInput(f"{path}: `defaults`, `tasks`, `scorers` and `gate` must be tables")
    for name, entry in tasks.items():
        if not isinstance(entry, dict):
            raise InvalidInput(f"{path}: [tasks.{name}] must be a table")
        for key in entry:
            if key not in TASK_KEYS:
                known = ", ".join(sorted(TASK_KEYS))
                raise InvalidInput(f"{path}: unknown key {key!r} in [tasks.{name}]; known: {known}")
        try:
            for key, value in entry.items():
                _check_type(key, value, TASK_KEYS[key])
        except InvalidInput as e:
            raise InvalidInput(f"{path}: [tasks.{name}]: {e}") from e
    own = {}
    for name, value in scorers.items():
        try:
            own[check_name(name, "scorer")] = ScorerEntry.from_toml(value)
        except InvalidInput as e:
            raise InvalidInput(f"{path}: [scorers] {name}: {e}") from e
    try:
        return Settings(Config.from_json(defaults), tasks, own, Gate.from_json(gate))
    except InvalidInput as e:
        raise InvalidInput(f"{path}: {e}") from e


COMMENTS = {
    "alpha": "of alpha / rank",
    "seed": "of A, of the order of rows and of the choice of calibration rows",
    "epochs": "passes over the training rows where `steps` is 0",
    "dense_learning_rate": "of all of B: calibration and --dense",
    "weight_decay": "of AdamW; it acts on trained entries alone",
    "score_batch": "rows a forward when scoring",
    "run_code": "let `pass_at_1` run the programs that a model writes, in a sandbox",
    "checkpoint_seconds": "how often a running training is saved; 0 is every step",
    "rank": "rank of B A; alpha / rank is the update's scaling",
    "sparsity": "share of B frozen at zero; 0.9 is LoRI-S of the paper",
    "scope": "where the mask's threshold is set: " + ", ".join(SCOPES),
    "targets": '"all-linear" (every linear layer but the head), names like ["q_proj", "v_proj"], '
    'or "plop" ("plop:N"): the 3 (N) types of layers that `lori place` chooses for the task',
    "init": "A is random, see `projection`; svd: each module's leading right singular vectors, "
    "which are kept in the file",
    "projection": "A is random, one a task (task) or one for all (shared); orthogonal: to the A of "
    "every other task; nullspace: off the inputs of the tasks taught before",
    "nullspace_energy": "of an earlier task's inputs, the share in the directions that A avoids",
    "nullspace_scale": "what a nullspace A keeps the size of: its rows, or its answers to the "
    "task's own inputs (inputs)",
    "batch": "rows a step",
    "micro_batch": "rows a forward; 0 is all of a step's, less takes less memory",
    "packing": "rows of a batch in one sequence where the model allows it; auto: on GPUs",
    "graphs": "auto: CUDA graphs for the steps of small models",
    "kernels": "auto: fused GPU kernels where they are installed (extra `cuda`)",
    "checkpointing": "on: less memory for one forward more",
    "steps": "optimizer steps; 0 means `epochs` passes over the rows",
    "calibration_steps": "dense steps before the mask is cut; 0: as many as a training has (a few "
    "find no better mask than chance)",
    "calibration_rows": "how many training rows calibrate where no calibration file is given; 0: "
    "all",
    "kind": "what is trained: see `lori kinds`",
    "kind_options": "options of that kind alone",
    "learning_rate": "0: the kind's usual one; dense_learning_rate is LoRI's without a mask",
    "head_learning_rate": "of what stands behind an encoder and tells its labels",
    "schedule": "after the warm-up: " + ", ".join(SCHEDULES),
    "warmup": "share of the steps",
    "clip": "largest norm of the gradient, 0 is off",
    "max_length": "tokens a row; longer prompts lose their beginning",
    "precision": "auto: bf16 on a GPU, fp32 elsewhere; fp8: bf16 with the base's layers in e4m3",
    "base_bits": "4: the base's linear layers in nf4 (QLoRA; extra `cuda`); 16: unpacked",
    "store_dtype": "of the stored values; what is scored is what is stored",
}


def default_toml(own: Mapping[str, Any] | None = None) -> str:
    """The commented `lori.toml` that `lori init` writes.

    Args:
        own: settings in which the workspace differs from the usual; these are no comments.
    """
    own = own or {}
    lines = ["# Defaults of this workspace. Flags of a command win over them.", "", "[defaults]"]
    for key, value in Config().replace(**own).to_json().items():
        if isinstance(value, str):
            shown = f'"{value}"'
        elif isinstance(value, bool):
            shown = str(value).lower()
        elif isinstance(value, list):
            shown = "[" + ", ".join(f'"{v}"' for v in value) + "]"
        elif isinstance(value, dict):
            shown = "{" + ", ".join(f"{k} = {v!r}" for k, v in value.items()) + "}"
        else:
            shown = repr(value)
        comment = f"  # {COMMENTS[key]}" if key in COMMENTS else ""
        lines.append(f"{'' if key in own else '# '}{key} = {shown}{comment}")
    lines += [
        "",
        "# [tasks.safety]",
        '# train = "data/safety/train.jsonl"',
        '# eval = "data/safety/eval.jsonl"',
        '# scorer = "exact_match"',
        "",
        "# [scorers]",
        '# polite = "scorers/polite.py:polite"  # your function of (text, row)',
        "",
        "# [gate]  # before `lori promote`; [gate.tasks.NAME] for one task",
        "# margin = 0.02  # a drop up to this is tolerated",
        "# confidence = 0.95",
        "# minimum = 0.8  # of the score",
        '# undecided = "warn"  # or "refuse": what the rows cannot tell',
        "# [gate.tasks.safety]",
        '# must_stay = "data/safety/must_stay.jsonl"  # examples that have to stay right',
        "",
    ]
    return "\n".join(lines)
