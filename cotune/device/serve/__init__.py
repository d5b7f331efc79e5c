"""`cotune device serve`: the personal model behind an OpenAI-compatible endpoint and a chat page, on this machine.

`personal_source.py` makes the texts, `guards.py` decides whose requests are heard, `page/` is what a browser shows,
`application.py` puts them together and `server.py` runs them.
"""
