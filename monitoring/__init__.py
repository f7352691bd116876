"""What the servers say about themselves: Triton's metrics endpoint."""
