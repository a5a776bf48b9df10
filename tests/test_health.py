"""Each sickness brought about for real on the tiny model, and healthy trainings beside them."""

import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.numpy import load_file

from fitness_dpo.callbacks import Health
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.data import load_preferences
from fitness_dpo.health import Pairs, Verdict, judge, length_exploitation
from fitness_dpo.model import Policy
from fitness_dpo.trainer import build_trainer
from tests.conftest import TINY, run_verb

Tiny = Callable[..., tuple[TrainConfig, Policy]]
Trained = tuple[dict[str, Verdict], Pairs, str]
WORDS = ["press", "pull", "squat", "lunge", "plank", "row", "sprint", "rest", "walk", "swim", "lift", "hold"]
draw = random.Random(0)  # noqa: S311


def words(count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def rows(count: int, answers: Callable[[], tuple[str, str]]) -> list[dict[str, str]]:
    pairs = [(f"Question {number}: {words(3)}?", *answers()) for number in range(count)]
    return [dict(zip(("question", "chosen", "rejected"), pair, strict=True)) for pair in pairs]


APART = rows(48, lambda: ("Yes: " + words(draw.randint(3, 9)), "No! " + words(draw.randint(3, 9))))
ALIKE = rows(32, lambda: (words(5), words(5)))  # nothing to learn but the rows themselves
LONGER = rows(64, lambda: (words(draw.randint(2, 4)), words(draw.randint(5, 14))))  # the rejected answer always is
SHORT = [
    {"question": f"Question {days}?", "chosen": f"Rest {days} days.", "rejected": f"Never rest {days}."}
    for days in range(24)
]
SETTINGS = [
    "data.validation_size=16", "data.test_size=0", "dpo.batch_size=8", "dpo.gradient_accumulation_steps=1",
    "dpo.logging_steps=1", "dpo.max_steps=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def train(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Trains the tiny model; the verdicts, the held-out pairs and what was printed meanwhile. Each training runs once."""
    known: dict[str, Trained] = {}

    def run(pairs: list[dict[str, str]], *overrides: str) -> Trained:
        key = f"{id(pairs)} {overrides}"
        if key not in known:
            folder = tmp_path_factory.mktemp("health")
            (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
            config, policy = tiny(f"data.path={folder / 'pairs.json'}", *SETTINGS, *overrides)
            printed = io.StringIO()
            health = Health(config.health, config.dpo, folder, Console(file=printed, width=400))
            trainer = build_trainer(config, policy, load_preferences(config.data).splits, folder, [health])
            trainer.train()
            trainer.evaluate()
            held_out = trainer.held_out
            verdicts = judge(
                trainer.state.log_history, config.health, config.dpo, trainer.state.max_steps, held_out, ended=True
            )
            measured = trainer.state.log_history[-1]["eval_rewards/margins"]
            change = [after - before for before, after in zip(held_out.before, held_out.after, strict=True)]
            assert config.dpo.beta * sum(change) / len(change) == pytest.approx(measured, abs=1e-3)
            known[key] = {verdict.name: verdict for verdict in verdicts}, held_out, printed.getvalue()
        return known[key]

    return run


def sick(trained: Trained) -> set[str]:
    return {name for name, verdict in trained[0].items() if verdict.sick}


def test_a_healthy_training_gets_every_verdict_and_none_is_sick(train: Callable[..., Trained]) -> None:
    trained = train(APART, "dpo.learning_rate=2e-3", "dpo.epochs=4")
    assert set(trained[0]) == {
        "explosion", "displacement", "saturation", "over-fitting", "no learning", "length exploitation",
    }  # fmt: skip
    assert not sick(trained)
    assert trained[2] == ""


def test_a_rate_far_too_low_learns_nothing(train: Callable[..., Trained]) -> None:
    trained = train(APART, "dpo.learning_rate=1e-9", "dpo.epochs=3")
    assert sick(trained) == {"no learning"}
    assert "try dpo.learning_rate=5e-09" in trained[0]["no learning"].line


def test_a_rate_far_too_high_moves_the_policy_but_not_apart(train: Callable[..., Trained]) -> None:
    rate = ["dpo.learning_rate=1000", "dpo.optimizer=sgd", "dpo.max_grad_norm=0"]
    trained = train(SHORT, "data.validation_size=8", *rate, "dpo.epochs=6")
    assert sick(trained) == {"no learning"}
    assert "try dpo.learning_rate=100:" in trained[0]["no learning"].line


def test_rows_learned_by_heart_are_over_fitted(train: Callable[..., Trained]) -> None:
    trained = train(ALIKE, "dpo.learning_rate=1e-2", "dpo.epochs=14")
    assert "over-fitting" in sick(trained)
    assert trained[0]["over-fitting"].figure > 0.2
    assert "try dpo.epochs=7" in trained[0]["over-fitting"].line


def test_a_training_that_goes_on_with_nothing_left_to_learn_is_saturated(train: Callable[..., Trained]) -> None:
    trained = train(APART, "dpo.learning_rate=3e-3", "dpo.epochs=5", "dpo.beta=1")
    assert sick(trained) == {"saturation"}
    assert trained[0]["saturation"].figure < 0.8
    assert trained[2].count("saturation") == 1, "one line, the first time it appears"


def test_displacement_and_the_override_that_lessens_it(train: Callable[..., Trained]) -> None:
    trained = train(LONGER, "dpo.learning_rate=5e-3", "dpo.epochs=2")
    line = trained[0]["displacement"].line
    assert "displacement" in sick(trained)
    assert "try dpo.loss_type=[sigmoid,sft] dpo.loss_weights=[1,0.2]" in line
    assert "displacement" in trained[2], "said while it trains, too"
    override = line.partition("try ")[2].partition(", or")[0].split()
    mended = train(LONGER, "dpo.learning_rate=5e-3", "dpo.epochs=2", *override)
    assert mended[0]["displacement"].figure > trained[0]["displacement"].figure + 0.005


def test_a_verdict_of_stop_on_ends_the_training_at_its_first_log(train: Callable[..., Trained]) -> None:
    words = ["dpo.learning_rate=5e-3", "dpo.epochs=4"]
    to_the_end = train(LONGER, *words)[2]
    stopped = train(LONGER, *words, "health.stop_on=[displacement]")[2]
    assert "displacement" in to_the_end
    assert "training ended" not in to_the_end
    assert "training ended at step 10 of 24" in stopped, "nothing is judged before ten logs"


def test_rejected_answers_that_are_always_longer_teach_length(train: Callable[..., Trained]) -> None:
    trained = train(LONGER, "dpo.learning_rate=5e-3", "dpo.epochs=2")
    assert "length exploitation" in sick(trained)
    assert trained[0]["length exploitation"].figure > 0.5
    assert max(trained[1].length_differences) < 0


def test_the_share_of_lengths_is_that_of_a_straight_line(tiny: Tiny) -> None:
    config, _ = tiny()
    differences = [number % 7 - 5 for number in range(40)]
    reward = [0.3 - 0.2 * difference + 0.01 * (-1) ** number for number, difference in enumerate(differences)]
    pairs = Pairs([1.0] * 40, [1 + each / config.dpo.beta for each in reward], differences)
    found = length_exploitation(pairs, config.health, config.dpo)
    assert found is not None
    average = sum(reward) / 40
    assert found.figure == pytest.approx(1 - 0.3 / average, abs=0.01)
    level = Pairs(pairs.before, pairs.after, [3] * 40)
    assert length_exploitation(level, config.health, config.dpo) is None, "lengths that do not vary tell nothing"


def test_nan_ends_the_training_with_one_line_and_keeps_the_good_checkpoint(pairs_file: Path, tmp_path: Path) -> None:
    """The warm-up's first rate is 0 and leaves the weights good; the second ruins them, which the third step finds."""
    done = run_verb(
        "train", *TINY[:4], f"data.path={pairs_file}", "dpo.batch_size=2", "dpo.gradient_accumulation_steps=1",
        "dpo.max_steps=10", "dpo.learning_rate=1e30", "dpo.logging_steps=1", "dpo.save_steps=1", "dpo.save_total_limit=4",
        "logging.sample_prompts=[]", "logging.wandb.mode=disabled", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert re.match(r"error: explosion: .* at step 3.*; try dpo.learning_rate=1e\+29", done.stderr)
    assert "training stopped at step 3; checkpoints/checkpoint-1 is the last good checkpoint" in done.stderr
    (run,) = (tmp_path / "outputs").glob("*/*")
    assert [folder.name for folder in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    weights = load_file(run / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
    assert all(abs(weight).max() < 1 for weight in weights.values())
    assert not (run / "metrics.json").exists()
    assert not (run / "adapter").exists()


def test_gradients_that_explode_end_the_training(train: Callable[..., Trained]) -> None:
    with pytest.raises(InputError, match=r"explosion: gradient norm .* times the first step's.*no good checkpoint yet"):
        train(APART, "dpo.learning_rate=10", "dpo.optimizer=sgd", "dpo.loss_type=[sppo_hard]", "dpo.max_grad_norm=0", "dpo.epochs=4", "dpo.forward=padded")  # fmt: skip


def test_one_bad_gradient_is_no_explosion(tiny: Tiny) -> None:
    config, _ = tiny()
    norms = [
        1.0,
        math.inf,
        math.nan,
        500.0,
        1.0,
    ]  # float16 looks for its scale by overflowing; clipping takes the spike
    history = [{"loss": 0.7, "grad_norm": norm, "step": step} for step, norm in enumerate(norms, 1)]
    for end in range(1, 6):
        (only,) = judge(history[:end], config.health, config.dpo, 5)
        assert not only.sick, only.line


def test_a_first_gradient_that_overflowed_is_no_measure_of_saturation(tiny: Tiny) -> None:
    config, _ = tiny()
    history = [
        {"loss": 0.1, "grad_norm": norm, "step": step, "rewards/accuracies": 1.0, "rewards/margins": 2.0, "rewards/chosen": 1.0,
         "logps/chosen": -9.0}
        for step, norm in enumerate([math.inf, *[1.0] * 39], 1)
    ]  # fmt: skip
    verdicts = {verdict.name: verdict for verdict in judge(history, config.health, config.dpo, 40)}
    assert not verdicts["saturation"].sick, verdicts["saturation"].line
