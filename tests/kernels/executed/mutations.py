"""Does the machine notice a wrong kernel? PTX damaged in one place at a time, executed on a shipped configuration.

Noticed: a wrong result, a finding, a deadlock, an error. Of synchronisation every fault is noticed but those of
equivalents.py, which change nothing that anybody could see.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from executed.equivalents import reason


@dataclass(frozen=True)
class Mutation:
    """replacement: text with groups of the pattern, or a function of the match."""

    name: str
    pattern: str
    replacement: str | Callable[[re.Match], str]
    synchronisation: bool = True


def one_more(found: re.Match) -> str:
    return found.group().replace(f" {found[1]};", f" {int(found[1]) + 1};")


def exclusive_or(bit: int) -> Callable[[re.Match], str]:
    """The last group, with a bit turned over."""
    return lambda found: found.group()[: found.start(1) - found.start()] + _flipped(found, bit)


def _flipped(found: re.Match, bit: int) -> str:
    return str(int(found[1], 0) ^ bit) + found.group()[found.end(1) - found.start() :]


MUTATIONS = (
    Mutation("barrier removed", r"\bbar(?:rier)?\.sync\s+\d+(?:, \d+)?;", ""),
    Mutation("warp barrier removed", r"\bbar\.warp\.sync\s+-1;", ""),
    Mutation("wait for copies removed", r"\bcp\.async\.wait_group\s+\d+;", ""),
    Mutation("wait for one copy less", r"\bcp\.async\.wait_group\s+(\d+);", one_more),
    Mutation("group of copies removed", r"\bcp\.async\.commit_group;", ""),
    Mutation("wait for wgmma removed", r"\bwgmma\.wait_group\.sync\.aligned \d+;", ""),
    Mutation("wait for one wgmma less", r"\bwgmma\.wait_group\.sync\.aligned (\d+);", one_more),
    Mutation("wgmma fence removed", r"\bwgmma\.fence\.sync\.aligned;", ""),
    Mutation("proxy fence removed", r"\bfence\.proxy\.async\.shared::cta;", ""),
    Mutation("arrival removed", r"(?:@!?%p\d+ )?mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", ""),
    Mutation("mbarrier wait removed", r"\{\s*\.reg \.pred complete;\s*waitLoop:[^}]*\}", ""),
    Mutation("expected bytes changed", r"expect_tx\.shared::cta\.b64 _, \[%r\d+\], (\d+);", exclusive_or(16)),
    Mutation("release and acquire removed", r"\bacq_rel\b", "relaxed"),
    Mutation("mask of a code", r"lop3\.b32 d, t, (0x\w+)", exclusive_or(1), False),
    Mutation("shift of a code", r"shr\.u32 t, [%$]\w+, (\d+);", exclusive_or(1), False),
    Mutation("comparison", r"setp\.lt\.s32", "setp.le.s32", False),
    Mutation("predicate of a store", r"@!?%p\d+ (st\.global)", r"\1", False),
    Mutation("predicate of a load", r"@!?%p\d+ (ld\.global)", r"\1", False),
    Mutation("bytes of a copy", r"selp\.b32\s+(%r\d+), (16|8|4), 0, %p\d+;", r"mov.b32 \1, \2;", False),
    Mutation("shift", r"\bsh[lr]\.[bus]32\s+%r\d+, %r\d+, (\d+);", exclusive_or(1), False),
    Mutation("mask", r"\band\.b32\s+%r\d+, %r\d+, (\d+);", exclusive_or(8), False),
    Mutation("place in shared memory", r"\b(?:ldmatrix|ld\.shared)[^;\[]*\[%r\d+\+(\d+)\]", exclusive_or(32), False),
    Mutation("operands of mma", r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", False),
    Mutation("which group", r"(selp\.b32\s+%r\d+), (%r\d+), (%r\d+), ", r"\1, \3, \2, ", False),
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    mutation: Mutation
    ordinal: int  # among the places of its kind in the text
    of: int  # how many there are
    line: int
    before: str
    start: int
    end: int
    after: str

    def __str__(self) -> str:
        return (
            f"{self.mutation.name} {self.ordinal + 1} of {self.of}, line {self.line}: {' '.join(self.before.split())}"
        )

    def apply(self, text: str) -> str:
        return text[: self.start] + self.after + text[self.end :]


def mutants(text: str) -> Iterator[Mutant]:
    """All that change the text, in order of kind and place."""
    for mutation in MUTATIONS:
        places = list(re.finditer(mutation.pattern, text))
        for ordinal, found in enumerate(places):
            new = mutation.replacement
            after = new(found) if callable(new) else found.expand(new)
            if after != found.group():
                line = text.count("\n", 0, found.start()) + 1
                yield Mutant(
                    mutation, ordinal, len(places), line, found.group()[:80], found.start(), found.end(), after
                )


def sample(everything: list[Mutant], each: int, others: int, seed: int) -> list[Mutant]:
    """At most `each` of a kind of synchronisation, and `others` of every other kind."""
    draw, chosen = random.Random(seed), []
    for mutation in MUTATIONS:
        of_kind = [mutant for mutant in everything if mutant.mutation is mutation]
        chosen += draw.sample(of_kind, min(each if mutation.synchronisation else others, len(of_kind)))
    return chosen


@dataclass(frozen=True)
class Verdict:
    mutant: str
    kind: str
    ordinal: int  # from 1
    synchronisation: bool
    noticed: str | None  # the first thing that is wrong
    equivalent: str | None  # why it changes nothing


def damage(name: str, gpu: str, each: int, seed: int, others: int = 0) -> list[Verdict]:
    """Mutants of a shipped configuration, executed one by one: at most `each` of a kind of synchronisation, `others` of
    every other kind. In a process of process.py."""
    import torch

    from executed import shipped_runs

    texts: list[str] = []

    def run(change: Callable[[str], str]) -> str | None:
        try:
            result = shipped_runs.run_shipped(name, gpu, seed, change)
        except Exception as error:  # a mutant may do anything
            return repr(error)[:200]
        return result.problems[0] if result.problems else None

    torch.manual_seed(seed)
    if problem := run(lambda text: texts.append(text) or text):
        raise ValueError(f"{name} on {gpu} is wrong before it is damaged: {problem}")
    verdicts = []
    for mutant in sample(list(mutants(texts[0])), each, others, seed):
        noticed = run(mutant.apply)
        kind, ordinal = mutant.mutation.name, mutant.ordinal + 1
        why = reason(name, gpu, kind, ordinal)
        verdicts.append(Verdict(str(mutant), kind, ordinal, mutant.mutation.synchronisation, noticed, why))
    return verdicts
