"""Draw reward over rounds, undisturbed and with faults, and compare: `python plot.py RESULTS.jsonl ... FIGURE.svg`."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 60, 700, 30, 300
GREY, BLUE, RED = "#bbb", "#2563a8", "#c0392b"

Curves = dict[tuple[bool, int], list[float]]
"""Rewards by whether there were faults, and the seed."""


def main() -> None:
    *results, figure = (Path(argument) for argument in sys.argv[1:])
    records = [json.loads(line) for path in results for line in path.read_text().splitlines()]
    curves = curves_of(records)
    figure.write_text(draw(records, curves))
    for words in compare(curves):
        print(words)


def curves_of(records: list[dict[str, Any]]) -> Curves:
    curves: Curves = defaultdict(list)
    for each in records:
        if each["kind"] == "round":
            curves[each["disturbed"], each["seed"]].append(each["reward"])
    return curves


def compare(curves: Curves) -> list[str]:
    """Say how far runs with faults are from those without, and these from each other."""
    plain = [curve for (disturbed, _), curve in curves.items() if not disturbed]
    spread = max((max(rewards) - min(rewards) for rewards in zip(*plain, strict=True)), default=0.0)
    said = [f"undisturbed runs differ by up to {spread:.3f} in a round"]
    for (disturbed, seed), curve in sorted(curves.items()):
        if disturbed and (False, seed) in curves:
            most = max(abs(one - other) for one, other in zip(curve, curves[False, seed], strict=True))
            said.append(f"seed {seed} with faults differs from seed {seed} without by up to {most:.3f}")
    return said


def draw(records: list[dict[str, Any]], curves: Curves) -> str:
    """Give the SVG: a line for each run, and a mark where a fault was."""
    last = max(len(curve) for curve in curves.values()) - 1

    def at(number: float, reward: float) -> tuple[float, float]:
        return LEFT + number / last * (RIGHT - LEFT), BOTTOM - reward * (BOTTOM - TOP)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    for tenth in range(0, 11, 2):
        x, y = at(0, tenth / 10)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(x - 8, y + 4, f"{tenth / 10:g}", anchor="end"))
    parts += [text(at(number, 0)[0], BOTTOM + 18, str(number)) for number in range(0, last + 1, 5)]
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 34, "round"))
    parts.append(text(LEFT, TOP - 4, "letters in order"))
    for number, kind in sorted({(each["round"], each["fault"]) for each in records if each["kind"] == "fault"}):
        x, _ = at(number, 0)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}" stroke="{BLUE}" stroke-dasharray="2 4"/>'
        )
        parts.append(text(x, TOP - 4, kind))
    for (disturbed, _), curve in sorted(curves.items()):
        points = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in enumerate(curve))
        style = f'stroke="{RED}" stroke-dasharray="6 4"' if disturbed else f'stroke="{GREY}" stroke-width="3"'
        parts.append(f'<polyline points="{points}" fill="none" {style}/>')
    seeds = ", ".join(str(seed) for disturbed, seed in sorted(curves) if not disturbed)
    parts.append(
        text(
            LEFT,
            HEIGHT - 6,
            f"grey: undisturbed, seeds {seeds}; red, on top of them: the same with faults (blue)",
            anchor="start",
        )
    )
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {view}>', *parts, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#333" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    main()
