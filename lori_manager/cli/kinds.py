"""`lori kinds`."""

from __future__ import annotations

from lori_manager.cli import output
from lori_manager.cli.output import Json
from lori_manager.kinds import KINDS, PARTIAL


def kinds(json: Json = False) -> None:
    """What `lori train --kind` can train, and what can be done with each.

    Settings are those of lori.toml that not every kind has a use for; options are the
    kind's own, given as `--option KEY=VALUE`.
    """
    if json:
        output.print_json([_plain(kind) for kind in KINDS.values()])
        return
    output.table(
        ["kind", "what", "paper", ">rate", "merges", "exported as", "served by", "settings",
         "options"],
        [
            [
                kind.name,
                kind.title,
                kind.source,
                f"{kind.rate:g}",
                "yes" if kind.low_rank else "no",
                kind.export,
                kind.served,
                "all" if kind.settings == PARTIAL else ", ".join(sorted(kind.settings)),
                ", ".join(f"{key}={value}" for key, value in kind.options.items()),
            ]
            for kind in KINDS.values()
        ],
    )  # fmt: skip


def _plain(kind: object) -> dict[str, object]:
    fields = dict(vars(kind))
    plain = {key: dict(fields[key]) for key in ("options", "not_on")}
    return {**fields, "settings": sorted(fields["settings"]), **plain}
