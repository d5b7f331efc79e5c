"""Data: readers, prompt templates, token batches, and the generator of assistant texts. No torch."""

from cotune.data.assistant.personas import DEMO_PERSONA, Persona
from cotune.data.assistant_text import Exchange, generate_exchanges
from cotune.data.batches import EncodedExample, TokenBatch, encode_example, fit_example, token_batches
from cotune.data.persona_text import generate_persona_exchanges, persona_split
from cotune.data.records import DatasetSplits, read_examples, read_prompts, read_splits
from cotune.data.sampling import draw
from cotune.data.templates import DATASETS, TEMPLATES, Example, Template, format_answer, format_request

__all__ = [
    "DATASETS",
    "DEMO_PERSONA",
    "TEMPLATES",
    "DatasetSplits",
    "EncodedExample",
    "Example",
    "Exchange",
    "Persona",
    "Template",
    "TokenBatch",
    "draw",
    "encode_example",
    "fit_example",
    "format_answer",
    "format_request",
    "generate_exchanges",
    "generate_persona_exchanges",
    "persona_split",
    "read_examples",
    "read_prompts",
    "read_splits",
    "token_batches",
]
