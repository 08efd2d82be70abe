"""Chats read as transformers writes them, and a template takes no more time and memory than it is given."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import transformers
from tests.conftest import make_tokenizer

from edgeskip.runtime.bundle.manifest import Bundle, FileRecord
from edgeskip.runtime.decoding import chat as chat_module
from edgeskip.runtime.decoding import template as template_module
from edgeskip.runtime.decoding.chat import render_chat
from edgeskip.runtime.errors import BundleError, RequestError

USER = [{"role": "user", "content": "is a < b & 'é'? \"yes\"\n"}]
TURNS = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>x</think>Hello", "reasoning": "greeting"},
    {"role": "user", "content": "And?", "name": None},
]
LOOP = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATES = {
    "plain": "{{ bos_token }}" + LOOP,
    "generation prompt": LOOP + "{% if add_generation_prompt %}[assistant]{% endif %}",
    "white space": "\n  {%- for m in messages %}\n    {% if true %}\n  {{ m.content }}\n  {% endif %}\n{%- endfor %}\n",
    "carriage returns": "{{ bos_token }}\r\n{% for m in messages %}\r\n{{ m.content }}{% endfor %}\r\n",
    "tojson": "{{ messages | tojson }}",
    "tojson of unsorted keys": "{{ {'b': 1, 'a': [none, true, 1.5, '</é>']} | tojson }}",
    "tojson with settings": "{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=True,"
    " sort_keys=True, separators=(',', ':')) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}."
    "{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, self='s') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}",
    "all special tokens": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ sep_token }}|"
    "{{ image_token }}|{{ additional_special_tokens }}",
    "what is defined": "{{ sep_token is defined }}{{ bos_token is defined }}{{ tools is none }}{{ documents is none }}"
    "{{ foo is defined }}{{ add_generation_prompt }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.name is defined }}"
    "{% endfor %}",
    "text tools": "{{ messages[0].content.split('</think>')[-1].strip('\\n') | upper }}{{ messages | length }}"
    "{{ messages[0]['content'][:2] }}{{ dict(a=1) | items | list }}{{ messages[::-1][0].role }}",
    "macros": "{% macro say(m) %}<{{ m.role }}>{{ caller() if caller }}{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
}


@pytest.fixture
def chat(bundles, tmp_path, monkeypatch):
    """Renders a chat by a template, in a bundle that has it, in a process that sees the test's surroundings."""
    monkeypatch.setattr(chat_module, "_ahead", False)
    chat_module._dismiss()

    def render(template, messages=USER, tools=(), **special_tokens):
        (tmp_path / "chat_template.jinja").write_bytes(template.encode())
        manifest = bundles("llama-gqa").manifest
        files = manifest.files | {"chat_template.jinja": FileRecord(0, "")}
        return render_chat(
            messages,
            Bundle(tmp_path, dataclasses.replace(manifest, files=files, special_tokens=special_tokens)),
            tools,
        )

    return render


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_reads_as_transformers_writes_it(name, chat, tmp_path):
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "image_token": "<i>",
    }
    judge = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(), chat_template=TEMPLATES[name], additional_special_tokens=["<x>"], **special
    )
    for messages in (USER, TURNS):
        wanted = judge.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert chat(TEMPLATES[name], messages, **special) == wanted


CALL = {"id": "abc123def", "type": "function", "function": {"name": "f", "arguments": {"x": 1, "é": [None]}}}
TOOL_TALK = [
    *USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abc123def", "content": "5"},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


def test_tools_and_calls_read_as_transformers_writes_them(chat):
    """Also where a client gives arguments as JSON, and no content beside calls."""
    template = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{{ m.content + '.' }}{% endfor %}"
    judge = transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), chat_template=template)
    wanted = judge.apply_chat_template(TOOL_TALK, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    assert chat(template, TOOL_TALK, tools=[TOOL]) == wanted
    function = {"arguments": json.dumps(CALL["function"]["arguments"]), "name": "f"}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL | {"function": function}]}
    plain = template.replace("m | tojson", "(m.tool_calls or 0) | tojson")
    wanted = judge.apply_chat_template(TOOL_TALK, chat_template=plain, tools=[TOOL], tokenize=False)
    assert chat(plain, [USER[0], called, TOOL_TALK[2]], tools=[TOOL]) == wanted


@pytest.mark.parametrize(
    ("tools", "calls", "said"),
    [
        ([TOOL], [], "tools: the model's chat template takes none; leave them out"),
        ([{1: object()}], [], "tools: not plain data"),
        (TOOL, [], "tools: {'type': 'function', 'function'"),
        (None, [], "tools: None; wanted a list of functions, as tables"),
        ([1], [], "tools: [1]; wanted a list of functions, as tables"),
        ([], ["f"], "message 1: one of its tool_calls is 'f'; wanted a function with a name"),
        ([], {"function": "f"}, "message 1: one of its tool_calls is"),
        ([], [{"function": {"name": "f", "arguments": "[1]"}}], "'arguments': '[1]'}; wanted a function with"),
        ([], [{"function": {"name": "f", "arguments": "[" * 9999}}], "message 1: one of its tool_calls is"),
    ],
)
def test_tools_and_calls_that_are_malformed_are_refused(tools, calls, said, chat):
    template = "{{ tools }}" if tools != [TOOL] else "{{ builtin_tools }}"
    with pytest.raises(RequestError, match=re.escape(said)):
        chat(template, [{"role": "assistant", "content": "a", "tool_calls": calls}], tools=tools)


def test_the_time_of_day_is_the_local_one(chat, monkeypatch):
    monkeypatch.setenv("TZ", "<+14>-14")  # there it is 14 hours later than in Greenwich
    there = timezone(timedelta(hours=14))
    before = datetime.now(there)
    said = chat("{{ strftime_now('%d %b %Y, %H') }}")
    assert said in {time.strftime("%d %b %Y, %H") for time in (before, datetime.now(there))}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hi"], "message 1: 'hi'; wanted a mapping with `role` and `content`"),
        ([*USER, None], "message 2: None; wanted"),
        ([{"content": "a"}], "message 1: has no role; wanted a text as its role"),
        ([{"role": "user"}], "message 1: has no content"),
        (
            [*USER, {"role": "user", "content": None}],
            "message 2: its content is None; wanted a text as its content",
        ),
        ([{"role": "user", "content": 5}], "message 1: its content is 5"),
        ([{"role": ["user"], "content": "a"}], "message 1: its role is \\['user'\\]"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "message 1: its content is \\[{'type': 'text'",
        ),
        (
            [{"role": "user", "content": "a", 1: "b"}],
            "message 1: {'role': 'user', 'content': 'a', 1: 'b'}; wanted a mapping",
        ),
        ([{"role": "user", "content": "a", "tools": {1, 2}}], "message 1: not plain data"),
    ],
)
def test_messages_that_a_template_would_print_as_something_else(messages, message, chat):
    with pytest.raises(RequestError, match=message):
        chat(LOOP, messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", r"refuses \(no system role\)"),
        ("{% for %}", "refuses"),
        ("{{ 1/0 }}", r"refuses \(division by zero\)"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ ''.__class__.mro() }}", "refuses"),
        ("{{ cycler.__init__.__globals__ }}", "refuses"),
        ("{% set ns = namespace(_x=1) %}", "refuses .a namespace has no name '_x'"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "refuses"),
        ("{% include 'other' %}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ range(1000000) | list }}", "refuses .Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses .maximum recursion depth"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "refuses|takes more than"),
        ("{{ 'a' * 6000000000 }}", "takes more than 512 MB"),
        ("{{ 'a' * 20000000 }}", "writes more than 16777216 characters"),
        ("{{ '%1000000000d' % 3 }}", "takes more than 512 MB"),
        ("{{ 'a'.center(1000000000) }}", "takes more than 512 MB"),
        ("{{ messages | tojson(indent=1000000000) }}", "takes more than 512 MB"),
    ],
)
def test_a_template_that_fails_or_takes_too_much_is_one_line(template, message, chat):
    with pytest.raises(RequestError, match=message) as caught:
        chat(template)
    assert "\n" not in str(caught.value)


def test_nested_loops_end_with_their_time(chat, monkeypatch, tmp_path):
    """By a copy of the program that allows itself a second."""
    program = tmp_path / "template.py"
    source = Path(template_module.__file__).read_text()
    program.write_text(source.replace("CHARACTERS = 3, 20,", "CHARACTERS = 1, 20,"))
    monkeypatch.setattr(template_module, "__file__", str(program))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(RequestError, match="the chat template takes more than"):
        chat("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2.5


def test_a_template_of_megabytes_is_not_read(chat):
    with pytest.raises(BundleError, match=r"chat_template.jinja: is too large; wanted at most 1 MB"):
        chat(" " * 2_000_000)


def test_nothing_runs_from_the_current_folder(chat, monkeypatch, tmp_path):
    for name in ("json", "jinja2", "markupsafe", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.curdir)
    assert chat("{{ messages | tojson }}") == json.dumps(USER, ensure_ascii=False)
    assert not (tmp_path / "ran").exists()


def test_processes_that_were_started_ahead_render_alike_and_end_with_the_program():
    """Also after one of them was killed."""
    code = (
        "import os, signal, json\n"
        "from edgeskip.runtime.decoding import chat\n"
        "def render(n): return chat._render(json.dumps({'template': '{{ n }}', 'variables': {'n': n}}).encode())\n"
        "first = render(0)\n"
        "chat.expect_chats()\n"
        "told = [first, *(render(n) for n in (1, 2))]\n"
        "os.kill(chat._SPARE[0].pid, signal.SIGKILL); chat._SPARE[0].wait()\n"
        "told += [render(3), render(4)]\n"
        "print(json.dumps([told, chat._SPARE[0].pid]))\n"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    told, spare = json.loads(run.stdout)
    assert told == [{"text": str(n)} for n in range(5)]
    with pytest.raises(ProcessLookupError):
        os.kill(spare, 0)
