"""The server side: embedded Triton and its CPU backends."""
