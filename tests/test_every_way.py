"""Every way of asking a run gives the same answers to the same five questions, greedy in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from playwright.sync_api import Browser, expect
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitness_dpo.bot import find, load
from fitness_dpo.conversation import Conversation
from fitness_dpo.merge import merge
from tests.conftest import run_verb, served
from tests.test_chat_page import answers, ask, opened, start_anew
from tests.test_infer import QUESTIONS, compose_infer
from tests.test_infer import say as type_in

TOKENS = 40
SETTINGS = (f"sampling.max_new_tokens={TOKENS}", "model.dtype=float32")


def embedded_run(home: Path) -> Path:
    """A run of the embedded model that changed it plainly."""
    done = run_verb(
        "train", "model=smollm2_135m", "data.max_rows=16", "dpo.max_steps=2", "dpo.learning_rate=1e-3", "dpo.warmup_ratio=0",
        "logging.sample_prompts=[]", "logging.wandb.mode=disabled", "data.max_validation_rows=2", cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (home / "outputs").glob("*/*")
    return run


def in_the_terminal(run: Path) -> list[str]:
    config = compose_infer(run, *SETTINGS)
    bot = find(config)
    policy = load(bot, merged=False)
    screens = [type_in(Conversation(policy, bot, config.sampling), question) for question in QUESTIONS]
    return [screen.partition("\n")[2].strip() for screen in screens]  # the first line says how to use it


def in_a_file(run: Path, home: Path) -> list[str]:
    (home / "questions.txt").write_text("\n".join(QUESTIONS))
    done = run_verb("infer", f"run={run}", *SETTINGS, "input=questions.txt", "output=answers.jsonl", cwd=home)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["answer"] for line in (home / "answers.jsonl").read_text().splitlines()]


def on_the_page(run: Path, browser: Browser, expected: list[str]) -> list[str]:
    """expected: what to wait for; an answer that stops growing elsewhere fails."""
    shown = []
    with served("chat", f"run={run}", *SETTINGS) as address, opened(browser, address) as page:
        for question, answer in zip(QUESTIONS, expected, strict=True):
            ask(page, question)
            expect(answers(page)).to_have_text([answer], timeout=60_000)
            shown.append(answers(page).inner_text().strip())
            start_anew(page)
    return shown


def over_the_api(run: Path) -> list[str]:
    with (
        served("serve", f"run={run}", *SETTINGS) as address,
        OpenAI(base_url=f"{address}/v1", api_key="none") as client,  # pragma: allowlist secret
    ):
        replies = [
            client.chat.completions.create(model="fitness", messages=[{"role": "user", "content": question}])
            for question in QUESTIONS
        ]
    return [(reply.choices[0].message.content or "").strip() for reply in replies]


def from_the_merged_model(folder: Path) -> list[str]:
    """Asked as any program asks it: transformers, and what the folder brings."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    said = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=TOKENS)
        said.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return said


@pytest.mark.parametrize(
    "model", [pytest.param("tiny", marks=pytest.mark.browser), pytest.param("embedded", marks=pytest.mark.slow)]
)
def test_every_way_gives_the_same_text(
    model: str, request: pytest.FixtureRequest, browser: Browser, tmp_path: Path
) -> None:
    run: Path = request.getfixturevalue("talker") if model == "tiny" else embedded_run(tmp_path)
    typed = in_the_terminal(run)
    assert len(set(typed)) == len(QUESTIONS)
    assert all(typed)
    assert in_a_file(run, tmp_path) == typed
    assert over_the_api(run) == typed
    assert from_the_merged_model(merge(run, tmp_path / "merged", "float32")) == typed
    assert on_the_page(run, browser, typed) == typed
