"""Grammars: texts fit, and drafts change none; masks are those of a text's tokens, whatever was asked before."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from tests.conftest import VOCAB, make_tokenizer

import edgeskip
from edgeskip import Grammar
from edgeskip.runtime.bundle.graphs import LEAST_DRAFT_VOCABULARY
from edgeskip.runtime.decoding.sampling import HostSampler
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.grammar.masks import TokenMask, token_table
from edgeskip.runtime.sampling import GREEDY

EOS = 1
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # or a random model writes spaces until its caches are full
}

ACCENTED = Grammar.from_regex("é(ab|é){9,40}")


def is_person(value):
    assert list(value) == ["name", "age", "kind", "tags"]
    assert len(value["name"]) <= 5
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert value["kind"] in ("cat", "dog")
    assert all(type(tag) is bool for tag in value["tags"])
    return len(value["tags"]) <= 2


@pytest.fixture(scope="module")
def model(bundles):
    with edgeskip.load(bundles("llama-gqa").folder, device="cpu", threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (Grammar.from_json_schema(PERSON), lambda text: is_person(json.loads(text))),
        (Grammar.from_regex("(ab|c[0-9]{1,3}){4,9}\\.é"), re.compile("(ab|c[0-9]{1,3}){4,9}\\.é").fullmatch),
        (Grammar.from_lark('start: sum\nsum: "1" | "(" sum "+" sum ")"'), lambda text: eval(text) == text.count("1")),
    ],
    ids=["json_schema", "regex", "lark"],
)
def test_texts_fit_and_drafts_change_none(grammar, fits, model):
    ended = drafted = accepted = 0
    draws = [{}, {"temperature": 1.5}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}]
    for number in range(16):
        settings = {"grammar": grammar, "max_new_tokens": 80, "presence_penalty": number % 2} | draws[number % 3]
        if number % 3:
            settings["seed"] = number
        prompt = [2 + number, 90, 33 + number]
        plain = model.complete(prompt, mode="autoregressive", **settings)
        k, threshold = 1 + number % 6, 0 if number % 4 else None
        made = model.complete(prompt, num_speculations=k, confidence_threshold=threshold, **settings)
        assert (made.text, made.token_ids, made.stop_reason) == (plain.text, plain.token_ids, plain.stop_reason)
        drafted, accepted = drafted + made.statistics.drafted, accepted + made.statistics.accepted
        if made.stop_reason == "eos":
            ended += 1
            assert fits(made.text), made.text
        early = model.complete(prompt, mode="early-exit", confidence_threshold=number % 4 / 8, **settings)
        assert early.stop_reason != "eos" or fits(early.text)
    assert ended >= 8
    assert 0 < accepted < drafted


def test_each_token_is_the_best_of_those_that_may_follow(bundles, reference, model):
    prompt, letters = [5, 90, 33, 7], [make_tokenizer().token_to_id(letter) for letter in "xyz"]
    made = model.complete(prompt, grammar=Grammar.from_regex("[xyz]{30}"), logprobs=0, num_speculations=4)
    with torch.no_grad():
        logits = reference("llama-gqa")(torch.tensor([[*prompt, *made.token_ids]])).logits[0, len(prompt) - 1 : -1]
    assert list(made.token_ids) == [letters[int(row[letters].argmax())] for row in logits[:-1]] + [EOS]
    own = logits.log_softmax(-1)[torch.arange(31), list(made.token_ids)]
    assert [one.logprob for one in made.logprobs] == pytest.approx(own.tolist(), abs=1e-3)


def test_logits_are_read_where_the_most_probable_token_may_not_follow():
    random, read = np.random.default_rng(2), []
    table, letters = token_table(make_tokenizer(), VOCAB, [EOS]), [make_tokenizer().token_to_id(x) for x in "xyz"]
    logits = random.normal(size=(12, VOCAB)).astype(np.float16)
    logits[::3, letters] += 9
    sampler = HostSampler(GREEDY, [], 20, TokenMask(Grammar.from_regex("[xyz]{12}"), table))
    found = sampler.pick_rows(lambda row: read.append(row) or logits[row], logits.argmax(1), 0, ())
    assert [*found] == [(row, letters[logits[row, letters].argmax()]) for row in range(12)]
    assert read == [row for row in range(12) if row % 3]


def test_an_exit_that_has_no_token_that_may_follow_changes_no_text(bundles):
    """It drafts from the first tokens alone, and that of the first byte of an accented letter comes after them."""
    assert make_tokenizer().encode("é", add_special_tokens=False).ids[0] >= LEAST_DRAFT_VOCABULARY
    bundle = bundles("llama-gqa", draft_vocabulary=LEAST_DRAFT_VOCABULARY)
    settings = {"grammar": ACCENTED, "temperature": 1.2, "seed": 1, "max_new_tokens": 80}
    with edgeskip.load(bundle.folder, device="cpu", threads=1) as model:
        for number in range(4):
            plain = model.complete([5, number], mode="autoregressive", **settings)
            made = model.complete([5, number], num_speculations=3, confidence_threshold=0, **settings)
            assert made.token_ids == plain.token_ids
            assert made.text[0] == "é"
            assert made.statistics.accepted


def test_a_mask_is_that_of_the_tokens_whatever_was_asked_before():
    tokenizer, random = make_tokenizer(), np.random.default_rng(0)
    table = token_table(tokenizer, VOCAB, [EOS])
    grammar = Grammar.from_json_schema(PERSON)
    spelled = [
        '{"name":"Mia","age":12,"kind":"cat","tags":[true,false]}',
        '{"name":"Max","age":150,"kind":"dog","tags":[]}',
        '{"name":"Max","size":3}',
    ]
    texts = [tokenizer.encode(text, add_special_tokens=False).ids for text in spelled]
    used, masks = TokenMask(grammar, table), 0
    for _ in range(150):
        ids = np.array(texts[random.integers(3)])[: random.integers(70)]
        found, wanted = used.allowed(ids), TokenMask(grammar, table).allowed(ids)
        assert (found is None) == (wanted is None)
        if found is not None:
            np.testing.assert_array_equal(found, wanted)
            masks += 1
            assert found[EOS] == (tokenizer.decode(ids.tolist())[-2:] in ("]}", "[]}"))
    assert 75 < masks < 150
    assert used.allowed(np.array([*texts[0], EOS])) is None
    used.check([*texts[0], EOS])
    for wrong in (texts[2], [*texts[0][:9], EOS]):
        with pytest.raises(RequestError, match="grammar: no token can follow the first"):
            used.check(wrong)


BAD = [
    (Grammar.from_regex("a("), "unclosed group"),
    (Grammar.from_json_schema({"type": "person"}), "person"),
    (Grammar.from_json_schema({"type": "integer", "minimum": 3, "maximum": 2}), "greater than"),
    (Grammar.from_json_schema({"$ref": "http://127.0.0.1:9/schema"}), "does not fetch"),
    (Grammar.from_lark("start: nothing"), "unknown name"),
    ("[a-z]", "grammar: a str; wanted an edgeskip.Grammar"),
]


@pytest.mark.parametrize(("grammar", "said"), BAD, ids=[said for _, said in BAD])
def test_what_is_no_grammar_is_said_at_once(grammar, said, model):
    with pytest.raises(RequestError, match=said) as caught:
        model.generate([5], grammar=grammar)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", [[], {"type": object}, {"minimum": float("nan")}], ids=str)
def test_a_schema_that_is_not_json_is_refused(schema):
    with pytest.raises(RequestError, match="wanted a JSON object"):
        Grammar.from_json_schema(schema)


@pytest.mark.parametrize("kind", ["json", None, ["regex"]], ids=str)
def test_a_grammar_of_another_kind_is_refused(kind):
    with pytest.raises(RequestError, match="wanted one of json_schema, regex, lark"):
        Grammar(kind, "a")


def test_a_bundle_without_eos_refuses_grammars(chat_bundles):
    with (
        edgeskip.load(chat_bundles(1024).folder, device="cpu") as model,
        pytest.raises(RequestError, match="no EOS token"),
    ):
        model.generate([5], grammar=Grammar.from_regex("[0-9]+"))
