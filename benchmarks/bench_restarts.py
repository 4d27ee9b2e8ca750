"""How many restarts of a gloo job come up: two ranks form a group and add up their ranks, then rank 0 fails.

n restarts in a row, and a budget of n: a restart that fails to form its group costs one too.
"""

from harness import EndedError, Job, Launcher, launchers, parser, samples, show

RANKS = 2


def restarts(launcher: Launcher, n: int, timeout: float) -> tuple[int, list[float]]:
    """Give how many of `n` restarts did not form the group, and the seconds between neighbours that did."""
    formed: dict[int, list[float]] = {}
    with Job(launcher, ["group", n, timeout], ranks=RANKS, max_restarts=n) as job:
        try:
            while len(formed.get(n, [])) < RANKS:
                # As long as it takes if no attempt succeeds: the launcher ends when its budget is spent.
                report = job.report("formed", within=(n + 1) * (timeout + 60))
                formed.setdefault(report["restart"], []).append(report["at"])
        except EndedError as ended:
            print(f"{launcher.name}: {str(ended).splitlines()[0]}")
    complete = {restart: max(times) for restart, times in formed.items() if len(times) == RANKS}
    gaps = [complete[i] - complete[i - 1] for i in range(1, n + 1) if {i, i - 1} <= complete.keys()]
    return sum(restart not in complete for restart in range(1, n + 1)), gaps


def main() -> None:
    made = parser(__doc__ or "", n=100, peer_n=15)
    made.add_argument("--timeout", type=float, default=30, help="seconds that the ranks wait for each other")
    options = made.parse_args()
    rows = {}
    for launcher in launchers(options):
        n = samples(options, launcher)
        failed, rows[launcher.name] = restarts(launcher, n, options.timeout)
        print(f"{launcher.name}: {failed} of {n} restarts failed to form the group")
    show("from one group to the next, where both formed", "s", rows)


if __name__ == "__main__":
    main()
