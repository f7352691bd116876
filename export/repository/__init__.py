"""What is done with a published repository: list, verify, diff, lint, roll back, collect, sign, push and pull."""
