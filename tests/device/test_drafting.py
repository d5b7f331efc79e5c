"""When a draft is sent, from where, and how long it is."""

from __future__ import annotations

from cotune.device.drafting import MAX_DRAFT, Drafting, Expected


class Counting:
    """Every text goes on with the next number."""

    def draft(self, history: list[int], k: int) -> list[int]:
        return [history[-1] + i for i in range(1, k + 1)]


class Silent:
    def draft(self, history: list[int], k: int) -> list[int]:
        return []


def drafting(kept_share: float = 0.5, vocab_size: int = 1000) -> Drafting:
    made = Drafting(Counting(), vocab_size)
    made.kept_share = kept_share
    return made


def test_what_is_expected_agrees_with_texts_that_may_go_on_so() -> None:
    expected = Expected(2, [5, 6])
    assert expected.end == 4
    for text in ([1, 2], [1, 2, 5], [1, 2, 5, 6], [1, 2, 5, 6, 9]):
        assert expected.agrees_with(text)
    for text in ([1], [1, 2, 7], [1, 2, 5, 7, 9]):
        assert not expected.agrees_with(text)


def test_a_draft_begins_with_the_token_that_the_device_just_decided() -> None:
    """So that the cloud, which may have gone on with another one, does not put it behind that."""
    assert drafting().next([1, 2], [], is_replaced=False) == Expected(1, [2, 3, 4, 5])


def test_nothing_is_said_twice() -> None:
    one = drafting()
    assert one.next([1, 2], [], is_replaced=False)
    assert one.next([1, 2, 3], [], is_replaced=False) is None
    assert one.next([1, 2, 3, 4, 5], [], is_replaced=False) == Expected(4, [5, 6, 7, 8])


def test_where_a_pass_begins_anew_a_short_rest_is_topped_up() -> None:
    one = drafting()
    one.next([1, 2], [], is_replaced=False)
    assert one.next([1, 2, 3], [], is_replaced=True) is None
    assert one.next([1, 2, 3, 4], [], is_replaced=True) == Expected(3, [4, 5, 6, 7])


def test_another_token_than_expected_makes_a_new_draft() -> None:
    one = drafting()
    one.next([1, 2], [], is_replaced=False)
    assert one.next([1, 2, 50], [], is_replaced=True) == Expected(2, [50, 51, 52, 53])


def test_before_the_corrected_token_is_known_it_is_guessed() -> None:
    one = drafting()
    assert one.next([1, 2], [77], is_replaced=False) == Expected(2, [3, 4, 5, 6])
    # The cloud read 3 to 6 and put its own 88 after them.
    assert one.next([1, 2], [3, 4, 5, 6, 88], is_replaced=False) == Expected(2, [3, 4, 5, 6, 7, 8, 9, 10])
    silent = Drafting(Silent(), 1000)
    assert silent.next([1, 2], [77], is_replaced=False) is None


def test_a_cloud_that_ran_far_ahead_by_itself_is_left_alone() -> None:
    assert drafting().next([1], [2, 3, 4], is_replaced=False)
    assert drafting().next([1], [2, 3, 4, 5], is_replaced=False) is None


def test_the_share_of_kept_tokens_decides_how_long_drafts_are() -> None:
    one = drafting()
    one.next([1, 2], [], is_replaced=False)
    before = one.kept_share
    one.note([1, 2, 3])
    assert one.kept_share > before
    one.note([1, 2, 3, 50])
    assert one.kept_share <= before
    low = one.kept_share
    one.note([1, 2, 3, 50, 51])  # the draft was over with its first wrong token
    assert one.kept_share == low
    good = drafting(kept_share=1.0)
    draft = good.next([1], [], is_replaced=False)
    assert draft is not None and len(draft.tokens) == 1 + MAX_DRAFT


def test_drafts_that_are_never_right_are_kept_to_itself_until_they_get_better() -> None:
    one = drafting(kept_share=0.05)
    text = [1]
    assert one.next(text, [], is_replaced=False) is None
    for token in range(2, 40):
        text.append(token)
        one.note(text)
        if one.next(text, [], is_replaced=False):
            break
    assert 0.1 < one.kept_share < 0.3


def test_tokens_that_do_not_exist_end_a_draft() -> None:
    assert drafting(vocab_size=5).next([1, 2], [], is_replaced=False) == Expected(1, [2, 3, 4])


def test_a_new_connection_knows_of_no_draft() -> None:
    one = drafting()
    first = one.next([1, 2], [], is_replaced=False)
    one.forget()
    assert one.next([1, 2], [], is_replaced=False) == first
