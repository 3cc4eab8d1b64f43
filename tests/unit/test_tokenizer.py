"""Text to tokens and back: SmolLM2's own ids, GGUF and tokenizer.json alike, no double BOS, streaming never breaks a character, templates in a sandbox."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from twinpilots.errors import CheckpointError, UnsupportedModelError, UserError
from twinpilots.model.chat_template import ChatTemplate
from twinpilots.model.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer, merges_from_scores, tokenizer_config
from twinpilots.model.locate import resolve_model
from twinpilots.model.tokenizer import Detokenizer, Tokenizer, load_tokenizer

# Ids of the SmolLM2 tokenizer (tokenizer.ggml.pre = smollm: every digit alone, then GPT-2's pieces).
GOLDEN: list[tuple[str, list[int]]] = [
    ("Hello world", [19556, 905]),
    ("1, 2, 3, 4, 5,", [33, 28, 216, 34, 28, 216, 35, 28, 216, 36, 28, 216, 37, 28]),
    ("  leading and   multiple   spaces ", [216, 2899, 284, 256, 2701, 256, 5600, 216]),
    (
        "def f(x):\n    return x**2 + 3.14159\n\n\n# done\t\ttabs",
        [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 1232, 216, 35, 30, 33, 36, 33, 37, 41, 1116, 198, 19, 2294, 197, 197, 100, 7366],
    ),
    ("I'm you're they'll WE'VE don't", [57, 5248, 346, 2316, 502, 3060, 26587, 23, 18525, 1326, 982]),
    ("1234567890 12,345.67", [33, 34, 35, 36, 37, 38, 39, 40, 41, 32, 216, 33, 34, 28, 35, 36, 37, 30, 38, 39]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
]
VARIED = "naïve café — “quotes” 日本語テスト 한국어 العربية 😀👩‍👩‍👧🇩🇪 \r\n\t x=1; y\u00a0z"


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # from the metadata, not from a converted copy
        try:
            found = load_tokenizer(resolve_model("smollm2-135m"))
        except UserError as error:
            pytest.skip(str(error))
    assert found is not None
    return found


@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_smollm2_gives_its_golden_ids(text: str, ids: list[int], smollm: Tokenizer) -> None:
    assert smollm.encode(text) == ids
    assert smollm.decode(ids, skip_special_tokens=False) == text


def test_smollm2_round_trips_and_hides_special_tokens(smollm: Tokenizer) -> None:
    assert smollm.decode(smollm.encode(VARIED)) == VARIED
    assert smollm.decode([1, 19556, 905, 2]) == "Hello world"
    assert (smollm.eos_token_ids, smollm.bos_token_id, smollm.vocab_size) == ([2], 1, 49152)


def test_smollm2_chat_template(smollm: Tokenizer) -> None:
    text = smollm.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n") and text.startswith("<|im_start|>system\n")
    ids = smollm.encode_chat([{"role": "user", "content": "hi"}])
    assert ids[0] == 1 and ids.count(1) == 3


@pytest.mark.parametrize("skip", [True, False])
def test_streamed_pieces_join_to_the_whole_text(skip: bool, smollm: Tokenizer) -> None:
    ids = [*smollm.encode(VARIED), 2, *smollm.encode(" and after"), *smollm.encode("😀")[:-1]]
    for step in (1, 2, 5):
        stream = Detokenizer(smollm, prompt_ids=smollm.encode("Say:"), skip_special_tokens=skip)
        pieces = [stream.add(ids[i : i + step]) for i in range(0, len(ids), step)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == smollm.decode(ids, skip_special_tokens=skip)


def test_any_ids_stream_without_loss(smollm: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(30):
        ids = [rng.randrange(smollm.vocab_size) for _ in range(30)]
        stream = Detokenizer(smollm)
        text = "".join(stream.add([token]) for token in ids) + stream.flush()
        assert text.replace("\ufffd", "") == smollm.decode(ids).replace("\ufffd", "")


# --- tokenizer.json directories ---


def write_directory(path: Path, **config: Any) -> Path:
    """A word-level tokenizer whose post-processor adds <s>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    path.mkdir()
    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hi": 3, "you": 4, "tool": 5}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}))
    return path


def load(path: Path) -> Tokenizer:
    found = load_tokenizer(resolve_model(path))
    assert found is not None
    return found


def test_bos_comes_once_whether_the_text_has_it_or_not(tmp_path: Path) -> None:
    tokenizer = load(write_directory(tmp_path / "a"))
    assert tokenizer.encode("hi you") == tokenizer.encode("<s>hi you") == [1, 3, 4]
    assert tokenizer.encode("hi", add_special=False) == [3]
    assert tokenizer.encode("<s>hi", add_special=False) == [1, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, [2])


def test_add_bos_token_is_honoured(tmp_path: Path) -> None:
    without = load(write_directory(tmp_path / "b", add_bos_token=False))
    assert without.encode("hi") == [3] and without.encode("<s>hi") == [1, 3]
    path = write_directory(tmp_path / "c", add_bos_token=True)
    data = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**data, "post_processor": None}))
    assert load(path).encode("hi") == load(path).encode("<s>hi") == [1, 3]


def test_chat_templates_are_found_in_every_place(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "hi"}]
    assert load(write_directory(tmp_path / "a", chat_template="A{{ messages[0].content }}{{ bos_token }}")).apply_chat_template(message) == "Ahi<s>"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools|length }}"}]
    tokenizer = load(write_directory(tmp_path / "b", chat_template=named))
    assert tokenizer.apply_chat_template(message) == "D" and tokenizer.apply_chat_template(message, tools=[{"x": 1}]) == "T1"
    path = write_directory(tmp_path / "c", chat_template="old")
    (path / "chat_template.jinja").write_text("new")
    assert load(path).apply_chat_template(message) == "new"
    plain = load(write_directory(tmp_path / "d"))
    assert not plain.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        plain.apply_chat_template(message)


def test_templates_render_like_transformers_and_stay_in_their_sandbox() -> None:
    source = (
        "{%- for m in messages %}\n    {%- if m.role == 'bad' %}{{ raise_exception('no bad role') }}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n{%- if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    template = ChatTemplate(source, {}, "m")
    assert template.render([{"role": "user", "content": "<é>"}]) == '"<é>"4'
    with pytest.raises(UserError, match="no bad role"):
        template.render([{"role": "bad", "content": ""}])
    for hostile in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ undefined_name.x }}", "{{ 1 / 'a' }}"):
        with pytest.raises(UserError, match="refuses"):
            ChatTemplate(hostile, {}, "m").render([])
    with pytest.raises(UserError, match="malformed"):
        ChatTemplate("{% if %}", {}, "m")


def test_directories_without_a_tokenizer_give_none_and_overrides_must_have_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert load_tokenizer(resolve_model(tmp_path / "empty")) is None
    assert load_tokenizer(resolve_model("dummy:opt-30b")) is None
    with pytest.raises(UserError, match="no tokenizer found"):
        load_tokenizer(resolve_model("dummy:opt-30b"), override=tmp_path / "empty")
    other = write_directory(tmp_path / "other")
    for override in (other, other / "tokenizer.json"):
        found = load_tokenizer(resolve_model("dummy:opt-30b"), override=override)
        assert found is not None and found.encode("hi") == [1, 3]
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load_tokenizer(resolve_model(other))


# --- GGUF metadata ---


def spm_fields(**changes: Any) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "h", "i", "▁h", "hi", "▁hi", "\n\n", "<turn>"]
    types = [2, 3, 3, *[6] * 256, *[1] * 6, 4, 3]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -3.0, -2.0, -1.0, 0.0, 0.0]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, **changes,
    }  # fmt: skip


def test_sentencepiece_merges_follow_the_scores_and_fall_back_to_bytes() -> None:
    fields = spm_fields()
    tokenizer = Tokenizer(build_tokenizer(fields, "m"), tokenizer_config(fields, "m"), "m")
    names = fields["tokenizer.ggml.tokens"]
    assert [names[i] for i in tokenizer.encode("hi")] == ["<s>", "▁hi"]
    assert [names[i] for i in tokenizer.encode("é hi", add_special=False)] == ["▁", "<0xC3>", "<0xA9>", "▁hi"]
    assert tokenizer.decode(tokenizer.encode("é hi")) == "é hi"
    assert [names[i] for i in tokenizer.encode("<turn>hi")] == ["<s>", "<turn>", "▁hi"]
    stream = Detokenizer(tokenizer, prompt_ids=tokenizer.encode("hi"))
    assert stream.add([names.index("▁hi")]) == " hi"


def test_sentencepiece_without_space_prefix_is_gemmas_way() -> None:
    fields = spm_fields(**{"tokenizer.ggml.add_space_prefix": False})
    tokenizer = Tokenizer(build_tokenizer(fields, "m"), tokenizer_config(fields, "m"), "m")
    names = fields["tokenizer.ggml.tokens"]
    assert [names[i] for i in tokenizer.encode("hi hi\n\nhi")] == ["<s>", "hi", "▁hi", "\n\n", "hi"]
    assert tokenizer.decode(tokenizer.encode(" hi hi")) == " hi hi"


def test_merges_rebuilt_from_scores_are_best_first() -> None:
    assert merges_from_scores({"a": 0, "b": 1, "ab": 2, "aba": 3}, [0.0, 0.0, -1.0, -2.0], set()) == [("a", "b"), ("ab", "a")]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_builds_and_loses_nothing(pre: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "ab"]
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1] * len(tokens),
    }  # fmt: skip
    tokenizer = Tokenizer(build_tokenizer(fields, "m"), tokenizer_config(fields, "m"), "m")
    assert tokenizer.decode(tokenizer.encode(VARIED)) == VARIED and len(tokens) - 1 in tokenizer.encode("ab")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, UnsupportedModelError, "tokenizer 't5'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "nonsense", "tokenizer.ggml.merges": ["a b"]}, UnsupportedModelError, "'nonsense' is not"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["q zzz"]}, CheckpointError, "merges"),
        ({"tokenizer.ggml.model": "gpt2"}, CheckpointError, "'tokenizer.ggml.merges' is missing"),
        ({"tokenizer.ggml.scores": [1.0]}, CheckpointError, "'tokenizer.ggml.scores'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, CheckpointError, "duplicates"),
        ({"tokenizer.ggml.tokens": "abc"}, CheckpointError, "'tokenizer.ggml.tokens'"),
        ({"tokenizer.ggml.token_type": [1]}, CheckpointError, "'tokenizer.ggml.token_type'"),
        ({"tokenizer.ggml.bos_token_id": 9999}, CheckpointError, "'tokenizer.ggml.bos_token_id' is 9999"),
    ],
)
def test_bad_metadata_is_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_tokenizer(spm_fields(**fields), "m")
