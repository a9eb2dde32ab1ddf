"""The benchmarks: one short file each, one table, one way to load them."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from fmd_ext.inputs.media import MediaError, check_clip
from fmd_ext.lab.eval.benchmarks.avhbench import AVHBENCH, AVHBENCH_DEDUPLICATED
from fmd_ext.lab.eval.benchmarks.avqa import AVQA
from fmd_ext.lab.eval.benchmarks.base import Benchmark, DataError, Findings, Prompt, ask, read_records
from fmd_ext.lab.eval.benchmarks.cmm import CMM
from fmd_ext.lab.eval.benchmarks.daily_omni import DAILY_OMNI, DAILY_OMNI_PICTURE, DAILY_OMNI_SOUND
from fmd_ext.lab.eval.benchmarks.music_avqa import MUSIC_AVQA
from fmd_ext.lab.eval.benchmarks.video_mme import VIDEO_MME
from fmd_ext.lab.eval.benchmarks.worldsense import WORLDSENSE
from fmd_ext.lab.eval.items import Item

__all__ = ["BENCHMARKS", "Benchmark", "DataError", "Loaded", "Prompt", "load", "select", "unreadable"]

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        AVHBENCH,
        AVHBENCH_DEDUPLICATED,
        MUSIC_AVQA,
        AVQA,
        VIDEO_MME,
        WORLDSENSE,
        CMM,
        DAILY_OMNI,
        DAILY_OMNI_PICTURE,
        DAILY_OMNI_SOUND,
    )
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A benchmark as found in a folder.

    Attributes:
        benchmark: its entry in the table.
        items: those that can be asked, videos without a file included.
        prompt: how the questions are put.
        files: the question files, for the record.
        digest: SHA-256 of these files: the version of the questions.
        malformed: one line per record that cannot be used.
        missing: names of videos that are not there.
        doubled: ids that more than one record has; all are kept, the second as ``ID#2``.
    """

    benchmark: Benchmark
    items: list[Item]
    prompt: Prompt
    files: list[Path]
    digest: str
    malformed: list[str]
    missing: list[str]
    doubled: list[str]

    def report(self, most: int = 20) -> list[str]:
        """What was found and what is wrong, one line each; lists are cut after ``most`` lines."""
        kinds = collections.Counter(item.kind for item in self.items)
        lines = [
            f"{self.benchmark.title}: {len(self.items)} questions about {len({i.video for i in self.items})} videos "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"
        ]
        lines += self.count_report()
        if self.doubled:
            lines.append(
                f"{len(self.doubled)} ids are there more than once, such as {self.doubled[0]}; all are kept, the "
                f"second as {self.doubled[0]}#2"
            )
        for title, problems in (
            ("records that cannot be used", self.malformed),
            ("videos that are missing", self.missing),
        ):
            if problems:
                lines.append(f"{len(problems)} {title}:")
                lines += [f"  {problem}" for problem in problems[:most]]
                lines += [f"  and {len(problems) - most} more"] * (len(problems) > most)
        return lines

    def count_report(self) -> list[str]:
        """The numbers of questions beside the published ones, and where they differ; of a small part in total alone."""
        published, lines = self.benchmark.published, []
        versions = [version for version, count in published.items() if count == len(self.items)]
        known = ", ".join(f"{count} in {version}" for version, count in published.items())
        if versions:
            lines.append(f"as many questions as published ({versions[0]})")
        elif published:
            lines.append(f"{len(self.items)} questions are none of the published numbers: {known}")
        if len(self.items) < min(published.values(), default=0) / 2:
            return lines
        for category, counts in self.benchmark.published_groups.items():
            found = collections.Counter(value for item in self.items for value in item.values(category))
            lines += [
                f"{found[value]} questions of {category} {value}, published are {count}"
                for value, count in counts.items()
                if found[value] not in (0, count)
            ]
        return lines


def unreadable(items: Sequence[Item], *, progress: bool = False) -> list[str]:
    """Opens the file of every item and returns a line for each that is no media file; nothing is decoded.

    ``progress`` shows a bar on a terminal.
    """
    paths = list(dict.fromkeys(path for item in items for path in (item.path, item.sound) if path is not None))

    def problem(path: Path) -> str | None:
        try:
            check_clip(path)
        except (MediaError, OSError) as error:
            return str(error)
        except Exception as error:  # a damaged file can raise anything
            return f"{path}: {type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor(8) as pool:  # it waits for the disk, mostly
        found = tqdm(pool.map(problem, paths), total=len(paths), desc="opening", disable=None if progress else True)
        return [line for line in found if line]


def load(name: str, folder: str | Path, *, prompt: str = "default", questions: str | Path | None = None) -> Loaded:
    """Reads and checks a benchmark's published files.

    Args:
        name: of a benchmark in ``BENCHMARKS``.
        folder: holds the question file(s) and, anywhere below it, the videos.
        prompt: name of one of the benchmark's prompts, or a template of your own with ``{question}``.
        questions: the question file, where it is not one of those that the benchmark looks for.

    Raises:
        DataError: no such folder or file, a file of another form, or not a single question that can be asked.
        ValueError: an unknown benchmark or prompt.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; the benchmarks are {', '.join(BENCHMARKS)}")
    benchmark, folder = BENCHMARKS[name], Path(folder)
    chosen = _prompt(benchmark, prompt)
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    records, files = read_records(folder, benchmark.files, Path(questions) if questions else None)
    findings = Findings(folder)
    try:
        items = benchmark.read(records, findings)
    except DataError as error:
        raise DataError(f"{', '.join(map(str, files))} is no file of {benchmark.title} as expected: {error}") from error
    items, doubled = _with_own_ids(items)
    if not items:
        wrong = findings.malformed[0] if findings.malformed else "they are empty"
        raise DataError(f"no question in {', '.join(map(str, files))} can be asked: {wrong}")
    items = [dataclasses.replace(item, prompt=ask(item, chosen.template)) for item in items]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return Loaded(benchmark, items, chosen, files, digest, findings.malformed, list(findings.missing), doubled)


def _with_own_ids(items: list[Item]) -> tuple[list[Item], list[str]]:
    """Published files have ids twice, with another answer: each record is a question of its own."""
    seen: collections.Counter[str] = collections.Counter()
    own: list[Item] = []
    for item in items:
        seen[item.id] += 1
        own.append(item if seen[item.id] == 1 else dataclasses.replace(item, id=f"{item.id}#{seen[item.id]}"))
    return own, [identity for identity, count in seen.items() if count > 1]


def select(
    items: Sequence[Item],
    *,
    limit: int | None = None,
    ids: Sequence[str] = (),
    categories: Sequence[tuple[str, str]] = (),
    exclude: Sequence[str] = (),
) -> list[Item]:
    """The chosen items, in their order: those of ``ids``, of all ``categories`` (name, value), none of ``exclude``
    (ids), and ``limit`` of them.

    A limit spreads evenly over the items, so that every category gets its share. Raises ValueError for an id or a
    category that no item has.
    """
    known_ids = {item.id for item in items}
    if unknown := [identity for identity in [*ids, *exclude] if identity not in known_ids]:
        raise ValueError(f"no item has the id {unknown[0]!r}")
    left_out, named = set(exclude), set(ids)
    chosen = [item for item in items if item.id not in left_out and (not ids or item.id in named)]
    for name, value in categories:
        known = sorted({own for item in items for own in item.values(name)})
        if value not in known:
            raise ValueError(f"no item has {name}={value}; values of {name}: {', '.join(known) or 'none'}")
        chosen = [item for item in chosen if value in item.values(name)]
    if limit is not None and limit < len(chosen):
        chosen = [chosen[index * len(chosen) // limit] for index in range(limit)]
    return chosen


def _prompt(benchmark: Benchmark, prompt: str) -> Prompt:
    if prompt in benchmark.prompts:
        return benchmark.prompts[prompt]
    if "{question}" not in prompt:
        raise ValueError(
            f"{benchmark.name} has no prompt {prompt!r}: the prompts are {', '.join(benchmark.prompts)}, "
            "or a template with {question}, {options}, {inline_options}, {option_list} or {subtitles}"
        )
    try:
        prompt.format(question="", options="", inline_options="", option_list="", subtitles="")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"the prompt template has a placeholder that is not known: {error}") from error
    return Prompt(prompt, "given by the user")
