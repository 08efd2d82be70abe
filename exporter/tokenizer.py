"""The tokenizer that transformers would load from a checkpoint's folder, as one tokenizer.json.

transformers (5) reads tokenizer.json, adds tokens that stand in the files beside it, and for some classes keeps only
the vocabulary and makes the rest anew. The same is done here, once, with the same library: what runs a bundle reads its
tokenizer.json and has nothing to look up. What cannot be done is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from edgeskip.exporter.config import read_json
from edgeskip.exporter.tokenizer_classes import Settings, TokenizerClass, tokenizer_class
from edgeskip.runtime.bundle.architecture import MOST_SIZE
from edgeskip.runtime.decoding.tokenizer import MOST_BYTES, tokenizer_from_json, tokenizers_errors
from edgeskip.runtime.errors import CheckpointError
from edgeskip.runtime.reading import kind_of, parse_json, read_text

Token = str | AddedToken

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer may name."""

_FLAGS = {"content", "lstrip", "rstrip", "normalized", "single_word", "special"}
_SAVE_AGAIN = "save it again with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A tokenizer, also as the text of its tokenizer.json, and what does not stand in that.

    `special_tokens` are texts by name, for chat templates; `chat_template` serves chats with and without tools;
    `fill_token` is Code Llama's, where the model infills a text.
    """

    tokenizer: Tokenizer
    json: str
    special_tokens: dict[str, str]
    split_special_tokens: bool
    chat_template: str | None
    fill_token: str | None = None


def read_checkpoint_tokenizer(folder: Path, config: Mapping[str, Any]) -> CheckpointTokenizer:
    """Reads the tokenizer of a checkpoint with this config.json.

    Raises:
        CheckpointError: a file that is missing or malformed, or something that is not supported.
    """
    path = folder / "tokenizer.json"
    if not kind_of(path, CheckpointError):
        legacy = kind_of(folder / "tokenizer.model", CheckpointError)
        found = "only tokenizer.model, without tokenizer.json" if legacy else "no tokenizer.json"
        raise CheckpointError(folder, found, fix=_SAVE_AGAIN)
    text = read_text(path, CheckpointError, most=MOST_BYTES)
    made = tokenizer_from_json(text, path, CheckpointError)
    if (last := max(made.get_vocab(with_added_tokens=True).values(), default=0)) >= MOST_SIZE:
        raise CheckpointError(path, f"token id {last}", wanted=f"less than {MOST_SIZE}")  # the library counts up to it
    stored = parse_json(text.encode(), path, CheckpointError)
    place = folder / "tokenizer_config.json"
    settings = read_json(place) if kind_of(place, CheckpointError) else {}
    _check_settings(place, settings, stored)
    kind = tokenizer_class(place, settings, config, byte_level='"ByteLevel"' in text)
    if kind.build and stored["model"].get("type") != "BPE":
        raise CheckpointError(path, f"its model is {stored['model'].get('type')!r}", wanted=f"BPE for {kind.name}")
    template = _chat_template(folder, settings)
    split = settings.get("split_special_tokens", False)
    with tokenizers_errors(lambda why: CheckpointError(folder, f"transformers cannot load its tokenizer ({why})")):
        listed = _gather(folder, settings, stored)
        special, extra = _special_tokens(settings, kind, stored)
        if kind.build:
            made = Tokenizer.from_str(json.dumps(kind.build(stored, settings)))
        _add_tokens(made, listed, special, extra)
        if kind.marks_all_special:
            contents = dict.fromkeys(map(str, (*special.values(), *extra)))
            made.add_tokens([AddedToken(content, special=True) for content in contents])
        if kind.own:  # it sets this one again, after the settings have been read
            special["fill_token"] = settings.get("fill_token", kind.own["fill_token"])
        if kind.adds_bos:
            _add_bos(made, special.get("bos_token"))
        names = {name: str(token) for name, token in special.items() if token is not None}
        written, tokenizer = _written(made, path)
        tokenizer.encode_special_tokens = split
    fill_token = names.get("fill_token") if kind.own else None
    return CheckpointTokenizer(tokenizer, written, names, split, template, fill_token)


def check_vocabulary(
    tokenizer: CheckpointTokenizer, vocab_size: int, folder: Path, warn: Callable[[str], None] = lambda _: None
) -> None:
    """Finds that the model has the tokens that go around every text, and warns of others that it has not.

    Raises:
        CheckpointError: no prompt could be run, or Code Llama's sign for a text to fill in would be read as a token.
    """
    place = folder / "tokenizer.json"
    fill = tokenizer.tokenizer.token_to_id(tokenizer.fill_token or "")
    if fill is not None and fill < vocab_size:
        found = f"fill_token is {tokenizer.fill_token!r:.60}, at which transformers splits a text"
        raise CheckpointError(folder / "tokenizer_config.json", found, wanted='"fill_token": null')
    around = max(tokenizer.tokenizer.encode("").ids, default=0)
    if around >= vocab_size:
        found = f"token {around} goes around each text"
        raise CheckpointError(place, found, wanted=f"tokens below {vocab_size}, which is what the model has")
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    if past := sorted((index, token) for token, index in vocabulary.items() if index >= vocab_size):
        (index, token), count = past[0], len(past)
        more = f" and {count - 1} more" if count > 1 else ""
        warn(f"{place}: the model has no row for token {index}, {token!r}{more}; prompts with it will be refused")


def _check_settings(place: Path, settings: Settings, stored: Settings) -> None:
    """Refuses settings that would change ids or texts in a way that is not supported."""
    code = settings.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if code:
        raise CheckpointError(place, f"auto_map names code, {code!r:.60}", wanted="a tokenizer without code of its own")
    for key in ("init_inputs", "fast_tokenizer_files", "fix_mistral_regex"):
        if settings.get(key):
            raise CheckpointError(place, f"{key} is {settings[key]!r:.60}, which is not supported", fix=_SAVE_AGAIN)
    forced = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    if settings.get("clean_up_tokenization_spaces") and (forced or stored["model"].get("type") != "BPE"):
        raise CheckpointError(place, "clean_up_tokenization_spaces, which is not supported for this model")
    if not isinstance(settings.get("split_special_tokens", False), bool):
        found = f"split_special_tokens is {settings['split_special_tokens']!r:.60}"
        raise CheckpointError(place, found, wanted="true or false")


def chat_template_files(folder: Path) -> dict[str, Path]:
    """Where a checkpoint may have chat templates in files of their own, by name."""
    others = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    return {"default": folder / "chat_template.jinja"} | others


def _chat_template(folder: Path, settings: Settings) -> str | None:
    """The template that transformers takes: files first, and of several, `default` or, where there are tools,
    `tool_use`; these two as one.
    """
    templates: Any = {
        name: read_text(path, CheckpointError)
        for name, path in chat_template_files(folder).items()
        if kind_of(path, CheckpointError)
    }
    place: Path = folder / "tokenizer_config.json"
    if not templates:
        templates = settings.get("chat_template")
        if isinstance(templates, list):
            if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in templates):
                raise CheckpointError(place, "chat_template is a list", wanted="templates with names")
            templates = {one["name"]: one.get("template") for one in templates}
    named = templates if isinstance(templates, dict) else {"default": templates}
    template, with_tools = named.get("default"), named.get("tool_use")
    for text in (template, with_tools):
        if not isinstance(text, str | None):
            raise CheckpointError(place, f"chat_template is {text!r:.60}", wanted="a text")
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise CheckpointError(place, "chat_template is not valid Unicode", wanted="a text") from None
    if template is None or with_tools is None:
        return template
    # each as Jinja reads it alone: it drops a newline at the end and those after tags; + keeps the spaces before one
    one, other = (re.sub(r"(\r\n|\r|\n)\Z", "", text) for text in (with_tools, template))
    return f"{{% if tools %}}\n{one}{{%+ else %}}\n{other}{{%+ endif %}}"


def _gather(folder: Path, settings: Settings, stored: Settings) -> dict[int, AddedToken]:
    """The tokens that the files list by id; completes the settings by what older files beside them say.

    Where tokenizer_config.json lists added tokens, it is alone in what it says of special ones.
    """
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    own = {name: token for name, token in settings.items() if name.endswith("_token") and name not in NAMED}
    own = {name: settings.pop(name) for name, token in own.items() if isinstance(token, str)}
    own = own or settings.get("model_specific_special_tokens") or {}
    if isinstance(settings.get("extra_special_tokens"), dict):
        own |= settings.pop("extra_special_tokens")
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        listed = {int(index): _added(token) for index, token in settings["added_tokens_decoder"].items()}
    else:
        names, ids = (folder / f"{name}.json" for name in ("special_tokens_map", "added_tokens"))
        if kind_of(names, CheckpointError):
            _merge_special_tokens_map(settings, read_json(names))
        if isinstance(settings.get("extra_special_tokens"), dict):
            own |= settings.pop("extra_special_tokens")
        special = {str(settings[name]) for name in NAMED if settings.get(name)}
        special |= {str(token) for token in settings.get("extra_special_tokens") or ()}
        for content, index in (read_json(ids) if kind_of(ids, CheckpointError) else {}).items():
            listed[index] = AddedToken(content, normalized=content not in special, special=content in special)
        for token in stored["added_tokens"]:
            listed[token["id"]] = _added(token)
    settings.update(_written_out(settings))
    by_content = {token.content: token for token in listed.values()}
    settings.update({name: by_content.get(str(settings[name]), settings[name]) for name in NAMED if settings.get(name)})
    settings["own"] = _written_out(own)
    return listed


def _merge_special_tokens_map(settings: Settings, names: Settings) -> None:
    for name, value in names.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            tokens = [_added(token, special=True) if isinstance(token, dict) else token for token in value]
            known = list(settings.get(name) or [])
            settings[name] = known + [token for token in tokens if token not in known]
        elif isinstance(value, dict) and name != "extra_special_tokens":
            settings[name] = _added({key: flag for key, flag in value.items() if key != "special"}, special=True)
        else:
            settings[name] = value


def _added(token: Settings, **flags: Any) -> AddedToken:
    """A token that is written out as a table; other keys are none of the library's, and it would print them."""
    if "content" not in token:
        raise ValueError("a token without content")
    return AddedToken(**{key: value for key, value in token.items() if key in _FLAGS}, **flags)


def _written_out(value: Any) -> Any:
    """Data with each token that is written out as a table made one."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return _added(value)
        return {key: _written_out(item) for key, item in value.items()}
    return [_written_out(item) for item in value] if isinstance(value, list) else value


def _special_tokens(settings: Settings, kind: TokenizerClass, stored: Settings) -> tuple[dict[str, Token], list[Token]]:
    """Special tokens by name, and those without one."""
    given: dict[str, Any] = dict(kind.named) | {name: settings[name] for name in NAMED if name in settings}
    if stored.get("padding"):
        given.setdefault("pad_token", stored["padding"]["pad_token"])
    own = dict(kind.own) | {
        name: token for name, token in settings.items() if name.endswith("_token") and name not in NAMED
    }
    own = {name: token for name, token in own.items() if isinstance(token, Token)}
    special = {name: given[name] for name in NAMED if given.get(name) is not None} | own | settings["own"]
    extra = settings.get("additional_special_tokens") or []
    extra = settings["extra_special_tokens"] if "extra_special_tokens" in settings else [*extra, *own.values()]
    for name, token in (*special.items(), *(("an extra special token", token) for token in extra or ())):
        if not isinstance(token, Token):
            raise TypeError(f"{name} is {token!r}")
    return special, list(extra or ())


def _add_tokens(
    tokenizer: Tokenizer,
    listed: Mapping[int, AddedToken],
    special: Mapping[str, Token],
    extra: Sequence[Token],
) -> None:
    """Adds what is listed, in the order of the ids, and the special tokens that are not in the vocabulary yet."""
    tokens: list[Token] = [token for _, token in sorted(listed.items())]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | set(map(str, tokens))
    for token in (*special.values(), *extra):
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    named = {str(token) for token in special.values()}
    made = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in made:
        token.special = token.special or token.content in named
    tokenizer.add_tokens(made)


def _add_bos(tokenizer: Tokenizer, bos: Token | None) -> None:
    pieces = [] if bos is None else [(str(bos), tokenizer.token_to_id(str(bos)))]
    tokenizer.post_processor = TemplateProcessing([*(token for token, _ in pieces), "$A"], special_tokens=pieces)


def _written(tokenizer: Tokenizer, place: Path) -> tuple[str, Tokenizer]:
    """Its tokenizer.json, and that read again.

    Raises:
        CheckpointError: a token was added twice with other flags, and what is written is not what the library does.
    """
    added = tokenizer.get_added_tokens_decoder()
    does = {index: _behaviour(tokenizer, index, token) for index, token in added.items()}
    text = str(tokenizer.to_str())
    once_special = [index for index, token in added.items() if not token.special and does[index][0] == ""]
    if once_special:  # for the library they still are, but it writes the last flag that it was given
        data = json.loads(text)
        for token in data["added_tokens"]:
            token["special"] = token["special"] or token["id"] in once_special
        text = json.dumps(data)
    read = tokenizer_from_json(text, place, CheckpointError)
    for index, token in added.items():
        if _behaviour(read, index, token) != does[index]:
            found = f"its token {token.content!r:.60} is listed twice, and not alike"
            raise CheckpointError(place, found, fix=_SAVE_AGAIN)
    return text, read


def _behaviour(tokenizer: Tokenizer, index: int, token: AddedToken) -> tuple[str, str, list[int]]:
    """An added token as text, as text with special tokens, and what its text is encoded to."""
    shown, whole = tokenizer.decode([index] * 2), tokenizer.decode([index] * 2, skip_special_tokens=False)
    return shown, whole, list(tokenizer.encode(token.content).ids)
