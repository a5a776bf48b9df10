"""python -m fitness_dpo.evaluate: what it measures, against slower ways to the same numbers, and how it ends."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from fitness_dpo import runs
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.data import load_preferences
from fitness_dpo.decoding import answer_all, decode
from fitness_dpo.evaluate import main
from fitness_dpo.inference import ask, generate
from fitness_dpo.likelihood import Item, score_all
from fitness_dpo.model import Policy, load_base, load_trained
from fitness_dpo.template import ChatTemplate
from tests.conftest import read_json, run_verb

QUESTIONS = [
    "Hi", "How often should I squat?", "I am 62, take a beta-blocker and want to start running. How hard should I go?",
    "Is it fine to train with a cold, or should I rest until it is gone and then begin again with less?",
]  # fmt: skip
QUICK = ["limit=4", "max_new_tokens=8", "gate.min_care_passed=0"]


@pytest.fixture(scope="module")
def perturbed(tiny: Callable[..., tuple[TrainConfig, Policy]]) -> Policy:
    """The tiny model with weights, adapter included, that make its answers lively."""
    _, policy = tiny()
    torch.manual_seed(0)
    for parameter in policy.model.parameters():  # the base's too, which else repeats one token for ever
        torch.nn.init.normal_(parameter, std=0.3)
    policy.model.eval()
    return policy


def test_a_batch_of_greedy_answers_is_the_answers_one_by_one(perturbed: Policy, compose_train: Any) -> None:
    sampling = compose_train("logging.sampling.max_new_tokens=24").logging.sampling
    prompts = [ask(question, "Be brief.") for question in QUESTIONS]
    alone = [generate(perturbed, [prompt], sampling)[0] for prompt in prompts]
    for batch_size in (3, 4):
        batched = dict(answer_all(perturbed, prompts, 24, batch_size))
        assert [batched[place].text for place in range(4)] == alone


@pytest.mark.slow
def test_the_embedded_models_batched_answers_are_those_one_by_one(compose_train: Any) -> None:
    config = compose_train("model=smollm2_135m", "model.dtype=float32", "logging.sampling.max_new_tokens=32")
    policy = load_base(config.model)
    prompts = [ask(question, config.data.system_prompt) for question in QUESTIONS]
    alone = [generate(policy, [prompt], config.logging.sampling)[0] for prompt in prompts]
    batched = dict(answer_all(policy, prompts, 32, 4))
    assert [batched[place].text for place in range(4)] == alone
    template = ChatTemplate(policy.tokenizer)
    items = [
        Item(template.prompt_ids(prompt), [template.answer_ids(prompt, answer) for answer in ("Yes.", alone[place])])
        for place, prompt in enumerate(prompts)
    ]
    scored = dict(score_all(policy, items, 32))
    for place, item in enumerate(items):
        expected = [plain_logps(policy, item.prompt, answer) for answer in item.answers]
        assert scored[place] == pytest.approx(expected, abs=1e-3)


def test_rows_leave_the_batch_as_they_end(perturbed: Policy) -> None:
    """With a token that answers hold made an ending, each must stop at its first one while the others go on unchanged."""
    template = ChatTemplate(perturbed.tokenizer)
    rows = [template.prompt_ids(ask(question, None)) for question in QUESTIONS]
    whole = decode(perturbed, rows, [-1], 24)
    assert all(len(ids) == 24 for ids in whole)
    for token in {ids[5] for ids in whole}:
        expected = [ids[: ids.index(token) + 1] if token in ids else ids for ids in whole]
        assert decode(perturbed, rows, [token], 24) == expected


def plain_logps(policy: Policy, prompt: list[int], answer: list[int]) -> float:
    """The sum over the answer's tokens out of one forward pass over the whole sequence."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return float(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum())


def test_scores_are_those_of_whole_sequences_one_by_one(perturbed: Policy) -> None:
    template = ChatTemplate(perturbed.tokenizer)
    items = []
    for place, question in enumerate(QUESTIONS):
        prompt = ask(question, "Be brief.")
        answers = [template.answer_ids(prompt, answer) for answer in ("Yes.", "No, twice a week. " * (place + 1))]
        items.append(Item(template.prompt_ids(prompt), answers))
    for batch_size in (1, 6, 32):
        scored = dict(score_all(perturbed, items, batch_size))
        for place, item in enumerate(items):
            expected = [plain_logps(perturbed, item.prompt, answer) for answer in item.answers]
            assert scored[place] == pytest.approx(expected, abs=1e-3)


@pytest.fixture(scope="module")
def evaluate(compose_train: Any) -> Iterator[Callable[..., tuple[int, str]]]:
    """Exit status and screen of `python -m fitness_dpo.evaluate *overrides` in a folder, in this process."""
    printed = io.StringIO()

    def run(folder: Path, *overrides: str) -> tuple[int, str]:
        with initialize_config_module("fitness_dpo.conf", version_base="1.3"):
            composed = compose("evaluate", overrides=[*QUICK, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        printed.seek(0)
        printed.truncate()
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            status = main(OmegaConf.to_object(composed), Path())  # type: ignore[arg-type]
        return status, printed.getvalue()

    yield run
    HydraConfig.instance().cfg = None


Evaluate = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def evaluated(trained: Path, evaluate: Evaluate) -> tuple[Path, str]:
    """A copy of a finished run with its evaluation, and the screen."""
    run = trained.parents[2] / "outputs" / "2026-01-01" / "copy"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    status, screen = evaluate(run.parents[2], f"run={run}")
    assert status == 0
    return run, screen


def test_every_measure_is_there_with_its_interval(evaluated: tuple[Path, str]) -> None:
    run, screen = evaluated
    metrics = read_json(run / "evaluation" / "metrics.json")
    assert (metrics["rows"], metrics["split"], metrics["model"]) == (2, "test", "embedded:tiny")
    accuracy = metrics["preference"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert {*metrics["quiz"]["base"]} == {*metrics["quiz"]["p_value"]} == {"raw", "per_byte"}
    assert {*metrics["safety"]["tuned"]} == {"care_passed", "answered", "over_refused"}
    assert {*metrics["degeneration"]["base"]} == {"words", "distinct_2", "repeated_4grams", "ended", "empty"}
    assert all(row["base"] is not None and row["reference"] for row in metrics["side_by_side"])
    assert all({"id", "prompt", "answer", "why"} <= {*failure} for failure in metrics["safety"]["failures"])
    assert f"verdict  {metrics['verdict'].split()[0]}" in screen
    assert metrics["verdict"].split(",")[0] in ("better", "not better", "unsafe to ship")


def test_preference_is_what_two_models_apart_give(evaluated: tuple[Path, str]) -> None:
    """The base loaded by itself and the trained model by itself, one sequence at a time, give the same figures."""
    run, _ = evaluated
    config = runs.load_config(run, TrainConfig)
    lines = [json.loads(line) for line in (run / "evaluation" / "items.jsonl").read_text().splitlines()]
    rows = load_preferences(config.data).splits["test"]
    for side, policy in (("base", load_base(config.model)), ("tuned", load_trained(run, config.model))):
        template = ChatTemplate(policy.tokenizer)
        for place, row in enumerate(rows):
            (line,) = (
                line for line in lines if (line["kind"], line["side"], line["item"]) == ("preference", side, place)
            )
            pair = template.pair_ids(row.prompt, row.chosen, row.rejected)
            expected = [plain_logps(policy, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
            assert line["logps"] == pytest.approx(expected, abs=1e-3)
    preference = read_json(run / "evaluation" / "metrics.json")["preference"]
    margins = preference["margins"]
    assert preference["margin"]["value"] == pytest.approx(
        config.dpo.beta * (sum(margins["after"]) - sum(margins["before"])) / 2
    )


def test_an_interrupted_evaluation_goes_on_and_other_settings_start_over(
    evaluated: tuple[Path, str], evaluate: Evaluate
) -> None:
    run, _ = evaluated
    file = run / "evaluation" / "items.jsonl"
    whole, metrics = file.read_text(), (run / "evaluation" / "metrics.json").read_text()
    lines = whole.splitlines(keepends=True)
    half = len(lines) // 2
    file.write_text("".join(lines[:half]) + lines[-1][:15])
    _, screen = evaluate(run.parents[2], f"run={run}")
    assert f"going on after {half} of {len(lines)} items" in screen
    assert file.read_text() == whole
    assert (run / "evaluation" / "metrics.json").read_text() == metrics

    file.write_text("".join(lines[:half]))
    _, screen = evaluate(run.parents[2], f"run={run}", "max_new_tokens=4")
    assert "going on" not in screen
    answers = [json.loads(line) for line in file.read_text().splitlines() if '"answer"' in line]
    assert len(answers) == 12
    assert all(answer["tokens"] <= 4 for answer in answers)


def test_a_closed_gate_is_exit_status_3_and_a_line_a_breach(evaluated: tuple[Path, str]) -> None:
    run, _ = evaluated
    done = run_verb("evaluate", *QUICK, f"run={run}", "gate.enabled=true", "gate.min_accuracy=1", cwd=run.parents[2])
    assert done.returncode == 3, done.stderr
    gate = read_json(run / "evaluation" / "metrics.json")["gate"]
    assert not gate["passed"]
    assert any("not above gate.min_accuracy=1" in line for line in gate["breaches"])
    assert done.stdout.count("\ngate   ") == len(gate["breaches"])


def test_a_run_against_itself_differs_in_nothing(evaluated: tuple[Path, str], evaluate: Evaluate) -> None:
    run, _ = evaluated
    _, screen = evaluate(run.parents[2], f"run={run}", f"against={run}")
    metrics = read_json(run / "evaluation-against-2026-01-01-copy" / "metrics.json")
    assert metrics["preference"]["margin"]["value"] == 0
    assert metrics["preference"]["margins"]["before"] == metrics["preference"]["margins"]["after"]
    assert all(row["base"] == row["tuned"] for row in metrics["side_by_side"])
    assert "against" in screen


def test_a_model_without_a_run_is_measured_alone(evaluate: Evaluate, tmp_path: Path, pairs_file: Path) -> None:
    for _ in range(2):
        _, screen = evaluate(tmp_path, "model.name=embedded:tiny", f"data.path={pairs_file}")
    assert "going on after" in screen
    (folder,) = (tmp_path / "outputs" / "evaluate").glob("*/*")
    metrics = read_json(folder / "metrics.json")
    assert metrics["run"] is metrics["verdict"] is metrics["quiz"]["base"] is metrics["preference"]["accuracy"] is None
    assert metrics["quiz"]["tuned"]["raw"]["value"] >= 0


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "overrides", "expected"),
    [
        (lambda run: (run / "adapter" / "adapter_model.safetensors").unlink(), [], "no adapter_model.safetensors there"),
        (
            lambda run: edit(run / "config.yaml", "embedded:tiny", "embedded:smollm2-135m-instruct"), [],
            "made for embedded:tiny, and the run names model.name=embedded:smollm2-135m-instruct",
        ),
        (lambda run: edit(run / "config.yaml", "test_size: 2", "test_size: 0"), [], "leave none for it (data.test_size=0"),
        (
            lambda run: edit(run / "versions.json", '"train": "', '"train": "f'), [],
            "trained on other rows than data.path=",
        ),
        (None, ["judge.url=http://127.0.0.1:9/v1"], "nothing answers there; start the server, or correct the address"),
        (None, ["quiz=quiz.json"], "quiz.json q1: 'answer' is 2, and there are options 0 to 1"),
        (None, ["quiz=keys.json"], "keys.json row 1: needs 'options' of type list (it has question, choices, answer)"),
        (None, ["quiz=nowhere.json"], "quiz=nowhere.json: no such file"),
        (None, ["safety=safety.json"], "safety.json s1: '(' is no regular expression"),
        (None, ["model.name=embedded:tiny"], "a model is measured without a run, and run="),
        (None, ["data.path=other.json"], "data.path=other.json: a run is measured on its own rows"),
        (None, ["against=nowhere"], "run=nowhere: no config.yaml there"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(
    spoil: Callable[[Path], None] | None, overrides: list[str], expected: str, trained: Path, evaluate: Evaluate,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    (tmp_path / "quiz.json").write_text('[{"id": "q1", "question": "a", "options": ["b", "c"], "answer": 2}]')
    (tmp_path / "keys.json").write_text('[{"question": "a", "choices": ["b", "c"], "answer": 1}]')
    (tmp_path / "safety.json").write_text(
        '[{"id": "s1", "prompt": "a", "kind": "care", "must": [["("]], "must_not": []}]'
    )
    if spoil is not None:
        spoil(run)
    with pytest.raises(InputError) as error:
        evaluate(tmp_path, f"run={run}", *overrides)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (run / "evaluation").exists()


def test_another_run_that_held_out_other_rows_is_refused(trained: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    edit(other / "versions.json", '"test": "', '"test": "f')
    with pytest.raises(InputError, match=f"against={other}: trained on other rows"):
        evaluate(tmp_path, f"run={trained}", f"against={other}")


def test_another_run_on_another_base_is_refused(trained: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "other", ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    edit(tmp_path / "other" / "config.yaml", "embedded:tiny", "org/elsewhere")
    with pytest.raises(InputError, match="its base is org/elsewhere, this run's is embedded:tiny"):
        evaluate(tmp_path, f"run={trained}", f"against={tmp_path / 'other'}")
