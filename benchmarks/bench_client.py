"""What a heartbeat and a pair of section calls cost a rank, with its real monitor listening.

Each call is timed by itself with perf_counter_ns, less the median of timing nothing; and, as a check on
that, in batches of 100 calls with the clock read twice per batch (nothing is subtracted; the loop is in
it).
"""

import tempfile
from array import array
from pathlib import Path

from harness import Job, Launcher, launchers, parser, quantile, samples, show


def cost(launcher: Launcher, calls: int) -> dict[str, list[float]]:
    """Give the microseconds of each call, and per call of each batch."""
    with tempfile.TemporaryDirectory(prefix="ftb_") as folder:
        ft = {"rank_section_timeouts": "step:600"}
        with Job(launcher, ["cost", calls, folder], ft=ft) as job:
            job.report("measured")
        nanoseconds = {path.name: array("q", path.read_bytes()) for path in Path(folder).iterdir()}
    clock = quantile(sorted(nanoseconds["empty"]), 0.5)
    return {
        name: [each / 100_000 if "batches" in name else (each - clock) / 1000 for each in values]
        for name, values in nanoseconds.items()
    }


def main() -> None:
    options = parser(__doc__ or "", n=100_000, peer_n=100_000).parse_args()
    taken = {
        launcher.name: cost(launcher, samples(options, launcher))
        for launcher in launchers(options, able=("ours", "nvrx"))
    }
    for name, title in (
        ("beats", "a heartbeat, each call"),
        ("beat_batches", "a heartbeat, in batches of 100"),
        ("pairs", "start_section and end_section, each pair"),
        ("pair_batches", "start_section and end_section, in batches of 100"),
    ):
        show(title, "us", {launcher: values[name] for launcher, values in taken.items()})


if __name__ == "__main__":
    main()
