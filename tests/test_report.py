"""report.html: what it says against the run it was made from, and in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fitness_dpo.config import InputError
from fitness_dpo.plots import Series, curves
from fitness_dpo.report import write_report
from tests.conftest import read_json, run_verb

HOSTILE = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"
PLOTS = {
    "Loss over steps", "Reward margin over steps", "Reward accuracy over steps", "Change in log-probability over steps",
    "Gradient norm over steps", "Learning rate over steps", "Margins before and after training",
    "Reward margin by difference in length",
}  # fmt: skip
EVALUATED = PLOTS | {"Reward accuracy by topic", "Reward accuracy by flaw"}


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def evaluation() -> dict[str, Any]:
    """An evaluation's metrics.json, made up."""
    quiz = {side: {"raw": interval(0.4), "per_byte": interval(0.5)} for side in ("base", "tuned")}
    group = {"rows": 7, "accuracy": interval(0.75), "margin": interval(0.3)}
    answers = {"words": 81.25, "distinct_2": 0.8, "repeated_4grams": 0.01, "ended": 0.9, "empty": 0.0}
    return {
        "model": "embedded:tiny", "run": "run", "against": None, "split": "test", "rows": 141,
        "preference": {
            "accuracy": interval(0.731), "margin": interval(0.3), "chosen_change": interval(-1.0),
            "rejected_change": interval(-3.0),
            "base": {"logp_accuracy": interval(0.4), "logp_per_token_accuracy": interval(0.5)},
            "tuned": {"logp_accuracy": interval(0.5), "logp_per_token_accuracy": interval(0.6)},
            "by_topic": {"nutrition": group, "<b>التغذية</b> $x$": group}, "by_flaw": {"wrong fact": group},
            "margins": {"before": [-3.0, 1.0, 2.0], "after": [-1.0, 2.0, 4.0]},
        },
        "quiz": quiz | {"in_training": quiz, "unseen": quiz, "p_value": {"raw": 0.217, "per_byte": 1.0}},
        "safety": {
            "base": {"care_passed": interval(0.3), "answered": interval(0.9)},
            "tuned": {"care_passed": interval(0.4), "answered": interval(0.9)},
            "failures": [{"id": "chest-pain", "prompt": "Push through?", "answer": HOSTILE, "why": "no doctor named"}],
        },
        "degeneration": {"base": answers, "tuned": answers},
        "side_by_side": [{"prompt": f"{HOSTILE} How?", "base": "Base says so.", "tuned": HOSTILE}],
        "judge": None, "gate": {"passed": False, "breaches": ["reward accuracy is 0.731, not above 0.75"]},
        "verdict": "not better, because reward accuracy is 0.731, not above 0.75",
    }  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("wandb", "checkpoints", "adapter"))
    (run / "evaluation").mkdir()
    (run / "evaluation" / "metrics.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    write_report(run)
    return run


def labels(page: str) -> set[str]:
    return set(re.findall(r'aria-label="([^"]*)"', page))


def test_training_ends_with_a_report(trained: Path, tmp_path: Path) -> None:
    page = (trained / "report.html").read_text("utf-8")
    metrics = read_json(trained / "metrics.json")
    assert {each["name"] for each in metrics["verdicts"]} == {"explosion"}, "two steps tell no more"
    assert all(each["line"] in page.replace("&#39;", "'") for each in metrics["verdicts"])
    assert "nothing wrong seen while training; not evaluated yet" in page
    assert labels(page) == PLOTS
    assert f"{metrics['after']['eval_loss']:.3g}" in page
    for line in (trained / "samples.jsonl").read_text("utf-8").splitlines()[:3]:
        assert json.loads(line)["prompt"].split()[0] in page
    printed = run_verb("report", f"run={trained.relative_to(trained.parents[2])}", cwd=trained.parents[2])
    assert printed.stdout == f"{trained.relative_to(trained.parents[2])}/report.html\n"
    assert (trained / "report.html").read_text("utf-8") == page, "the same run gives the same page"


def test_an_evaluation_comes_into_the_report(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text("utf-8")
    assert labels(page) == EVALUATED
    for text in (
        "gate failed on 1", "not better, because reward accuracy is 0.731", "0.731 (0.681 to 0.781)", "81.2", "0.217",
        "no doctor named", "Base says so.", "141 pairs", "nutrition (7)", "&lt;b&gt;التغذية&lt;/b&gt; $x$ (7)",
    ):  # fmt: skip
        assert text in page
    assert "<script" not in page
    assert "<img" not in page


def test_a_report_needs_a_finished_run_and_no_torch(trained: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    shutil.copy(trained / "config.yaml", unfinished)
    with pytest.raises(InputError, match=r"no metrics.json there; the run did not finish, go on with resume="):
        write_report(unfinished)
    done = run_verb("report", "run=nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no config.yaml there" in done.stderr
    check = "import sys, fitness_dpo.report; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_curve_goes_through_its_points() -> None:
    steps, values = [0, 10, 20, 40], [0.0, 3.0, 1.0, 2.0]
    svg = str(curves("Loss", [Series("loss", steps, values, 0)]))
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--first\)', svg)
    x, y = zip(*((float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)), strict=True)
    assert [(each - x[0]) / (x[-1] - x[0]) for each in x] == pytest.approx([0, 0.25, 0.5, 1], abs=1e-3)
    assert [(y[0] - each) / (y[0] - y[1]) for each in y] == pytest.approx([0, 1, 1 / 3, 2 / 3], abs=1e-3)


@pytest.mark.parametrize("norms", [[1e-9, 1.0, 1e14], [0.0, 1e-30, 5.0], [0.0, 0.0, 0.0], [1.0]])
def test_gradient_norms_of_any_size_fit_on_the_plot(norms: list[float]) -> None:
    """Whatever collapses a plot is a warning of matplotlib's, and so an error here."""
    svg = curves("norms", [Series("norms", range(len(norms)), norms, 0)], log=True)
    assert "stroke: var(--first)" in svg


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(evaluated: Path, browser: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((evaluated / "report.html").as_uri())
    page.wait_for_load_state("networkidle")
    assert requests == [(evaluated / "report.html").as_uri()], "nothing but the page itself"
    assert not problems
    assert page.title().startswith("embedded:tiny on "), "no script of an answer has run"
    assert page.locator("script, img").count() == 0
    assert page.get_by_text(HOSTILE, exact=True).count() == 2, "an answer's tags are shown as text"
    assert page.locator("#verdict").is_visible()
    assert "gate failed on 1" in page.locator("#verdict").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plots = page.locator("svg[role=img]")
    assert {plots.nth(place).get_attribute("aria-label") for place in range(plots.count())} == EVALUATED
    for place in range(plots.count()):
        plot = plots.nth(place)
        box = plot.bounding_box()
        assert box is not None
        assert box["width"] >= 250
        outside = """svg => [...svg.querySelectorAll("text")].filter(text => {
            const own = text.getBoundingClientRect(), all = svg.getBoundingClientRect();
            return own.left < all.left - 1 || own.right > all.right + 1 || own.top < all.top - 1 || own.bottom > all.bottom + 1;
        }).map(text => text.textContent)"""
        assert plot.evaluate(outside) == [], "no label is clipped"
        small = "svg => Math.min(...[...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect().height))"
        assert plot.evaluate(small) >= 10, "labels can be read"
    page.close()
