#!/usr/bin/python3
"""`vblk wash` as a user meets it: every arm runs, it stops and goes on, and everything that goes wrong. Prints TAP."""

import argparse
import contextlib
import csv
import hashlib
import html.parser
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import ENGINES, Folder, Report, Server, make_sparse, run, wait_until  # noqa: E402

MIB = 1 << 20
# What destroys the disk that it is given, as wash does.
OTHERS_THAT_WRITE = (
    ("bench", "--image", "DEVICE", "--rw", "randwrite", "--runtime", "0.1"),
    ("bench", "flush", "--image", "DEVICE", "--runtime", "0.1"),
    ("demo", "--image", "DEVICE", "--overwrite", "--size", "4M"),
    ("img", "convert", "-n", "-f", "raw", "-O", "raw", "FILE", "DEVICE"),
    ("img", "convert", "-f", "raw", "-O", "raw", "FILE", "DEVICE"),
)
PEER = ("qemu-storage-daemon --blockdev driver=file,node-name=f,filename={image},cache.direct=on,aio={aio} "
        "--blockdev driver=raw,node-name=d,file=f "
        "--export type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on")


def wash(vblk, *arguments, **options):
    return run(vblk, "wash", *arguments, timeout=options.pop("timeout", 400), **options)


def refused(report, vblk, title, arguments, names, statuses=(1, 2)):
    status, output = wash(vblk, *arguments)
    report.check(f"{title}: refused in one line that names it",
                 status in statuses and names in output and output.count("\n") == 1, f"status {status}\n{output}")


def runs_of(folder):
    """The stored runs, each checked against its digest."""
    runs = []
    for line in (folder / "runs.jsonl").read_text().splitlines():
        found = re.fullmatch(r'\{"digest":"([0-9a-f]{64})","run":(.*)\}', line)
        assert found and hashlib.sha256(found.group(2).encode()).hexdigest() == found.group(1), line[:200]
        runs.append(json.loads(found.group(2)))
    return runs


class Page(html.parser.HTMLParser):
    """What a page loads from elsewhere, and whether its tags are closed."""

    VOID = {"meta", "br", "link", "img", "line", "circle", "rect", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.foreign, self.wrong, self.ids = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        for name in ("src", "href"):
            if values.get(name) and not values[name].startswith("#"):
                self.foreign.append(values[name])
        if tag in ("script", "link", "iframe"):
            self.foreign.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_whole(report, vblk):
    """One trial of everything, with another server, on two images."""
    with Folder() as folder:
        image, qcow2, result = folder / "a.img", folder / "b.qcow2", folder / "result"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "64M"], check=True)
        status, output = wash(vblk, "--image", image, "--image", qcow2, "--size", "64M", "--output", result, "--preset",
                              "smoke", "--randseed", "5", "--peer", PEER, "--eta", "never")
        report.check("a trial of all experiments ends with 0 and the report's path",
                     status == 0 and "report.html" in output, f"status {status}\n{output}")
        if status != 0:
            return
        analysis = json.loads((result / "analysis.json").read_text())
        summary = json.loads((result / "summary.json").read_text())
        runs = runs_of(result)
        failures = {f"{one['cell']} {one['arm']}: {one['error']}" for one in runs if one["error"]}
        report.check("no run fails", not failures, "\n".join(sorted(failures)))
        done = {one["arm"] for one in runs}
        has_ram = not summary["devices"]["ram"].startswith("skipped")
        report.check("every arm that is registered has run", set(analysis["arms"]) == done,
                     f"missing {set(analysis['arms']) - done}")
        cells = {one["cell"] for one in runs}
        report.check("raw and qcow2 are factors", {"core/image/randread-8", "core/image:b.qcow2/randread-8"} <= cells,
                     "\n".join(sorted(cells)))
        if has_ram:
            report.check("the RAM-backed loop device is one", any("/ram/" in cell for cell in cells))
        else:
            report.skip("the RAM-backed loop device is one", summary["devices"]["ram"])
        report.check("the machine's disk is told, though the image was made only now",
                     "file system" in summary["machine"] and summary["identity"]["image"].count("bytes") == 1 and
                     "not there" not in summary["identity"]["image"], f"{summary['machine']} {summary['identity']}")
        report.check("the digest of the rules is that of the file",
                     summary["analysis_sha256"] == hashlib.sha256((result / "analysis.json").read_bytes()).hexdigest())
        claims = {claim["id"]: claim for claim in summary["claims"]}
        without = [name for name, claim in claims.items() if name != "C1c" and
                   not any(one["decides"] and one["cells"] for one in claim["comparisons"])]
        report.check("every claim but that of large batches has cells that decide it", not without, without)
        report.check("two rounds of 60 ms decide nothing and say so",
                     summary["label"].startswith("a trial") and summary["complete"] is True, summary["label"])
        ratios = [cell["ratio"] for claim in claims.values() for one in claim["comparisons"] for cell in one["cells"]
                  if "ratio" in cell]
        report.check("ratios lie inside their intervals", ratios and all(
            cell["interval"][0] <= cell["ratio"] <= cell["interval"][1] for claim in claims.values()
            for one in claim["comparisons"] for cell in one["cells"] if "ratio" in cell))
        page = Page((result / "report.html").read_text())
        report.check("the page is closed, loads nothing, and has a section for each claim",
                     not page.open and not page.wrong and not page.foreign and set(claims) <= page.ids,
                     f"{page.open} {page.wrong} {page.foreign} {set(claims) - page.ids}")
        test_browser(report, result / "report.html")
        rows = list(csv.DictReader((result / "runs.csv").open()))
        report.check("the CSV has a row for each run", len(rows) == len(runs), f"{len(rows)} and {len(runs)}")
        before = (result / "runs.jsonl").read_bytes()
        status, output = wash(vblk, "--output", result, "--report")
        report.check("the reports are made again from what was stored", status == 0 and
                     json.loads((result / "summary.json").read_text())["claims"] == summary["claims"], output)
        refused(report, vblk, "going on with fewer images than it began with",
                ["--image", image, "--output", result, "--preset", "smoke", "--randseed", "5", "--peer", PEER], "image:b.qcow2 (")
        status, output = wash(vblk, "compare", result, result)
        report.check("results are set side by side", status == 0 and "C0" in output and "core/image" in output, output)
        status, output = wash(vblk, "--image", image, "--image", qcow2, "--output", result, "--preset", "smoke",
                              "--randseed", "5", "--peer", PEER, "--eta", "never")
        report.check("what is done is not done again", status == 0 and (result / "runs.jsonl").read_bytes() == before,
                     f"status {status}\n{output}")


def first_pixel(png):
    """The colour of the upper left corner: in a first row every filter of PNG (RFC 2083, 6) leaves it as it is."""
    data, position = b"", 8
    while position < len(png):
        length, kind = struct.unpack(">I4s", png[position:position + 8])
        if kind == b"IDAT":
            data += png[position + 8:position + 8 + length]
        position += 12 + length
    return tuple(zlib.decompress(data)[1:4])


def test_browser(report, page):
    """The page in a real browser."""
    browser = shutil.which("chromium")
    if browser is None:
        return report.skip("the page in a browser", "there is no chromium")
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={page.parent}/browser"]
    url = page.as_uri()
    status, dom = run(*common, "--dump-dom", url, timeout=120)
    report.check("a browser reads the page, with its plots", status == 0 and dom.count("<svg") > 10 and "</html>" in dom, dom[-500:])
    for title, options, wanted in (("light", [], (255, 255, 255)),
                                   ("dark", ["--blink-settings=preferredColorScheme=0"], (21, 24, 28)),
                                   ("light and narrow", ["--window-size=400,2000"], (255, 255, 255))):
        picture = page.parent / "picture.png"
        picture.unlink(missing_ok=True)
        status, output = run(*common, *options, f"--screenshot={picture}", url, timeout=120)
        found = first_pixel(picture.read_bytes()) if picture.exists() else None
        report.check(f"it is drawn {title}", found == wanted, f"{found}\n{output[-500:]}")
    printed = page.parent / "page.pdf"
    run(*common, f"--print-to-pdf={printed}", url, timeout=120)
    report.check("it is printed", printed.exists() and printed.read_bytes().startswith(b"%PDF"))
    # On paper nothing can be opened: what is folded on the screen must be there.
    folded = page.parent / "folded.html"
    folded.write_text(page.read_text().replace("details::details-content", "details::nothing"))
    short = page.parent / "folded.pdf"
    run(*common, f"--print-to-pdf={short}", folded.as_uri(), timeout=120)
    pages = [len(re.findall(rb"/Type\s*/Page\b", path.read_bytes())) for path in (printed, short) if path.exists()]
    report.check("tables that are folded on the screen are printed", len(pages) == 2 and pages[0] > pages[1] > 0, pages)
    report.check("the flush plots and the machine's limits are on the page", 'id="flushes"' in dom and 'id="limits"' in dom)


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.startswith("vblk-wash-")]


def test_kill_and_resume(report, vblk):
    """With other servers that run already."""
    with Folder() as folder, contextlib.ExitStack() as servers:
        image, result = folder / "a.img", folder / "result"
        for engine in ENGINES:
            make_sparse(folder / engine, 64 * MIB)
            servers.enter_context(Server(vblk, [folder / engine, "--aio", engine], folder / f"{engine}.s", folder / "log"))
        command = ["--image", image, "--size", "64M", "--output", result, "--preset", "smoke", "--ram", "off",
                   "--randseed", "9", "--eta", "never", "--peer", folder / "{aio}.s"]
        seen = 0
        for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            process = subprocess.Popen([str(vblk), "wash", *map(str, command)], stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, start_new_session=True)
            path = result / "runs.jsonl"
            goes_on = wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= seen + 12, 120)
            # A terminal sends SIGINT to all of its processes.
            if how == signal.SIGINT:
                os.killpg(process.pid, how)
            else:
                process.send_signal(how)
            output, _ = process.communicate(timeout=60)
            runs = path.read_bytes()
            count = runs[:runs.rfind(b"\n") + 1].count(b"\n")
            report.check(f"after {how.name} all runs up to then are there", goes_on and count >= seen + 12,
                         f"{count} after {seen}\n{output.decode()}")
            if how != signal.SIGKILL:
                report.check(f"{how.name} leaves no files beside the image", not leftovers(folder), leftovers(folder))
                report.check(f"{how.name} ends it with 130, a report, and how to go on",
                             process.returncode == 130 and b"goes on" in output and (result / "report.html").exists(),
                             f"status {process.returncode}\n{output.decode()}")
                label = json.loads((result / "summary.json").read_text())
                report.check("a result that is not whole says so", label["complete"] is False)
            seen = count
        with (result / "runs.jsonl").open("ab") as file:
            file.write(b'{"digest":"torn')
        status, output = wash(vblk, *command)
        runs = runs_of(result)
        report.check("it goes on to the end, past a torn line", status == 0 and "torn" in output, f"status {status}\n{output}")
        report.check("what was measured before is still there", len(runs) > seen, len(runs))
        served = [one for one in runs if one["arm"].startswith("peer-")]
        report.check("servers that ran already have been measured, with their processor time",
                     {one["arm"] for one in served} == {f"peer-{engine}" for engine in ENGINES} and
                     all(one["record"]["metrics"].get("cpu", 0) > 0 for one in served if not one["error"]) and
                     not any(one["error"] for one in served), [one["error"] for one in served])
        kept = {(one["cell"], one["arm"], one["round"]) for one in runs}
        rounds = json.loads((result / "analysis.json").read_text())["presets"]["smoke"]["rounds"]
        cells = {one["cell"] for one in runs}
        report.check("their processor time is none of strangers",
                     all(one["record"]["counters"]["served_elsewhere_seconds"] > 0 for one in served), served[:1])
        report.check("no block is missing",
                     all((cell, arm, number) in kept for number in range(rounds) for cell in cells
                         for arm in {one["arm"] for one in runs if one["cell"] == cell and one["round"] == 0}))
        report.check("what killed runs leave behind the next one clears away", not leftovers(folder), leftovers(folder))

        path = result / "runs.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b'"rate":', b'"rota":', 1))
        refused(report, vblk, "a damaged folder", command, "damaged in line")
        refused(report, vblk, "a report of a damaged folder", ["--output", result, "--report"], "damaged in line")
        report.check("the damaged folder is left alone", path.read_bytes() == whole.replace(b'"rate":', b'"rota":', 1))
        status, output = wash(vblk, "--output", result, "--report", "--force")
        report.check("a damaged folder is reported without that line by --force",
                     status == 0 and "damaged in line" in output and
                     any("damaged" in note for note in json.loads((result / "summary.json").read_text())["notes"]), output)
        path.write_bytes(whole)
        other = shutil.copy(vblk, folder / "other-vblk")
        with open(other, "ab") as file:
            file.write(b"another program")
        refused(report, other, "going on by another program", command, "program (")
        refused(report, vblk, "going on with another preset", 
                ["--image", image, "--output", result, "--preset", "quick", "--randseed", "9"], "preset (smoke, now quick)")
        refused(report, vblk, "going on with a loop device that it did not begin with",
                [word if word != "off" else "on" for word in command], "ram (off, now on)")
        with image.open("r+b") as file:
            file.truncate(96 * MIB)
        refused(report, vblk, "going on with an image of another size", command, "image (")
        with image.open("r+b") as file:
            file.truncate(64 * MIB)
        shutil.copy(image, folder / "copy.img")
        os.rename(image, folder / "kept.img")
        os.rename(folder / "copy.img", image)
        refused(report, vblk, "going on with another image in the same place", command, "image (")
        os.rename(folder / "kept.img", image)
        status, output = wash(other, *command, "--force")
        report.check("it goes on all the same by --force, and says so", status == 0 and "--force" in output,
                     f"status {status}\n{output}")


def test_bad_input(report, vblk):
    with Folder() as folder:
        image, small, out = folder / "a.img", folder / "small.img", folder / "out"
        make_sparse(image, 32 * MIB)
        make_sparse(small, MIB)
        common = ["--output", out, "--preset", "smoke"]
        (folder / "taken").mkdir()
        (folder / "taken" / "thesis.txt").write_text("precious")
        for title, arguments, names in (
                ("no image", common, "--image"),
                ("no output", ["--image", image], "--output"),
                ("unknown preset", ["--image", image, "--output", out, "--preset", "warp"], "warp"),
                ("report and image", [*common, "--image", image, "--report"], "--report"),
                ("report of nothing", ["--output", folder / "none", "--report"], "none"),
                ("unknown option", [*common, "--image", image, "--warp"], "warp"),
                ("ram that is neither", [*common, "--image", image, "--ram", "perhaps"], "perhaps"),
                ("peer without a socket", [*common, "--image", image, "--peer", "server"], "{socket}"),
                ("one socket for all engines", [*common, "--image", image, "--peer", "/run/disk.sock"], "{aio}"),
                ("peer and qcow2", ["--output", out, "--image", folder / "x.qcow2", "--peer", "{image} {socket}"], "raw"),
                ("odd seed", [*common, "--image", image, "--randseed", "x"], "randseed"),
                ("odd size", [*common, "--image", image, "--size", "big"], "--size"),
                ("image that is not there", [*common, "--image", folder / "none.img"], "none.img"),
                ("image that it would make too small", [*common, "--image", folder / "new.img", "--size", "1k"], "too few"),
                ("image that is a folder", [*common, "--image", folder], "irectory"),
                ("image that is too small", [*common, "--image", small], "too few"),
                ("output that holds something else", ["--image", image, "--output", folder / "taken", "--preset", "smoke"],
                 "something else"),
                ("output below a file", ["--image", image, "--output", image / "x", "--preset", "smoke"], "a.img"),
                ("comparison of one", ["compare", out], "two"),
                ("comparison with nothing", ["compare", out, out], "summary.json"),
        ):
            refused(report, vblk, f"wash, {title}", arguments, names)
        report.check("what is refused leaves no folder", not out.exists())
        report.check("what is refused leaves no image", not (folder / "new.img").exists())
        report.check("what is refused leaves the image alone", image.read_bytes().count(0) == 32 * MIB)
        holder = subprocess.Popen([str(vblk), "serve", str(image), "--socket-path", str(folder / "s")],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        holder.stdout.readline()
        refused(report, vblk, "wash, an image that a server has", [*common, "--image", image], "a.img")
        holder.kill()
        holder.communicate()


def test_devices(report, vblk):
    """A device that is mounted, and one that is read-only, are not written to."""
    if os.geteuid() != 0:
        return report.skip("wash, devices", "needs root")
    with Folder() as folder:
        disk, place, arguments = folder / "disk", folder / "mnt", ["--output", folder / "out", "--preset", "smoke"]
        make_sparse(disk, 64 * MIB)
        subprocess.run(["mkfs.ext4", "-q", disk], check=True)
        make_sparse(folder / "source", MIB)
        place.mkdir()
        for title, options, names in (("mounted", [], "is mounted"), ("read-only", ["--read-only"], "ead-only")):
            done = subprocess.run(["losetup", "--find", "--show", *options, disk], capture_output=True, text=True)
            device = done.stdout.strip()
            if done.returncode or (title == "mounted" and subprocess.run(["mount", device, place]).returncode):
                report.skip(f"wash, a {title} device", "no loop device, or it cannot be mounted")
                continue
            before = disk.read_bytes()
            try:
                status, output = wash(vblk, "--image", device, *arguments)
                report.check(f"wash, a {title} device is refused in one line",
                             status == 1 and names in output and output.count("\n") == 1, f"status {status}\n{output}")
                for words in OTHERS_THAT_WRITE if title == "mounted" else ():
                    command = [{"DEVICE": device, "FILE": folder / "source"}.get(word, word) for word in words]
                    status, output = run(vblk, *command)
                    report.check(f"{' '.join(words)}: a mounted device is refused in one line",
                                 status == 1 and names in output and output.count("\n") == 1, f"status {status}\n{output}")
                report.check(f"a {title} device is left alone", title == "mounted" or disk.read_bytes() == before)
            finally:
                subprocess.run(["umount", place], stderr=subprocess.DEVNULL, check=False)
                subprocess.run(["losetup", "--detach", device], check=False)


def test_full_disk(report, vblk):
    if os.geteuid() != 0:
        return report.skip("wash, a full disk", "needs root")
    with Folder() as folder:
        place = folder / "mnt"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12M", "tmpfs", place], stderr=subprocess.DEVNULL).returncode:
            return report.skip("wash, a full disk", "cannot mount a tmpfs")
        try:
            refused(report, vblk, "wash, a disk too full for the image",
                    ["--image", place / "a.img", "--size", "64M", "--output", folder / "out", "--preset", "smoke", "--eta", "never"],
                    "No space left")
        finally:
            subprocess.run(["umount", place], check=False)


def test_full_output(report, vblk):
    """The disk under the result fills while runs are measured."""
    if os.geteuid() != 0:
        return report.skip("wash, a full disk under the result", "needs root")
    with Folder() as folder:
        place = folder / "mnt"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], stderr=subprocess.DEVNULL).returncode:
            return report.skip("wash, a full disk under the result", "cannot mount a tmpfs")
        try:
            result = place / "out"
            command = ["--image", folder / "a.img", "--size", "32M", "--output", result, "--preset", "smoke", "--ram", "off",
                       "--randseed", "3", "--eta", "never"]
            status, output = wash(vblk, *command)
            report.check("wash, a full disk under the result ends it in one line",
                         status == 1 and "No space left" in output and output.count("\n") == 1, f"status {status}\n{output}")
            runs = runs_of(result)
            report.check("what was measured is kept", len(runs) > 5, len(runs))
            report.check("no half of a report is left", not list(result.glob("*.new")), list(result.iterdir()))
            subprocess.run(["mount", "-o", "remount,size=64M", place], check=True)
            status, output = wash(vblk, *command)
            report.check("with space it goes on", status == 0 and runs_of(result)[:len(runs)] == runs, f"status {status}\n{output}")
        finally:
            subprocess.run(["umount", place], check=False)


def test_no_permission(report, vblk):
    """Cells of a device that cannot be had are counted, never made up."""
    if os.geteuid() != 0:
        return report.skip("wash, no permission for a loop device", "needs root, to be another user")
    with Folder() as folder:
        # Where that user may be: the build folder may not be such a place.
        program = shutil.copy(vblk, folder / "vblk")
        os.chmod(folder, 0o777)
        command = [program, "wash", "--image", folder / "a.img", "--size", "32M", "--output", folder / "out", "--preset", "smoke",
                   "--eta", "never"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400, user=65534, group=65534,
                              extra_groups=[], check=False)
        summary = json.loads((folder / "out" / "summary.json").read_text()) if done.returncode == 0 else {}
        skipped = summary.get("skipped_cells", [])
        report.check("without permission for a loop device its cells are skipped and counted",
                     [one["device"] for one in skipped] == ["ram"] and skipped[0]["cells"] == 2 and
                     "ermission" in skipped[0]["because"] and "2 of the cells skipped" in done.stdout,
                     f"status {done.returncode}\n{done.stdout}{done.stderr}{skipped}")
        cells = {cell["cell"] for claim in summary.get("claims", []) for one in claim["comparisons"] for cell in one["cells"]}
        report.check("none of them is in the result", cells and not any("/ram/" in cell for cell in cells), sorted(cells))


def test_progress(report, vblk):
    with Folder() as folder:
        command = [vblk, "wash", "--image", folder / "a.img", "--size", "32M", "--output", folder / "out", "--preset", "smoke",
                   "--ram", "off", "--eta", "always"]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if sum(" runs, about " in seen for seen in lines) == 3:
                    process.terminate()
        told = [re.search(r"(\d+) of \d+ runs, about .*s left: ", line) for line in lines]
        numbers = [int(found[1]) for found in told if found]
        report.check("progress tells runs and the time that is left", len(numbers) >= 3 and numbers == sorted(set(numbers)),
                     "".join(lines))


def test_documented_result(report, vblk):
    """The tables of docs/wash.md are those of the result that is kept beside it."""
    program = Path(__file__).resolve().parent.parent.parent / "scripts" / "wash_tables.py"
    status, output = run(program, "--check")
    report.check("docs/wash.md has the tables of its result", status == 0, output)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--vblk", required=True, type=Path)
    options = parser.parse_args()
    report = Report()
    for test in (test_documented_result, test_bad_input, test_devices, test_full_disk, test_full_output, test_no_permission, test_whole, test_kill_and_resume,
                 test_progress):
        test(report, options.vblk.resolve())
    report.exit()


if __name__ == "__main__":
    main()
