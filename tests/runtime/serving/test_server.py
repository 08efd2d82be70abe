"""OpenAI's own client against a real server: what it gets is the model's, whoever else asks, leaves or errs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import transformers
from prometheus_client.parser import text_string_to_metric_families
from tests.conftest import edit_json, make_tokenizer

import edgeskip
from edgeskip.runtime.decoding.streaming import token_spelling

CAPACITY = 1024
NAME = "tiny"


@contextmanager
def serving(bundle, *options, **variables):
    """A server in a process of its own; yields the process and its address."""
    command = [sys.executable, "-m", "edgeskip", "serve", bundle.folder, "--port", 0, "--name", NAME, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [*map(str, command), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = []
        drain = threading.Thread(target=lambda: said.extend(process.stderr))
        try:
            for line in process.stderr:
                said.append(line)
                if "is served at" in line:
                    break
            else:
                pytest.fail("".join(said))
            drain.start()
            process.said = said
            yield process, line.split()[-1]
        finally:
            process.kill()
            if drain.is_alive():
                drain.join()


def client_of(url, key="none"):
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def server(chat_bundles):
    with serving(chat_bundles(CAPACITY), "--queue", 60) as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")
def model(chat_bundles):
    with edgeskip.load(chat_bundles(CAPACITY).folder, device="cpu", threads=1) as loaded:
        yield loaded


def figures(url):
    """Samples of /metrics by name and labels."""
    text = httpx.get(url.replace("/v1", "/metrics")).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def say(text):
    return [{"role": "system", "content": "S"}, {"role": "user", "content": text}]


def test_a_chat_s_answer_is_the_model_s_whole_and_streamed(client, model):
    wanted = model.complete(say("Hi"), max_new_tokens=24)
    whole = client.chat.completions.create(model=NAME, messages=say("Hi"), max_completion_tokens=24)
    assert whole.choices[0].message.content == wanted.text
    assert whole.choices[0].finish_reason == "length"
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(wanted.prompt_token_ids), 24)
    details, statistics = usage.completion_tokens_details, wanted.statistics
    assert details.accepted_prediction_tokens == statistics.accepted
    assert details.rejected_prediction_tokens == statistics.drafted - statistics.accepted
    *chunks, last = client.chat.completions.create(
        model=NAME, messages=say("Hi"), max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 5
    assert (last.choices, last.usage.completion_tokens) == ([], 24)
    assert last.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 2  # said a moment ago


def test_a_text_s_continuation_is_the_model_s(client, model):
    wanted = model.complete("def f(x):", max_new_tokens=20)
    for prompt in ("def f(x):", ["def f(x):"], model.encode("def f(x):")):
        made = client.completions.create(model=NAME, prompt=prompt, max_tokens=20)
        assert made.choices[0].text == wanted.text
    chunks = list(client.completions.create(model=NAME, prompt="def f(x):", max_tokens=20, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted.text
    stop = wanted.text[7:9]
    cut = client.completions.create(model=NAME, prompt="def f(x):", max_tokens=20, stop=stop)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (wanted.text[: wanted.text.index(stop)], "stop")


def test_a_seed_draws_the_model_s_text_and_its_probabilities(client, model):
    settings = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
    wanted = model.complete(say("Hi"), max_new_tokens=12, logprobs=2, top_k=40, **settings)
    made = client.chat.completions.create(
        model=NAME,
        messages=say("Hi"),
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 40},
        **settings,
    )
    assert made.choices[0].message.content == wanted.text
    told = made.choices[0].logprobs.content
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in wanted.logprobs], abs=1e-4)
    for ours, theirs in zip(told, wanted.logprobs, strict=True):
        tops = [logprob for _, logprob in theirs.top]
        assert [top.logprob for top in ours.top_logprobs] == pytest.approx(tops, abs=1e-4)
    request = {"model": NAME, "prompt": "a", "max_tokens": 6, "logprobs": 1, "temperature": 0}
    text = client.completions.create(**request).choices[0].logprobs
    assert [list(top.values()) for top in text.top_logprobs] == [[one] for one in text.token_logprobs]
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**request, stream=True)]
    streamed = [chunk for chunk in chunks if chunk]
    assert len(streamed) > 2
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for chunk in streamed for one in getattr(chunk, name)] == getattr(text, name)


def test_each_event_has_the_probabilities_of_its_own_tokens(client, model):
    """And each token its own bytes, also where it is a part of a character."""
    settings = {"temperature": 1.2, "seed": 3, "top_k": 0}
    wanted = model.complete(say("Hi"), max_new_tokens=200, logprobs=0, **settings)
    pieces = model.generate(say("Hi"), max_new_tokens=200, logprobs=0, stop=[wanted.text[60:64]], **settings)
    ids = [one.token_id for piece in pieces for one in piece.logprobs]
    assert ids == list(wanted.token_ids[: len(ids)])
    assert 60 <= len(ids) < 200
    spelled = [token for token in ids if token > 1]  # no special ones
    own, top_k = b"".join(map(token_spelling(model.tokenizer), spelled)), {"top_k": settings.pop("top_k")}
    assert own.decode(errors="replace")[:60] == wanted.text[:60]
    chunks = client.chat.completions.create(
        model=NAME, messages=say("Hi"), max_tokens=200, logprobs=True, stream=True, extra_body=top_k, **settings
    )
    told, plain = [], 0
    for chunk in chunks:
        (choice,) = chunk.choices
        own = [] if choice.logprobs is None else choice.logprobs.content
        told += own
        said = bytes(byte for one in own for byte in one.bytes)
        if choice.delta.content and said.isascii() and b"<" not in said:
            assert choice.delta.content.lstrip("\ufffd") == said.decode()  # that was a part of a character before
            plain += 1
    assert plain > 20
    assert len(told) == 200
    assert any(not bytes(one.bytes).isascii() for one in told)
    assert [bytes(one.bytes) for one in told] == [token_spelling(model.tokenizer)(token) for token in wanted.token_ids]


def test_parts_of_a_content_and_a_developer_s_message_are_taken(client, model):
    wanted = model.complete(say("Hi"), max_new_tokens=8).text
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]
    made = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, user="me", tools=[])
    assert made.choices[0].message.content == wanted


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "size"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def test_an_answer_has_the_format_that_was_asked_for(chat_bundles, tmp_path):
    shutil.copytree(chat_bundles(CAPACITY).folder, tmp_path / "b")
    edit_json(tmp_path / "b" / "manifest.json", lambda manifest: manifest.update(eos_token_ids=[1]))
    city = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    with edgeskip.load(tmp_path / "b", device="cpu", threads=1) as model, serving(model.bundle) as (_, url):
        client = client_of(url)
        for number in range(3):
            request = {"model": NAME, "messages": say(f"city {number}"), "temperature": 1, "seed": number}
            made = client.chat.completions.create(**request, response_format=city)
            told = json.loads(made.choices[0].message.content)
            assert (list(told), made.choices[0].finish_reason) == (["city", "size"], "stop")
            assert told["city"] in ("Paris", "Rome")
            assert 0 <= told["size"] <= 99
            chunks = client.chat.completions.create(**request, response_format=city, stream=True)
            assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == told
            wanted = {"grammar": edgeskip.Grammar.from_json_schema(CITY), "mode": "autoregressive"}
            assert model.complete(say(f"city {number}"), temperature=1, seed=number, **wanted).text == (
                made.choices[0].message.content
            )
        request = {"model": NAME, "messages": say("a"), "max_tokens": 8, "temperature": 0}
        free = client.chat.completions.create(**request).choices[0].message.content
        assert (
            client.chat.completions.create(**request, response_format={"type": "text"}).choices[0].message.content
            == free
        )
        made = client.chat.completions.create(**request, response_format={"type": "json_object"})
        assert made.choices[0].message.content.lstrip()[0] == "{"
        bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "city"}}}
        for format_, said in (
            (bad, "Invalid type: city"),
            ({"type": "xml"}, "json_object"),
            ({"type": "json_schema"}, "schema"),
        ):
            with pytest.raises(openai.BadRequestError, match=said) as caught:
                client.chat.completions.create(**request, response_format=format_)
            assert caught.value.param == "response_format"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather's forecast.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}
TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
TEMPLATES = {
    "hermes": TOOLS
    + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ call.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}<assistant>",
    "llama": TOOLS + '{# {"name": ..., "parameters": ...} #}'
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}<assistant>",
    "mistral": TOOLS
    + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}"
    "{% endif %}{% if m.tool_call_id and m.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "{% endfor %}<assistant>",
}


def with_template(bundle, folder, template):
    """A copy of a bundle that has this chat template, and whose texts end."""
    shutil.copytree(bundle.folder, folder)
    (folder / "chat_template.jinja").write_text(template)
    digest = hashlib.sha256(template.encode()).hexdigest()

    def change(manifest):
        manifest["eos_token_ids"] = [1]
        manifest["files"]["chat_template.jinja"] = {"bytes": len(template.encode()), "sha256": digest}

    edit_json(folder / "manifest.json", change)
    return folder


@pytest.mark.parametrize("family", TEMPLATES)
def test_tools_are_called(family, chat_bundles, tmp_path):
    """From a demanded call, whole and streamed, to its result in the messages."""
    folder = with_template(chat_bundles(CAPACITY), tmp_path / "b", TEMPLATES[family])
    judge = transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), chat_template=TEMPLATES[family])
    with edgeskip.load(folder, device="cpu", threads=1) as model, serving(model.bundle) as (_, url):
        client = client_of(url)
        request = {"model": NAME, "messages": say("And in Rome?"), "tools": [CLOCK, WEATHER], "temperature": 1}
        seen = set()
        for seed, choice in enumerate(["required", "required", {"type": "function", "function": {"name": "weather"}}]):
            settings = {**request, "tool_choice": choice, "parallel_tool_calls": False, "seed": seed}
            made = client.chat.completions.create(**settings)
            (answer,) = made.choices
            (call,) = answer.message.tool_calls
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            rendered = judge.apply_chat_template(
                request["messages"], tools=request["tools"], add_generation_prompt=True, tokenize=False
            )
            assert made.usage.prompt_tokens == len(rendered.encode())
            if call.function.name == "weather":
                given = json.loads(call.function.arguments)
                assert (given["city"] in ("Paris", "Rome"), given["days"] in range(1, 10), len(given)) == (1, 1, 2)
            with client.chat.completions.stream(**settings) as stream:
                (streamed,) = stream.get_final_completion().choices
            (again,) = streamed.message.tool_calls
            assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)
            assert streamed.finish_reason == "tool_calls"
            seen.add(call.function.name)
        assert "weather" in seen
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        said = [*say("Rome?"), answer.message.model_dump(), result]
        function = {"name": "weather", "arguments": json.loads(call.function.arguments)}
        plain = {"role": "assistant", "content": "", "tool_calls": [{**call.model_dump(), "function": function}]}
        rendered = judge.apply_chat_template(
            [*said[:2], plain, said[3]], tools=request["tools"], add_generation_prompt=True, tokenize=False
        )
        wanted = model.complete(model.tokenizer.encode(rendered, add_special_tokens=False).ids, max_new_tokens=9)
        settings = {"model": NAME, "messages": said, "max_tokens": 9}
        made = client.chat.completions.create(**settings, tools=request["tools"])
        assert made.choices[0].message.content == wanted.text
        assert made.choices[0].message.tool_calls is None
        without = judge.apply_chat_template([*said[:2], plain, said[3]], add_generation_prompt=True, tokenize=False)
        made = client.chat.completions.create(**settings, tools=request["tools"], tool_choice="none")
        assert made.usage.prompt_tokens == len(without.encode())
        for schema, reason in (
            ({"properties": {"zone": {"type": "city"}}}, "the parameters of clock are not sound (Invalid type: city)"),
            ({"enum": ["x" * 40_000]}, "characters, with the schemas of all that may be called; wanted at most 32768"),
        ):
            bad = {"type": "function", "function": {**CLOCK["function"], "parameters": schema}}
            with pytest.raises(openai.BadRequestError, match=re.escape(reason)) as caught:
                client.chat.completions.create(**request | {"tools": [WEATHER, bad]}, tool_choice="required")
            assert caught.value.param == "tools"
            assert len(str(caught.value)) < 300


def test_calls_that_the_model_chose_to_make_stand_beside_its_text(chat_bundles, tmp_path, monkeypatch):
    from starlette.testclient import TestClient

    from edgeskip.runtime.serving.app import Served, make_app
    from edgeskip.runtime.serving.worker import Worker

    folder = with_template(chat_bundles(CAPACITY), tmp_path / "b", TEMPLATES["hermes"])
    call = '<tool_call>{"name": "clock", "arguments": {"zone": %s}}</tool_call>'
    texts = {
        f"I look.\n{call % 1}\n{call % 2}\n": ("I look.", [1, 2], "tool_calls"),
        f"No {call % 3} more": ("No more", [3], "tool_calls"),
        "No <tool_call>.": ("No <tool_call>.", [], "stop"),
    }
    with edgeskip.load(folder, device="cpu", threads=1) as model:
        served = Served(model, Worker(4), NAME)
        generate = model.generate
        with TestClient(make_app(served), base_url="http://localhost") as http:
            client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http)
            for text, (content, zones, finish) in texts.items():
                grammar = edgeskip.Grammar.from_lark(f"start: {json.dumps(text)}")  # it can mean nothing else
                monkeypatch.setattr(model, "generate", lambda ids, g=grammar, **rest: generate(ids, grammar=g, **rest))
                settings = {"model": NAME, "messages": say("Time?"), "tools": [CLOCK]}
                whole = client.chat.completions.create(**settings).choices[0]
                with client.chat.completions.stream(**settings) as stream:
                    streamed = stream.get_final_completion().choices[0]
                for answer in (whole, streamed):
                    assert (answer.message.content, answer.finish_reason) == (content, finish)
                    calls = answer.message.tool_calls or []
                    assert [json.loads(call.function.arguments)["zone"] for call in calls] == zones
        served.worker.close()


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    for ask in (
        lambda: client.models.retrieve("gpt"),
        lambda: client.completions.create(model="gpt", prompt="a"),
        lambda: client.chat.completions.create(model="gpt", messages=say("a"), tools=[CLOCK]),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'") as caught:
            ask()
        assert caught.value.code == "model_not_found"


CALLED = {"name": "clock", "arguments": "{}"}
CALLING = [
    {"role": "assistant", "tool_calls": [{"id": "one", "type": "function", "function": CALLED}]},
    {"role": "tool", "tool_call_id": "one", "content": "9"},
]
BAD = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"n": 2}, "n"),
    ({"stop": [""]}, "stop"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"include_logits": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": [5, 6]}, "message_1"),
    ({"messages": [{"role": "user"}]}, "message_1"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"tools": [CLOCK]}, "tools"),  # of which the template knows nothing
    ({"tools": [CLOCK, CLOCK]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": False}}]}, "tools"),
    ({"tools": [{**CLOCK, "cache": 1}]}, "tools"),
    ({"tools": [{**CLOCK, "function": {"name": "a", "paramters": {}}}]}, "tools"),
    ({"tools": [{**CLOCK, "function": {"name": "a", "strict": "yes"}}]}, "tools"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "a"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [CLOCK], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]}, "message_1"),
    ({"messages": [CALLING[0]]}, "message_1"),  # the call has no result
    ({"messages": [*CALLING[:1], *say("a"), *CALLING[1:]]}, "message_1"),
    ({"messages": [*say("a"), CALLING[1]]}, "message_3"),
    ({"messages": [CALLING[0] | {"role": "user", "content": "a"}, CALLING[1]]}, "message_2"),
    ({"messages": [CALLING[0], CALLING[1] | {"tool_call_id": "other"}]}, "message_2"),
    ({"messages": [CALLING[0], {"role": "tool", "content": "9"}]}, "message_2"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": CALLED}]}, CALLING[1]]}, "message_1"),
    ({"extra_body": {"beam_width": 4}}, "beam_width"),
    ({"messages": [{"role": "user", "content": "x" * CAPACITY}]}, "prompt"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda one: one if isinstance(one, str) else "")
def test_bad_input_is_refused_by_name(change, param, client):
    request = {"model": NAME, "messages": say("a"), "max_tokens": 2} | change
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert (caught.value.code == "context_length_exceeded") == (param == "prompt")


def test_what_is_no_request_at_all_is_refused_in_the_same_shape(server):
    url, head = f"{server}/chat/completions", {"Content-Type": "application/json"}
    answers = [
        (httpx.post(url, content="{", headers=head), 400),
        (httpx.post(url, content="[" * 10_000, headers=head), 400),
        (httpx.post(url, content="[]", headers=head), 400),
        (httpx.post(url, json={"messages": say("a")}), 400),
        (httpx.post(url, content="{}"), 415),  # as a page from elsewhere could without asking
        (httpx.post(url, json={}, headers={"Host": "evil.example"}), 403),
        (httpx.post(url, content=b" " * (1 << 23) + b"{}", headers=head), 413),
        (httpx.get(url), 405),
        (httpx.get(f"{server}/nothing"), 404),
    ]
    for answer, status in answers:
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(server.replace("/v1", "/health")).json() == {"status": "ok"}


def test_of_50_clients_at_once_each_gets_its_own_answer(client, model, server):
    texts = [f"client {number} says {number * number}" for number in range(50)]
    wanted = [model.complete(text, max_new_tokens=12).text for text in texts]
    assert len(set(wanted)) > 25
    before = figures(server)

    def ask(text):
        request = {"model": NAME, "prompt": text, "max_tokens": 12}
        if texts.index(text) % 2:
            return client.completions.create(**request).choices[0].text
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True))

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(ask, texts)) == wanted
    served = ("edgeskip_requests_total", "/v1/completions", "200")
    until(lambda: figures(server)[served] - before.get(served, 0) == 50)
    after = figures(server)
    assert after[("edgeskip_generated_tokens_total",)] - before[("edgeskip_generated_tokens_total",)] == 50 * 12
    assert after[("edgeskip_accepted_tokens_total",)] > 0
    assert after["edgeskip_time_to_first_token_seconds_count",] >= 50
    assert (after[("edgeskip_waiting_requests",)], after[("edgeskip_decoding",)]) == (0, 0)


def test_a_client_that_leaves_ends_its_text_and_its_wait(client, server):
    """A long text is left while streaming, one while it waits, and one that is not streamed."""
    path = "/v1/chat/completions"

    def left():
        return figures(server).get(("edgeskip_requests_total", path, "499"), 0)

    long = {"model": NAME, "messages": say("tell me"), "max_tokens": 900}
    before, made = left(), figures(server)[("edgeskip_generated_tokens_total",)]
    first = client.chat.completions.create(**long, stream=True)
    next(first), next(first)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(**long)  # waits for the first
    first.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(**long)
    until(lambda: left() == before + 3)
    until(lambda: figures(server)[("edgeskip_decoding",)] == 0)
    assert figures(server)[("edgeskip_generated_tokens_total",)] == made  # none came to its end
    assert client.chat.completions.create(**long | {"max_tokens": 2}).usage.completion_tokens == 2


def test_a_full_queue_a_key_and_a_clean_stop(chat_bundles):
    with serving(chat_bundles(CAPACITY), "--queue", 1, EDGESKIP_API_KEY="secret") as (process, url):
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client_of(url, "guess").models.list()
        assert httpx.get(f"{url}/models", headers={"Authorization": "bearer secret"}).status_code == 200
        client = client_of(url, "secret")
        long = {"model": NAME, "messages": say("tell me"), "max_tokens": 1000}
        running = client.chat.completions.create(**long, stream=True)
        next(running), next(running)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: client.chat.completions.create(**long))
            until(lambda: figures(url)[("edgeskip_waiting_requests",)] == 1)
            with pytest.raises(openai.RateLimitError) as full:
                client.chat.completions.create(**long)
            assert int(full.value.response.headers["retry-after"]) >= 1
            process.send_signal(signal.SIGTERM)
            finishes = [chunk.choices[0].finish_reason for chunk in running]
            assert finishes[-1] == "length"  # what was under way came to its end
            with pytest.raises(openai.InternalServerError, match="closing"):
                waiting.result()
        assert process.wait(20) == 0
        assert not any("Traceback" in line for line in process.said)


def test_a_port_that_is_taken_is_refused_in_one_line(server, chat_bundles):
    port = httpx.URL(server).port
    command = [sys.executable, "-m", "edgeskip", "serve", str(chat_bundles(CAPACITY).folder), "--port", str(port)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 5
    assert run.stderr.startswith(f"edgeskip: 127.0.0.1:{port}: cannot listen there (Address already in use)")
    assert run.stderr.count("\n") == 1


def test_an_error_within_a_stream_is_its_last_event(model, monkeypatch):
    """What fails on the device is the server's error, in the stream of whom it happened to; the next one is served."""
    from starlette.testclient import TestClient

    from edgeskip.runtime.decoding.model import Piece
    from edgeskip.runtime.errors import BackendError
    from edgeskip.runtime.serving.app import Served, make_app
    from edgeskip.runtime.serving.worker import Worker

    def fails(*_, **__):
        yield Piece("a")
        raise BackendError("the GPU", "is gone")

    served = Served(model, Worker(4), NAME)
    request = {"model": NAME, "prompt": "a", "max_tokens": 2}
    with TestClient(make_app(served), base_url="http://localhost") as client:
        with monkeypatch.context() as patch:
            patch.setattr(model, "generate", fails)
            whole = client.post("/v1/completions", json=request)
            assert (whole.status_code, whole.json()["error"]["message"]) == (500, "the GPU: is gone")
            *_, last, _ = client.post("/v1/completions", json=request | {"stream": True}).text.split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert client.post("/v1/completions", json=request).status_code == 200
    served.worker.close()
