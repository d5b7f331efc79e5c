"""From the messages of a chat to the one prompt that the backbone continues.

The plugin was tuned on single exchanges in one form, its prompt format. A conversation becomes a row of these:

    <system texts>            each followed by an empty line
    <format(request)> <answer>  each earlier exchange, followed by an empty line
    <format(last request)>    what the backbone continues

A conversation of one user message is thus exactly what `cotune device generate` sends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cotune.openai_api.api_error import ApiError
from cotune.openai_api.requests import Message


def chat_prompt(messages: Sequence[Message], format_prompt: Callable[[str], str]) -> str:
    r"""One prompt of a conversation whose last message is the user's.

    Args:
        messages: at least one.
        format_prompt: puts one request into the form of the training prompts.

    Raises:
        ApiError: the last message is not the user's, or empty.

    Example:
        >>> turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
        >>> messages = [Message(role=role, content=content) for role, content in turns]
        >>> chat_prompt(messages, "User: {}\nAssistant:".format)
        'User: Hi\nAssistant: Hello.\n\nUser: Bye\nAssistant:'
    """
    *earlier, last = messages
    if last.role != "user" or not last.content.strip():
        what = "empty" if last.role == "user" else f"of the {last.role}"
        raise ApiError(f"the last message is {what}, expected one of the user with text in it", param="messages")
    parts: list[str] = []
    is_asked = False
    for message in earlier:
        text = message.content.strip()
        if message.role == "user":
            parts.append(("\n\n" if parts else "") + format_prompt(text))
        elif message.role == "assistant" and is_asked:
            # The answer follows its request as it did in the training texts: after a space, if the form has none.
            space = "" if parts[-1][-1:].isspace() else " "
            parts.append(space + text)
        elif text:
            parts.append(("\n\n" if parts else "") + text)
        is_asked = message.role == "user"
    return "".join(parts) + ("\n\n" if parts else "") + format_prompt(last.content.strip() if earlier else last.content)
