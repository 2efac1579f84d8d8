#!/usr/bin/python3
"""Writes the tables of docs/wash.md from a result folder of `vblk wash`, of which its summary.json is enough.

Between the lines `<!-- tables: FOLDER -->` and `<!-- end of tables -->` everything is replaced. `--check` only compares.
"""

import argparse
import json
import re
import sys
from pathlib import Path

METRICS = {"rate": "per second", "p50": "p50", "p99": "p99", "cpu": "processor time", "per_wakeup": "results per sleep",
           "wake_cost": "time to hand over", "submit_max": "longest submission", "stream_rate": "rate of the stream", "per_call": "requests in a call",
           "write_p99": "p99 of the stream's writes"}
COUNTERS = {"system_calls_per_io": "system calls per operation, load included", "requests_per_submission": "requests in a submission",
            "sleeps_per_io": "times asleep per operation",
            "preemptions_per_io": "times interrupted per operation"}
PLACE = re.compile(r"(<!-- tables: (\S+) -->\n).*?(<!-- end of tables -->)", re.DOTALL)


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def blocks_text(cell, blocks_of):
    """Where a cell rests on fewer blocks than there are; older results do not say how many there are of each cell."""
    of = cell.get("blocks_of", blocks_of)
    return f", {cell['blocks']} of {of} blocks" if cell["blocks"] < of else ""


def cell_text(cell, comparison, blocks_of):
    if "ratio" not in cell:
        return "n/a" + (blocks_text(cell, blocks_of) if cell["blocks"] else "")
    verdict = cell["verdict"]
    if "AIO" in verdict or "THREADS" in verdict:
        verdict = (comparison["aio"] if "AIO" in verdict else comparison["threads"]) + " wins"
    return f"{cell['ratio']:.3f} ({cell['interval'][0]:.3f} to {cell['interval'][1]:.3f}) {verdict.lower()}{blocks_text(cell, blocks_of)}"


def reported_table(comparison):
    """Counters that are told beside the ratios."""
    def number(one, side):
        return f"{one[side]:.3g}" if side in one else "not known"
    rows = [[one["cell"], COUNTERS[one["counter"]], number(one, "aio"), number(one, "threads")]
            for one in comparison.get("reported", [])]
    return "\n" + table(["cell", "beside it", comparison["aio"], comparison["threads"]], rows) if rows else ""


def heading(claim, comparison):
    """What is compared, and what it must come to."""
    wanted = "; ".join(f"{METRICS[one['metric']]} must be {one['expected']}" for one in claim["metrics"]
                       if one.get("comparison") == comparison["name"] and claim.get("rule") == "share")
    return f"\n{comparison['aio']} / {comparison['threads']}" + (f" ({wanted})" if wanted else "") + ":\n\n"


def comparison_tables(claim, blocks_of):
    text = ""
    for comparison in claim["comparisons"]:
        if not comparison["decides"] or not comparison["cells"]:
            continue
        metrics = list(dict.fromkeys(cell["metric"] for cell in comparison["cells"]))
        rows = {}
        for cell in comparison["cells"]:
            rows.setdefault(cell["cell"], {})[cell["metric"]] = cell_text(cell, comparison, blocks_of)
        text += heading(claim, comparison)
        text += table(["cell", *(METRICS[metric] for metric in metrics)],
                      [[name, *(row.get(metric, "") for metric in metrics)] for name, row in rows.items()])
        text += reported_table(comparison)
    return text


def claim_text(claim, blocks_of):
    text = f"\n#### {claim['id']}: {claim['title']}: {claim['outcome']}\n\n"
    if claim["sentence"]:
        text += f"> {claim['sentence']}\n\n"
    text += claim["words"] + "\n"
    if "crossover" in claim:
        line = claim["crossover"]
        at = f"{line['crossover_per_second']:,.0f} per second" if "crossover_per_second" in line else "none"
        text += (f"\nThe pool's extra processor time: {line['extra_us_per_operation']:.2f} us per operation (90 %: "
                 f"{line['extra_us_interval'][0]:.2f} to {line['extra_us_interval'][1]:.2f}), R² {line['r_squared']:.3f}; "
                 f"crossover: {at}.\n")
    return text + comparison_tables(claim, blocks_of)


def blocks_at_most(summary):
    return max((cell["blocks"] for claim in summary["claims"] for one in claim["comparisons"] for cell in one["cells"]), default=0)


def outcomes(claim):
    """By metric; where several comparisons decide by one, each outcome once."""
    found = {}
    for one in claim["metrics"]:
        found.setdefault(one["metric"], {})[one["outcome"].lower()] = None
    return {metric: "; ".join(names) for metric, names in found.items()}


def within(controls, metric):
    """What the blocks can tell apart, as the A/A shows it; older results do not say."""
    width = controls.get("again_within", {}).get(metric)
    return "" if width is None else f", within {width * 100:.1f} %"


def tables(summary):
    controls = summary["controls"]
    text = f"Preset {summary['preset']}, begun {summary['started']}, seed {summary['seed']}, rules {summary['analysis_sha256'][:16]}.\n\n"
    text += table(["machine", ""], [[name, value] for name, value in {**summary["machine"], **summary["devices"]}.items()])
    again = "; ".join(f"{METRICS[metric]} " + ", ".join(f"{count} {verdict.lower()}" for verdict, count in counts.items())
                      + within(controls, metric)
                      for metric, counts in controls["again"].items())
    text += (f"\nControls: an engine compared with itself: {again}. Slowed down, it was found in {controls['slowed_found']} of "
             f"{controls['slowed_cells']} cells. Of {controls['blocks']} blocks {controls['noisy_blocks']} are noisy, "
             f"{controls['repeated_blocks']} were repeated. {summary['runs']} runs, {summary['failed_runs']} failed.\n\n")
    shown = ("rate", "p50", "p99", "cpu")
    rows = []
    for claim in summary["claims"]:
        outcome = outcomes(claim)
        rows.append([claim["id"], claim["title"], f"**{claim['outcome']}**", *(outcome.get(metric, "") for metric in shown)])
    text += table(["", "claim", "outcome", *(METRICS[metric] for metric in shown)], rows)
    skipped = summary.get("skipped_cells", [])
    for one in skipped:
        text += f"\n{one['cells']} of the cells were skipped, those of {one['device']}: {one['because']}.\n"
    blocks_of = blocks_at_most(summary)
    return text + "".join(claim_text(claim, blocks_of) for claim in summary["claims"] if claim["outcome"] != "NOT MEASURED")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, nargs="?", default=Path(__file__).resolve().parent.parent / "docs/wash.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if there is something to change")
    options = parser.parse_args()
    old = options.document.read_text()

    def renew(place):
        summary = json.loads((options.document.parent / place[2] / "summary.json").read_text())
        return place[1] + "\n" + tables(summary) + "\n" + place[3]
    new, count = PLACE.subn(renew, old)
    if count == 0:
        sys.exit(f"{options.document} has no place for tables")
    if options.check:
        sys.exit(0 if new == old else f"{options.document} has other tables than its results; scripts/wash_tables.py renews them")
    options.document.write_text(new)


if __name__ == "__main__":
    main()
