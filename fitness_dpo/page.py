"""The web page: a conversation with the run's model, the untuned one beside it where asked. Model text is never markup."""

import html
import os
from collections.abc import Iterator
from contextlib import closing
from threading import Lock
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from fitness_dpo.bot import Bot
from fitness_dpo.config import ChatConfig, InputError
from fitness_dpo.conversation import Conversation
from fitness_dpo.data import Message
from fitness_dpo.model import Policy

NOTE = (
    "**No medical advice.** A small language model answers here, and it is often wrong. With pain, illness, pregnancy or "
    "medication, ask somebody who is qualified."
)
CSS = """
footer, .icon-button-wrapper.top-panel {display: none !important}
.message-content {white-space: pre-wrap; overflow-wrap: anywhere}
"""
Histories = tuple[list[Any], list[Any]]


def launch(policy: Policy, bot: Bot, config: ChatConfig, *, block: bool = True) -> gr.Blocks:
    """Serve the page at config.host and config.port; with `block`, until Ctrl-C. Nothing in it is fetched from elsewhere."""
    page = build(policy, bot, config)
    page.queue(default_concurrency_limit=None).launch(
        server_name=config.host, server_port=config.port, share=False, quiet=True, prevent_thread_lock=not block,
        footer_links=[], ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False, css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    return page


def build(policy: Policy, bot: Bot, config: ChatConfig) -> gr.Blocks:
    answers = Answers(policy, bot, config)
    page: gr.Blocks = gr.Blocks(title="Fitness bot", analytics_enabled=False, fill_height=True)
    with page:
        gr.Markdown("# Fitness bot")
        gr.Markdown(NOTE, elem_classes="note")
        with gr.Row():
            tuned, base = (
                gr.Chatbot(
                    label=label, visible=visible, elem_id=name, render_markdown=False, latex_delimiters=[], height=420,
                    buttons=[], feedback_options=None, min_width=300, allow_file_downloads=False,
                )
                for label, visible, name in (("Tuned", True, "tuned"), ("Untuned", False, "untuned"))
            )  # fmt: skip
        with gr.Row():
            question = gr.Textbox(
                show_label=False, placeholder="Ask about training, food or recovery", lines=1, max_lines=6, scale=8,
                min_width=220, autofocus=True, elem_id="question",
            )  # fmt: skip
            send = gr.Button("Ask", variant="primary", scale=1, min_width=80)
        with gr.Row():
            stop, retry, clear = (
                gr.Button(text, size="sm", min_width=80) for text in ("Stop", "Retry", "New conversation")
            )
        compare = gr.Checkbox(label="Show the untuned model beside it", visible=bot.run is not None, elem_id="compare")
        with gr.Accordion("Example questions", open=False):
            for topic, questions in config.examples.items():
                gr.Examples([[text] for text in questions], question, label=topic)

        chats = [tuned, base]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        asking = gr.on(
            [send.click, question.submit], answers.ask, [question, *chats, compare], [question, *chats], **quiet
        )
        again = retry.click(answers.retry, [*chats, compare], chats, cancels=asking, **quiet)
        stop.click(None, cancels=[asking, again], api_visibility="private")
        clear.click(lambda: ([], []), None, chats, cancels=[asking, again], **quiet)
        compare.change(lambda on: gr.update(visible=on), compare, base, **quiet)
    return page


class Answers:
    """What the buttons do. The page keeps the conversations; the model is one, and answers one question at a time."""

    def __init__(self, policy: Policy, bot: Bot, config: ChatConfig) -> None:
        self.policy, self.bot, self.config = policy, bot, config
        self.turn = Lock()

    def ask(self, question: str, tuned: list[Any], base: list[Any], compare: bool) -> Iterator[tuple[Any, ...]]:
        """An empty box and the conversations with the question at their end, then with the answers as they grow."""
        for history in (tuned, base) if compare else (tuned,):
            try:
                self.talk(history).prompt(question)
            except InputError as error:
                gr.Warning(html.escape(str(error)))
                yield gr.skip(), gr.skip(), gr.skip()
                return
        tuned = [*tuned, entry("user", question)]
        base = [*base, entry("user", question)] if compare else base
        yield "", tuned, base
        for answered in self.reply(tuned, base, compare):
            yield gr.skip(), *answered

    def retry(self, tuned: list[Any], base: list[Any], compare: bool) -> Iterator[Histories]:
        """The conversations with their last question answered anew."""
        yield from self.reply(without_answer(tuned), without_answer(base), compare)

    def reply(self, tuned: list[Any], base: list[Any], compare: bool) -> Iterator[Histories]:
        """The conversations as the tuned model's answer grows, then the untuned one's."""
        yield tuned, base
        for answered in self.grow(tuned, untuned=False):
            yield answered, base
            tuned = answered
        if compare and base:
            for answered in self.grow(base, untuned=True):
                yield tuned, answered

    def grow(self, history: list[Any], *, untuned: bool) -> Iterator[list[Any]]:
        if not history or history[-1]["role"] != "user":
            return
        talk = self.talk(history[:-1])
        talk.untuned = untuned
        prompt, forgotten = talk.prompt(text_of(history[-1]))
        if forgotten:
            gr.Info(f"The oldest {forgotten} questions no longer fit and are forgotten.")
        answer = ""
        with self.turn, closing(talk.answer(prompt)) as pieces:
            for piece in pieces:
                answer += piece
                yield [*history, entry("assistant", answer.lstrip())]
        yield [*history, entry("assistant", answer.strip())]

    def talk(self, history: list[Any]) -> Conversation:
        said: list[Message] = [{"role": shown["role"], "content": text_of(shown)} for shown in history]
        return Conversation(self.policy, self.bot, self.config.sampling, said)


def entry(role: str, text: str) -> Message:
    """A chat entry that shows `text` as it is: Gradio takes HTML for HTML even where Markdown is off."""
    return {"role": role, "content": html.escape(text, quote=False)}


def text_of(shown: dict[str, Any]) -> str:
    """The text of a chat entry, which the page sends back in parts."""
    content = shown["content"]
    return html.unescape(content if isinstance(content, str) else "".join(part["text"] for part in content))


def without_answer(history: list[Any]) -> list[Any]:
    return history[:-1] if history and history[-1]["role"] == "assistant" else history
