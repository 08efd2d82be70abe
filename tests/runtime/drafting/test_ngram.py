"""N-gram drafts, against a search of the whole text."""

from __future__ import annotations

import numpy as np
import pytest

from edgeskip.runtime.drafting.ngram import NgramIndex


def searched(tokens, count, longest, shortest):
    """What followed the latest earlier occurrence of the longest n-gram at the end, token by token."""
    for n in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if n <= len(tokens) and tokens[start : start + n] == tokens[-n:]:
                drafts = list(tokens[start + n :])
                while len(drafts) < count:
                    drafts += drafts[: len(drafts)]
                return drafts[:count]
    return []


@pytest.mark.parametrize("alphabet", [2, 4, 8])
@pytest.mark.parametrize(("longest", "shortest"), [(4, 2), (1, 1), (3, 3)])
def test_drafts_are_what_a_search_of_the_text_finds(alphabet, longest, shortest):
    random = np.random.default_rng(alphabet)
    tokens = random.integers(0, alphabet, 160).tolist()
    index, found = NgramIndex(tokens[:3], longest=longest, shortest=shortest), 0
    for size in range(3, len(tokens)):
        for count in (1, 6, 16):
            drafts = index.drafts(count)
            assert drafts == searched(tokens[:size], count, longest, shortest)
            found += bool(drafts)
        assert index.last == tokens[size - 1]
        index.add(tokens[size : size + 1])
    assert found > 5


def test_tokens_may_come_several_at_a_time():
    tokens = np.random.default_rng(0).integers(0, 6, 90).tolist()
    index = NgramIndex(tokens[:20])
    index.add(tokens[20:55])
    index.add([])
    index.add(tokens[55:])
    assert index.drafts(8) == NgramIndex(tokens).drafts(8) != []


@pytest.mark.parametrize("tokens", [[], [7], [7, 8], [1, 2, 3, 4, 5]])
def test_a_text_that_repeats_nothing_has_no_drafts(tokens):
    assert NgramIndex(tokens).drafts(4) == []
