"""The closed-API way: a cloud that is a chat API, text in and text out, between two private halves on the device.

What leaves is redacted first (`redact.py`): private values become placeholders, whose meaning stays on the device, and
come back in the answer. Redaction needs neither PyTorch nor any package outside the standard library.
"""
