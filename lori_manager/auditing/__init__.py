"""From stored scores to an audit: what every step did to every task, and whether it is real.

Scores are compared row by row, on the rows that both have, and only within one revision of
a task and one version of its scorer. Outcomes are read task by task and let go when a task
is done; no model is ever loaded.
"""

from lori_manager.auditing.choosing import MOST
from lori_manager.auditing.reading import AuditStore
from lori_manager.auditing.results import (
    Audit,
    Comparison,
    Entry,
    Sensitivity,
    SequenceAudit,
    TaskAudit,
)
from lori_manager.auditing.run import AuditRun, audit

__all__ = [
    "MOST",
    "Audit",
    "AuditRun",
    "AuditStore",
    "Comparison",
    "Entry",
    "Sensitivity",
    "SequenceAudit",
    "TaskAudit",
    "audit",
]
