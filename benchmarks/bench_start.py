"""How long it takes from the command to the first line of user code, which loads nothing.

The launchers take turns (A B C A B C), so that a change of the machine meets all of them; the first turn
warms the page cache and is not counted.
"""

from harness import Job, Launcher, launchers, parser, samples, show


def start(launcher: Launcher, ranks: int) -> float:
    """Give the milliseconds until the first line of the last rank."""
    with Job(launcher, ["start"], ranks=ranks) as job:
        last = max(job.report("started")["at"] for _ in range(ranks))
        job.wait()
        return (last - job.started_at) * 1000


def main() -> None:
    made = parser(__doc__ or "", n=20, peer_n=20)
    made.add_argument("--ranks", type=int, default=2)
    options = made.parse_args()
    chosen = launchers(options)
    rows: dict[str, list[float]] = {launcher.name: [] for launcher in chosen}
    for turn in range(max(samples(options, launcher) for launcher in chosen) + 1):
        for launcher in chosen:
            if turn <= samples(options, launcher):
                taken = start(launcher, options.ranks)
                rows[launcher.name] += [taken] if turn else []
    show(f"from the command to the first line of user code in the last of {options.ranks} ranks", "ms", rows)


if __name__ == "__main__":
    main()
