"""Saves that are cut off, or fail, at each of their system calls in turn, and what is there afterwards.

Run as a script it takes a question a line ("order third", "kills third", "faults third") and answers with a line of
JSON. A process of its own with one thread, as it forks with torch imported, and waits for any child.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import EDQUOT, EIO, ENOSPC, EROFS
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ft_launcher.checkpoint import CheckpointError, CheckpointManager
from ft_launcher.checkpoint.manifest import MANIFEST, decode
from tests.syscalls import Call, Fault, mark, trace, why_not

Saved = tuple[int, str]
"""A step, and which of the saves of that step; everything that is saved is a function of the two."""

KEPT = 2
NEXT: Saved = (9, "next")
BELOW = Path("a", "b")
"""Where the checkpoints are, below the directory that is watched."""


# -- what is saved --------------------------------------------------------------------------------------------------


class Training:
    """A tensor that is written past the buffers (1.4 MB), and some that are not."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    @torch.no_grad()
    def go_to(self, saved: Saved) -> None:
        """Give everything the values of `saved`."""
        step, variant = saved
        for index, parameter in enumerate(self.model.parameters()):
            start = 100 * step + 10 * len(variant) + index
            parameter.copy_(torch.arange(start, start + parameter.numel()).view_as(parameter))
        self.optimizer.param_groups[0]["lr"] = float(step)

    def is_at(self, saved: Saved) -> bool:
        """Say whether everything has the values of `saved`, to the bit."""
        other = Training()
        other.go_to(saved)
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        same_rate = self.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]
        return same_rate and all(torch.equal(one, two) for one, two in pairs)

    def save(self, manager: CheckpointManager, saved: Saved) -> None:
        """Save these values, and wait for it."""
        self.go_to(saved)
        manager.save(self.model, self.optimizer, saved[0], {"loss": 1.0}, extra={"variant": saved[1]})
        manager.wait()


def load(manager: CheckpointManager) -> tuple[Saved | None, str]:
    """Load the latest: what it is, and what is wrong with it."""
    training = Training()
    restored = manager.load_latest(training.model, training.optimizer)
    if restored is None:
        return None, ""
    saved = (restored.step, str(restored.extra["variant"]))
    return saved, "" if training.is_at(saved) else f"{saved} has other values than were saved"


# -- the saves --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A directory as it is found, and a save into it."""

    before: Saved | None
    saved: Saved
    prepare: Callable[[Path], None]
    options: dict[str, Any]
    errnos: tuple[int, ...] = (EIO,)

    def manager(self, directory: Path) -> CheckpointManager:
        """Make the manager."""
        return CheckpointManager(directory / BELOW, KEPT, save_best=False, show_progress=False, **self.options)

    def save(self, directory: Path) -> CheckpointManager:
        """Do the save, and give the manager."""
        manager = self.manager(directory)
        Training().save(manager, self.saved)
        return manager


def nothing(_directory: Path) -> None:
    """Leave no checkpoint, nor even the directory."""


def two(directory: Path) -> None:
    """Save steps 1 and 2."""
    with CheckpointManager(directory / BELOW, KEPT, save_best=False, show_progress=False) as manager:
        for step in (1, 2):
            Training().save(manager, (step, "old"))


def dead_writers(directory: Path) -> None:
    """Leave what writers leave that die in the middle of everything that they do; step 2 stands beside its place."""
    two(directory)
    here = directory / BELOW
    shutil.copytree(here / "step_00000001", here / ".tmp-step_00000003-0")
    shutil.copytree(here / "step_00000001", here / ".trash-step_00000000-0")
    shutil.copytree(here / "step_00000001", here / ".replaced-step_00000001")
    (here / "step_00000002").rename(here / ".replaced-step_00000002")


SCENARIOS = {
    "first": Scenario(None, (1, "new"), nothing, {}),
    "third": Scenario((2, "old"), (3, "new"), two, {}, (ENOSPC, EIO, EROFS, EDQUOT)),
    "again": Scenario((2, "old"), (2, "again"), two, {}),
    "swept": Scenario((2, "old"), (3, "new"), dead_writers, {}),
    "async": Scenario((2, "old"), (3, "new"), two, {"async_save": True}),
    "sharded": Scenario((2, "old"), (3, "new"), two, {"backend": "dcp"}),
}


class Place:
    """A directory that is put back to how a scenario finds it."""

    def __init__(self, root: Path, scenario: Scenario) -> None:
        self.path = root / "watched"
        self._template = root / "template"
        shutil.rmtree(self._template, ignore_errors=True)
        self._template.mkdir(parents=True)
        scenario.prepare(self._template)

    def reset(self) -> Path:
        """Put it back, and give it."""
        shutil.rmtree(self.path, ignore_errors=True)
        # Links: files of checkpoints are written once, and never changed.
        shutil.copytree(self._template, self.path, copy_function=os.link)
        (self.path / BELOW / ".lock").unlink(missing_ok=True)
        return self.path


def left(directory: Path) -> list[str]:
    """Give what is in the directory and belongs to no checkpoint."""
    found = []
    for each in (directory / BELOW).iterdir():
        if each.name == ".lock":
            continue
        if not each.name.startswith("step_"):
            found.append(each.name)
            continue
        expected = {MANIFEST, *decode((each / MANIFEST).read_bytes()).files}
        files = {str(path.relative_to(each)) for path in each.rglob("*") if path.is_file()}
        found += [f"{each.name}/{name}" for name in files ^ expected]
    return sorted(found)


def is_commit(call: Call) -> bool:
    """Say whether this is what makes the new checkpoint count."""
    return call.name.startswith("rename") and "/.tmp-" in call.path and "/step_" in call.onto


# -- the questions ----------------------------------------------------------------------------------------------------


def regions(work: Callable[[], object], place: Path, faults: Sequence[Fault | None]) -> tuple[int, list[list[Call]]]:
    """Trace, without the files of the parent."""
    sys.stdout.flush()
    return trace(work, place, faults)


def order(scenario: Scenario, root: Path) -> list[Call]:
    """Give the calls of an undisturbed save."""
    place = Place(root, scenario)

    def save() -> None:
        directory = place.reset()
        mark()
        scenario.save(directory).close()
        mark()

    code, calls = regions(save, place.path, [None])
    if code != 0:
        raise RuntimeError(f"the save ended with {code}")
    return calls[0]


def kills(scenario: Scenario, root: Path) -> dict[str, Any]:
    """Kill a save before each of its calls. Gives how many, and what was wrong afterwards."""
    place = Place(root, scenario)
    at = 0
    wrong: list[str] = []
    while True:
        directory = place.reset()

        def save(directory: Path = directory) -> None:
            mark()
            scenario.save(directory).close()
            mark()

        code, (calls,) = regions(save, place.path, [Fault(at)])
        if code == 0:
            return {"points": at, "wrong": wrong}
        said = f"killed before {at}, {calls[-1]}"
        if code != -9:
            wrong.append(f"{said}: ended with {code}")
        expected = scenario.saved if any(map(is_commit, calls[:-1])) else scenario.before
        wrong += [f"{said}: {each}" for each in aftermath(scenario, directory, expected)]
        at += 1


def aftermath(scenario: Scenario, directory: Path, expected: Saved | None) -> list[str]:
    """Be the next life of the training; what is not as it must be."""
    wrong: list[str] = []
    warnings = Warnings()
    logging.getLogger().addHandler(warnings)
    try:
        with scenario.manager(directory) as manager:
            loaded, problem = load(manager)
            if problem or loaded != expected:
                wrong.append(problem or f"{loaded} was loaded, not {expected}")
            Training().save(manager, NEXT)
        wrong += after_the_next(scenario, directory)
    except Exception as error:  # noqa: BLE001
        wrong.append(repr(error))
    finally:
        logging.getLogger().removeHandler(warnings)
    return wrong + warnings.sentences


def after_the_next(scenario: Scenario, directory: Path) -> list[str]:
    """Say what is wrong after one more save, of NEXT, that nothing disturbed and whose manager is closed."""
    # Before another manager sweeps: whoever saved after the trouble must have done it.
    wrong = [f"left over: {rest}"] if (rest := left(directory)) else []
    with scenario.manager(directory) as manager:
        loaded, problem = load(manager)
        if problem or loaded != NEXT:
            wrong.append(problem or f"{loaded} was loaded, not {NEXT}")
        if len(manager.steps()) > KEPT:
            wrong.append(f"kept: {manager.steps()}")
    return wrong


class Warnings(logging.Handler):
    """Collects them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take it."""
        self.sentences.append(record.getMessage())


def faults(scenario: Scenario, root: Path) -> dict[str, Any]:
    """Have each call of a save fail, with each errno, alone or with all that follow. As `kills`."""
    count = len(order(scenario, root))
    # What is deleted beside the save is surely within the region only when the manager is closed there.
    ways = [(number, False, closes) for number in scenario.errnos for closes in (False, True)]
    ways += [(scenario.errnos[0], True, False)]
    plan = [(Fault(at, number, stays), closes) for number, stays, closes in ways for at in range(count)]
    place = Place(root, scenario)
    answers = root / "answers"

    def fail() -> None:
        with answers.open("w") as file:
            for _, closes in plan:
                file.write(json.dumps(failed_save(scenario, place.reset(), closes=closes)) + "\n")

    code, calls = regions(fail, place.path, [fault for fault, _ in plan])
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    wrong = [] if code == 0 else [f"the process ended with {code}"]
    for (fault, closes), those, answer in zip(plan, calls, lines, strict=False):
        said = f"{os.strerror(fault.errno or 0)} {'from' if fault.stays else 'at'} {fault.at}"
        said += f", {those[fault.at]}" if fault.at < len(those) else ""
        said += ", and closed" if closes else ""
        done = those[: fault.at] + ([] if fault.stays else those[fault.at + 1 :])
        is_committed = any(map(is_commit, done))
        loaded = None if answer["loaded"] is None else tuple(answer["loaded"])
        if loaded != (scenario.saved if is_committed else scenario.before):
            wrong.append(f"{said}: {loaded} was loaded")
        if not is_committed and not answer["raised"]:
            wrong.append(f"{said}: nothing was raised")
        if not fault.stays and any("/.tmp-" in name for name in answer["left"]):
            wrong.append(f"{said}: left over: {answer['left']}")
        if scenario.prepare is two and not is_committed and not fault.stays and "/step_00000002" not in answer["left"]:
            wrong.append(f"{said}: what was saved before is not where it was: {answer['left']}")
        wrong += [f"{said}: {each}" for each in answer["wrong"]]
    return {"points": len(lines), "wrong": wrong, "raised": sum(bool(answer["raised"]) for answer in lines)}


def failed_save(scenario: Scenario, directory: Path, *, closes: bool) -> dict[str, Any]:
    """Save with a fault, and go on in the same process, with the same manager or with another."""
    answer: dict[str, Any] = {"raised": "", "loaded": None, "left": [], "wrong": []}
    mark()
    manager = scenario.manager(directory)
    try:
        Training().save(manager, scenario.saved)
    except CheckpointError as error:
        answer["raised"] = str(error)
    except Exception as error:  # noqa: BLE001
        answer["raised"] = repr(error)
        answer["wrong"].append(f"{error!r} is no CheckpointError")
    if closes:
        manager.close()
    mark()
    try:
        manager = scenario.manager(directory) if closes else manager
        if (directory / BELOW).exists():
            answer["left"] = [f"/{each.name}" for each in (directory / BELOW).iterdir()]
        answer["loaded"], problem = load(manager)
        answer["wrong"] += [problem] if problem else []
        Training().save(manager, NEXT)
        manager.close()
        answer["wrong"] += after_the_next(scenario, directory)
    except Exception as error:  # noqa: BLE001
        answer["wrong"].append(repr(error))
    return answer


def main() -> None:
    """Answer."""
    torch.set_num_threads(1)
    logging.getLogger("ft_launcher").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as root:
        if reason := why_not():
            print(json.dumps({"skip": reason}), flush=True)
            return
        for name in ("third", "sharded"):  # have torch import what it needs here, and not in every child
            rehearsal = Place(Path(root), SCENARIOS[name])
            SCENARIOS[name].save(rehearsal.reset()).close()
        print(json.dumps({}), flush=True)
        for line in sys.stdin:
            question, name = line.split()
            scenario = SCENARIOS[name]
            answer: dict[str, Any]
            if question == "order":
                answer = {"calls": [(each.name, each.path, each.onto) for each in order(scenario, Path(root))]}
            else:
                answer = {"kills": kills, "faults": faults}[question](scenario, Path(root))
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
