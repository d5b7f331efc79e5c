"""`coevaluate evaluate`: evaluate on one machine."""
from __future__ import annotations
def evaluate() -> None:
    """x"""
