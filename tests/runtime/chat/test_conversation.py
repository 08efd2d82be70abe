"""Turns of a conversation are the model's answers to all that was said, and old ones make room for new ones."""

from __future__ import annotations

import logging
import shutil
from itertools import pairwise

import pytest
from tests.conftest import edit_json

import edgeskip
from edgeskip.runtime.errors import RequestError

CAPACITY = 192


@pytest.fixture
def model(chat_bundles):
    with edgeskip.load(chat_bundles(CAPACITY).folder) as loaded:
        yield loaded


def ending(bundle, folder):
    """A copy of a bundle whose texts may end, as those of a grammar do."""
    copy = shutil.copytree(bundle.folder, folder / "b", copy_function=shutil.copy2)
    edit_json(copy / "manifest.json", lambda manifest: manifest.update(eos_token_ids=[1]))
    return copy


def message(role, content):
    return {"role": role, "content": content}


def test_an_answer_is_the_model_s_to_all_that_was_said(model):
    chat = edgeskip.Chat(model, system="short", max_new_tokens=8)
    said = [message("system", "short")]
    for text in ("Hi", "And?", "So"):
        answer = chat.ask(text)
        said.append(message("user", text))
        cached = chat.generation.statistics.cached_tokens
        assert answer == model.complete(said, max_new_tokens=8).text
        assert (cached > 15) == (len(said) > 2)  # an answer has a few bytes that come back as other tokens
        said.append(message("assistant", answer))
    assert chat.messages == said[1:]
    chat.reset()
    assert chat.messages == []
    assert chat.ask("Hi") == said[2]["content"]


def test_an_answer_that_is_stopped_is_as_long_as_it_came(model):
    chat = edgeskip.Chat(model, max_new_tokens=40)
    pieces = chat.send("tell")
    said = [next(pieces).text, next(pieces).text]
    pieces.close()
    assert chat.messages == [message("user", "tell"), message("assistant", "".join(said))]
    assert chat.ask("go on")  # the model is free again


def test_what_cannot_be_sent_is_not_part_of_the_conversation(model):
    chat = edgeskip.Chat(model, max_new_tokens=4)
    chat.ask("a")
    before = list(chat.messages)
    with pytest.raises(RequestError, match="its content is None"):
        chat.ask(None)
    with pytest.raises(RequestError, match=f"wanted at most {CAPACITY}"):
        chat.ask("x" * CAPACITY)
    assert chat.messages == before
    assert chat.ask("b")
    with pytest.raises(RequestError, match="message 1: 'a'; wanted a mapping"):
        edgeskip.Chat(model, messages=["a"])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"draft": "nope"}, "draft: 'nope'; wanted one of exit, ngram, auto"),
        ({"mode": "autoregressive", "draft": "ngram"}, "draft: 'ngram', beside the mode autoregressive"),
        ({"drafts": "ngram"}, "'drafts'; wanted one of"),
        ({"max_new_tokens": 0}, "max new tokens: 0"),
        ({"grammar": edgeskip.Grammar.from_regex("(")}, "grammar: not sound"),
        ({"system": 3}, "system: 3; wanted a text"),
        ({"messages": None}, "messages: None; wanted a list"),
    ],
)
def test_what_no_turn_could_have_is_refused_at_once(settings, error, chat_bundles, tmp_path):
    with edgeskip.load(ending(chat_bundles(CAPACITY), tmp_path)) as model, pytest.raises(RequestError, match=error):
        edgeskip.Chat(model, **settings)


@pytest.mark.parametrize("model", [3, None, "a folder"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(RequestError, match=f"model: {model!r}; wanted what edgeskip.load returns"):
        edgeskip.Chat(model)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (3, "file: 3; wanted a path"),
        (None, "file: None; wanted a path"),
        (b"a", "file: b'a'; wanted a path"),
        ("", "file: ''; wanted a path"),
        ("\0", "cannot be"),
        (".", "cannot be written|is a folder"),
    ],
)
def test_what_is_no_file_is_refused(path, error, model):
    chat = edgeskip.Chat(model, system="S")
    for write_or_read in (chat.save, chat.load):
        with pytest.raises(RequestError, match=error):
            write_or_read(path)
    assert chat.system == "S"


def test_the_oldest_turns_make_room(model, caplog):
    chat = edgeskip.Chat(model, system="S", max_new_tokens=24)
    dropped = []
    with caplog.at_level(logging.WARNING, "edgeskip"):
        for turn in range(8):
            chat.ask(f"turn {turn}")
            dropped.append(chat.dropped_messages)
            assert len(chat.generation.prompt_token_ids) <= CAPACITY - 24
            assert chat.messages[0]["role"] == "user"
            assert chat.messages[-2] == message("user", f"turn {turn}")
    assert sum(dropped) > 0
    assert sum(dropped) + len(chat.messages) == 16
    assert all(not (one and other) for one, other in pairwise(dropped))  # not at every turn
    assert [record.args[0] for record in caplog.records] == [count for count in dropped if count]


def test_a_conversation_is_saved_and_goes_on(model, tmp_path):
    chat = edgeskip.Chat(model, system="S", max_new_tokens=8)
    chat.ask("Hi")
    chat.save(tmp_path / "talk.json")
    other = edgeskip.Chat(model, max_new_tokens=8)
    other.load(tmp_path / "talk.json")
    assert (other.system, other.messages) == (chat.system, chat.messages)
    assert other.ask("And?") == chat.ask("And?")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[]", "not a conversation"),
        ('{"system": 1, "messages": []}', "wanted a system prompt and a list of messages"),
        ('{"system": null, "messages": ["a"]}', "message 1: 'a'; wanted a mapping"),
        ('{"system": null, "messages": [{"role": "user"}]}', "message 1"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(text, error, model, tmp_path):
    (tmp_path / "talk.json").write_text(text)
    chat = edgeskip.Chat(model, system="S", messages=[message("user", "a"), message("assistant", "b")])
    with pytest.raises(RequestError, match=error):
        chat.load(tmp_path / "talk.json")
    assert (chat.system, len(chat.messages)) == ("S", 2)
