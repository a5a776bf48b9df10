"""A conversation with the bot, kept within the model's window."""

from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext

from fitness_dpo.bot import Bot, untuned
from fitness_dpo.config import InputError, SamplingConfig
from fitness_dpo.data import Message
from fitness_dpo.inference import ask, stream
from fitness_dpo.model import Policy
from fitness_dpo.template import ChatTemplate


class Conversation:
    """The questions and answers so far, and who answers the next."""

    def __init__(self, policy: Policy, bot: Bot, sampling: SamplingConfig, history: Sequence[Message] = ()) -> None:
        self.policy, self.bot, self.sampling = policy, bot, sampling
        self.history = list(history)
        self.system_prompt = bot.system_prompt
        self.untuned = False

    def prompt(self, question: str) -> tuple[list[Message], int]:
        """The messages that end with `question`, and how many of the oldest questions were forgotten to make room."""
        asked = ask(question, self.system_prompt, tuple(self.history), standardised=self.bot.standardised)
        messages, forgotten = fit(self.policy, asked, self.bot.model.max_length_tokens, self.sampling.max_new_tokens)
        self.history = [message for message in messages[:-1] if message["role"] != "system"]
        return messages, forgotten

    def answer(self, prompt: list[Message]) -> Generator[str, None, None]:
        """The answer piece by piece. Closing it stops the model; what was said by then belongs to the conversation."""
        answer = ""
        try:
            with (
                untuned(self.policy.model) if self.untuned else nullcontext(),
                closing(stream(self.policy, prompt, self.sampling)) as pieces,
            ):
                for piece in pieces:
                    answer += piece
                    yield piece
        finally:
            if answer.strip():
                self.history += [prompt[-1], {"role": "assistant", "content": answer.strip()}]


def fit(policy: Policy, messages: list[Message], window: int, answer: int) -> tuple[list[Message], int]:
    """`messages` without the oldest turns, so that they and `answer` tokens fit into `window`, and how many turns went.

    A turn is a question and what followed it; a system message stays. Raises InputError for an empty last message, and
    for one that does not fit alone.
    """
    if not messages[-1]["content"]:
        raise InputError("prompt='': the question is empty; ask something")
    template = ChatTemplate(policy.tokenizer)
    start = 1 if messages[0]["role"] == "system" else 0
    forgotten = 0
    while (length := len(template.prompt_ids(messages))) + answer > window:
        turns = [place for place, message in enumerate(messages) if message["role"] == "user" and place > start]
        if not turns:
            raise InputError(
                f"prompt: its {length} tokens leave no room for sampling.max_new_tokens={answer} in model.max_length_tokens={window}; "
                "shorten it, or change one of the two"
            )
        messages = messages[:start] + messages[turns[0] :]
        forgotten += 1
    return messages, forgotten
