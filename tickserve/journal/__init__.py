"""The journal: every decision of a client, in a bounded, crash-safe file off the hot path, and what reads it back.

`Client(url, manifest=..., observer=Journal("journal"))` writes; `read_journal` and `tickserve replay` read. Writing
and reading take the extra `journal` (zstandard).
"""

from tickserve.journal._journal import Journal, JournalStats
from tickserve.journal._reader import journal_files, read_actions, read_journal
from tickserve.journal._replay import Difference, Replay, replay
from tickserve.journal._schema import OUTCOME, ActionRecord, DecisionRecord, GapRecord, Record
from tickserve.journal._summary import summarize
from tickserve.journal._tail import JournalTail

__all__ = [
    "OUTCOME",
    "ActionRecord",
    "DecisionRecord",
    "Difference",
    "GapRecord",
    "Journal",
    "JournalStats",
    "JournalTail",
    "Record",
    "Replay",
    "journal_files",
    "read_actions",
    "read_journal",
    "replay",
    "summarize",
]
