"""What a workspace holds, to compare before and after something went wrong."""

from __future__ import annotations

from typing import Any

from lori_manager.workspace import Workspace


def everything(workspace: Workspace) -> dict[str, list[Any]]:
    """Every record of the store."""
    store = workspace.store
    tasks = [t for task in store.tasks() for t in store.task_revisions(task.name)]
    return {
        "tasks": tasks,
        "masks": [mask for task in store.tasks() for mask in store.masks(task.name)],
        "adapters": store.adapters(),
        "scores": store.scores(),
        "outcomes": [store.outcomes(score)[0].tolist() for score in store.scores()],
        "aliases": store.aliases(),
    }


def assert_nothing_is_lost(before: dict[str, list[Any]], workspace: Workspace) -> None:
    """All that was there is there, and whole; there may be more, and files without a row."""
    now = everything(workspace)
    for kind, records in before.items():
        missing = [record for record in records if record not in now[kind]]
        assert not missing, f"{kind} lost or changed: {missing}"
    wrong = [finding for finding in workspace.verify() if finding.kind != "orphan"]
    assert not wrong


def results(workspace: Workspace, line: str) -> list[Any]:
    """What training a line has come to: digests, parents, masks and scores, no times."""
    return [
        (
            adapter.digest,
            [parent.digest for parent in adapter.parents],
            adapter.projection,
            {
                score.task: workspace.store.outcomes(score)[0].tolist()
                for score in workspace.store.scores(subject=adapter.ref)
            },
        )
        for adapter in workspace.store.adapters()
        if adapter.line == line
    ]
