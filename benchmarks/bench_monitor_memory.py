"""What a rank monitor keeps in memory: PSS (shared pages by share) and USS (its own) from smaps_rollup.

Read while its rank is connected and sends heartbeats. PSS depends on how many share: the peer's monitors
are forks of its launcher, with all of torch in it.
"""

from pathlib import Path

from harness import Job, Launcher, launchers, parser, samples, show


def memory(launcher: Launcher, ranks: int) -> list[tuple[float, float]]:
    """Give PSS and USS, in MB, of the monitors of a job with `ranks` ranks."""
    with Job(launcher, ["beat", 10], ranks=ranks) as job:
        workers = [job.report("beating")["pid"] for _ in range(ranks)]
        monitors = job.monitors(workers)
        if len(monitors) != ranks:
            raise SystemExit(f"{launcher.name}: {len(monitors)} processes beside {ranks} ranks:\n{job.log()}")
        return [_read(pid) for pid in monitors]


def _read(pid: int) -> tuple[float, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return kib["Pss"] * 1024 / 1e6, (kib["Private_Clean"] + kib["Private_Dirty"]) * 1024 / 1e6


def main() -> None:
    made = parser(__doc__ or "", n=3, peer_n=3)
    made.add_argument("--ranks", type=int, default=4, help="ranks of the job; n is the number of jobs")
    options = made.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {}
    for launcher in launchers(options, able=("ours", "nvrx")):
        taken[launcher.name] = []
        for _ in range(samples(options, launcher)):
            taken[launcher.name] += memory(launcher, options.ranks)
    for index, what in enumerate(("PSS", "USS")):
        rows = {name: [each[index] for each in values] for name, values in taken.items()}
        show(f"{what} of each monitor, {options.ranks} ranks", "MB", rows)


if __name__ == "__main__":
    main()
