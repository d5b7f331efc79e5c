"""`cotune tune`: tune on one machine."""
from __future__ import annotations
def tune() -> None:
    """x"""
