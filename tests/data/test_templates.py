from __future__ import annotations

import pytest

from cotune.data.templates import (
    TEMPLATES,
    Example,
    Row,
    choose_template,
    format_answer,
    format_request,
    make_example,
)
from cotune.errors import DataError

ROWS: dict[str, Row] = {
    "prompt_target": {"prompt": "One, two,", "target": " three"},
    "prompt_response": {"prompt": "One, two,", "response": "three"},
    "prompt_completion": {"prompt": "One, two,", "completion": "three"},
    "request": {"request": "Hello!", "answer": "Hi."},
    "summary": {"document": "Long.", "summary": "Short."},
    "conversation": {"story": "S.", "turns": [{"question": "Q?", "answer": "A."}]},
    "question": {"context": "", "question": "Q?", "answer": "A."},
    "messages": {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]},
    "dialogue": {"turns": [{"speaker": "A", "text": "Hello!"}, {"speaker": "B", "text": "Hi."}]},
    "instruction": {"instruction": "Add.", "input": "1, 2", "output": "3", "category": "sums"},
    "sentence_pair": {"sentence1": "X", "sentence2": "Y", "label": "same"},
    "label": {"text": "Nice.", "label": "positive"},
    "text": {"text": "Once upon a time", "title": "Tales"},
}


def render(row: Row) -> list[Example]:
    return choose_template(None, row).render(row)


def test_every_template_has_a_row_and_is_found_by_its_columns() -> None:
    assert set(ROWS) == set(TEMPLATES)
    for name, row in ROWS.items():
        assert choose_template(None, row).name == name
        assert choose_template(name, row).name == name


def test_prompts_and_targets_by_hand() -> None:
    assert render(ROWS["prompt_target"]) == [Example("One, two,", " three")]
    assert render(ROWS["prompt_completion"]) == [Example("One, two,", " three")]
    assert render(ROWS["request"]) == [Example("User: Hello!\nAssistant:", " Hi.")]
    assert render(ROWS["summary"]) == [Example("Summarize this text.\n\nLong.\n\nSummary:", " Short.")]
    assert render(ROWS["instruction"]) == [Example("User: Add.\n1, 2\nAssistant:", " 3")]
    assert render(ROWS["sentence_pair"]) == [Example("Sentence 1: X\nSentence 2: Y\nLabel:", " same")]
    assert render(ROWS["label"]) == [Example("Text: Nice.\nLabel:", " positive")]
    assert render(ROWS["text"]) == [Example("", "Once upon a time")]


def test_question_with_context_and_options() -> None:
    row = {"context": "It rains.", "question": "Is it dry?", "answer": "no", "options": ["yes", "no"]}
    assert render(row) == [Example("It rains.\n\nQuestion: Is it dry?\nOptions:\n- yes\n- no\nAnswer:", " no")]
    assert render({"question": "Q?", "answer": 7}) == [Example("Question: Q?\nAnswer:", " 7")]


def test_a_conversation_gives_one_example_a_turn() -> None:
    turns = [{"question": "Who?", "answer": "Anna."}, {"question": "Where?", "answer": "Rome."}]
    first = "Anna is in Rome.\n\nQuestion: Who?\nAnswer:"
    assert render({"story": "Anna is in Rome.", "turns": turns}) == [
        Example(first, " Anna."),
        Example(f"{first} Anna.\nQuestion: Where?\nAnswer:", " Rome."),
    ]


def test_a_dialogue_gives_one_example_for_each_turn_but_the_first() -> None:
    turns = [{"speaker": "A", "text": "Hello!"}, {"speaker": "B", "text": "Hi."}, {"speaker": "A", "text": "Bye."}]
    assert render({"turns": turns}) == [
        Example("A: Hello!\nB:", " Hi."),
        Example("A: Hello!\nB: Hi.\nA:", " Bye."),
    ]


def test_messages_give_one_example_for_each_message_of_the_assistant() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye!"},
        {"role": "assistant", "content": "Bye."},
    ]
    first = "System: Be kind.\nUser: Hello!\nAssistant:"
    assert render({"messages": messages}) == [
        Example(first, " Hi."),
        Example(f"{first} Hi.\nUser: Bye!\nAssistant:", " Bye."),
    ]


def test_request_prompt_is_the_one_of_the_built_in_model() -> None:
    assert format_request("Hello!") + format_answer("Hi.") == "User: Hello!\nAssistant: Hi."


def test_space_is_added_only_where_no_white_space_is() -> None:
    assert make_example("a", "b") == Example("a", " b")
    assert make_example("a\n", "b") == Example("a\n", "b")
    assert make_example("a", "\nb") == Example("a", "\nb")
    assert make_example("", "b") == Example("", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "target": " "}, "target is empty"),
        ({"prompt": "a", "target": None}, "column 'target' is null, expected text"),
        ({"prompt": ["a"], "target": "b"}, "column 'prompt' is a list of text, expected text"),
        ({"prompt": "a", "target": True}, "column 'target' is true or false, expected text"),
        ({"prompt": "a", "target": "\ud800"}, "half of a surrogate pair"),
        ({"story": "S", "turns": "no"}, "column 'turns' is text, expected a list of objects"),
        ({"turns": [1, 2]}, "column 'turns' is a list of a number, expected a list of objects"),
        ({"turns": [{"speaker": "A"}]}, "column 'text' is missing; found 'speaker'"),
        ({"question": "Q", "answer": "A", "options": "x"}, "column 'options' is text, expected a list of texts"),
    ],
)
def test_rows_that_do_not_fit_say_why(row: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(row)


def test_unknown_columns_and_templates_list_what_is_accepted() -> None:
    with pytest.raises(DataError, match=r"no template fits the columns 'a', 'b'; accepted are: prompt \+ target; "):
        choose_template(None, ["b", "a"])
    with pytest.raises(DataError, match=r"template is 'poem', expected one of 'conversation', "):
        choose_template("poem", ["text"])
    with pytest.raises(DataError, match="template 'summary' needs column 'summary', but the columns are 'document'"):
        choose_template("summary", ["document"])
