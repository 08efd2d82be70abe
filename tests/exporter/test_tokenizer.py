"""A checkpoint's tokenizer is the one that transformers loads from the folder, or is refused by name."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
import transformers
from tests.conftest import make_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgeskip.exporter import tokenizer as exporter_tokenizer
from edgeskip.exporter.tokenizer import check_vocabulary, read_checkpoint_tokenizer
from edgeskip.runtime.decoding.template import environment
from edgeskip.runtime.errors import CheckpointError

TEXTS = (
    *("hello world", "<s>hello <|user|> wor 2024", "  <|im_end|>  x<pad>y</s> z", "hello<x y> \n\nnaïve 日本😀"),
    *("<unk>", "a b <|user|>hello hello", "", "▁<PRE> boi <boi>", "e\u0301 <|user|>\t<|im_end|>"),
)
MERGED = [
    "hello world, this is a test of <tokens> in 2024",
    "def f(x): return x+1",
    "naïve café 日本語 tests the hello",
]


@cache
def byte_level() -> str:
    """A tokenizer of bytes with a few merges, as Llama 3's and Qwen's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(MERGED * 3, trainer)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made.to_str()


@cache
def byte_fallback() -> str:
    """A tokenizer of letters, all else as bytes, as Llama 2's."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    made.train_from_iterator(MERGED * 3, trainer)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    data = json.loads(made.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    return json.dumps(data)


def flags(content, **others):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content} | plain | others


def written(content, **others):
    return flags(content, **others) | {"__type": "AddedToken"}


def write(folder, tokenizer, config, **files):
    """A checkpoint's folder, as far as a tokenizer reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str())
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def assert_the_same(folder, config, seed=0):
    """Ids of texts, texts of ids, and what a chat template sees, are those of transformers."""
    judge = transformers.AutoTokenizer.from_pretrained(folder)
    read = read_checkpoint_tokenizer(folder, config)
    stored = Tokenizer.from_str(read.json)  # what a bundle gets
    stored.encode_special_tokens = read.split_special_tokens
    for text in TEXTS:
        assert stored.encode(text).ids == judge(text).input_ids, text
        assert stored.encode(text, add_special_tokens=False).ids == judge(text, add_special_tokens=False).input_ids
    assert stored.get_vocab() == judge.get_vocab()
    chosen = random.Random(seed)
    for _ in range(6):
        ids = [chosen.randrange(stored.get_vocab_size()) for _ in range(12)]
        assert stored.decode(ids) == judge.decode(ids, skip_special_tokens=True)
    assert read.special_tokens == judge.special_tokens_map
    return judge, read


BASES = {"byte-level": byte_level, "byte fallback": byte_fallback}
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
FOLDERS = {
    "nothing but tokenizer.json": {},
    "named in tokenizer_config.json": {"tokenizer_config": CLASS},
    "added_tokens_decoder": {"tokenizer_config": CLASS | {"added_tokens_decoder": {"999": flags("<|user|>")}}},
    "added_tokens_decoder with flags": {
        "tokenizer_config": CLASS
        | {
            "added_tokens_decoder": {
                "1": flags("</s>", rstrip=True),
                "2": flags("<|user|>", lstrip=True, special=False),
            }
        }
    },
    "added_tokens_decoder, no longer special": {
        "tokenizer_config": CLASS | {"added_tokens_decoder": {"1": flags("<s>", special=False)}}
    },
    "additional_special_tokens": {
        "tokenizer_config": CLASS | {"additional_special_tokens": ["<|user|>", "<|im_end|>"]}
    },
    "additional_special_tokens written out": {
        "tokenizer_config": CLASS | {"additional_special_tokens": [written("<|user|>", lstrip=True, rstrip=True)]}
    },
    "extra_special_tokens by name": {"tokenizer_config": CLASS | {"extra_special_tokens": {"boi_token": "<boi>"}}},
    "tokens of its own": {"tokenizer_config": CLASS | {"image_token": "<boi>", "pad_token": "<pad>"}},
    "written-out BOS and EOS": {
        "tokenizer_config": CLASS | {"bos_token": written("<|user|>"), "eos_token": written("<x y>", normalized=True)}
    },
    "added_tokens.json": {"tokenizer_config": CLASS, "added_tokens": {"<|user|>": 500, "<pad>": 501}},
    "added_tokens.json with EOS": {
        "tokenizer_config": CLASS | {"eos_token": "<|im_end|>"},
        "added_tokens": {"<|im_end|>": 500},
    },
    "special_tokens_map.json": {
        "special_tokens_map": {"bos_token": flags("<s>"), "eos_token": "<|im_end|>", "video_token": "<boi>"}
    },
    "special_tokens_map.json after others": {
        "tokenizer_config": CLASS | {"pad_token": "<pad>"},
        "special_tokens_map": {"bos_token": "<unk>", "pad_token": "</s>", "additional_special_tokens": ["<|user|>"]},
    },
    "special_tokens_map.json, unheeded": {
        "tokenizer_config": CLASS | {"added_tokens_decoder": {"1": flags("</s>")}},
        "special_tokens_map": {"bos_token": "<unk>"},
    },
    "add_bos_token and add_eos_token": {"tokenizer_config": CLASS | {"add_bos_token": False, "add_eos_token": True}},
    "split_special_tokens": {"tokenizer_config": CLASS | {"split_special_tokens": True}},
    "model_max_length and sides": {
        "tokenizer_config": CLASS | {"model_max_length": 2, "padding_side": "left", "truncation_side": "left"}
    },
    "clean_up_tokenization_spaces": {"tokenizer_config": CLASS | {"clean_up_tokenization_spaces": True}},
    "LlamaTokenizer": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "pad_token": None}},
    "LlamaTokenizer, legacy": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}},
    "LlamaTokenizer, no prefix": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}},
    "LlamaTokenizer, other tokens": {
        "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": None, "add_prefix_space": None}
        | {"added_tokens_decoder": {"2": flags("</s>"), "420": flags("<|im_end|>", special=False)}}
    },
    "GPT2Tokenizer": {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
    "Qwen2Tokenizer": {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}},
    "TokenizersBackend": {"tokenizer_config": {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}},
}


@pytest.mark.parametrize(
    ("name", "model_type"),
    [(name, "llama") for name in FOLDERS]
    + [(name, kind) for name in FOLDERS if "Tok" in name or "noth" in name for kind in ("mistral", "qwen2", "qwen3")],
)
@pytest.mark.parametrize("base", BASES)
def test_ids_texts_and_special_tokens_are_those_of_transformers(name, base, model_type, tmp_path):
    config = {"model_type": model_type}
    assert_the_same(write(tmp_path / "checkpoint", BASES[base](), config, **FOLDERS[name]), config)


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_neither_truncation_nor_padding_that_is_stored_reaches_a_text(tokenizer_class, tmp_path):
    tokenizer, config = Tokenizer.from_str(byte_fallback()), {"model_type": "llama"}
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40, pad_token="<pad>", pad_id=2)
    folder = write(tmp_path / "checkpoint", tokenizer, config, tokenizer_config={"tokenizer_class": tokenizer_class})
    _, read = assert_the_same(folder, config)
    assert len(read.tokenizer.encode("hello world, hello").ids) > 3
    assert read.special_tokens["pad_token"] == "<|endoftext|>" if "Qwen" in tokenizer_class else "<pad>"
    assert (read.tokenizer.truncation, read.tokenizer.padding) == (None, None)


def test_code_llama_adds_bos_and_its_own_tokens(tmp_path):
    config = {"model_type": "llama"}
    settings = {
        "tokenizer_class": "CodeLlamaTokenizer",
        "fill_token": "<FILL_ME>",
        "additional_special_tokens": ["<pad>"],
    }
    tokenizer = Tokenizer.from_str(byte_fallback())
    tokenizer.post_processor = None
    folder = write(tmp_path / "checkpoint", tokenizer, config, tokenizer_config=settings)
    _, read = assert_the_same(folder, config)
    assert read.tokenizer.encode("a").ids[0] == 1
    check_vocabulary(read, read.tokenizer.token_to_id("<FILL_ME>"), folder)  # transformers splits a text there
    with pytest.raises(CheckpointError, match=r"fill_token is '<FILL_ME>'.*wanted .fill_token.: null"):
        check_vocabulary(read, 500, folder)


TOKENS = ("<|user|>", "<|im_end|>", "<pad>", "<s>", "</s>", "<unk>", "hello", "wor", "<x y>")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "image_token")


def random_flags(chosen):
    return flags(
        chosen.choice(TOKENS),
        lstrip=chosen.random() < 0.2,
        rstrip=chosen.random() < 0.2,
        normalized=chosen.random() < 0.3,
        special=chosen.random() < 0.6,
    )


def random_folder(chosen, folder):
    """A folder with some of all that a tokenizer reads; its config.json."""
    tokenizer = Tokenizer.from_str(chosen.choice([byte_level, byte_fallback])())
    for _ in range(chosen.choice([0, 0, 1, 2])):
        tokenizer.add_tokens([AddedToken(**random_flags(chosen))])
    if chosen.random() < 0.15:
        tokenizer.post_processor = None
    config = {"model_type": chosen.choice(["llama", "llama", "mistral", "qwen2", "qwen3"])}
    classes = ("PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", "TokenizersBackend")
    settings = {"tokenizer_class": chosen.choice(classes)}
    if chosen.random() < 0.1:
        config |= settings
        settings = {}
    for name in NAMES:
        if chosen.random() < 0.3:
            value = random_flags(chosen) | {"__type": "AddedToken"}
            settings[name] = chosen.choice([chosen.choice(TOKENS), chosen.choice(TOKENS), value, None])
    for name in ("add_bos_token", "add_prefix_space", "legacy", "clean_up_tokenization_spaces", "split_special_tokens"):
        if chosen.random() < 0.2:
            settings[name] = chosen.random() < 0.5
    if chosen.random() < 0.2:
        settings["additional_special_tokens"] = chosen.choices(TOKENS, k=2)
    size, files = tokenizer.get_vocab_size(), {"tokenizer_config": settings}
    if chosen.random() < 0.35:
        indices = chosen.choices([0, 1, 2, size, size + 1, size + 5], k=2)
        settings["added_tokens_decoder"] = {str(index): random_flags(chosen) for index in indices}
    if chosen.random() < 0.3:
        names = chosen.sample(NAMES, 3)
        files["special_tokens_map"] = {n: chosen.choice([chosen.choice(TOKENS), random_flags(chosen)]) for n in names}
    if chosen.random() < 0.25:
        files["added_tokens"] = {token: size + i for i, token in enumerate(chosen.sample(TOKENS, 2))}
    write(folder, tokenizer, config, **files)
    return config


def test_random_folders(tmp_path):
    """What transformers loads is loaded alike, or refused; what it cannot load is of no interest."""
    alike, refused = 0, []
    for seed in range(90):
        chosen, folder = random.Random(seed), tmp_path / str(seed)
        config = random_folder(chosen, folder)
        try:
            transformers.AutoTokenizer.from_pretrained(folder)("a")
        except Exception:  # of any kind, from the library or below it
            continue
        try:
            read_checkpoint_tokenizer(folder, config)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        assert_the_same(folder, config, seed)
        alike += 1
    assert alike > 50
    assert all("is listed twice, and not alike" in message for message in refused)
    assert len(refused) < 5


def regex_decoder():
    made = make_tokenizer()
    made.decoder = decoders.Replace(Regex("a+"), "b")
    return made


def word_pieces():
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    return made


def ctc():
    made = make_tokenizer()
    made.decoder = decoders.CTC()
    return made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class is 'BertTokenizer'; wanted PreTrained"),
        ({"tokenizer_class": 5}, "tokenizer_class is 5"),
        ({"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}, "auto_map names code"),
        ({"auto_map": ["mine.Tokenizer", None]}, "auto_map names code"),
        ({"init_inputs": [1]}, r"init_inputs is \[1\]"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, "fast_tokenizer_files"),
        ({"fix_mistral_regex": True}, "fix_mistral_regex is True"),
        ({"split_special_tokens": "yes"}, "split_special_tokens is 'yes'; wanted true or false"),
        ({"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
         | {"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces"),
        ({"bos_token": {"content": "<s>"}}, "cannot load its tokenizer .bos_token is {'content': '<s>'}"),
        ({"eos_token": 1}, "cannot load its tokenizer .eos_token is 1"),
        ({"additional_special_tokens": [{"content": "<x>"}]}, "an extra special token is {'content'"),
        ({"additional_special_tokens": 5}, "cannot load its tokenizer"),
        ({"added_tokens_decoder": {"x": flags("<x>")}}, "cannot load its tokenizer .invalid literal"),
        ({"added_tokens_decoder": {"5": {"contents": "<x>"}}}, "cannot load its tokenizer .a token without content"),
        ({"added_tokens_decoder": ["<x>"]}, "cannot load its tokenizer"),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": "yes"}, "cannot load its tokenizer"),
        ({"chat_template": 5}, "chat_template is 5; wanted a text"),
        ({"chat_template": "\ud800"}, "chat_template is not valid Unicode; wanted a text"),
        ({"chat_template": [{"name": ["default"], "template": "x"}]}, "chat_template is a list; wanted templates with"),
        ({"chat_template": [{"name": "default", "template": 5}]}, "chat_template is 5; wanted a text"),
    ],
)  # fmt: skip
def test_settings_that_are_not_supported_are_refused_by_name(settings, message, tmp_path):
    write(tmp_path / "checkpoint", byte_level(), {}, tokenizer_config=settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint_tokenizer(tmp_path / "checkpoint", {"model_type": "llama"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: "{}", "not a tokenizer"),
        (lambda: "[1]", "not a tokenizer"),
        (lambda: byte_level().replace('"type":"BPE"', '"type":"Nothing"'), "not a tokenizer"),
        (lambda: byte_level()[:-9], "not a tokenizer"),
        (regex_decoder, "its decoder replaces a regular expression; wanted a text to replace"),
        (ctc, "its decoder is CTC; wanted ByteLevel"),
    ],
)
def test_a_tokenizer_json_that_is_not_supported(tokenizer, message, tmp_path):
    write(tmp_path / "checkpoint", tokenizer(), {})
    with pytest.raises(CheckpointError, match=rf"tokenizer.json: {message}"):
        read_checkpoint_tokenizer(tmp_path / "checkpoint", {"model_type": "llama"})


@pytest.mark.parametrize("index", [1 << 24, 50_000_000, 4_000_000_000])
def test_a_token_s_id_is_bounded_before_the_library_counts_up_to_it(index, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter_tokenizer, "_written", lambda *_: pytest.fail("it counted"))
    data = json.loads(byte_level())
    data["model"]["vocab"]["far"] = index
    write(tmp_path / "checkpoint", json.dumps(data), {})
    with pytest.raises(CheckpointError, match=f"tokenizer.json: token id {index}; wanted less than 16777216"):
        read_checkpoint_tokenizer(tmp_path / "checkpoint", {"model_type": "llama"})


def test_a_class_that_needs_bpe_and_spaces_that_would_be_cleaned_up(tmp_path):
    settings = {"tokenizer_class": "LlamaTokenizer"}
    folder = write(tmp_path / "checkpoint", word_pieces(), {}, tokenizer_config=settings)
    with pytest.raises(CheckpointError, match="its model is 'WordPiece'; wanted BPE for LlamaTokenizer"):
        read_checkpoint_tokenizer(folder, {"model_type": "llama"})
    write(folder, word_pieces(), {}, tokenizer_config={"clean_up_tokenization_spaces": True})
    with pytest.raises(CheckpointError, match="clean_up_tokenization_spaces, which is not supported for this model"):
        read_checkpoint_tokenizer(folder, {"model_type": "llama"})


TEMPLATES = {
    "none": ({}, {}),
    "a text": ({"chat_template": "inline"}, {}),
    "named": ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, {}),
    "named, no default": ({"chat_template": [{"name": "tool_use", "template": "t"}]}, {}),
    "a file": ({"chat_template": "inline"}, {"chat_template.jinja": "file é\r\n"}),
    "several files": ({}, {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "t"}),
    "files without default": ({"chat_template": "inline"}, {"additional_chat_templates/tool_use.jinja": "t"}),
    "two whose ends matter": (
        {},
        {
            "chat_template.jinja": "\n  {% if true %}\n{{ messages[0].content }}\n  {% endif %}\n  \n",
            "additional_chat_templates/tool_use.jinja": "{%- for t in tools %}\n \n{{ t | tojson }}{% endfor -%}\n\n",
        },
    ),
    "default elsewhere": ({}, {"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "d"}),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_is_the_one_that_transformers_takes(name, tmp_path):
    settings, files = TEMPLATES[name]
    folder = write(tmp_path / "checkpoint", byte_level(), {"model_type": "llama"}, tokenizer_config=CLASS | settings)
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content.encode())
    judge = transformers.AutoTokenizer.from_pretrained(folder)
    found = read_checkpoint_tokenizer(folder, {"model_type": "llama"}).chat_template
    messages = [{"role": "user", "content": "Hi"}]
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        try:
            wanted = judge.apply_chat_template(messages, tools=tools, tokenize=False)
        except ValueError:  # none, or none by default
            assert (found, tools) == (None, None)
            break
        assert environment().from_string(found).render(messages=messages, tools=tools) == wanted


def test_tokens_past_the_model_s_are_told_and_a_bos_past_them_is_refused(tmp_path):
    config = {"model_type": "llama"}
    folder = write(tmp_path / "checkpoint", byte_level(), config, tokenizer_config=CLASS | {"pad_token": "[PAD]"})
    read, told = read_checkpoint_tokenizer(folder, config), []
    check_vocabulary(read, 321, folder, told.append)
    assert told == []
    check_vocabulary(read, 319, folder, told.append)
    assert [line.partition(": ")[2] for line in told] == [
        "the model has no row for token 319, 'Ġreturn' and 1 more; prompts with it will be refused"
    ]
    with pytest.raises(CheckpointError, match="token 0 goes around each text; wanted tokens below 0"):
        check_vocabulary(read, 0, folder)


def test_a_panic_of_the_library_is_one_line(tmp_path, capfd):
    data = json.loads(byte_level())
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    write(tmp_path / "checkpoint", json.dumps(data), {})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        read_checkpoint_tokenizer(tmp_path / "checkpoint", {"model_type": "llama"})
    assert capfd.readouterr() == ("", "")
