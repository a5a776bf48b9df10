"""Rows and texts nobody thought of: the loader refuses them in words, and the template keeps data apart from control tokens."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitness_dpo.config import DataConfig, InputError, TrainConfig
from fitness_dpo.examples import known_row, to_examples
from fitness_dpo.files import parse_rows
from fitness_dpo.pairs import RowError
from fitness_dpo.template import ChatTemplate
from fitness_dpo.weights import locate

KEYS = (
    "prompt", "question", "instruction", "input", "chosen", "rejected", "output", "messages", "conversations", "history", "label",
    "response_a", "response_b", "winner", "score_0", "score_1", "answers", "completions", "completion", "system", "split", "id",
)  # fmt: skip
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "<s>", "<|eot_id|>", "\ue0000\ue001")
texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(CONTROL)), max_size=5).map("".join)
dirty = st.one_of(texts, texts.map("half \ud83d a pair ".__add__))  # JSON may spell it out
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), dirty)
messages = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(("user", "assistant", "system", "tool", "human", "")), "content": scalars,
                  "from": scalars, "value": scalars},
)  # fmt: skip
values = st.recursive(
    st.one_of(scalars, messages),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=6,
)
rows = st.one_of(st.dictionaries(st.sampled_from(KEYS), values, max_size=6), values)
FEW, MANY = 300, 100_000


@pytest.fixture(scope="module")
def config(compose_train: Callable[..., TrainConfig]) -> DataConfig:
    return compose_train("data.path=fitness_qa").data


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    from transformers import AutoTokenizer

    return ChatTemplate(AutoTokenizer.from_pretrained(locate("embedded:tiny", None)))


def require_line(refused: ValueError) -> None:
    assert str(refused)
    assert "\n" not in str(refused)


def check_row(row: Any, config: DataConfig) -> None:
    for standardise in (True, False):
        try:
            entry, known = known_row(row, config.columns)
            pairs = to_examples("here", entry, known, dataclasses.replace(config, standardise=standardise))
        except RowError as refused:
            require_line(refused)
        else:
            for pair in pairs:
                json.dumps([pair.prompt, pair.chosen, pair.rejected]).encode()
                assert pair.prompt[-1]["role"] == "user"
                assert pair.prompt[-1]["content"]
                assert pair.chosen or pair.rejected


def check_bytes(content: bytes) -> None:
    try:
        list(parse_rows("file", content))
    except InputError as refused:
        require_line(refused)
    except UnicodeDecodeError:
        pass  # read_rows turns it into an InputError that names the byte


def check_texts(question: str, chosen: str, rejected: str, template: ChatTemplate) -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}]
    tokenizer = template.tokenizer
    controls = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_added_vocab()}
    asked = template.prompt_ids(prompt)
    assert tokenizer.decode(asked, skip_special_tokens=False) == template.prompt_text(prompt)
    bare = template.prompt_ids([prompt[0], {"role": "user", "content": "x"}])
    assert [token for token in asked if token in controls] == [token for token in bare if token in controls]
    for answer in (chosen, rejected):
        ids = template.answer_ids(prompt, answer)
        assert tokenizer.decode(ids, skip_special_tokens=False) == answer + str(tokenizer.eos_token)
        assert [token for token in ids if token in controls] == [tokenizer.eos_token_id]


def run(check: Callable[..., None], strategies: tuple[Any, ...], count: int, *fixed: Any) -> None:
    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.tuples(*strategies))
    def holds(drawn: tuple[Any, ...]) -> None:
        check(*drawn, *fixed)

    holds()


COUNTS = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


@COUNTS
def test_any_row_is_read_or_refused_in_one_line(count: int, config: DataConfig) -> None:
    run(check_row, (rows,), count, config)


@COUNTS
def test_any_bytes_are_read_or_refused_in_one_line(count: int) -> None:
    starts = st.sampled_from(
        (b"", b"[", b"{", b'{"prompt": "', b"PAR1", b"\x1f\x8b", b"\xef\xbb\xbf", b"a,b,c\n", b'[{"a": 1}, ')
    )
    content = st.tuples(starts, st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda text: text.encode())))
    run(lambda parts: check_bytes(b"".join(parts)), (content,), count)


@COUNTS
def test_any_text_comes_back_from_its_tokens_and_is_no_control_token(count: int, template: ChatTemplate) -> None:
    run(check_texts, (texts, texts, texts), count, template)
