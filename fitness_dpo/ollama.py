"""A chat template, which is Jinja -> an Ollama Modelfile, whose template is Go's text/template."""

from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFReader

from fitness_dpo.config import InputError
from fitness_dpo.data import Message
from fitness_dpo.template import ChatTemplate

SYSTEM, USER, ANSWER, NEXT = (f"\ue010{name}\ue011" for name in ("system", "user", "answer", "next"))
CONVERSATION: list[Message] = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": USER},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": NEXT},
]


class Turns(NamedTuple):
    """What a chat template writes before and after the text of each role."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    begin: str
    """What follows the last message, where the assistant is to begin."""
    unasked: str | None
    """The system message of a conversation that brings none."""

    def write(self, messages: list[Message]) -> str:
        """A conversation as Ollama's template, made of these turns, renders it."""
        if messages[0]["role"] != "system" and self.unasked is not None:
            messages = [{"role": "system", "content": self.unasked}, *messages]
        sides = {"system": self.system, "user": self.user, "assistant": self.assistant}
        return "".join(sides[m["role"]][0] + m["content"] + sides[m["role"]][1] for m in messages) + self.begin

    def go_template(self) -> str:
        def turn(sides: tuple[str, str]) -> str:
            return f"{sides[0]}{{{{ .Content }}}}{sides[1]}"

        return (
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{turn(self.system)}'
            f'{{{{ else if eq .Role "user" }}}}{turn(self.user)}{{{{ else }}}}{turn(self.assistant)}'
            f"{{{{ end }}}}{{{{ end }}}}{self.begin}"
        )


def turns(tokenizer: Any) -> Turns:
    """The turns of the tokenizer's chat template. Raises InputError for a template that is not made turn by turn."""
    template = ChatTemplate(tokenizer)

    def text(messages: list[Message], *, ask: bool = False) -> str:
        return "".join(template.render(messages, ask=ask))

    try:
        s0, s1 = text(CONVERSATION[:1]).split(SYSTEM)
        u0, u1 = _after(text(CONVERSATION[:2]), s0 + SYSTEM + s1).split(USER)
        whole = _after(text(CONVERSATION, ask=True), s0 + SYSTEM + s1 + u0 + USER + u1)
        a0, between, begin = (part for piece in whole.split(ANSWER) for part in piece.split(NEXT))
        a1, begin = _before(between, u0), _after(begin, u1)
        alone = _before(text(CONVERSATION[1:2], ask=True), u0 + USER + u1 + begin)
        unasked = _before(_after(alone, s0), s1) if alone else None
    except ValueError as error:
        raise _unknown(tokenizer) from error
    found = Turns((s0, s1), (u0, u1), (a0, a1), begin, unasked)
    longer: list[Message] = [*CONVERSATION, CONVERSATION[2], CONVERSATION[3]]
    for messages in (CONVERSATION[1:2], CONVERSATION[:2], CONVERSATION[1:], CONVERSATION, longer):
        if found.write(messages) != text(messages, ask=True):
            raise _unknown(tokenizer)
    return found


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(start)
    return text[len(start) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(end)
    return text[: len(text) - len(end)]


def _unknown(tokenizer: Any) -> InputError:
    return InputError(
        f"format=ollama: the chat template of {tokenizer.name_or_path} does not write each message by itself, so it has no "
        "Ollama form; use format=gguf and llama.cpp's own server, which renders the template as it is"
    )


def modelfile(tokenizer: Any, file: Path, ends: list[str], window: int) -> str:
    """The Modelfile for a GGUF file beside it: the turns, the system prompt, the stop tokens, greedy answers.

    window: tokens of the longest conversation. Raises InputError where a Modelfile cannot hold the template or the prompt.
    """
    made = turns(tokenizer)
    flag = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    if flag is not None and flag.contents() and tokenizer.bos_token:  # llama.cpp writes it by itself
        made = made._replace(system=(made.system[0].removeprefix(tokenizer.bos_token), made.system[1]))
    sides = "".join([*made.system, *made.user, *made.assistant, made.begin])
    for what, text, forbidden in (
        ("chat template", sides, ('"""', "{{", "}}")),
        ("system prompt", made.unasked or "", ('"""',)),
    ):
        if any(mark in text for mark in forbidden):
            raise InputError(f"format=ollama: the {what} holds {' or '.join(forbidden)}, which a Modelfile cannot hold")
    lines = [
        "# ollama create NAME -f Modelfile",
        f"FROM ./{file.name}",
        f'TEMPLATE """{made.go_template()}"""',
        *([f'SYSTEM """{made.unasked}"""'] if made.unasked else []),
        *(f'PARAMETER stop "{end}"' for end in ends),
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {window}",
    ]
    return "\n".join(lines) + "\n"
