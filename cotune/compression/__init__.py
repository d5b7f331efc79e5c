"""Compression: pruning and quantising a model's weights with calibration texts."""
