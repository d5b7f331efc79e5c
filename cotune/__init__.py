"""cotune: one large language model in the cloud and many private devices learn and generate together.

Importing `cotune`, `cotune.wire` or `cotune.device` never imports PyTorch.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
