"""The grammar of the generated assistant texts: words, voices, and one file for each kind of request."""
