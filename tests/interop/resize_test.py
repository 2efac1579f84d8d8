#!/usr/bin/python3
"""Disks that get another size while requests are under way, by `vblk ctl resize`; checked by qemu-img. Prints TAP."""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
import qcow2_images as qcow2  # noqa: E402
from harness import ENGINES, Folder, Poke, Report, Script, Server, make_sparse, run, test_seed  # noqa: E402
from qcow2_images import KIB, MIB, SECTOR, Recipe, qemu_img  # noqa: E402

STATUS_OK, STATUS_IOERR = 0, 1


def ctl_resize(options, monitor, size):
    return run(options.vblk, "ctl", monitor, "resize", size)


def serve(options, folder, image, *arguments):
    return Server(options.vblk, [image, "--monitor", folder / "m", "--queues", 4, "--iothreads", 2, *arguments],
                  folder / "s", folder / "log")


def size_of(image, image_format):
    _, text = run("qemu-img", "info", "--output", "json", "-f", image_format, image)
    return json.loads(text)["virtual-size"]


def sectors_told(options, server):
    """What a frontend that connects is told."""
    with Poke(options.poke, server.socket) as poke:
        return poke("config")["capacity"]


def test_growth_under_load(report, options, engine, recipe):
    """Requests of four queues go on within the old end while the disk grows, and none of them notices."""
    with Folder() as folder:
        title = f"{recipe.name if recipe else 'raw'} on {engine}"
        if recipe:
            image, _ = recipe.make(folder, options.random)
            image_format, cluster, size = "qcow2", recipe.cluster_size(), recipe.size
        else:
            image, image_format, cluster, size = folder / "disk.img", "raw", 4 * KIB, MIB + SECTOR
            make_sparse(image, size)
        with serve(options, folder, image, "--aio", engine) as server, Script(options.churn) as churn:
            answer = churn(f"connect {server.socket} 4")
            report.check(f"{title}: connected", answer["text"].startswith("connected"), answer["text"])
            churn("adopt")
            churn.start(f"run {options.random.getrandbits(32)} 6000 8 {cluster} wwwrrdzuf")
            for step in range(1, 9):
                # Mostly within a page of the host's.
                size += step * (512 * KIB + SECTOR)
                status, output = ctl_resize(options, folder / "m", size)
                report.check(f"{title}: grows to {size} bytes", status == 0 and json.loads(output)["size"] == size, output)
                time.sleep(options.random.random() / 20)
            answer = churn.answer()
            report.check(f"{title}: no request beside it fails or finds what it should not",
                         (answer.get("failed"), answer.get("bad"), answer.get("lost")) == (0, 0, 0), answer["text"])
            # As the driver still sees it: the old size.
            churn(f"dump {folder / 'model'}")
            churn("disconnect")
            report.check(f"{title}: a frontend is told of the new size", sectors_told(options, server) == size // SECTOR)
            with Poke(options.poke, server.socket) as poke:
                last = size // SECTOR - 8
                answers = [poke(f"read {last} 8"), poke(f"write {last} 8 77"), poke(f"read {last} 8"), poke(f"read {last + 1} 8")]
                report.check(f"{title}: the new end is there, holds what is written, and is an end",
                             [answer["status"] for answer in answers] == [STATUS_OK] * 3 + [STATUS_IOERR]
                             and answers[0]["first"] == 0 and answers[2]["first"] == 77, answers)
            status = server.stop()
            report.check(f"{title}: the server ends with 0", status == 0, f"{status}\n{server.log.read_text()}")
        report.check(f"{title}: qemu-img sees the new size", size_of(image, image_format) == size)
        if recipe:
            found = qcow2.check(image)
            report.check(f"{title}: qemu-img check finds nothing", qcow2.is_clean(found), found["text"])
            qcow2.to_raw(image, folder / "raw")
        else:
            os.link(image, folder / "raw")
        with open(folder / "raw", "rb") as raw:
            same = raw.read(os.path.getsize(folder / "model")) == (folder / "model").read_bytes()
        report.check(f"{title}: the host reads what the driver read", same)


def test_up_and_down(report, options, engine):
    """What a smaller end has cut off does not come back with a larger one."""
    recipe = Recipe("down", {"cluster_size": 4 * KIB}, 6 * MIB)
    with Folder() as folder:
        image, _ = recipe.make(folder, options.random)
        with serve(options, folder, image, "--aio", engine) as server:
            with Poke(options.poke, server.socket) as poke:
                poke(f"write 0 {recipe.size // SECTOR // 16} 5")
                end = recipe.size // SECTOR - 16
                poke(f"write {end} 16 6")
                for size in (recipe.size - 4 * KIB, MIB + SECTOR, recipe.size):
                    status, output = ctl_resize(options, folder / "m", size)
                    report.check(f"{engine}: gets {size} bytes", status == 0, output)
                    if size < recipe.size:
                        answer = poke(f"read {size // SECTOR} 1")
                        report.check(f"{engine}: beyond {size} bytes there is nothing", answer["status"] == STATUS_IOERR,
                                     answer["text"])
                answer = poke(f"read {end} 16")
                report.check(f"{engine}: what was cut off reads as zeroes", (answer["status"], answer["first"]) == (0, 0),
                             answer["text"])
                answer = poke("read 0 64")
                report.check(f"{engine}: what was not is still there", (answer["status"], answer["first"]) == (0, 5),
                             answer["text"])
            report.check(f"{engine}: the server ends with 0", server.stop() == 0, server.log.read_text())
        found = qcow2.check(image)
        report.check(f"{engine}: qemu-img check finds nothing after it", qcow2.is_clean(found), found["text"])


def test_refusals(report, options):
    with Folder() as folder:
        raw, disk, old, frozen = (folder / name for name in ("disk.img", "disk.qcow2", "old.qcow2", "frozen.qcow2"))
        make_sparse(raw, MIB)
        for image, compat in ((disk, "1.1"), (old, "0.10"), (frozen, "1.1")):
            qemu_img("create", "-f", "qcow2", "-o", f"compat={compat}", image, MIB)
        qemu_img("snapshot", "-c", "one", old)
        cases = [
            ("a raw disk made smaller", raw, [], 512 * KIB, "can only become larger"),
            ("part of a sector", disk, [], MIB + 100, "multiple"),
            ("part of a block", disk, ["--logical-block-size", "4096"], MIB + SECTOR, "multiple"),
            ("no size", disk, [], "0", "size"),
            ("no number", disk, [], "large", "large"),
            ("more than the format has", disk, [], "16E", ""),
            ("more than its table may have", disk, [], "1E", "cannot have more than"),
            ("snapshots of version 2", old, [], 2 * MIB, "snapshots"),
            ("a disk that is not written", frozen, ["--read-only"], 2 * MIB, "read"),
        ]
        for title, image, arguments, size, names in cases:
            with serve(options, folder, image, *arguments) as server:
                status, output = ctl_resize(options, folder / "m", size)
                lines = output.strip().splitlines()
                report.check(f"refused in one line: {title}", status == 1 and len(lines) == 1 and names in output, output)
                told = sectors_told(options, server)
                server.stop()
            found = size_of(image, "raw" if image == raw else "qcow2")
            report.check(f"unchanged: {title}", told * SECTOR == found == MIB, f"{told} sectors, {found} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    parser.add_argument("--poke", required=True, type=Path, help="tests/interop/poke")
    parser.add_argument("--churn", required=True, type=Path, help="tests/interop/churn")
    options = parser.parse_args()
    options.random = random.Random(test_seed())
    for name in ("vblk", "poke", "churn"):
        setattr(options, name, getattr(options, name).resolve())
    report = Report()
    for engine in ENGINES:
        test_growth_under_load(report, options, engine, None)
    recipes = [
        Recipe("plain", {}, 4 * MIB),
        Recipe("small_clusters", {"cluster_size": 512, "refcount_bits": 1}, MIB + SECTOR),
        Recipe("subclusters", {"extended_l2": "on", "cluster_size": 16 * KIB}, 4 * MIB, snapshots=True),
    ]
    for engine, recipe in zip(ENGINES, recipes):
        test_growth_under_load(report, options, engine, recipe)
        test_up_and_down(report, options, engine)
    test_refusals(report, options)
    report.exit()


if __name__ == "__main__":
    main()
