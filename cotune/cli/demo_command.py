"""`codemo demo`: demo on one machine."""
from __future__ import annotations
def demo() -> None:
    """x"""
