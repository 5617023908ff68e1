"""The options that stand for the keys of lori.toml, made from `Config` itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from lori_manager import config
from lori_manager.cli import complete
from lori_manager.config import Config
from lori_manager.kinds import KINDS, check_bits, check_given

Changes = Mapping[str, Any]

# `max_length` is not here: a task's rows are cut by lori.toml alone, alike for every adapter.
# `kind_options` are read as KEY=VALUE by the commands that take them.
_NO_OPTION = ("max_length", "kind_options")
TRAINING = tuple(f.name for f in dataclasses.fields(Config) if f.name not in _NO_OPTION)
CALIBRATION = (
    "calibration_steps", "calibration_rows", "epochs", "sparsity", "scope", "rank", "alpha",
    "targets", "init", "projection", "nullspace_energy", "nullspace_scale", "seed", "batch",
    "dense_learning_rate", "schedule", "warmup", "weight_decay", "clip", "precision", "base_bits",
    "micro_batch", "packing", "graphs", "kernels", "checkpointing",
)  # fmt: skip
SCORING = ("precision", "base_bits", "score_batch", "packing", "kernels", "run_code")

_DEFAULTS = Config()
_SHORT = {"learning_rate": "--lr", "dense_learning_rate": "--dense-lr"}
_CHOICES = {
    "kind": tuple(KINDS),
    "scope": config.SCOPES,
    "precision": config.PRECISIONS,
    "base_bits": tuple(str(bits) for bits in config.BASE_BITS),
    "init": config.INITS,
    "projection": config.PROJECTIONS,
    "nullspace_scale": config.NULLSPACE_SCALES,
    "schedule": config.SCHEDULES,
    "store_dtype": config.STORE_DTYPES,
    **dict.fromkeys(("graphs", "kernels"), config.SWITCHES),
    "packing": config.PACKING,
    "checkpointing": config.CHECKPOINTING,
}


def with_settings(
    *keys: str, also: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per key; it gets those that were set as `changes`.

    Args:
        keys: fields of `Config`.
        also: key -> a further name of its option.
    """
    names = {key: [_flag(key)] for key in keys}
    for key, name in (_SHORT | dict(also or {})).items():
        if key in names:
            names[key].append(name)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            changes = {key: given.pop(key) for key in keys}
            command(**given, changes={k: v for k, v in changes.items() if v is not None})

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "changes"]
        added = [_option(key, names[key]) for key in keys]
        run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return run

    return decorate


def configured(base: Config, changes: Changes, *, trains: bool = False) -> Config:
    """`base` with the options of a command.

    Args:
        trains: whether the command trains the kind of the settings, whichever named it.
    Raises:
        InvalidInput: a value that no run can use.
    """
    changes = dict(changes)
    if "targets" in changes:
        changes["targets"] = tuple(t.strip() for t in changes["targets"].split(","))
    found = base.replace(**changes)
    check_given(found, changes)
    if trains or "kind" in changes:
        check_bits(found, changes)
    return found


def _flag(key: str) -> str:
    """`--run-code/--no-run-code` where the setting is true or false."""
    name = key.replace("_", "-")
    return f"--{name}/--no-{name}" if isinstance(getattr(_DEFAULTS, key), bool) else f"--{name}"


def _option(key: str, names: list[str]) -> inspect.Parameter:
    default = getattr(_DEFAULTS, key)
    listed = isinstance(default, tuple)
    shown = ",".join(default) if listed else str(default).lower()
    choices = _CHOICES.get(key)
    option = typer.Option(
        *names,
        help=config.COMMENTS.get(key, ""),
        show_default=f"lori.toml, else {shown}",
        autocompletion=complete.among(*choices) if choices else None,
        rich_help_panel="Settings",
    )
    kind = str if listed else type(default)
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
