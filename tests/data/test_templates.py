from __future__ import annotations

import pytest

from cotune.data.templates import (
    TEMPLATES,
    Example,
    Row,
    choose_question_template,
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
    "highlights": {"article": "Long.", "highlights": "Short .\nBrief .", "id": "0a"},
    "conversation_lists": {"source": "race", "story": "S.", "questions": ["Q?"], "answers": {"input_text": ["A."]}},
    "distractors": {"question": "Q?", "correct_answer": "A.", "support": ""},
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


HUB_COQA: Row = {
    "source": "mctest",
    "story": "Anna is in Rome.",
    "questions": ["Who?", "Where?"],
    "answers": {"input_text": ["Anna.", "Rome."], "answer_start": [0, 11], "answer_end": [4, 15]},
}


def official_coqa(**second_answer: object) -> Row:
    answer = {"span_start": 11, "span_end": 15, "span_text": "Rome", "input_text": "Rome.", "turn_id": 2}
    return {
        "source": "mctest",
        "id": "3x",
        "filename": "mc160.train.1",
        "story": "Anna is in Rome.",
        "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "Where?", "turn_id": 2}],
        "answers": [{"span_text": "Anna", "input_text": "Anna.", "turn_id": 1}, answer | second_answer],
        "name": "mc160.train.1",
    }


@pytest.mark.parametrize("row", [HUB_COQA, official_coqa()])
def test_coqa_is_the_same_conversation_in_both_formats(row: Row) -> None:
    first = "Anna is in Rome.\n\nQuestion: Who?\nAnswer:"
    assert render(row) == [
        Example(first, " Anna."),
        Example(f"{first} Anna.\nQuestion: Where?\nAnswer:", " Rome."),
    ]
    assert choose_template("coqa", row).name == "conversation_lists"


def test_coqa_turns_without_an_answer_or_marked_as_bad_are_left_out() -> None:
    first = [Example("Anna is in Rome.\n\nQuestion: Who?\nAnswer:", " Anna.")]
    assert render(official_coqa(input_text=" ")) == first
    assert render(official_coqa(bad_turn="true")) == first
    assert len(render(official_coqa(bad_turn="false"))) == 2


def test_sciq_shows_its_options_in_an_order_that_says_nothing() -> None:
    row = {
        "question": "What falls?",
        "distractor3": "wind",
        "distractor1": "fire",
        "distractor2": "air",
        "correct_answer": "rain",
        "support": "Rain falls.",
    }
    options = "Options:\n- air\n- fire\n- rain\n- wind\n"
    assert render(row) == [Example(f"Rain falls.\n\nQuestion: What falls?\n{options}Answer:", " rain")]
    assert render(row | {"support": ""})[0].prompt == f"Question: What falls?\n{options}Answer:"
    assert render({"question": "Q?", "correct_answer": "A."}) == [Example("Question: Q?\nAnswer:", " A.")]


def test_cnn_dailymail_reads_as_a_summary() -> None:
    expected = [Example("Summarize this text.\n\nLong.\n\nSummary:", " Short .\nBrief .")]
    assert render(ROWS["highlights"]) == expected
    assert render({"article": " \n", "highlights": "Short ."}) == []


@pytest.mark.parametrize(
    ("row", "document"),
    [
        (ROWS["summary"], "Long."),
        (ROWS["highlights"], "Long."),
        (ROWS["conversation"], "S."),
        (ROWS["conversation_lists"], "S."),
        ({"context": "It rains.", "question": "Q?", "answer": "A."}, "It rains."),
        ({"support": "It rains.", "question": "Q?", "correct_answer": "A."}, "It rains."),
    ],
)
def test_an_example_knows_where_its_document_stands(row: Row, document: str) -> None:
    (example,) = render(row)
    assert example.document is not None
    start, end = example.document
    assert example.prompt[start:end] == document
    assert render(ROWS["question"])[0].document is None


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
        ({"story": "S", "questions": ["Q", "R"], "answers": ["A"]}, "there are 2 questions and 1 answers, expected"),
        ({"story": "S", "questions": "Q", "answers": ["A"]}, "column 'questions' is text, expected texts, objects"),
        ({"story": "S", "questions": ["Q"], "answers": {"text": ["A"]}}, "column 'answers' is an object, expected"),
        (official_coqa(turn_id=3), "question 2 has turn_id 2 and its answer 3, expected the same"),
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
    with pytest.raises(DataError, match="or a data set: 'cnn_dailymail', 'coqa', 'mctest', 'sciq', 'xsum'"):
        choose_template("poem", ["text"])
    with pytest.raises(DataError, match=r"'cnn_dailymail' has columns article \+ highlights; document \+ summary, but"):
        choose_template("cnn_dailymail", ["text"])
    with pytest.raises(DataError, match="template 'summary' needs column 'summary', but the columns are 'document'"):
        choose_template("summary", ["document"])


def test_a_question_needs_no_answer() -> None:
    for row, name in (
        ({"prompt": "a"}, "prompt_target"),
        ({"request": "a"}, "request"),
        ({"question": "a", "answer": "b"}, "question"),
        ({"text": "a"}, "label"),
        ({"sentence1": "a", "sentence2": "b"}, "sentence_pair"),
    ):
        assert choose_question_template(None, row).name == name
    assert choose_question_template("sciq", {"question": "a"}).name == "question"
    with pytest.raises(DataError, match=r"no question is in the columns 'story'; accepted are: prompt; request; docu"):
        choose_question_template(None, {"story": "a"})
    with pytest.raises(DataError, match="'messages'; accepted are: none of this template"):
        choose_question_template("messages", {"messages": []})
    with pytest.raises(DataError, match="template is 'no'"):
        choose_question_template("no", {"prompt": "a"})
