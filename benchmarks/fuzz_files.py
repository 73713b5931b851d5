"""Damage files of every kind, load and use them in processes of their own, and count what comes of it.

    python fuzz_files.py --count 10000 --seed 1 --jobs 2
    python fuzz_files.py --seed 1 --only w4a8:17 json:3

Outcomes: `same`, the output is that of the valid file; `content`, it differs as the values of an unsealed file say;
`named`, a ValueError or OSError that names the file or its folder; `unnamed`, the same without a name; `raw`, another
exception; `silent`, another output, or one that is not finite, without a word; `hang`, more than 5 s; `memory`, more
than 1 GB. The last six are reproduced by seed and number.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from file_mutations import mutate
from file_targets import Target, is_finite, is_same, make_targets, says_so

OUTCOMES = ("same", "content", "named", "unnamed", "raw", "silent", "hang", "memory")
BAD = OUTCOMES[3:]
SECONDS, BYTES = 5.0, 2**30
_SHOWN = 300  # characters of an error


@dataclass(frozen=True)
class Case:
    """One damaged file: the `number`-th of its kind."""

    kind: str
    number: int


@dataclass
class Running:
    """A process that uses a damaged file."""

    case: Case
    folder: Path
    done: str
    pid: int
    pipe: int
    until: float
    said: bytes = b""


@dataclass
class Tally:
    """Outcomes per kind, and what was bad."""

    counts: dict[str, Counter] = field(default_factory=dict)
    bad: list[dict[str, object]] = field(default_factory=list)

    def add(self, run: Running, outcome: str, text: str) -> None:
        self.counts.setdefault(run.case.kind, Counter())[outcome] += 1
        if outcome in BAD:
            case = f"{run.case.kind}:{run.case.number}"
            self.bad.append({"case": case, "outcome": outcome, "done": run.done, "error": text})

    def table(self) -> str:
        """Return a Markdown table."""
        total = sum(self.counts.values(), Counter())
        rows = [*sorted(self.counts.items()), ("**all**", total)]
        lines = [f"| kind | count | {' | '.join(OUTCOMES)} |", f"|---|{'---|' * (1 + len(OUTCOMES))}"]
        for kind, counts in rows:
            cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
            lines.append(f"| {kind} | {sum(counts.values())} | {cells} |")
        return "\n".join(lines)


class Fuzz:
    """Run cases in forked processes, which share what was imported."""

    def __init__(self, root: Path, seed: int, verbose: bool = False) -> None:
        self.root, self.seed, self.verbose = root, seed, verbose
        (root / "valid").mkdir()
        self.targets = make_targets(root / "valid")
        self.valid = {
            kind: target.use(target.folder) for kind, target in self.targets.items() if kind != "original_pt"
        }
        self.valid["original_pt"] = self._use_copy("original_pt")  # it writes into its folder
        self.others = [path for target in self.targets.values() for path in target.files()]
        self.rss = _rss()

    def _use_copy(self, kind: str) -> list[object]:
        folder = self.root / f"copy_{kind}"
        shutil.copytree(self.targets[kind].folder, folder)
        return self.targets[kind].use(folder)

    def run(self, cases: list[Case], jobs: int, bar: tqdm) -> Tally:
        """Run all cases; an interrupt ends it with what is counted so far."""
        tally, waiting, running = Tally(), iter(cases), []
        try:
            while True:
                while len(running) < jobs and (case := next(waiting, None)) is not None:
                    running.append(self._start(case))
                if not running:
                    break
                for run, outcome, text in self._wait(running):
                    running.remove(run)
                    tally.add(run, outcome, text)
                    bar.update()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        finally:
            for run in running:
                os.kill(run.pid, signal.SIGKILL)
                os.waitpid(run.pid, 0)
        return tally

    def _start(self, case: Case) -> Running:
        """Copy the valid files, damage one and fork."""
        target = self.targets[case.kind]
        folder = Path(tempfile.mkdtemp(dir=self.root)) / case.kind
        shutil.copytree(target.folder, folder, copy_function=os.link)
        rng = random.Random(f"{self.seed}:{case.kind}:{case.number}")
        path = rng.choice(target.files(folder))
        content = path.read_bytes()
        path.unlink()  # a link to the valid file
        path.write_bytes(content)
        done = f"{path.relative_to(folder)}: {mutate(path, self.others, rng)}"
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._child(target, folder, path, write)
        os.close(write)
        return Running(case, folder, done, pid, read, time.monotonic() + SECONDS)

    def _child(self, target: Target, folder: Path, path: Path, write: int) -> None:
        """Use the damaged file, say what came of it, and end the process."""
        outcome, text = "raw", ""
        try:
            limit = _virtual() + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            if not self.verbose:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            outcome, text = self._outcome(target, folder, path)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, json.dumps([outcome, text[:_SHOWN]]).encode())
            os._exit(0)

    def _outcome(self, target: Target, folder: Path, path: Path) -> tuple[str, str]:
        try:
            with torch.no_grad():
                values = target.use(folder)
        except (ValueError, OSError, FloatingPointError) as error:
            text = f"{type(error).__name__}: {error}"
            if self.verbose:
                traceback.print_exc()
            return "named" if str(folder) in text else "unnamed", text
        except MemoryError as error:
            return "memory", str(error)
        except BaseException as error:
            if self.verbose:
                traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            where = traceback.extract_tb(error.__traceback__)[-1]
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "qarvd" in frame.filename]
            places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], where)]
            return "memory" if "memory" in text else "raw", f"{text[: _SHOWN - 80]} at {' '.join(places)}"
        valid = self.valid[folder.name]
        if is_same(valid, values):
            return "same", ""
        valid = {each.read_bytes() for each in self.others if each.is_file()}
        another = len(list(folder.iterdir())) == 1 and path.is_file() and path.read_bytes() in valid
        said = another or says_so(self.targets[folder.name].folder / path.relative_to(folder), path)
        return ("content" if said and is_finite(values) else "silent"), f"finite: {is_finite(values)}"

    def _wait(self, running: list[Running]) -> Iterator[tuple[Running, str, str]]:
        """Yield the processes that have ended; stop those that take too long."""
        ready, _, _ = select.select([run.pipe for run in running], [], [], 0.2)
        for run in list(running):
            late = time.monotonic() > run.until
            if run.pipe not in ready and not late:
                continue
            chunk = os.read(run.pipe, 65536) if run.pipe in ready else b""
            run.said += chunk
            if chunk and not late:
                continue
            if late:
                os.kill(run.pid, signal.SIGKILL)
            _, _, usage = os.wait4(run.pid, 0)
            os.close(run.pipe)
            shutil.rmtree(run.folder.parent, ignore_errors=True)
            outcome, text = json.loads(run.said) if run.said else ("hang" if late else "raw", "no answer")
            if usage.ru_maxrss * 1024 > self.rss + BYTES:
                outcome = "memory"
            yield run, outcome, text


def _statm(column: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()


def _virtual() -> int:
    return _statm(0)


def _rss() -> int:
    return _statm(1)


def main() -> int:
    """Run the fuzz from the command line; return 1 if anything was bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="damaged files over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--only", nargs="+", metavar="KIND:NUMBER", help="repeat these, with their tracebacks")
    parser.add_argument("--out", help="JSON file for counts and everything bad")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("qarvd_diffusers").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), args.seed, verbose=bool(args.only))
        kinds = args.kinds or list(fuzz.targets)
        if unknown := sorted(set(kinds) - set(fuzz.targets)):
            parser.error(f"unknown kinds {unknown}, expected some of {', '.join(fuzz.targets)}")
        cases = [Case(kinds[i % len(kinds)], i // len(kinds)) for i in range(args.count)]
        if args.only:
            cases = [Case(kind, int(number)) for kind, _, number in (each.partition(":") for each in args.only)]
        with tqdm(total=len(cases), unit="file") as bar:
            tally = fuzz.run(cases, 1 if args.only else args.jobs, bar)
    print(tally.table())
    for each in tally.bad[:50]:
        print(f"{each['case']}: {each['outcome']}: {each['done']}: {each['error']}")
    if args.out:
        Path(args.out).write_text(json.dumps({"counts": tally.counts, "bad": tally.bad}, indent=1), encoding="utf-8")
    return int(bool(tally.bad))


if __name__ == "__main__":
    sys.exit(main())
