"""Which runtime, measured: what can run a model here, each held against research and timed under one harness.

measure.py      calls that take turns, so that a slow spell of the machine meets all of them
candidates.py   what can run this model on this machine, and what cannot, with the reason
choose.py       the rule that names one
survey.py       all of it: the record that goes into the manifest
"""
