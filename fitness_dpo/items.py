"""items.jsonl: what an evaluation has measured so far, an item a line, so that an interrupted one goes on. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from fitness_dpo.runs import write_whole

ITEMS, SETTINGS = "items.jsonl", "settings.json"
Record = dict[str, Any]


class Items:
    """The records in a folder that were made under `settings`; of other settings nothing is kept.

    A record has a `kind`, a `side` (base or tuned), the `item`'s position among its kind, its `id`, and what was measured.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / ITEMS
        self.records: dict[tuple[str, str], dict[int, Record]] = {}
        if recorded_settings(folder) != settings:
            self.file.unlink(missing_ok=True)
            write_whole(folder / SETTINGS, json.dumps(settings, indent=1))
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        *whole, rest = text.split("\n")  # not splitlines, which also cuts at characters that an answer may hold
        if rest:  # a line that was cut off
            write_whole(self.file, text.removesuffix(rest))
        for line in whole:
            self._keep(json.loads(line))

    def _keep(self, record: Record) -> None:
        self.records.setdefault((record["kind"], record["side"]), {})[record["item"]] = record

    def add(self, kind: str, side: str, item: int, **measured: Any) -> None:
        record = {"kind": kind, "side": side, "item": item, **measured}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._keep(record)

    def missing(self, kind: str, side: str, count: int) -> list[int]:
        """Positions below `count` that have no record yet."""
        known = self.records.get((kind, side), {})
        return [item for item in range(count) if item not in known]

    def column(self, kind: str, side: str, key: str) -> list[Any]:
        """What was measured under `key`, in the items' order; empty where that side was not measured."""
        return [record[key] for _, record in sorted(self.records.get((kind, side), {}).items())]

    def __len__(self) -> int:
        return sum(map(len, self.records.values()))


def recorded_settings(folder: Path) -> Any:
    file = folder / SETTINGS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
