"""The OpenAI-compatible HTTP interface, over any source of text: requests, answers, streaming, errors, routes.

A `TextSource` (`source.py`) makes the text; `routes.py` puts it behind `/v1/chat/completions`, `/v1/completions` and
`/v1/models`. What the text comes from, a personal plugin or a plain backbone, is not known here.
"""
