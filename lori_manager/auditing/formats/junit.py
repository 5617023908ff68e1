"""JUnit XML for CI: a suite for each judged version, a case for each task revision."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from xml.etree import ElementTree

from lori_manager.auditing import wording
from lori_manager.auditing.results import Audit, Entry, TaskAudit
from lori_manager.records import Finding

# XML 1.0 has no way to write these, not even escaped.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NOT_SCORED = "not scored"


def text(found: Audit) -> str:
    """The document.

    A case fails where a regression of its version on its task is real, or beyond
    `max_drop`; it is skipped where the version was not scored on the task.
    """
    failures: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in (*found.regressions, *found.findings):
        task = f"{finding.facts['task']}#{finding.facts['revision']}"
        failures[finding.subject, task].append(finding)
    root = ElementTree.Element("testsuites", name="lori audit")
    suites = [_suite(root, ref, found.tasks, failures) for ref in found.adapters]
    for key in ("tests", "failures", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in suites)))
    root.set("errors", "0")
    root.set("time", "0")
    ElementTree.indent(root)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def _suite(
    root: ElementTree.Element,
    ref: str,
    tasks: Sequence[TaskAudit],
    failures: dict[tuple[str, str], list[Finding]],
) -> ElementTree.Element:
    suite = ElementTree.SubElement(root, "testsuite", name=ref)
    failed = skipped = 0
    for task in tasks:
        entries = [e for e in task.entries if e.subject == ref]
        if not entries and not task.latest:
            continue  # an older revision that this version has nothing to do with
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"lori.audit.{ref}", name=task.ref, time="0"
        )
        for finding in failures[ref, task.ref]:
            message = _clean(finding.message)
            failure = ElementTree.SubElement(case, "failure", message=message, type=finding.kind)
            failure.text = message
        failed += bool(failures[ref, task.ref])
        if not entries:
            skipped += 1
            ElementTree.SubElement(case, "skipped", message=_NOT_SCORED)
            continue
        told = ElementTree.SubElement(case, "system-out")
        told.text = _clean("\n".join([*map(_told, entries), *wording.notes(task)]))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(failed))
    suite.set("errors", "0")
    suite.set("skipped", str(skipped))
    suite.set("time", "0")
    return suite


def _told(entry: Entry) -> str:
    compared = [
        f"{wording.change(c)} from {c.against}, p {wording.p(c)}"
        for c in (entry.parent, entry.previous, entry.against)
        if c is not None
    ]
    precision = f" ({entry.precision})" if entry.precision else ""
    return "; ".join([wording.score(entry) + precision, *compared])


def _clean(told: str) -> str:
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", told)
