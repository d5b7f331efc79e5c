"""A small model on the device, for the time when its cloud is out of reach, and to draft with when it is not.

`folder.py` reads what `cotune compress --export` wrote, `onnx_model.py` and `llama_model.py` run it behind the one
interface of `model.py`, `generate.py` makes text with it.
"""
