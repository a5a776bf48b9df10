"""Conversations written out as one text -> turns: Human/Assistant transcripts and texts with a chat template baked in."""

import re

Turn = tuple[str, str]  # role, content

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user", "[inst]": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "[/inst]": "assistant",
}  # fmt: skip
TEMPLATES = tuple(
    re.compile(opening)
    for opening in (
        r"<\|im_start\|>[ ]?(system|user|assistant)\b",  # ChatML
        r"<\|start_header_id\|>(system|user|assistant)<\|end_header_id\|>",  # Llama 3
        r"<start_of_turn>(user|model)\b",  # Gemma
        r"<\|(system|user|assistant)\|>",  # Zephyr, Phi
        r"(\[/?INST\])",  # Llama 2, Mistral
    )
)
HUMAN_ASSISTANT = (re.compile(r"(?:\A|\n\n)(Human|Assistant):"), re.compile(r"(?:\A|\n)(Human|User|Assistant):"))
BEGINNING = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>)?\s*")
ENDING = re.compile(r"(?:\s*(?:<\|im_end\|>|<\|eot_id\|>|<\|end\|>|<\|endoftext\|>|<end_of_turn>|</s>(?:<s>)?))+\s*\Z")
LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
TEMPLATE_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|endoftext|begin_of_text|end|system|user|assistant)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
)


def parse(text: str) -> list[Turn] | None:
    """The turns of a text that is a whole conversation, or None for any other text.

    An assistant turn that was only opened, as in a prompt that waits for its answer, is left out.
    """
    text = text[BEGINNING.match(text).end() :]  # type: ignore[union-attr]  # it matches the empty string too
    opening = next((template for template in TEMPLATES if template.match(text)), None)
    if opening is None and text.startswith("Human:") and "\nAssistant:" in text:
        opening = HUMAN_ASSISTANT["\n\nAssistant:" not in text]
    if opening is None:
        return None
    pieces = opening.split(text)
    turns = [
        (ROLES[role.lower()], strip_ending(content).strip())
        for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if system := LLAMA2_SYSTEM.match(turns[0][1]):
        turns[:1] = [("system", system[1].strip()), ("user", turns[0][1][system.end() :].strip())]
    return turns[:-1] if turns[-1] == ("assistant", "") else turns


def strip_ending(text: str) -> str:
    """The text without the end-of-turn tokens it closes with."""
    return ENDING.sub("", text) if text.rstrip().endswith(">") else text
