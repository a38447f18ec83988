"""The lines that the doctor prints: what each rank finds, joined."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from partial_fc.files import printable
from partial_fc.parallel import distributed


@dataclass(frozen=True)
class Found:
    """What a check says in one line; `value` is for the checks after it."""

    text: str
    level: Literal["ok", "warning", "problem"] = "ok"
    value: Any = None


class Sheet:
    """Prints a line a check, on rank 0, and counts warnings and problems, on all ranks alike."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def check(
        self, name: str, look: Callable[..., Found], *arguments: Any, first_rank_only: bool = False
    ) -> Found | None:
        """Calls look(*arguments) on every rank and prints what was found, ranks that say the same in one line.

        A collective; `look` must hold none of its own. An exception in it is a problem. Returns what this rank found,
        or None on all ranks where any rank found a problem: what builds on it is then left out by all of them.
        """
        found = Found("")
        if not first_rank_only or distributed.rank() == 0:
            try:
                found = look(*arguments)
            except Exception as error:
                found = Found(distributed.message(error), "problem")
        said = distributed.gather_objects((found.level, found.text))
        self._print(name, said[:1] if first_rank_only else said)
        return None if any(level == "problem" for level, _ in said) else found

    def add(self, name: str, found: Found) -> None:
        """Prints what all ranks know already."""
        self._print(name, [(found.level, found.text)])

    def end(self) -> bool:
        """Prints the sum of it. True if there is no problem."""
        problems, warnings = self.counts["problem"], self.counts["warning"]
        if distributed.rank() == 0:
            sums = [f"{n} {word}{'s' * (n > 1)}" for n, word in ((problems, "problem"), (warnings, "warning")) if n]
            print(", ".join(sums) or "nothing is wrong", flush=True)
        return problems == 0

    def _print(self, name: str, said: list[tuple[str, str]]) -> None:
        for level, text in dict.fromkeys(said):
            self.counts[level] += 1
            ranks = [rank for rank, other in enumerate(said) if other == (level, text)]
            where = "" if len(ranks) == len(said) else f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}: "
            if distributed.rank() == 0:
                one_line = "; ".join(line.strip() for line in text.splitlines())
                print(printable(f"{level:<8} {name}: {where}{one_line}"), flush=True)


def spans(numbers: list[int]) -> str:
    """Sorted numbers in short: 0-3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
