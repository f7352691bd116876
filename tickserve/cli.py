"""Placeholder replaced in this sitting."""


def main() -> None:
    """Entry."""
