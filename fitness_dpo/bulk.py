"""Questions in a file -> answers in a file, in batches. What was answered before an interruption is not answered again."""

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from fitness_dpo.bot import Bot, load
from fitness_dpo.config import InferConfig, InputError, SamplingConfig
from fitness_dpo.data import Message
from fitness_dpo.files import Place, parse_rows
from fitness_dpo.formats import plain_key
from fitness_dpo.model import Policy

COLUMNS = ("question", "prompt", "query", "instruction", "input")


class Question(NamedTuple):
    place: str
    """Where it stands: `questions.jsonl line 12`."""
    text: str
    id: Any
    """The row's own id, kept beside the answer; None where it has none."""


def answer_file(bot: Bot, config: InferConfig, source: Path, output: Path) -> None:
    """Answer what `source` asks and `output` lacks. Every question is checked before the first is answered."""
    questions = read_questions(source)
    there, whole_bytes = answered(output, questions, bot.name)
    if there == len(questions):
        print(f"{output}: all {there} questions are answered")  # noqa: T201
        return
    from fitness_dpo.conversation import Conversation

    policy = load(bot, merged=True)
    left = questions[there:]
    prompts = []
    for question in left:
        try:
            prompts.append(Conversation(policy, bot, config.sampling).prompt(question.text)[0])
        except InputError as error:
            raise InputError(f"{question.place}: {error}") from error
    began = time.perf_counter()
    console = Console(stderr=True)
    bar = Progress(console=console, disable=not console.is_terminal)
    with written(output), output.open("ab") as file, bar as progress:
        file.truncate(whole_bytes)
        task = progress.add_task("answering", total=len(questions), completed=there)
        for start in range(0, len(left), config.batch_size):
            batch = slice(start, start + config.batch_size)
            answers = answers_at_once(policy, prompts[batch], config.sampling)
            lines = [as_line(question, answer, bot.name) for question, answer in zip(left[batch], answers, strict=True)]
            file.write("".join(lines).encode())
            file.flush()
            progress.update(task, advance=len(lines))
            if not console.is_terminal:
                console.print(f"{there + start + len(lines)} of {len(questions)} answered", highlight=False)
    seconds = time.perf_counter() - began
    print(f"{output}: {len(questions)} answers, {len(left)} of them new, in {seconds:.0f} s")  # noqa: T201


@contextmanager
def written(output: Path) -> Iterator[None]:
    """Raise InputError where the answers cannot be written, such as to a full disk."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output={output}: cannot be written ({error.strerror}); mend that, and the same command goes on"
        ) from error


def answers_at_once(policy: Policy, prompts: list[list[Message]], sampling: SamplingConfig) -> list[str]:
    from fitness_dpo.decoding import answer_all
    from fitness_dpo.inference import generate

    if sampling.do_sample:
        return generate(policy, prompts, sampling)
    found = dict(answer_all(policy, prompts, sampling.max_new_tokens, len(prompts)))
    return [found[position].text for position in range(len(prompts))]


def as_line(question: Question, answer: str, name: str) -> str:
    row = {} if question.id is None else {"id": question.id}
    return json.dumps(row | {"question": question.text, "answer": answer, "model": name}, ensure_ascii=False) + "\n"


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, in its order. Raises InputError for a file without, naming the line."""
    if not path.is_file():
        raise InputError(f"input={path}: no such file; check the path")
    content = path.read_bytes()
    try:
        questions = [as_question(place, row) for place, row in question_rows(path.name, content)]
    except UnicodeDecodeError as error:
        raise InputError(f"input={path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    if not questions:
        raise InputError(f"input={path}: the file is empty; give one with questions")
    return questions


def question_rows(name: str, content: bytes) -> Iterable[tuple[Place, Any]]:
    """The rows of a file; plain text (`.txt`) has one question on a line, a table may have but one column."""
    header, _, rest = content.partition(b"\n")
    if name.endswith(".txt"):
        lines = enumerate(content.decode("utf-8-sig").split("\n"), 1)
        return [(Place(name, f"line {number}"), line) for number, line in lines if line.strip()]
    if plain_key(header.decode("utf-8-sig", errors="replace")) in COLUMNS:
        rows = csv.reader(io.StringIO(rest.decode(), newline=""))
        return [(Place(name, f"line {rows.line_num + 1}"), cell(name, rows.line_num + 1, row)) for row in rows if row]
    return parse_rows(name, content)


def cell(name: str, line: int, row: list[str]) -> str:
    if len(row) > 1:
        raise InputError(f"{name} line {line}: has more cells than columns; put quotes round text with a comma in it")
    return row[0]


def as_question(place: Place, row: Any) -> Question:
    known = {plain_key(key): value for key, value in row.items()} if isinstance(row, dict) else {"question": row}
    column = next((column for column in COLUMNS if column in known), None)
    if column is None:
        found = ", ".join(known)
        raise InputError(
            f"{place}: no column {', '.join(COLUMNS)} (columns found: {found}); rename that of the questions"
        )
    text = known[column]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: {column} holds no question; fill it in or remove the row")
    return Question(str(place), text.strip(), known.get("id"))


def answered(output: Path, questions: list[Question], name: str) -> tuple[int, int]:
    """How many of the first questions `output` answers, and the length in bytes of those lines. A line that was cut off
    counts for nothing. Raises InputError where the answers are not this bot's to these questions."""
    if not output.parent.is_dir():
        raise InputError(f"output={output}: there is no folder {output.parent}; make it first")
    content = output.read_bytes() if output.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.decode(errors="replace").split("\n")[:-1]
    mend = "name another output"
    if len(lines) > len(questions):
        raise InputError(f"output={output}: holds {len(lines)} answers, the input asks {len(questions)}; {mend}")
    for number, (line, question) in enumerate(zip(lines, questions, strict=False), 1):
        try:
            row = json.loads(line)
            known = (row["question"], row["model"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"output={output} line {number}: no answer that this command wrote; {mend}") from error
        if known[0] != question.text:
            raise InputError(f"output={output} line {number}: answers another question than {question.place}; {mend}")
        if known[1] != name:
            raise InputError(
                f"output={output} line {number}: {known[1]} answered, now it is {name}; {mend}, or keep to that"
            )
    return len(lines), len(whole)
