"""Profilers around a `tickserve` command: what starts them, what runs inside the profiled process, what they left."""
