"""Write a JSONL file of varied, partly messy fitness pairs, about 1 kB each: python scripts/make_pairs.py 100000 pairs.jsonl"""

import json
import random
import sys
from pathlib import Path

VOCABULARY = (
    "squat bench deadlift row press pull-up lunge plank sprint swim bike run walk hike knee hip back shoulder ankle wrist "
    "protein carbohydrate fat fibre water sleep stress rest set rep load tempo volume intensity recovery soreness doctor coach "
    "morning evening week month slowly heavy light often never always more less after before because although while during "
    "I you we they my your the a an and or but should could would feel want need add keep try build lose gain hold eat drink"
)
WORDS = VOCABULARY.split()


def sentence(draw: random.Random, shortest: int, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))).capitalize()


def answer(draw: random.Random) -> str:
    return ". ".join(
        sentence(draw, 6, 16) + draw.choice(["", f" {draw.randint(1, 200)} kg"]) for _ in range(draw.randint(4, 10))
    )


def mess(draw: random.Random, text: str) -> str:
    return draw.choice(
        [text + "  ", text.replace(". ", ".\r\n"), f"&quot;{text}&quot;", f"<p>{text}</p>", text + " 💪 ümläut"]
    )


def main(rows: int, file: Path) -> None:
    draw = random.Random(0)  # noqa: S311
    written: list[dict[str, str]] = []
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            chance = draw.random()
            if written and chance < 0.02:  # an exact repetition
                row = draw.choice(written)
            elif written and chance < 0.04:  # nearly one: a word more in the question
                earlier = draw.choice(written)
                row = earlier | {"question": "Please: " + earlier["question"]}
            else:
                question = f"{sentence(draw, 10, 40)}, at {draw.randint(14, 90)} years?"
                row = {"question": question, "chosen": answer(draw), "rejected": answer(draw)}
                if chance > 0.9:
                    row["chosen"] = mess(draw, row["chosen"])
                if len(written) < 5000:
                    written.append(row)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
