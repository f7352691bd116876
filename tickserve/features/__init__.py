"""The feature engine: a spec becomes small state machines, run over a chunk of events or stepped one event at a time.

`spec` needs numpy alone; `engine` needs numba (the `stream` extra).
"""
