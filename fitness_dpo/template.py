"""Messages -> token ids, the same way in training, sampling and answering. A text can never become a control token."""

import re
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from fitness_dpo.config import InputError
from fitness_dpo.data import Message

PLACEHOLDER = "\ue000{}\ue001"


class PairIds(NamedTuple):
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


class ChatTemplate:
    """The tokenizer's chat template, thinking switched off where it knows the switch.

    The template is rendered with placeholders for the texts, so that it can neither split nor strip them, and a text
    that spells out a control token is tokenized as the plain characters it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                f"model.name={tokenizer.name_or_path}: its tokenizer has no chat template; choose an instruct model"
            )
        self.tokenizer = tokenizer
        control = sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
        self.control = re.compile(f"({'|'.join(map(re.escape, control))})") if control else re.compile("(?!)")

    def render(self, messages: list[Message], *, ask: bool) -> list[str]:
        """The rendered text in pieces: the template's own at even positions, the messages' contents at odd ones.

        With `ask` it ends where the assistant is to begin.
        """
        blanks = [{"role": m["role"], "content": PLACEHOLDER.format(i)} for i, m in enumerate(messages)]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                blanks, tokenize=False, add_generation_prompt=ask, enable_thinking=False
            )
        except jinja2.TemplateError as error:
            raise InputError(
                f"model.name={self.tokenizer.name_or_path}: its chat template refuses these roles ({error}); "
                "without system messages it may work: data.system_prompt=null"
            ) from error
        pieces = re.split("\ue000([0-9]+)\ue001", text)
        return [messages[int(piece)]["content"] if position % 2 else piece for position, piece in enumerate(pieces)]

    def prompt_text(self, messages: list[Message]) -> str:
        return "".join(self.render(messages, ask=True))

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Token ids up to where the assistant begins."""
        return self.encode(self.render(messages, ask=True))

    def answer_ids(self, messages: list[Message], answer: str) -> list[int]:
        """Token ids of an assistant's answer to `messages`, its end-of-turn token last."""
        prompt = self.prompt_text(messages)
        *head, content, tail = self.render([*messages, {"role": "assistant", "content": answer}], ask=False)
        before = "".join(head)
        if not before.startswith(prompt):
            raise InputError(
                f"model.name={self.tokenizer.name_or_path}: its chat template renders a prompt differently once it is answered, "
                "so training would not match answering; choose another model"
            )
        end = str(self.tokenizer.eos_token)
        tail = tail[: tail.index(end) + len(end)] if end in tail else tail + end
        return self.encode([before[len(prompt) :], content, tail])

    def pair_ids(self, prompt: list[Message], chosen: str, rejected: str) -> PairIds:
        return PairIds(self.prompt_ids(prompt), self.answer_ids(prompt, chosen), self.answer_ids(prompt, rejected))

    def encode(self, pieces: list[str]) -> list[int]:
        """Token ids of rendered pieces. Contents (odd positions) never yield a control token.

        Without control tokens in the contents the text is tokenized whole, as the model was trained. With them, each is
        cut after its first character and the parts are tokenized apart.
        """
        if not any(self.control.search(content) for content in pieces[1::2]):
            return self._ids("".join(pieces))
        parts: list[str] = []
        for position, piece in enumerate(pieces):
            for number, part in enumerate(self.control.split(piece) if position % 2 else [piece]):
                parts += [part[:1], part[1:]] if number % 2 else [part]
        return [token for part in parts if part for token in self._ids(part)]

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False)
        ids: list[int] = encoded["input_ids"]
        return ids
