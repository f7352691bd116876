"""Drift of served models, from their journal: measured against the training, exported, and turned into an action.

Records come in from a journal that is being written (`follow.py`), are added up in windows (`monitor.py`, `tally.py`,
`window.py`), and go out as metrics (`families.py`) and as the action file that clients obey (`decide.py`). What each
number is: docs/drift.md.
"""
