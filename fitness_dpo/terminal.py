"""A conversation in the terminal: answers stream in, Ctrl-C stops one, commands begin with a slash."""

import atexit
import re
from collections.abc import Callable
from contextlib import closing

from rich.console import Console

from fitness_dpo.config import InputError
from fitness_dpo.conversation import Conversation
from fitness_dpo.weights import cache_folder

HISTORY, HISTORY_LINES = "questions.txt", 1000
TERMINAL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HELP = """\
/reset        forget the conversation
/system TEXT  replace the system prompt; without TEXT, show it
/base         let the untuned model answer, or the tuned one again
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


def converse(talk: Conversation, console: Console, read: Callable[[], str]) -> None:
    """Ask and answer until /quit or the end of input. `read` gives a line and raises EOFError after the last."""
    console.print("[dim]Ask about training, food or recovery. /help lists the commands. No medical advice.[/]")
    while True:
        try:
            line = read().strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                console.print(command(talk, line), style="dim", markup=False, highlight=False)
            elif line:
                answer(talk, line, console)
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("[dim](stopped; /quit leaves)[/]")
        except InputError as error:
            console.print(f"error: {error}", style="red", markup=False, highlight=False)


def answer(talk: Conversation, question: str, console: Console) -> None:
    prompt, forgotten = talk.prompt(question)
    if forgotten:
        what = "question and its answer" if forgotten == 1 else f"{forgotten} questions and their answers"
        console.print(f"[dim]The oldest {what} no longer fit and are forgotten.[/]", highlight=False)
    with closing(talk.answer(prompt)) as pieces:
        for piece in pieces:
            console.out(TERMINAL_CODES.sub("", piece), end="", highlight=False)
    console.print()


def command(talk: Conversation, line: str) -> str:
    """Carry out a line that begins with a slash and say what it did."""
    name, _, text = line.partition(" ")
    match name:
        case "/help":
            return HELP
        case "/reset":
            talk.history.clear()
            return "The conversation is forgotten."
        case "/system":
            if text.strip():
                talk.system_prompt = text.strip()
            return f"System prompt: {talk.system_prompt or 'none'}"
        case "/base":
            if talk.bot.run is None:
                return f"{talk.bot.name} is itself untuned; there is nothing to switch off."
            talk.untuned = not talk.untuned
            return f"The {'untuned' if talk.untuned else 'tuned'} model answers from here on."
        case _:
            return f"There is no command {name}.\n{HELP}"


def line_reader() -> Callable[[], str]:
    """Reads questions from the terminal, with line editing and the questions of earlier days behind the up arrow."""
    import readline

    file = cache_folder() / HISTORY
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    atexit.register(readline.write_history_file, file)
    return lambda: input("> ")
