#!/usr/bin/python3
"""`vblk img` beside Debian's qemu-img, on the same inputs. Prints TAP.

What both say must be the same: exit status, standard output where a script would read it, JSON. Images that vblk makes
are judged by qemu-img. Where the two differ on purpose, the test says so.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from harness import Folder, Report, Server, allocated_bytes, test_seed, wait_until  # noqa: E402
from power_cut import FATES, after_power_cut, operations_of  # noqa: E402
from qcow2_images import (COPIED, EXTENSION_BITMAPS, INCOMPAT_EXTENDED_L2, KIB, MIB, OFFSET_MASK, SECTOR, Header, check,  # noqa: E402
                          extension_offset, is_clean, is_sound, l2_entry_offset, option_matrix, qemu_img, qemu_io, read_number,
                          write_number)


class Tool:
    """A program that takes qemu-img's command lines; says (status, output, errors)."""

    def __init__(self, *command):
        self.command = list(map(str, command))

    def __call__(self, *arguments, **options):
        done = subprocess.run([*self.command, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=options.pop("timeout", 60), **options)
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    def start(self, *arguments, **options):
        return subprocess.Popen([*self.command, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, **options)

    def works(self, *arguments, **options):
        status, output, errors = self(*arguments, **options)
        if status != 0:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: status {status}: {errors}")
        return output


QEMU = Tool("qemu-img")


class Holder:
    """A program that opens an image by qemu-io's command line and has it open while a `with` block runs."""

    def __init__(self, *command):
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process.stdin.write(b"length\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate(timeout=20)


def same(report, name, vblk, arguments, change=lambda text: text, **options):
    """Both say the same on standard output, and end with the same status."""
    theirs, ours = QEMU(*arguments, **options), vblk(*arguments, **options)
    good = theirs[0] == ours[0] and change(theirs[1]) == change(ours[1])
    return report.check(name, good, f"{' '.join(map(str, arguments))}\nqemu-img: {theirs}\nvblk img: {ours}")


def both_at_once(vblk, *arguments):
    """(status, output, errors) of both, for what only looks at an image. qemu-img is stopped when it goes on for too long: there
    are sizes for which it takes minutes."""
    limits = [lambda: resource.setrlimit(resource.RLIMIT_CPU, (5, 5)), None]
    ended = []
    for process in [tool.start(*arguments, preexec_fn=limit) for tool, limit in zip((QEMU, vblk), limits)]:
        output, errors = process.communicate(timeout=120)
        ended.append((process.returncode, output.decode(errors="replace"), errors.decode(errors="replace")))
    return ended


def as_json(text):
    return json.loads(text) if text.strip() else None


def released(path):
    """Waits until the kernel has given up the locks of a process that was killed."""
    return wait_until(lambda: "Failed to get" not in QEMU("map", path)[2])


def without_holes(text):
    """A map as JSON. Where an image has many clusters that were never written, qemu-img asks the file below, and tells
    of data that is zero; here data is data."""
    merged = []
    for piece in json.loads(text):
        piece["zero"] = piece["zero"] and not piece["data"]
        last = merged[-1] if merged else None
        if last and all(last.get(key) == piece.get(key) for key in ("depth", "present", "zero", "data")) and \
                ("offset" in last) == ("offset" in piece) and \
                last.get("offset", 0) + last["length"] == piece.get("offset", last["length"]):
            last["length"] += piece["length"]
        else:
            merged.append(piece)
    return merged


def each_fails(report, name, vblk, cases, folder, **options):
    """Each command line fails with qemu-img's status and one line, and leaves no file behind."""
    wrong = []
    for arguments in cases:
        before = sorted(os.listdir(folder))
        theirs = QEMU(*arguments, **options)
        for left in set(os.listdir(folder)) - set(before):
            (folder / left).unlink()
        ours = vblk(*arguments, **options)
        lines = ours[2].splitlines()
        after = sorted(os.listdir(folder))
        if not (ours[0] == theirs[0] != 0 and len(lines) == 1 and lines[0].startswith("vblk img: ") and before == after):
            wrong.append(f"{' '.join(map(str, arguments))}: qemu-img {theirs}, vblk img {ours}, {before} {after}")
    return report.check(name, not wrong, "\n".join(wrong))


# ---- What is there: info, map, measure, check of sound images.

def describes_alike(report, vblk, folder, rng):
    different = {what: [] for what in ("info", "info as JSON", "chain", "map", "map as JSON", "part of the map", "check",
                                       "check as JSON", "measure")}
    for number, recipe in enumerate(option_matrix(rng, 36)):
        place = folder / f"r{number}"
        place.mkdir()
        image, _ = recipe.make(place, rng)

        def compare(what, *arguments, change=lambda text: text):
            # A second time: the space that files have changes while the kernel writes them back.
            for _ in range(2):
                theirs, ours = both_at_once(vblk, *arguments)
                if theirs[0] == ours[0] and change(theirs[1]) == change(ours[1]):
                    return
            different[what].append(f"{recipe}: {' '.join(map(str, arguments))}\n{theirs}\n{ours}")

        compare("info", "info", image)
        compare("info as JSON", "info", "--output=json", image, change=as_json)
        compare("chain", "info", "--backing-chain", "--output=json", image, change=as_json)
        compare("check", "check", image)
        compare("check as JSON", "check", "--output", "json", image, change=as_json)
        compare("measure", "measure", "-O", "raw", image)
        theirs = QEMU.works("map", "--output=json", image)
        has_holes = '"zero": true, "data": true' in theirs
        compare("map as JSON", "map", "--output=json", image,
                change=without_holes if has_holes else lambda text: text)
        start = rng.randrange(recipe.size // SECTOR) * SECTOR
        compare("part of the map", "map", "--output=json", f"--start-offset={start}", "--max-length=1M", image,
                change=without_holes if has_holes else lambda text: text)
        if not has_holes:
            compare("map", "map", image)
            compare("measure", "measure", "--output=json", "-O", "qcow2", image, change=as_json)
            compare("measure", "measure", "-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=8", image)
        shutil.rmtree(place)
    for what, cases in different.items():
        report.check(f"{what}: the same as qemu-img says, for images of every option", not cases, "\n".join(cases[:3]))


def describes_special(report, vblk, folder):
    empty, odd, disk = folder / "empty.raw", folder / "odd.raw", folder / "zero.qcow2"
    empty.touch()
    odd.write_bytes(b"x" * 1000)
    qemu_img("create", "-f", "qcow2", disk, 0)
    for path in (empty, odd, disk):
        image_format = path.suffix[1:]
        for arguments in (["info", "-f", image_format], ["info", "--output=json", "-f", image_format],
                          ["map", "--output=json", "-f", image_format], ["map", "-f", image_format],
                          ["measure", "-O", "qcow2", "-f", image_format]):
            change = as_json if arguments[1] == "--output=json" else lambda text: text
            same(report, f"{path.name}: {' '.join(arguments)}", vblk, [*arguments, path], change)
    same(report, "a raw image has nothing to check: status 63", vblk, ["check", "-f", "raw", odd])
    for options in (["-q"], ["-q", "--output=json"], ["-q", "--output=human"]):
        same(report, f"check {' '.join(options)} says nothing", vblk, ["check", *options, disk])
    for size in ("0", "1", "513", "1M", "10G", "1.5T"):
        for options in ([], ["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-o", "cluster_size=512,refcount_bits=64"],
                        ["-O", "qcow2", "-o", "extended_l2=on,preallocation=full"]):
            if size == "1.5T" and "cluster_size=512,refcount_bits=64" in options:
                continue
            same(report, f"measure --size {size} {' '.join(options)}", vblk, ["measure", "--size", size, *options])
    each_fails(report, "commands that make no sense fail as qemu-img's do", vblk, [
        ["info"], ["info", empty, odd], ["info", folder / "none"], ["info", "--output=xml", odd], ["info", "--nonsense", odd],
        ["info", "-f", "nonsense", odd], ["info", "-f", "qcow2", odd], ["info", folder], ["nonsense"], [],
        ["map"], ["map", "--start-offset=x", odd], ["measure"], ["measure", "--size", "1G", odd],
        ["measure", "--size", "1P", "-O", "qcow2", "-o", "cluster_size=512"], ["measure", "--size", "1G", "-O", "nonsense"],
        ["check"], ["check", folder / "none"], ["check", "-r", "nonsense", disk], ["check", "-f", "qcow2", odd], ["compare", odd], ["compare", odd, folder / "none"],
        ["compare", "--nonsense", odd, odd]], folder)


def takes_descriptions(report, vblk, folder):
    """--image-opts, as far as a description only says what a format and a name would."""
    raw, image, odd = folder / "disk.raw", folder / "image.qcow2", folder / "a,b.qcow2"
    raw.write_bytes(b"some text" * 70000)
    os.truncate(raw, MIB)
    for path in (image, odd):
        QEMU.works("convert", "-f", "raw", "-O", "qcow2", raw, path)
    of_raw, of_image = f"driver=raw,file.filename={raw}", f"driver=qcow2,file.driver=file,file.filename={image}"
    of_odd = f"file.filename={folder}/a,,b.qcow2"
    for command, *more in (("info", "--output=json"), ("check", "--output=json"), ("map", "--output=json"),
                           ("measure", "--output=json", "-O", "qcow2"), ("info", "--output=json", "--backing-chain"), ("snapshot", "-l")):
        change = (lambda text: text) if command == "snapshot" else as_json
        for name in (of_image, of_odd, *([] if command in ("check", "snapshot") else [of_raw])):
            same(report, f"{command} --image-opts {name.split(',')[0]}", vblk, [command, "--image-opts", *more, name], change)
    same(report, "compare --image-opts", vblk, ["compare", "--image-opts", of_raw, of_image])
    same(report, "compare --image-opts, the other way", vblk, ["compare", "--image-opts", of_odd, of_raw])
    with Holder("qemu-io", "-f", "qcow2", image):
        same(report, "force-share=on looks all the same", vblk, ["info", "--output=json", "--image-opts", f"force-share=on,{of_image}"],
             as_json)
    wrong = []
    for arguments in (["convert", "--image-opts", "-O", "qcow2", of_image, folder / "new"],
                      ["convert", "--image-opts", "-O", "raw", of_raw, of_raw, folder / "new"],
                      ["resize", "--image-opts", f"driver=qcow2,file.filename={folder}/new", "3M"],
                      ["amend", "--image-opts", "-o", "lazy_refcounts=on", f"driver=qcow2,file.filename={folder}/new"],
                      ["bitmap", "--image-opts", "--add", f"driver=qcow2,file.filename={folder}/new", "b"],
                      ["snapshot", "--image-opts", "-c", "s", f"file.filename={folder}/new"],
                      ["rebase", "--image-opts", "-u", "-b", raw, "-F", "raw", f"driver=qcow2,file.filename={folder}/new"],
                      ["commit", "--image-opts", "-d", f"driver=qcow2,file.filename={folder}/new"],
                      ["convert", "-n", "--target-image-opts", "-f", "raw", raw, f"driver=qcow2,file.filename={folder}/new"]):
        ended = []
        for tool, place in ((QEMU, folder / "theirs.new"), (vblk, folder / "ours.new")):
            shutil.copy(place if place.exists() and arguments[0] != "convert" else image, folder / "new")
            if arguments[0] == "convert" and "-n" not in arguments:
                (folder / "new").unlink()
            ended.append(tool(*arguments)[:2])
            shutil.move(folder / "new", place)
        kind = "raw" if "raw" == arguments[arguments.index("-O") + 1 if "-O" in arguments else 0] else "qcow2"
        # The bitmap makes commit go another way here.
        if ended[0] != ended[1] and arguments[0] != "commit" or \
                identical(folder / "theirs.new", kind, folder / "ours.new", kind)[0] != 0:
            wrong.append(f"{arguments}: {ended}")
        if kind == "raw":
            for name in ("theirs.new", "ours.new"):
                shutil.copy(image, folder / name)
    report.check("commands that change or make images take descriptions", not wrong, "\n".join(wrong))
    each_fails(report, "descriptions that say nothing, too much or something else fail as with qemu-img", vblk, [
        ["info", "--image-opts", image], ["info", "--image-opts", "driver=qcow2"], ["info", "--image-opts", f"filename={image}"],
        ["info", "-f", "qcow2", "--image-opts", of_image], ["info", "--image-opts", f"nonsense=1,{of_image}"],
        ["info", "--image-opts", f"driver=nonsense,file.filename={image}"], ["info", "--image-opts", f"driver=qcow2,file.filename={raw}"],
        ["info", "--image-opts", f"driver=qcow2,file.filename={folder}/none"], ["compare", "--image-opts", of_image],
        ["convert", "--target-image-opts", "-f", "raw", raw, f"driver=raw,file.filename={folder}/x"],
        ["convert", "-n", "-O", "raw", "--target-image-opts", raw, of_raw], ["snapshot", "--image-opts", "-l", "-c", "x", of_image]],
        folder)
    for path in folder.iterdir():
        path.unlink()


# ---- create

def creates_alike(report, vblk, folder, rng):
    different = []
    base = folder / "base.qcow2"
    qemu_img("create", "-f", "qcow2", base, "5M")
    count = 0
    for recipe in option_matrix(rng, 44):
        options = dict(recipe.options)
        arguments = ["-f", "qcow2"]
        path = folder / "new.qcow2"
        if recipe.data_file:
            options["data_file"] = folder / "new.data"
        if recipe.backing:
            arguments += ["-b", "base.qcow2" if rng.random() < 0.5 else base, "-F", "qcow2"]
        if options:
            arguments += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
        arguments.append(path)
        if not recipe.backing or rng.random() < 0.5:
            large = [] if "preallocation" in options or recipe.data_file else ["77M", "3G"]
            arguments.append(rng.choice(["0", "512", "1000", "1M", str(recipe.size), *large]))
        found = []
        for tool in (QEMU, vblk):
            status, output, errors = tool("create", *arguments)
            if status != 0:
                found.append((status, output))
            else:
                information = as_json(QEMU.works("info", "--output=json", path))
                information.pop("actual-size")
                found.append((status, output, information, is_clean(check(path)), path.stat().st_mode))
            found[-1] += (sorted(p.name for p in folder.iterdir()),)
            for name in ("new.qcow2", "new.data"):
                (folder / name).unlink(missing_ok=True)
        count += found[0][0] == 0
        if found[0] != found[1]:
            different.append(f"{' '.join(map(str, arguments))}\n{found[0]}\n{found[1]}")
    report.check("create: the same image as qemu-img's, for every option", not different and count > 30,
                 f"{count}\n" + "\n".join(different[:3]))
    for mode in ("off", "falloc", "full"):
        path = folder / "raw"
        same(report, f"create -f raw -o preallocation={mode}", vblk, ["create", "-o", f"preallocation={mode}", path, "1M"])
        report.check(f"it has its size and space ({mode})",
                     path.stat().st_size == MIB and (allocated_bytes(path) >= MIB) == (mode != "off"))
        path.unlink()
    old = folder / "old.qcow2"
    old.write_bytes(b"what was there" * 1000)
    old.chmod(0o600)
    link = folder / "link.qcow2"
    link.symlink_to("old.qcow2")
    vblk.works("create", "-q", "-f", "qcow2", link, "1M")
    report.check("create takes an old file's place, mode and symbolic link",
                 link.is_symlink() and old.stat().st_mode & 0o777 == 0o600 and is_clean(check(old)))
    for path in (old, link):
        path.unlink()
    each_fails(report, "create refuses what qemu-img refuses", vblk, [
        ["create", "-f", "qcow2"], ["create", "-f", "qcow2", folder / "x"], ["create", "-f", "nonsense", folder / "x", "1M"],
        ["create", "-f", "qcow2", folder / "x", "10foo"], ["create", "-f", "qcow2", folder / "x", "9E"],
        ["create", "-f", "qcow2", folder / "no" / "x", "1M"], ["create", "-f", "qcow2", folder / "x", "1M", "2M"],
        ["create", "-f", "qcow2", "-b", "none", "-F", "raw", folder / "x", "1M"],
        ["create", "-f", "qcow2", "-b", base, folder / "x"], ["create", "-f", "raw", "-b", base, "-F", "qcow2", folder / "x", "1M"],
        *(["create", "-q", "-f", "qcow2", "-o", options, folder / "x", "1M"] for options in (
            "nonsense=1", "cluster_size=1000", "cluster_size=4M", "cluster_size=256", "refcount_bits=5", "refcount_bits=128",
            "compat=0.10,refcount_bits=8", "compat=0.10,extended_l2=on", "compat=0.10,lazy_refcounts=on",
            "compat=0.10,compression_type=zstd", "compat=2", "extended_l2=on,cluster_size=8k", "data_file_raw=on",
            "preallocation=nonsense", "compression_type=lz4", "encryption=on", "lazy_refcounts=maybe")),
        ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", folder / "x", "1T"],
        ["create", "-q", "-f", "raw", "-o", "preallocation=metadata", folder / "x", "1M"],
        ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "-b", base, "-F", "qcow2", folder / "x"]], folder)
    status, output, _ = vblk("create", "-f", "qcow2", "-o", "help")
    listed = set(re.findall(r"^  (\w+)=", output, re.M))
    # With a name qemu-img adds what is asked of the file below.
    theirs = set(re.findall(r"^  ([\w.-]+)=", QEMU("create", "-f", "qcow2", "-o", "help", folder / "x")[1], re.M))
    report.check("-o help lists qemu-img's options but encryption's",
                 status == 0 and listed == {name for name in theirs if not name.startswith("encrypt")}, f"{listed ^ theirs}")


# ---- convert

def gives_hints(report, vblk, folder):
    """What is wished of the file system is asked for as qemu-img asks; whether it heeds it is its own affair."""
    log, wrong = folder / "log", []
    for kind, words in (("raw", "nocow=on"), ("qcow2", "nocow=on"), ("raw", "extent_size_hint=2M"), ("raw", "nocow=off"),
                        ("raw", "preallocation=off,nocow=on,extent_size_hint=1M")):
        asked = []
        for tool in (QEMU, vblk):
            traced = Tool("strace", "-f", "-o", log, "-e", "trace=ioctl", *tool.command)
            ended = traced("create", "-f", kind, "-o", words, folder / "new", "1M")
            calls = log.read_text()
            asked.append((*ended[:2], "FS_IOC_GETFLAGS" in calls,
                          "FS_IOC_FSGETXATTR" in calls or "extent_size_hint" not in words))
        if asked[0] != asked[1]:
            wrong.append(f"{kind} {words}: {asked}")
    report.check("create -o nocow and extent_size_hint ask what qemu-img asks", not wrong, "\n".join(wrong))
    for path in folder.iterdir():
        path.unlink()


def content(rng, size, block=64 * KIB):
    """Text that compresses, noise that does not, zeroes: a third of each."""
    made = bytearray(size)
    for at in range(0, size, block):
        length, kind = min(block, size - at), rng.randrange(3)
        if kind == 0:
            made[at:at + length] = rng.randbytes(length)
        elif kind == 1:
            made[at:at + length] = (b"%016d some text that compresses\n" % at * (length // 32 + 1))[:length]
    return made


def identical(first, first_format, second, second_format):
    return QEMU("compare", "-f", first_format, "-F", second_format, first, second)


def converts(report, vblk, folder, rng):
    failures, count = [], 0
    for number, recipe in enumerate(option_matrix(rng, 36)):
        place = folder / f"c{number}"
        place.mkdir()
        image, _ = recipe.make(place, rng)
        targets = [("raw", []), ("raw", ["-W", "-m", "1"]), ("qcow2", []), ("qcow2", ["-c"]),
                   ("qcow2", ["-c", "-o", "compression_type=zstd,cluster_size=4k"]), ("qcow2", ["-S", "0"]),
                   ("qcow2", ["-W", "-o", f"cluster_size={512 << rng.randrange(13)},refcount_bits={1 << rng.randrange(7)}"]),
                   ("qcow2", ["-c", "-o", f"cluster_size={512 << rng.randrange(13)},refcount_bits={1 << rng.randrange(7)}"]),
                   ("qcow2", ["-o", "compat=0.10"]), ("qcow2", ["-o", "extended_l2=on", "-t", "writeback"]),
                   ("qcow2", ["-o", "preallocation=metadata"]), ("qcow2", ["-o", "preallocation=falloc", "-t", "none"]),
                   ("qcow2", ["-o", f"data_file={place}/data,data_file_raw=on"]), ("raw", ["-S", "64k", "-t", "none"]),
                   ("raw", ["-S", "0", "-T", "none", "-m", "16"])]
        for kind, options in rng.sample(targets, 2):
            target = place / "target"
            status, output, errors = vblk("convert", "-O", kind, *options, image, target)
            count += 1
            found = identical(image, "qcow2", target, kind)
            good = status == 0 and not output and not errors and found[0] == 0
            if good and kind == "qcow2":
                good = is_clean(check(target))
            if not good:
                failures.append(f"{recipe}: {kind} {options}: {status} {errors} {found} {check(target)['text']}")
            for left in ("target", "data"):
                (place / left).unlink(missing_ok=True)
        shutil.rmtree(place)
    report.check("convert: every image is the same disk afterwards, and clean", not failures and count >= 70,
                 "\n".join(failures[:3]))


def brings_threads_in(report, vblk, folder, raw):
    """One thread copies; data that is compressed is the work of all, from where it is met."""
    mixed, plain, back = folder / "mixed.qcow2", folder / "plain.qcow2", folder / "back.raw"
    QEMU.works("convert", "-f", "raw", "-O", "qcow2", "-c", raw, mixed)
    QEMU.works("convert", "-f", "raw", "-O", "qcow2", raw, plain)
    # The first third is written again, and not compressed then.
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4M", mixed], stdout=subprocess.DEVNULL, check=True)
    for path, all_of_them in (plain, False), (mixed, os.cpu_count() > 1):
        trace = folder / "trace"
        status = subprocess.run(["strace", "-f", "-qq", "-e", "trace=clone,clone3,io_uring_setup", "-o", trace, *vblk.command, "convert",
                                 "-O", "raw", path, back]).returncode
        calls = trace.read_text()
        has_rings = re.search(r"io_uring_setup\(.*= \d", calls)  # otherwise there are the threads of a pool
        report.check(f"{path.name}: {'several threads' if all_of_them else 'one thread'}, and the same disk",
                     status == 0 and identical(path, "qcow2", back, "raw")[0] == 0 and
                     (not has_rings or ("clone" in calls) == all_of_them), f"{status} {calls}")


def answers_signals(report, vblk, folder, raw):
    """SIGUSR1, as qemu-img does."""
    process = subprocess.Popen([*vblk.command, "convert", "-r", "4M", "-f", "raw", "-O", "raw", raw, folder / "asked.raw"],
                               stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=60)[1]
    report.check("SIGUSR1 asks for the progress", process.returncode == 0 and re.fullmatch(r" +\(\d+\.\d\d/100%\)\n", errors),
                 f"{process.returncode} {errors}")


def converts_content(report, vblk, folder, rng):
    raw = folder / "content.raw"
    whole = content(rng, 12 * MIB + 3 * SECTOR)
    for name, options in {"plain": [], "deflate": ["-c"], "zstd": ["-c", "-o", "compression_type=zstd"],
                          "out of order": ["-W", "-c"], "narrow refcounts": ["-c", "-o", "refcount_bits=1"],
                          "small clusters": ["-c", "-o", "cluster_size=512"],
                          "large clusters": ["-c", "-o", "cluster_size=2M,compression_type=zstd"]}.items():
        ours, theirs = folder / "ours.qcow2", folder / "theirs.qcow2"
        # qemu-img is slow with small clusters.
        raw.write_bytes(whole[:MIB] if "cluster_size=512" in options else whole)
        vblk.works("convert", "-f", "raw", "-O", "qcow2", *options, raw, ours)
        QEMU.works("convert", "-f", "raw", "-O", "qcow2", *options, raw, theirs)
        found = identical(raw, "raw", ours, "qcow2")
        report.check(f"{name}: the same disk, clean, as compact as qemu-img's",
                     found[0] == 0 and is_clean(check(ours)) and
                     ours.stat().st_size <= theirs.stat().st_size * 1.03 + 256 * KIB + 2 * (1 << Header(ours)["cluster_bits"]),
                     f"{found} {check(ours)['text']} {ours.stat().st_size} {theirs.stat().st_size}")
        back = folder / "back.raw"
        vblk.works("convert", "-O", "raw", theirs, back)
        report.check(f"{name}: qemu-img's image is read back", back.read_bytes() == raw.read_bytes())
        same(report, f"{name}: compare says so too", vblk, ["compare", "-f", "raw", "-F", "qcow2", raw, theirs])
    raw.write_bytes(whole)
    vblk.works("convert", "-f", "raw", "-O", "raw", raw, folder / "sparse.raw")
    report.check("zeroes become holes", allocated_bytes(folder / "sparse.raw") < 0.8 * raw.stat().st_size)
    vblk.works("convert", "-f", "raw", "-O", "raw", "-S", "0", raw, folder / "full.raw")
    report.check("-S 0 writes them", allocated_bytes(folder / "full.raw") >= raw.stat().st_size)
    brings_threads_in(report, vblk, folder, raw)
    parts = [folder / "a.raw", folder / "b.raw"]
    for path in parts:
        path.write_bytes(content(rng, MIB + rng.randrange(9) * SECTOR))
    vblk.works("convert", "-f", "raw", "-O", "qcow2", *parts, folder / "both.qcow2")
    QEMU.works("convert", "-f", "raw", "-O", "raw", *parts, folder / "both.raw")
    report.check("several images become one", identical(folder / "both.qcow2", "qcow2", folder / "both.raw", "raw")[0] == 0)
    begun = time.monotonic()
    vblk.works("convert", "-r", "2M", "-f", "raw", "-O", "raw", parts[0], folder / "slow.raw")
    vblk.works("convert", "-r", "16M", "-f", "raw", "-O", "raw", raw, folder / "slow.raw")
    report.check("a rate limit is kept", time.monotonic() - begun > 0.6 * allocated_bytes(folder / "sparse.raw") / (16 * MIB))
    answers_signals(report, vblk, folder, raw)
    status, output, _ = vblk("convert", "-p", "-f", "raw", "-O", "qcow2", raw, folder / "p.qcow2")
    report.check("-p shows progress from 0 to 100",
                 status == 0 and output.startswith("    (0.00/100%)\r") and output.endswith("    (100.00/100%)\r\n"), output)
    for path in folder.iterdir():
        path.unlink()


def converts_overlays(report, vblk, folder, rng):
    names = [folder / f"chain{n}.qcow2" for n in range(5)]
    QEMU.works("create", "-f", "qcow2", names[0], "8M")
    for below, image in zip(names, names[1:]):
        QEMU.works("create", "-f", "qcow2", "-b", below.name, "-F", "qcow2", image, "9M")
    for image in names:
        for _ in range(6):
            at = rng.randrange(100) * 64 * KIB + rng.randrange(64) * SECTOR
            command = rng.choice(["write -P 7", "write -P 200", "write -z"])
            qemu_io(image, f"{command} {at} {rng.randrange(1, 200) * SECTOR}")
    top = names[-1]
    vblk.works("convert", "-O", "qcow2", top, folder / "flat.qcow2")
    report.check("a chain of five becomes one image",
                 identical(top, "qcow2", folder / "flat.qcow2", "qcow2")[0] == 0 and is_clean(check(folder / "flat.qcow2")))
    for options in ([], ["-o", "compat=0.10"], ["-o", "extended_l2=on"], ["-o", "cluster_size=4k"], ["-c"],
                    ["-o", "cluster_size=2M"], ["-S", "0"], ["-S", "0", "-o", "cluster_size=4k"], ["-W", "-S", "64k"]):
        over = folder / "over.qcow2"
        vblk.works("convert", "-O", "qcow2", *options, "-B", names[-2].name, "-F", "qcow2", top, over)
        information = as_json(QEMU.works("info", "--output=json", over))
        report.check(f"-B keeps the backing file {' '.join(options)}",
                     information["backing-filename"] == names[-2].name and is_clean(check(over)) and
                     identical(top, "qcow2", over, "qcow2")[0] == 0, check(over)["text"])
    QEMU.works("snapshot", "-c", "before", top)
    QEMU.works("convert", "-l", "before", "-O", "raw", top, folder / "before.raw")
    qemu_io(top, "write -P 99 0 1M")
    for name in ("before", "1", "snapshot.name=before", "snapshot.id=1"):
        vblk.works("convert", "-l", name, "-O", "raw", top, folder / "snapshot.raw")
        report.check(f"-l {name} is the disk as it was",
                     identical(folder / "before.raw", "raw", folder / "snapshot.raw", "raw")[0] == 0)
    wrong = []
    for name in ("snapshot.id=1,snapshot.name=before", "snapshot.name=before,snapshot.id=1", "snapshot.id=2,snapshot.name=before",
                 "snapshot.id=1,snapshot.name=other", "snapshot.id=2,snapshot.id=1", "snapshot.id=1,snapshot.id=2", "snapshot.id=",
                 "snapshot.name=before,,x", "snapshot.nonsense=1", "snapshot.id=1,nonsense=1", "snapshot.", "other", ""):
        ended = [tool("convert", "-l", name, "-O", "raw", top, folder / "snapshot.raw")[0] for tool in (QEMU, vblk)]
        ended += [tool("measure", "-l", name, "-O", "raw", top)[0] for tool in (QEMU, vblk)]
        if ended[0] != ended[1] or ended[2] != ended[3]:
            wrong.append(f"{name}: {ended}")
    report.check("-l takes what qemu-img takes for a snapshot, and nothing else", not wrong, "\n".join(wrong))
    target = folder / "target.qcow2"
    QEMU.works("create", "-f", "qcow2", target, "10M")
    qemu_io(target, "write -P 11 0 9M")
    vblk.works("convert", "-n", "-O", "qcow2", top, target)
    found = QEMU("compare", "-f", "qcow2", "-F", "qcow2", top, target)
    report.check("-n writes over what a target has", found[0] == 0 and is_clean(check(target)), found)
    for path in folder.iterdir():
        path.unlink()


def compresses_into_images(report, vblk, folder, rng):
    """-n -c: what an image has already gets compressed content, and gives back what it had."""
    wrong, smaller = [], 0
    raw = folder / "in.raw"
    raw.write_bytes(content(rng, 6 * MIB))
    for number, options in enumerate(([], ["-o", "compression_type=zstd"], ["-o", "cluster_size=512"], ["-o", "cluster_size=2M"],
                                      ["-o", "extended_l2=on"], ["-o", "refcount_bits=1"], ["-o", "refcount_bits=2"],
                                      ["-o", "compat=0.10"])):
        paths = [folder / "theirs", folder / "ours", folder / "plain"]
        for path in paths:
            QEMU.works("create", "-q", "-f", "qcow2", *options, path, "6M")
        ended = [tool("convert", "-n", "-c", "-f", "raw", "-O", "qcow2", raw, path)[:2] for tool, path in zip((QEMU, vblk), paths)]
        vblk.works("convert", "-n", "-f", "raw", "-O", "qcow2", raw, paths[2])
        smaller += allocated_bytes(paths[1]) < allocated_bytes(paths[2])
        same_disk = QEMU("compare", "-f", "qcow2", "-F", "qcow2", paths[0], paths[1])[0] == 0
        if ended[0] != ended[1] or not same_disk or not is_clean(check(paths[1])):
            wrong.append(f"{options}: {ended} {check(paths[1])['text'][:300]}")
        # Over what is there, where qemu-img gives up; a snapshot keeps what it has.
        # What compressed data shares has no reference left for a snapshot where few can be counted.
        has_snapshot = not any(word.startswith("refcount_bits") for word in options)
        if has_snapshot:
            QEMU.works("snapshot", "-c", "kept", paths[1])
        qemu_io(paths[1], f"write -P 3 {rng.randrange(8000) * SECTOR} 300k")
        vblk.works("convert", "-n", "-c", *rng.choice([[], ["-W"], ["-m", "1"]]), "-f", "raw", "-O", "qcow2", raw, paths[1])
        if QEMU("compare", "-f", "qcow2", "-F", "qcow2", paths[0], paths[1])[0] != 0 or not is_clean(check(paths[1])):
            wrong.append(f"{options} again: {check(paths[1])['text'][:300]}")
        if has_snapshot:
            QEMU.works("snapshot", "-a", "kept", paths[1])
            if QEMU("compare", "-f", "qcow2", "-F", "qcow2", paths[0], paths[1])[0] != 0:
                wrong.append(f"{options}: the snapshot has changed")
        for path in paths:
            path.unlink()
    report.check("-n -c compresses into an image that is there", not wrong and smaller >= 5, f"{smaller}\n" + "\n".join(wrong))
    # What a larger target has behind the source's end stays, and so qemu-img refuses a source that ends within a cluster.
    short, target = folder / "short.raw", folder / "target"
    short.write_bytes(content(rng, 3 * MIB - 7 * SECTOR))
    QEMU.works("create", "-q", "-f", "qcow2", target, "6M")
    qemu_io(target, "write -P 3 0 6M")
    vblk.works("convert", "-n", "-c", "-f", "raw", "-O", "qcow2", short, target)
    QEMU.works("convert", "-O", "raw", target, folder / "whole.raw")
    report.check("-n -c leaves alone what is behind the source's end", is_clean(check(target)) and (folder / "whole.raw").read_bytes() ==
                 short.read_bytes() + b"\3" * (3 * MIB + 7 * SECTOR))
    target.unlink()
    wrong, interrupted = [], 0
    target, copy = folder / "target", folder / "copy"
    QEMU.works("create", "-q", "-f", "qcow2", target, "6M")
    qemu_io(target, "write -P 3 1M 2M")
    for when in range(2, 60, 6):
        shutil.copy(target, copy)
        interrupted += killed_at(vblk, "io_uring_enter,pwritev2", when, "convert", "-n", "-c", "-f", "raw", "-O", "qcow2", raw, copy) != 0
        released(copy)
        judged = check(copy)
        if judged["corruptions"] or judged["check-errors"]:
            wrong.append(f"{when}: {judged['text'][:300]}")
    report.check("-n -c killed on the way: leaks at the most", not wrong and interrupted > 4, f"{interrupted}\n" + "\n".join(wrong))
    data = folder / "data"
    QEMU.works("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", folder / "external", "6M")
    each_fails(report, "-n -c refuses what qemu-img refuses", vblk, [
        ["convert", "-n", "-c", "-f", "raw", "-O", "raw", raw, target],
        ["convert", "-n", "-c", "-f", "raw", "-O", "qcow2", raw, folder / "external"]], folder)
    for path in folder.iterdir():
        path.unlink()


def copies_in_kernel(report, vblk, folder, rng):
    """-C: the same disk, by copy_file_range(2) where the kernel can, and without it where it cannot."""
    raw, image, wrong = folder / "in.raw", folder / "in.qcow2", []
    raw.write_bytes(content(rng, 9 * MIB + 100))
    with open(raw, "r+b") as file:
        file.truncate(20 * MIB + 700)
    QEMU.works("convert", "-f", "raw", "-O", "qcow2", raw, image)
    QEMU.works("convert", "-c", "-f", "raw", "-O", "qcow2", raw, folder / "packed.qcow2")
    QEMU.works("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", folder / "top.qcow2")
    qemu_io(folder / "top.qcow2", "write -P 4 1M 90k", "write -z 2M 1M")
    log = folder / "log"
    traced = Tool("strace", "-f", "-o", log, "-e", "trace=copy_file_range", *vblk.command)
    forbidden = Tool("strace", "-f", "-o", "/dev/null", "-e", "inject=copy_file_range:error=EXDEV:when=3+", *vblk.command)
    for source, kind in ((raw, "raw"), (image, "qcow2"), (folder / "packed.qcow2", "qcow2"), (folder / "top.qcow2", "qcow2")):
        for tool in (traced, forbidden):
            for target, options in ((folder / "new", []), (folder / "new", ["-t", "none"]), (folder / "there", ["-n"])):
                if "-n" in options:
                    target.write_bytes(b"\5" * (21 * MIB))
                ended = tool("convert", "-C", *options, "-f", kind, "-O", "raw", source, target)
                calls = log.read_text().count("copy_file_range(") if tool is traced else 1
                # Not what is written around the page cache.
                expects = "none" not in options
                found = identical(source, kind, target, "raw")[0] if "-n" not in options else \
                    QEMU("compare", "-f", kind, "-F", "raw", source, target)[0]
                if ended[0] != 0 or ("-n" not in options and found != 0) or (tool is traced and (calls > 0) != expects):
                    wrong.append(f"{source.name} {options} {tool.command[0:1]}: {ended} {found} {calls}")
                if "-n" in options:
                    whole = folder / "whole"
                    QEMU.works("convert", "-f", kind, "-O", "raw", source, whole)
                    data = whole.read_bytes()
                    if target.read_bytes()[:len(data)] != data:
                        wrong.append(f"{source.name} {options}: other bytes")
    vblk.works("convert", "-C", "-O", "qcow2", folder / "top.qcow2", folder / "new.qcow2")
    if identical(folder / "top.qcow2", "qcow2", folder / "new.qcow2", "qcow2")[0] != 0 or not is_clean(check(folder / "new.qcow2")):
        wrong.append("into qcow2")
    report.check("-C copies in the kernel what it can", not wrong, "\n".join(wrong))
    each_fails(report, "-C refuses what qemu-img refuses", vblk, [
        ["convert", "-C", "-c", "-O", "qcow2", image, folder / "x"], ["convert", "-C", "-S", "4k", "-O", "raw", image, folder / "x"]],
        folder)
    for path in folder.iterdir():
        path.unlink()


def survives_changing_sources(report, vblk, folder, rng):
    """The source is changed, cut short or taken away while it is read, by somebody who asks for no lock. Of what is not there
    any more qemu-img makes zeroes, and says 0."""
    raw, image, compressed = folder / "disk.raw", folder / "disk.qcow2", folder / "compressed.qcow2"
    raw.write_bytes(content(rng, 9 * MIB))
    for options, path in (([], image), (["-c", "-o", "cluster_size=4k"], compressed)):
        QEMU.works("convert", "-f", "raw", "-O", "qcow2", *options, raw, path)

    def spoil(path):
        with open(path, "r+b") as file:
            file.write(rng.randbytes(path.stat().st_size))

    changes = {"cut short": lambda path: os.truncate(path, 3 * MIB), "emptied": lambda path: os.truncate(path, 0),
               "overwritten": spoil, "made longer": lambda path: os.truncate(path, 60 * MIB), "removed": lambda path: path.unlink()}
    started = []
    for what in changes:
        for source in (raw, image, compressed):
            kind, changing, target = rng.choice(["raw", "qcow2"]), folder / f"source{len(started)}", folder / f"target{len(started)}"
            shutil.copy(source, changing)
            started.append((what, source, kind, changing, target, vblk.start(
                "convert", "-m", "1", "-r", "4M", "-f", source.suffix[1:], "-O", kind, changing, target)))
    time.sleep(0.4)
    running = sum(process.poll() is None for *_, process in started)
    for what, _, _, changing, *_ in started:
        changes[what](changing)
    wrong, failed = [], 0
    for what, source, kind, changing, target, process in started:
        errors = process.communicate(timeout=60)[1].decode()
        failed += process.returncode == 1
        told = [line for line in errors.splitlines() if line.startswith("vblk img: ")]
        good = process.returncode in (0, 1) and len(told) == process.returncode == (not target.exists())
        # An open file that loses its name, or gets longer, is the same disk; what was cut off is none.
        if what in ("removed", "made longer"):
            good = good and process.returncode == 0
        if process.returncode == 0 and what != "overwritten":
            good = good and identical(raw, "raw", target, kind)[0] == 0
        if process.returncode == 0 and kind == "qcow2":
            good = good and is_clean(check(target))
        if not good:
            wrong.append(f"{source.name} {what}, to {kind}: {process.returncode} {errors}")
    report.check("convert of a source that changes: one line and no target, or a whole one", not wrong and (failed > 2 or running < 12),
                 f"{running} {failed}\n" + "\n".join(wrong[:5]))
    for path in folder.iterdir():
        path.unlink()


def peak_kib(*command):
    """The most memory that a command has in use, looked at while it runs, and its status."""
    process, peak = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1])) if found else peak
        time.sleep(0.001)
    return peak, process.returncode


def bounds_memory(report, vblk, folder, rng):
    """What docs/img.md says of convert's memory, besides what the program takes for a disk of one sector."""
    small, large = folder / "small.raw", folder / "large.raw"
    small.write_bytes(b"1" * SECTOR)
    piece = content(rng, 8 * MIB)
    with open(large, "wb") as file:
        for _ in range(16):
            file.write(piece)
    image = folder / "large.qcow2"
    QEMU.works("convert", "-f", "raw", "-O", "qcow2", large, image)
    target = folder / "target"
    # It may end before it is looked at.
    base = 0
    while base == 0:
        base = peak_kib(*vblk.command, "convert", "-f", "raw", "-O", "raw", small, target)[0]
    tables_mib = 2 + 2  # the source's caches and the target's tables; what allocates memory rounds up
    for source, options, bound_mib in (
            (large, ["-O", "qcow2"], 8), (image, ["-O", "raw"], 8), (large, ["-O", "qcow2", "-m", "2"], 2),
            (large, ["-O", "qcow2", "-c", "-o", "compression_type=zstd"], 16),
            (large, ["-O", "qcow2", "-c", "-m", "16", "-o", "compression_type=zstd"], 32),
            (large, ["-O", "qcow2", "-W", "-o", "cluster_size=2M"], 16 + 4)):
        peak, status = peak_kib(*vblk.command, "convert", "-f", source.suffix[1:], *options, source, target)
        report.check(f"convert {' '.join(options)}: memory as docs/img.md says",
                     status == 0 and 0 < peak - base < (bound_mib + tables_mib) * 1024,
                     f"status {status}, {peak - base} KiB above {base} KiB, bound {bound_mib} + {tables_mib} MiB")
    for path in folder.iterdir():
        path.unlink()


def converts_distribution(report, vblk, folder, rng):
    """A compressed image with a file system of real files, as distributions offer them."""
    tree, raw = folder / "tree", folder / "disk.raw"
    tree.mkdir()
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    for path in (*modules, Path(sys.executable), *map(Path, filter(None, map(shutil.which, ("bash", "qemu-img"))))):
        shutil.copy(path, tree)
    (tree / "link").symlink_to(modules[0].name)
    with open(raw, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, raw], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
    options = ["-c", "-o", "compression_type=zstd", "-f", "raw", "-O", "qcow2"]
    theirs, ours = folder / "theirs.qcow2", folder / "ours.qcow2"
    for tool, path in ((QEMU, theirs), (vblk, ours)):
        tool.works("convert", *options, raw, path)
    for image in (theirs, ours):
        report.check(f"{image.stem}: both say that it is the same disk", all(
            tool("compare", "-f", "raw", "-F", "qcow2", raw, image)[:2] == (0, "Images are identical.\n") for tool in (QEMU, vblk)))
        for what, change in (("map", without_holes), ("info", as_json), ("check", as_json), ("measure", as_json)):
            more = ["-O", "qcow2"] if what == "measure" else []
            same(report, f"{image.stem}: {what}", vblk, [what, "--output=json", *more, image], change)
    report.check("it is clean, and as compact as qemu-img's", is_clean(check(ours)) and
                 ours.stat().st_size < theirs.stat().st_size * 1.03 + 256 * KIB < raw.stat().st_size,
                 f"{check(ours)['text']} {ours.stat().st_size} {theirs.stat().st_size}")
    back = folder / "back.raw"
    for tool, image in ((QEMU, ours), (vblk, theirs), (vblk, ours)):
        tool.works("convert", "-O", "raw", image, back)
        judged = subprocess.run(["e2fsck", "-fn", back], capture_output=True, text=True,
                                env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
        report.check(f"{image.stem} by {Path(tool.command[0]).name}: the file system in it is whole",
                     judged.returncode == 0 and back.read_bytes() == raw.read_bytes(), judged.stdout)
    shutil.rmtree(tree)
    for path in folder.iterdir():
        path.unlink()


def salvages(report, vblk, folder, rng):
    """What cannot be found out or read becomes zeroes, sector by sector; the rest is there."""
    sound, broken = folder / "sound.qcow2", folder / "broken.qcow2"
    wrong = []
    for options in (["-o", "cluster_size=4k"], []):
        QEMU.works("create", "-q", "-f", "qcow2", *options, sound, "4M")
        qemu_io(sound, "write -P 7 0 1M", "write -P 8 3M 500k")
        for places in (1, 3):
            shutil.copy(sound, broken)
            damage = Damage(broken)
            for place in rng.sample(damage.l2, places):
                damage.flip(place, 512)
            outputs = [folder / "theirs.raw", folder / "ours.raw"]
            ended = [tool("convert", "--salvage", "-q", "-O", "raw", broken, output) for tool, output in zip((QEMU, vblk), outputs)]
            plain = vblk("convert", "-O", "raw", broken, folder / "none.raw")
            if ended[0][0] != 0 or ended[1][0] != 0 or outputs[0].read_bytes() != outputs[1].read_bytes() or \
                    plain[0] != 1 or (folder / "none.raw").exists():
                wrong.append(f"{options} {places}: {ended} {plain}")
    report.check("convert --salvage goes on behind L2 entries that cannot be, as qemu-img does", not wrong, "\n".join(wrong))
    for path in folder.iterdir():
        path.unlink()


def refuses_to_convert(report, vblk, folder, options):
    raw, image = folder / "a b:c.raw", folder / "image.qcow2"
    raw.write_bytes(b"1" * MIB)
    small = folder / "small.raw"
    small.write_bytes(b"2" * 1024)
    vblk.works("convert", "-f", "raw", "-O", "qcow2", raw, image)
    report.check("names may have colons and spaces", is_clean(check(image)))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    over = folder.parent / "over.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", image, "-F", "qcow2", over)
    each_fails(report, "convert refuses what qemu-img refuses", vblk, [
        ["convert"], ["convert", image], ["convert", "-O", "qcow2", image, image], ["convert", folder / "none", folder / "x"],
        ["convert", "-n", "-O", "raw", image, folder / "x"], ["convert", "-n", "-O", "raw", image, small],
        ["convert", "-m", "17", image, folder / "x"], ["convert", "-m", "0", image, folder / "x"],
        ["convert", "-S", "1000", image, folder / "x"], ["convert", "-c", "-O", "raw", image, folder / "x"],
        ["convert", "-r", "foo", image, folder / "x"], ["convert", "--target-is-zero", image, folder / "x"],
        ["convert", "-O", "qcow2", "-B", image, image, folder / "x"], ["convert", "-l", "none", image, folder / "x"],
        ["convert", "-O", "nonsense", image, folder / "x"], ["convert", image, folder / "no" / "x"],
        ["convert", "-t", "nonsense", image, folder / "x"], ["convert", "-f", "qcow2", small, folder / "x"],
        ["convert", "-O", "qcow2", "-o", "cluster_size=3", image, folder / "x"]], folder)
    status, _, errors = vblk("convert", "-O", "qcow2", over, image)
    report.check("the backing file of the source is no target", status == 1 and "based on it" in errors, errors)
    for what, *arguments in (
            ("create onto its backing file", "create", "-f", "qcow2", "-b", image, "-F", "qcow2", image),
            ("create onto what its backing file is based on", "create", "-f", "qcow2", "-b", over, "-F", "qcow2", image),
            ("convert onto the backing file that is named", "convert", "-f", "raw", "-O", "qcow2", "-B", image, "-F", "qcow2",
             raw, image)):
        status, _, errors = vblk(*arguments)
        report.check(f"{what} is refused", status == 1 and errors.count("\n") == 1, errors)
    report.check("nothing is lost by that", before == {path: path.read_bytes() for path in folder.iterdir()})
    over.unlink()
    socket = folder / "s"
    with Server(options.vblk, [image, "--format", "qcow2"], socket, folder.parent / "log"):
        status, _, errors = vblk("create", "-f", "qcow2", "-b", image, "-F", "qcow2", over)
        report.check("an overlay on what a server writes is made", status == 0 and QEMU("info", "-U", over)[0] == 0, errors)
        over.unlink()
        # At the same time, for each waits a second for the server to end.
        cases = [["info", image], ["map", image], ["check", image], ["compare", image, image],
                 ["convert", "-O", "raw", image, folder / "x"], ["convert", "-f", "raw", "-O", "qcow2", raw, image],
                 ["create", "-f", "qcow2", image, "1M"], ["resize", image, "2M"], ["bitmap", "--add", image, "b"],
                 ["amend", "-o", "lazy_refcounts=on", image], ["dd", f"if={image}", f"of={folder / 'x'}"]]
        for arguments, process in [(arguments, vblk.start(*arguments)) for arguments in cases]:
            errors = process.communicate(timeout=60)[1].decode()
            report.check(f"{arguments[0]} of what a server writes is refused",
                         process.returncode != 0 and len(errors.splitlines()) == 1 and "another process" in errors and
                         not (folder / "x").exists(), (process.returncode, errors))
        report.check("-U looks all the same", vblk("info", "-U", image)[0] == 0)


def follows_chains(report, vblk, folder, options):
    """Chains whose middle or end is missing, is no image, is its own backing file, or is written by somebody."""
    place, kept = folder / "place", folder / "kept"
    kept.mkdir()
    for below, name in ((None, "base"), ("base", "mid"), ("mid", "top"), (None, "other")):
        backing = ["-b", f"{below}.qcow2", "-F", "qcow2"] if below else []
        QEMU.works("create", "-q", "-f", "qcow2", *backing, kept / f"{name}.qcow2", "4M")
        qemu_io(kept / f"{name}.qcow2", f"write -P {len(name)} 1M 300k")
    QEMU.works("snapshot", "-c", "s", kept / "top.qcow2")
    new = ["-b", "other.qcow2", "-F", "qcow2"]
    reading = [["map", "top.qcow2"], ["convert", "-O", "raw", "top.qcow2", "x"], ["compare", "top.qcow2", "other.qcow2"],
               ["compare", "other.qcow2", "top.qcow2"], ["measure", "-O", "qcow2", "top.qcow2"], ["dd", "if=top.qcow2", "of=x"]]
    writing = [["commit", "top.qcow2"], ["commit", "-b", "base.qcow2", "top.qcow2"], ["resize", "top.qcow2", "5M"],
               ["rebase", *new, "top.qcow2"], ["rebase", "-b", "", "top.qcow2"]]
    # Of the image alone, where qemu-img opens all of the chain.
    alone = [["check", "top.qcow2"], ["snapshot", "-l", "top.qcow2"], ["snapshot", "-c", "new", "top.qcow2"],
             ["amend", "-o", "lazy_refcounts=on", "top.qcow2"], ["info", "top.qcow2"], ["rebase", "-u", *new, "top.qcow2"]]
    making = [["create", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "x"], ["info", "--backing-chain", "top.qcow2"]]

    def few_files():
        """qemu-img opens the images of a loop again and again until there are no descriptors left."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))

    def begin():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(kept, place)

    for what, spoil in {"a middle file that is missing": lambda: (place / "mid.qcow2").unlink(),
                        "a middle file that is no image": lambda: (place / "mid.qcow2").write_bytes(b"no image" * 999),
                        "a base that is missing": lambda: (place / "base.qcow2").unlink(),
                        "a base that is based on the top": lambda: QEMU.works(
                            "rebase", "-u", "-b", "top.qcow2", "-F", "qcow2", place / "base.qcow2")}.items():
        begin()
        spoil()
        before = {path: path.read_bytes() for path in place.iterdir()}
        each_fails(report, f"{what}: all that reads the chain fails as with qemu-img", vblk, [*reading, *writing, *making], place,
                   cwd=place, preexec_fn=few_files)
        report.check(f"{what}: nothing has changed", before == {path: path.read_bytes() for path in place.iterdir()})
        ended = [(arguments[0], *vblk(*arguments, cwd=place)) for arguments in alone]
        report.check(f"{what}: the image itself can be looked at and changed", all(end[1] == 0 for end in ended) and
                     is_clean(check(place / "top.qcow2")) and vblk("compare", "top.qcow2", "other.qcow2", cwd=place)[0] == 1, ended)

    # What is cut off reads as zeroes for qemu-img.
    begin()
    os.truncate(place / "mid.qcow2", 64 * KIB)
    before = {path: path.read_bytes() for path in place.iterdir()}
    ended = [(arguments[0], *vblk(*arguments, cwd=place)) for arguments in (*reading, *writing)]
    report.check("a middle file that was cut short: refused in a line, and nothing has changed",
                 all(status in (1, 2) and len(errors.splitlines()) == 1 for _, status, _, errors in ended) and
                 before == {path: path.read_bytes() for path in place.iterdir()}, ended)

    # Written by a server or by QEMU, or read by QEMU, at the same time.
    cases = [*reading, *writing, *making, *alone]
    holders = {who: folder / who.replace(" ", "_") for who in ("top qemu-io", "mid vblk serve", "base qemu-io", "mid qemu-io -r")}
    for copy in holders.values():
        shutil.copytree(kept, copy)
    with contextlib.ExitStack() as stack:
        for who, copy in holders.items():
            name, *program = who.split()
            image = copy / f"{name}.qcow2"
            if program[0] == "vblk":
                stack.enter_context(Server(options.vblk, [image, "--format", "qcow2"], folder / "s", folder / "log"))
            else:
                stack.enter_context(Holder(*program, "-f", "qcow2", image))
        started, theirs = [], []
        for who, copy in holders.items():
            for number, arguments in enumerate(cases):
                for tool in (QEMU, vblk):
                    # An image of its own for each, unless it is the image that is held.
                    own = "top" if who.startswith("top") else f"{number}{tool.command[-1]}"
                    if own != "top":
                        shutil.copy(kept / "top.qcow2", copy / f"{own}.qcow2")
                    words = [word.replace("top", own).replace("=x", f"=x{own}{number}") for word in arguments]
                    words = [f"x{own}{number}" if word == "x" else word for word in words]
                    if tool is QEMU:
                        theirs.append(QEMU(*words, cwd=copy))
                    else:
                        started.append((who, arguments, vblk.start(*words, cwd=copy)))
        wrong = []
        for (who, arguments, process), expected in zip(started, theirs):
            output, errors = process.communicate(timeout=60)
            ended = (process.returncode, output.decode(), errors.decode())
            is_better = arguments in alone and not who.startswith("top") and ended[0] == 0
            is_told = bool(ended[0]) and (ended[0] > 1 or arguments[0] != "compare")
            if ended[0] != expected[0] and not is_better or len(ended[2].splitlines()) != is_told:
                wrong.append(f"{who}: {' '.join(arguments)}: qemu-img {expected}, vblk img {ended}")
    refused = sum(status != 0 for status, _, _ in theirs)
    report.check("an image, its middle or its base that another process has: the statuses are qemu-img's",
                 not wrong and refused > 40, f"{refused} refused\n" + "\n".join(wrong[:5]))
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True)


def leaves_nothing_half(report, vblk, folder, options, rng):
    raw = folder / "source.raw"
    raw.write_bytes(content(rng, 24 * MIB))
    # A file size limit stands for a full disk, in a folder whose other files must stay.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))  # noqa: E731
    old = folder / "old.qcow2"
    QEMU.works("create", "-f", "qcow2", old, "3M")
    before = old.read_bytes()
    for target in (folder / "new.qcow2", old):
        for kind in ("qcow2", "raw"):
            status, _, errors = vblk("convert", "-f", "raw", "-O", kind, raw, target, preexec_fn=limit)
            report.check(f"no space for {target.name} as {kind}: one line, and nothing has changed",
                         status == 1 and len(errors.splitlines()) == 1 and old.read_bytes() == before and
                         sorted(p.name for p in folder.iterdir()) == ["old.qcow2", "source.raw"], (status, errors))
    for number in range(6):
        kind, number_of_signal = rng.choice(["qcow2", "raw"]), [signal.SIGKILL, signal.SIGINT, signal.SIGTERM][number % 3]
        target = [old, folder / "new.qcow2"][number % 2]
        # Some seconds' worth of data.
        process = subprocess.Popen([options.vblk, "img", "convert", "-r", "2M", "-f", "raw", "-O", kind, raw, target],
                                   stderr=subprocess.DEVNULL)
        time.sleep(0.1 + rng.random() * 0.3)
        process.send_signal(number_of_signal)
        process.wait()
        report.check(f"{number_of_signal.name} while {target.name} is made as {kind}: what was there is there, nothing else",
                     process.returncode == -number_of_signal and old.read_bytes() == before and
                     sorted(p.name for p in folder.iterdir()) == ["old.qcow2", "source.raw"],
                     (process.returncode, [p.name for p in folder.iterdir()]))
    hard = folder / "hard.qcow2"
    os.link(old, hard)
    process = subprocess.Popen([options.vblk, "img", "convert", "-r", "2M", "-f", "raw", "-O", "qcow2", raw, old])
    time.sleep(0.2)
    process.kill()
    process.wait()
    status = QEMU("info", "-f", "qcow2", old)[0]
    report.check("a file with two names is written in place, and is no image until the end", status != 0)
    vblk.works("convert", "-f", "raw", "-O", "qcow2", raw, old)
    report.check("then it is one under both names",
                 os.path.samefile(old, hard) and identical(raw, "raw", hard, "qcow2")[0] == 0 and is_clean(check(hard)))
    for path in folder.iterdir():
        path.unlink()


def killed_at(vblk, calls, when, *arguments, error=None):
    """Runs a command that is killed, or has an error, at the call of this kind that has this number; its status."""
    fate = f"error={error}" if error else "signal=KILL"
    process = subprocess.Popen(["strace", "-f", "-o", "/dev/null", "-e", f"inject={calls}:{fate}:when={when}", *vblk.command,
                                *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.wait(60)
    return process.returncode


def makes_two_files(report, vblk, folder, rng):
    """An image and its data file: neither is ever taken for half of another pair."""
    raws = [folder / "one.raw", folder / "two.raw"]
    for raw in raws:
        raw.write_bytes(content(rng, 2 * MIB))
    image, data = folder / "image.qcow2", folder / "image.data"
    make = ["convert", "-f", "raw", "-O", "qcow2", "-o", f"data_file={data}"]
    wrong, interrupted = [], 0
    # The last calls: what gives and takes names.
    for call, when in (("unlink", 1), ("linkat", 1), ("rename", 1), ("linkat", 2), ("rename", 2)):
        for path in (image, data):
            path.unlink(missing_ok=True)
        vblk.works(*make, raws[0], image)
        interrupted += killed_at(vblk, call, when, *make, raws[1], image) != 0
        found = []
        if QEMU("info", image)[0] == 0:
            released(image)
            found = [identical(raw, "raw", image, "qcow2")[0] for raw in raws]
        if found and 0 not in found:
            wrong.append(f"killed at {call} {when}: the image is neither of the two")
    report.check("convert with a data file killed on the way: the old image, the new one, or none", not wrong and interrupted > 3,
                 f"{interrupted}\n" + "\n".join(wrong))
    for path in [*folder.glob(".*"), image, data]:
        path.unlink(missing_ok=True)
    status = killed_at(vblk, "linkat", 2, *make, raws[0], image, error="ENOSPC")
    report.check("an image that cannot get its name leaves no data file", status == 1 and sorted(folder.iterdir()) == sorted(raws),
                 f"{status} {sorted(folder.iterdir())}")
    (folder / "below").mkdir()
    (folder / "link").symlink_to("below")
    QEMU.works("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", image, "2M")
    base = folder / "base.qcow2"
    QEMU.works("create", "-q", "-f", "qcow2", base, "2M")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    wrong = []
    for arguments in (
            ["create", "-f", "qcow2", "-o", f"data_file={folder}/x", folder / "x", "1M"],
            ["create", "-f", "qcow2", "-o", "data_file=x", folder / "x", "1M"],
            ["create", "-f", "qcow2", "-o", f"data_file={folder}/link/../below/./x", folder / "below" / "x", "1M"],
            ["create", "-f", "qcow2", "-o", f"data_file={folder}/link/x", folder / "below" / "x", "1M"],
            ["create", "-f", "qcow2", "-o", f"data_file={base}", base, "1M"],
            ["create", "-f", "qcow2", "-o", f"data_file={base}", "-b", base, "-F", "qcow2", folder / "x"],
            ["convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=x", raws[0], folder / "x"],
            ["convert", "-f", "raw", "-O", "qcow2", "-o", f"data_file={raws[0]}", raws[0], folder / "x"],
            ["convert", "-U", "-f", "raw", "-O", "qcow2", "-o", f"data_file={raws[0]}", raws[0], folder / "x"],
            ["convert", "-U", "-O", "raw", image, data], ["dd", "-U", f"if={image}", f"of={data}"]):
        status, _, errors = vblk(*arguments)
        after = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        if status != 1 or len(errors.splitlines()) != 1 or after != before or list((folder / "below").iterdir()):
            wrong.append(f"{' '.join(map(str, arguments))}: {status} {errors} {sorted(after)}")
    report.check("a data file that is the image, its source, or its source's is refused", not wrong, "\n".join(wrong))
    before = image.read_bytes()
    status, _, errors = vblk("amend", "-o", f"data_file={image}", image)
    report.check("amend does not make an image its own data file", status == 1 and "own data file" in errors and
                 image.read_bytes() == before, errors)
    itself = folder / "itself.qcow2"
    vblk.works("create", "-q", "-f", "qcow2", "-o", "data_file=apart_.qcow2", itself, "1M")
    itself.write_bytes(itself.read_bytes().replace(b"apart_.qcow2", b"itself.qcow2"))
    status, _, errors = vblk("convert", "-O", "raw", itself, folder / "x")
    report.check("an image that says so all the same is not opened", status == 1 and "or the image itself" in errors, errors)
    (folder / "link").unlink()
    (folder / "below").rmdir()
    for path in folder.iterdir():
        path.unlink()

    # In place, where the file has two names: not an image until its bitmaps are there.
    source, target, other = folder / "source.qcow2", folder / "target.qcow2", folder / "other.qcow2"
    QEMU.works("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", source, "1M")
    qemu_io(source, "write -P 3 0 300k")
    for name in ("a", "b"):
        QEMU.works("bitmap", "--add", source, name)
        qemu_io(source, "write -P 4 100k 64k")
    target.write_bytes(b"what was there")
    os.link(target, other)
    wrong, interrupted = [], 0
    for when in range(1, 60, 3):
        status = killed_at(vblk, "io_uring_enter,pwritev2", when, "convert", "--bitmaps", "-O", "qcow2", "-t", "writeback", source, target)
        interrupted += status != 0
        whole = QEMU("info", "-f", "qcow2", target)[0] == 0
        if whole:
            released(target)
            if stored_bitmaps(target) != stored_bitmaps(source) or identical(source, "qcow2", target, "qcow2")[0] != 0 or \
                    not is_clean(check(target)):
                wrong.append(f"{when}: an image without its bitmaps: {check(target)['text']}")
        elif status == 0:
            wrong.append(f"{when}: no image")
        if status == 0:
            break
    report.check("convert --bitmaps in place killed on the way: an image with its bitmaps, or none", not wrong and interrupted > 4,
                 f"{interrupted}\n" + "\n".join(wrong[:3]))
    for path in folder.iterdir():
        path.unlink()


def speaks_to_nobody(report, vblk, folder, rng):
    """Whoever reads what is said may leave, and what it is written to may be full."""
    raw, image, broken = folder / "disk.raw", folder / "image.qcow2", folder / "broken.qcow2"
    raw.write_bytes(content(rng, 8 * MIB))
    vblk.works("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", raw, image)
    shutil.copy(image, broken)
    damage = Damage(broken)
    with open(broken, "r+b") as file:
        for place in damage.refcount_table[:1]:
            file.seek(place)
            file.write(bytes(8))

    def without_reader(tool, *arguments, stream="stdout"):
        reading, writing = os.pipe()
        os.close(reading)
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | {stream: writing}
        done = subprocess.run([*tool.command, *map(str, arguments)], stdin=subprocess.DEVNULL, timeout=120, **streams)
        os.close(writing)
        return done.returncode, (done.stderr or b"").decode()

    wrong = []
    for arguments in (["map", image], ["map", "--output=json", image], ["info", image], ["check", image], ["check", broken],
                      ["compare", "-F", "raw", "-f", "qcow2", image, raw], ["snapshot", "-l", image], ["create", "-o", "help"]):
        theirs, ours = without_reader(QEMU, *arguments), without_reader(vblk, *arguments)
        complaints = [line for line in ours[1].splitlines() if not line.startswith(("ERROR", "Leaked", "refcounts of"))]
        if theirs[0] != ours[0] or complaints:
            wrong.append(f"{arguments}: qemu-img {theirs}, vblk img {ours[0]} {complaints[:2]}")
    target = folder / "target.qcow2"
    ended = without_reader(vblk, "convert", "-p", "-f", "raw", "-O", "qcow2", raw, target)
    if ended[0] != 0 or identical(raw, "raw", target, "qcow2")[0] != 0 or not is_clean(check(target)):
        wrong.append(f"convert -p: {ended}")
    # Thousands of findings.
    status = without_reader(vblk, "check", broken, stream="stderr")[0]
    if status != QEMU("check", broken)[0]:
        wrong.append(f"check without a reader of its findings: {status}")
    report.check("a reader who leaves: the work is done, with qemu-img's status", not wrong, "\n".join(wrong))
    wrong = []
    for arguments in (["map", image], ["info", "--output=json", image], ["check", image]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*vblk.command, *map(str, arguments)], stdout=full, stderr=subprocess.PIPE, timeout=60)
        lines = done.stderr.decode().splitlines()
        if done.returncode != 1 or len(lines) != 1 or "cannot be written" not in lines[0]:
            wrong.append(f"{arguments}: {done.returncode} {lines}")
    report.check("output that cannot be written is told of by the status", not wrong, "\n".join(wrong))
    for path in folder.iterdir():
        path.unlink()


def uses_block_devices(report, vblk, folder, rng):
    if os.geteuid() != 0:
        report.skip("block devices as source and target", "loop devices need root")
        return
    raw, backing = folder / "source.raw", folder / "device"
    raw.write_bytes(content(rng, 4 * MIB))
    backing.write_bytes(rng.randbytes(6 * MIB))
    device = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True)
    if device.returncode != 0:
        report.skip("block devices as source and target", "there is no loop device")
        return
    device = device.stdout.strip()
    try:
        for kind, options in (("qcow2", []), ("qcow2", ["-c"]), ("raw", []), ("raw", ["-n"])):
            vblk.works("convert", *options, "-f", "raw", "-O", kind, "-t", "writeback", raw, device)
            if kind == "qcow2":
                found = identical(raw, "raw", device, "qcow2")
                report.check(f"a device holds a qcow2 image {' '.join(options)}",
                             found[0] == 0 and check(device)["corruptions"] == 0, f"{found} {check(device)['text']}")
            else:
                with open(device, "rb") as file:
                    report.check(f"a device holds a raw disk {' '.join(options)}", file.read(4 * MIB) == raw.read_bytes())
        large = folder / "large.raw"
        large.write_bytes(b"3" * (8 * MIB))
        for kind in ("raw", "qcow2"):
            status, _, errors = vblk("convert", "-f", "raw", "-O", kind, large, device)
            report.check(f"a device that is too small for {kind}: one line",
                         status == 1 and len(errors.splitlines()) == 1, (status, errors))
    finally:
        subprocess.run(["losetup", "-d", device], check=False)
    for path in folder.iterdir():
        path.unlink()


def keeps_mounted_names(report, vblk, folder, rng):
    """A file that is mounted over another cannot be replaced, and is overwritten."""
    if os.geteuid() != 0:
        report.skip("a mounted file as target", "mounting needs root")
        return
    raw, below, over = folder / "source.raw", folder / "below", folder / "over"
    raw.write_bytes(content(rng, MIB))
    below.write_bytes(b"1")
    over.write_bytes(b"2" * MIB)
    if subprocess.run(["mount", "--bind", over, below]).returncode != 0:
        report.skip("a mounted file as target", "nothing can be mounted")
        return
    try:
        for kind in ("raw", "qcow2"):
            status, _, errors = vblk("convert", "-f", "raw", "-O", kind, raw, below)
            report.check(f"a mounted file is overwritten, {kind}",
                         status == 0 and identical(raw, "raw", over, kind)[0] == 0 and below.samefile(over), errors)
    finally:
        subprocess.run(["umount", below], check=False)
    for path in folder.iterdir():
        path.unlink()


# ---- compare, resize

def compares_alike(report, vblk, folder, rng):
    different, found_different = [], 0
    for number in range(24):
        one, other = folder / "one.raw", folder / "other.raw"
        data = content(rng, rng.choice([512, 3 * MIB, 5 * MIB + SECTOR]))
        one.write_bytes(data)
        changed = bytearray(data)
        for _ in range(rng.randrange(4)):
            changed[rng.randrange(len(changed))] ^= 1 + rng.randrange(255)
        if rng.random() < 0.4:
            tail = rng.choice([b"", b"x"])
            changed += bytes(rng.randrange(1, 4000) * SECTOR) + tail + bytes(SECTOR - len(tail))
        other.write_bytes(changed)
        names = [one, other]
        formats = ["raw", "raw"]
        if rng.random() < 0.6:
            QEMU.works("convert", "-f", "raw", "-O", "qcow2", *rng.choice([[], ["-c"]]), other, folder / "other.qcow2")
            names[1], formats[1] = folder / "other.qcow2", "qcow2"
        if rng.random() < 0.5:
            names.reverse()
            formats.reverse()
        arguments = ["compare", "-f", formats[0], "-F", formats[1], *names]
        theirs, ours = QEMU(*arguments), vblk(*arguments)
        found_different += theirs[0] == 1
        if theirs[:2] != ours[:2]:
            different.append(f"{formats} {theirs} {ours}")
    report.check("compare: the same verdict and the same first difference", not different and 4 < found_different < 24,
                 f"{found_different}\n" + "\n".join(different[:3]))
    # Strict: allocation counts too.
    QEMU.works("create", "-f", "qcow2", folder / "s1.qcow2", "4M")
    QEMU.works("create", "-f", "qcow2", folder / "s2.qcow2", "4M")
    same(report, "compare -s of equal images", vblk, ["compare", "-s", folder / "s1.qcow2", folder / "s2.qcow2"])
    qemu_io(folder / "s1.qcow2", "write -P 0 1M 64k")
    # qemu-img stumbles over where the range ends, at offset 0.
    found = vblk("compare", "-s", folder / "s1.qcow2", folder / "s2.qcow2")
    report.check("compare -s sees what is allocated, and where",
                 found[:2] == (1, "Strict mode: Offset 1048576 block status mismatch!\n"), found)
    same(report, "compare does not", vblk, ["compare", folder / "s1.qcow2", folder / "s2.qcow2"])
    same(report, "compare -q says nothing", vblk, ["compare", "-q", folder / "s1.qcow2", folder / "other.raw"])
    for path in folder.iterdir():
        path.unlink()


def shown(text):
    """What -p shows: the first percentage, whether it came to 100, and what is said besides."""
    steps = re.findall(r"    \(([0-9.]+)/100%\)\r", text)
    return steps[:1], steps[-1:] == ["100.00"], re.sub(r"    \([0-9.]+/100%\)\r", "", text)


def shows_progress_alike(report, vblk, folder, rng):
    """-p begins with 0, comes to 100 where the work is done, and ends its line."""
    raw, other, longer = folder / "disk.raw", folder / "other.raw", folder / "longer.raw"
    raw.write_bytes(content(rng, 6 * MIB))
    data = bytearray(raw.read_bytes())
    data[3 * MIB] ^= 1
    other.write_bytes(data)
    shutil.copy(raw, longer)
    os.truncate(longer, 7 * MIB)
    below, new = folder / "below.qcow2", folder / "new.qcow2"
    for path in (below, new):
        QEMU.works("convert", "-f", "raw", "-O", "qcow2", raw, path)
    image, fresh = folder / "image.qcow2", folder / "fresh.qcow2"
    QEMU.works("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", image)
    qemu_io(image, "write -P 7 1M 3M")
    shutil.copy(image, fresh)
    for name, *arguments in (("compare of equal disks", "compare", raw, raw), ("of another size", "compare", raw, longer),
                             ("of different ones", "compare", raw, other), ("of one, quietly", "compare", "-q", raw, raw),
                             ("compare -s of two sizes", "compare", "-s", raw, longer),
                             ("rebase", "rebase", "-b", new, "-F", "qcow2", image), ("rebase, quietly", "rebase", "-q", "-b", "", image),
                             ("rebase -u", "rebase", "-u", "-b", new, "-F", "qcow2", image),
                             ("commit -d", "commit", "-d", image), ("commit, quietly", "commit", "-q", image),
                             ("commit", "commit", image)):
        more = ["-f", "raw", "-F", "raw"] if arguments[0] == "compare" else []
        ended = []
        for tool in (QEMU, vblk):
            shutil.copy(fresh, image)
            ended.append(tool(arguments[0], "-p", *more, *arguments[1:])[:2])
        report.check(f"-p, {name}: as qemu-img shows it", [(status, shown(text)) for status, text in ended][0] ==
                     [(status, shown(text)) for status, text in ended][1], ended)
    for path in folder.iterdir():
        path.unlink()


def tells_errors_of_compare(report, vblk, folder, rng):
    """What cannot be opened, mapped or read is three statuses, from either side and also below."""
    raw, sound, unmapped, unread = (folder / name for name in ("disk.raw", "sound.qcow2", "unmapped.qcow2", "unread.qcow2"))
    raw.write_bytes(b"".join(b"%016d" % number * 256 for number in range(768)))
    for path in (sound, unmapped):
        QEMU.works("convert", "-f", "raw", "-O", "qcow2", raw, path)
    QEMU.works("convert", "-f", "raw", "-O", "qcow2", "-c", raw, unread)
    place = l2_entry_offset(unmapped, 20)
    write_number(unmapped, place, read_number(unmapped, place) ^ SECTOR)
    with open(unread, "r+b") as file:
        file.seek(read_number(unread, l2_entry_offset(unread, 20)) & (1 << 54) - 1)
        file.write(b"\xff" * 200)
    for below in (unmapped, unread):
        QEMU.works("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", folder / f"over_{below.name}", "3M")
    differs = folder / "differs.raw"
    differs.write_bytes(b"x" + raw.read_bytes()[1:])
    nothing, wrong, statuses = folder / "none", [], set()
    for bad in (unmapped, unread, folder / "over_unmapped.qcow2", folder / "over_unread.qcow2", nothing):
        for pair in ((bad, sound), (sound, bad), (bad, bad), (bad, raw), (bad, differs)):
            theirs, ours = QEMU("compare", *pair), vblk("compare", *pair)
            statuses.add(theirs[0])
            lines = [line for line in ours[2].splitlines() if line.startswith("vblk img: ")]
            if theirs[0] != ours[0] or len(lines) != (ours[0] > 1):
                wrong.append(f"{pair}: qemu-img {theirs}, vblk img {ours}")
    report.check("compare: what cannot be opened, mapped, read is 2, 3, 4", not wrong and statuses == {1, 2, 3, 4},
                 f"{statuses}\n" + "\n".join(wrong[:3]))
    for path in folder.iterdir():
        path.unlink()


def resizes_alike(report, vblk, folder, rng):
    for kind, options in (("raw", []), ("qcow2", []), ("qcow2", ["-o", "cluster_size=512"]),
                          ("qcow2", ["-o", "extended_l2=on"]), ("qcow2", ["-o", "compat=0.10"])):
        # qemu-img takes seconds to shrink what has many small clusters.
        large = "6M" if "cluster_size=512" in options else "40M"
        paths = [folder / "theirs", folder / "ours"]
        QEMU.works("create", "-f", kind, *options, paths[0], "3M")
        if kind == "qcow2":
            qemu_io(paths[0], "write -P 5 0 3M")
        shutil.copy(paths[0], paths[1])
        # What the disk must be: qemu-img 7.2 may find old bytes of its file again where --preallocation=full makes it longer.
        model = folder / "model"
        QEMU.works("convert", "-f", kind, "-O", "raw", paths[0], model)
        wrong = []
        for size, more in (("+1M", []), ("5M", []), ("-1M", ["--shrink"]), ("2M", []), (large, []), ("1M", ["--shrink"]),
                           ("+3072", []), ("+0", []), ("--shrink", []), ("-900M", ["--shrink"]), ("9M", ["--preallocation=full"]),
                           ("10M", ["--preallocation=falloc"]), ("10M", ["--preallocation=falloc"]), ("9M", ["--preallocation=nonsense"])):
            ended = [tool("resize", "-f", kind, *more, path, size)[:2] for tool, path in zip((QEMU, vblk), paths)]
            sizes = [Header(path)["size"] if kind == "qcow2" else path.stat().st_size for path in paths]
            judged = kind == "raw" or is_clean(check(paths[1]))
            os.truncate(model, (sizes[0] + SECTOR - 1) // SECTOR * SECTOR)
            if ended[0] != ended[1] or sizes[0] != sizes[1] or not judged or identical(model, "raw", paths[1], kind)[0] != 0:
                wrong.append(f"{size} {more}: {ended} {sizes} {judged}")
        report.check(f"resize of {kind} {' '.join(options)}: up and down as qemu-img does it", not wrong, "\n".join(wrong))
    for path in folder.iterdir():
        path.unlink()


def preallocates_alike(report, vblk, folder):
    """What a disk grows by, with its space: mapped as qemu-img maps it, zeroes, and in the file as far as that was asked for."""
    wrong = []
    for options in ([], ["-o", "cluster_size=4k"], ["-o", "extended_l2=on"], ["-o", "compat=0.10"], ["-o", "data_file=DATA"],
                    ["-o", "data_file=DATA,data_file_raw=on"]):
        for mode, space in (("metadata", 0), ("falloc", 40 * MIB), ("full", 40 * MIB)):
            paths = [folder / "theirs", folder / "ours"]
            for path in paths:
                QEMU.works("create", "-q", "-f", "qcow2", *[word.replace("DATA", str(path) + ".data") for word in options], path, "3M")
                qemu_io(path, "write -P 5 1M 1M")
            before = folder / "before"
            QEMU.works("convert", "-O", "raw", paths[1], before)
            os.truncate(before, 43 * MIB)
            ended = [tool("resize", f"--preallocation={mode}", path, "43M")[:2] for tool, path in zip((QEMU, vblk), paths)]
            mapped = [sum(piece["length"] for piece in without_holes(QEMU.works("map", "--output=json", path)) if piece["data"])
                      for path in paths]
            # There qemu-img's have their space and no subcluster in use, which reads as zeroes too.
            if "extended_l2=on" in options:
                mapped = [check(path)["allocated-clusters"] * 64 * KIB for path in paths]
            holder = Path(f"{paths[1]}.data") if "data_file" in "".join(options) else paths[1]
            taken = allocated_bytes(holder)
            if ended[0] != ended[1] or mapped[0] != mapped[1] or not is_clean(check(paths[1])) or \
                    identical(before, "raw", paths[1], "qcow2")[0] != 0 or not space <= taken < space + 8 * MIB:
                wrong.append(f"{options} {mode}: {ended} {mapped} {taken} {check(paths[1])['text'][:300]}")
            for path in folder.iterdir():
                path.unlink()
    report.check("resize --preallocation: the clusters that qemu-img maps, zeroes, and no more space than asked for", not wrong,
                 "\n".join(wrong))
    promises_only_space_that_is_there(report, vblk, folder)


def promises_only_space_that_is_there(report, vblk, folder):
    name = "resize --preallocation=falloc fails where there is no space, and the disk has its old size"
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]).returncode != 0:
        report.skip(name, "nothing can be mounted")
        return
    try:
        wrong = []
        for options in ([], ["-o", "extended_l2=on"], ["-o", f"data_file={folder / 'data'}"]):
            image = folder / "image"
            QEMU.works("create", "-q", "-f", "qcow2", *options, image, "3M")
            qemu_io(image, "write -P 5 0 3M")
            ended = vblk("resize", "--preallocation=falloc", image, "60M")
            if ended[0] != 1 or "No space left" not in ended[2] or Header(image)["size"] != 3 * MIB or not is_sound(check(image)):
                wrong.append(f"{options}: {ended} {Header(image)['size']} {check(image)['text'][:300]}")
            for path in folder.iterdir():
                path.unlink()
        report.check(name, not wrong, "\n".join(wrong))
    finally:
        subprocess.run(["umount", folder], check=False)


def fills_empty_disks(report, vblk, folder):
    """Disks of no bytes become larger, and take what is committed into them."""
    wrong = []
    for kind, options in (("raw", []), ("qcow2", []), ("qcow2", ["-o", "cluster_size=512"]), ("qcow2", ["-o", "compat=0.10"]),
                          ("qcow2", ["-o", "data_file=DATA"])):
        paths = [folder / "theirs", folder / "ours"]
        for path in paths:
            QEMU.works("create", "-q", "-f", kind, *[word.replace("DATA", f"{path}.data") for word in options], path, "0")
        for size in ("0", "5M", "900M"):
            ended = [tool("resize", "-f", kind, path, size)[0] for tool, path in zip((QEMU, vblk), paths)]
            if ended[0] != ended[1] and size != "0" or (size != "0" and (identical(paths[0], kind, paths[1], kind)[0] != 0 or
                                                                         kind == "qcow2" and not is_clean(check(paths[1])))):
                wrong.append(f"{kind} {options} {size}: {ended}")
        for path in paths:
            base = Path(f"{path}.base")
            QEMU.works("create", "-q", "-f", kind, *[word.replace("DATA", f"{base}.data") for word in options], base, "0")
            top = Path(f"{path}.top")
            QEMU.works("create", "-q", "-f", "qcow2", "-b", base, "-F", kind, top, "3M")
            qemu_io(top, "write -P 7 1M 70k")
        ended = [tool("commit", f"{path}.top")[:2] for tool, path in zip((QEMU, vblk), paths)]
        bases = [Path(f"{path}.base") for path in paths]
        if ended[0] != ended[1] or identical(bases[0], kind, bases[1], kind)[0] != 0 or \
                kind == "qcow2" and not is_clean(check(bases[1])):
            wrong.append(f"commit into {kind} {options}: {ended}")
        for path in folder.iterdir():
            path.unlink()
    report.check("disks of no bytes grow, and are committed into, as with qemu-img", not wrong, "\n".join(wrong))


# ---- rebase

def rebases_alike(report, vblk, folder, rng):
    wrong, cases = [], 0
    for number in range(10):
        bases = []
        for name in ("a", "b"):
            raw, base = folder / f"{name}.raw", folder / f"{name}.qcow2"
            raw.write_bytes(content(rng, rng.choice([1, 2, 3]) * MIB))
            QEMU.works("convert", "-f", "raw", "-O", "qcow2", *rng.choice([[], ["-c"]]), raw, base)
            bases.append(rng.choice([("raw", raw), ("qcow2", base)]))
        # Much of the new one is as the old one is.
        if rng.random() < 0.5 and bases[1][0] == "raw":
            data = (folder / "a.raw").read_bytes()[:bases[1][1].stat().st_size]
            with open(bases[1][1], "r+b") as file:
                file.write(data[:len(data) // 2 // SECTOR * SECTOR])
        paths = [folder / "theirs.qcow2", folder / "ours.qcow2"]
        options = rng.choice([[], ["-o", "cluster_size=4k"], ["-o", "extended_l2=on"], ["-o", "compat=0.10"],
                              ["-o", "cluster_size=512"]])
        QEMU.works("create", "-f", "qcow2", *options, "-b", bases[0][1].name, "-F", bases[0][0], paths[0],
                   rng.choice(["1M", "2M", "4M"]))
        for _ in range(5):
            at, length = rng.randrange(1500) * SECTOR, rng.randrange(1, 400) * SECTOR
            qemu_io(paths[0], f"{rng.choice(['write -P 7', 'write -z'])} {at} {length}")
        shutil.copy(paths[0], paths[1])
        before = folder / "before.raw"
        QEMU.works("convert", "-O", "raw", paths[0], before)
        to = rng.choice([["-b", bases[1][1].name, "-F", bases[1][0]], ["-b", bases[1][1], "-F", bases[1][0]], ["-b", ""]])
        cases += 1
        ended = [tool("rebase", *to, path) for tool, path in zip((QEMU, vblk), paths)]
        named = [as_json(QEMU.works("info", "--output=json", path)) for path in paths]
        for information in named:
            information.pop("actual-size")
            information.pop("filename")
        found = identical(before, "raw", paths[1], "qcow2")
        if ended[0][:2] != ended[1][:2] or ended[1][0] != 0 or named[0] != named[1] or found[0] != 0 or \
                not is_clean(check(paths[1])):
            wrong.append(f"{options} {to}: {ended} {named} {found} {check(paths[1])['text']}")
        for to in (["-b", "nowhere", "-F", "raw"], ["-b", "", "-F", "raw"], ["-b", bases[1][1], "-F", bases[1][0]], []):
            ended = [tool("rebase", "-u", *to, path) for tool, path in zip((QEMU, vblk), paths)]
            named = [as_json(QEMU.works("info", "--output=json", path)) for path in paths]
            if ended[0][:2] != ended[1][:2] or any(named[0].get(key) != named[1].get(key) for key in
                                                   ("backing-filename", "backing-filename-format")) or \
                    ("nowhere" not in to and not is_clean(check(paths[1]))):
                wrong.append(f"-u {to}: {ended} {named}")
    report.check("rebase keeps the disk and changes the name, as qemu-img does it", not wrong and cases == 10,
                 "\n".join(wrong[:3]))
    image = folder / "ours.qcow2"
    fresh = folder / "fresh.qcow2"
    shutil.copy(image, fresh)
    each_fails(report, "rebase refuses what qemu-img refuses", vblk, [
        ["rebase", image], ["rebase", "-b", "nowhere", "-F", "raw", image], ["rebase", "-b", folder / "a.qcow2", image],
        ["rebase", "-u", "-b", folder / "a.qcow2", image], ["rebase", "-u", "-b", "x", "-F", "nonsense", image],
        ["rebase", "-u", "-b", "x" * 1100, "-F", "raw", image], ["rebase", "-b", "x", "-F", "raw", folder / "a.raw"],
        ["rebase", "-b", "", folder / "none"], ["rebase"]], folder)
    data = fresh.read_bytes()
    for arguments in (["-b", "nowhere", "-F", "raw"], ["-b", folder / "a.qcow2"], ["-u", "-b", "x" * 1100, "-F", "raw"]):
        vblk("rebase", *arguments, fresh)
    report.check("and leaves the image alone", fresh.read_bytes() == data)
    for path in folder.iterdir():
        path.unlink()


def rebase_killed(report, vblk, folder, rng):
    """At calls that are counted, and at any time: the same disk on the old or the new backing file, and the next one works."""
    bases = []
    for name in ("old", "new"):
        raw = folder / f"{name}.raw"
        raw.write_bytes(content(rng, 8 * MIB))
        bases.append(folder / f"{name}.qcow2")
        QEMU.works("convert", "-f", "raw", "-O", "qcow2", raw, bases[-1])
    sound, copy, before = folder / "sound.qcow2", folder / "copy.qcow2", folder / "before.raw"
    QEMU.works("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", bases[0], "-F", "qcow2", sound, "9M")
    qemu_io(sound, "write -P 7 1M 1M", "write -z 3M 300k")
    QEMU.works("convert", "-O", "raw", sound, before)
    words = ["rebase", "-b", bases[1], "-F", "qcow2", copy]
    shutil.copy(sound, copy)
    begun = time.monotonic()
    vblk.works(*words)
    whole_seconds = time.monotonic() - begun
    wrong, interrupted, names = [], 0, set()
    for when in [*range(3, 40, 8), *(rng.random() for _ in range(6))]:
        shutil.copy(sound, copy)
        if isinstance(when, int):
            killed = killed_at(vblk, "io_uring_enter,pwritev2", when, *words) != 0
        else:
            process = vblk.start(*words)
            time.sleep(when * whole_seconds)
            process.kill()
            process.communicate()
            killed = process.returncode != 0
        interrupted += killed
        released(copy)
        judged, name = check(copy), as_json(QEMU.works("info", "--output=json", copy))["backing-filename"]
        names.add(name)
        if judged["corruptions"] or judged["check-errors"] or name not in map(str, bases if killed else bases[1:]) or \
                identical(before, "raw", copy, "qcow2")[0] != 0:
            wrong.append(f"{when}: {name} {judged['text'][:500]}")
        again = vblk(*words)
        if again[0] != 0 or identical(before, "raw", copy, "qcow2")[0] != 0 or not is_sound(check(copy)):
            wrong.append(f"{when}: once more: {again}")
    report.check("rebase killed on the way: the same disk, without errors, and the next one works",
                 not wrong and interrupted > 4 and str(bases[0]) in names, f"{interrupted} {names}\n" + "\n".join(wrong[:3]))
    for path in folder.iterdir():
        path.unlink()


# ---- commit

def commit_survives_power_cuts(report, vblk, folder, rng):
    """All of a commit: copying into the base, which grows, and emptying the image. Whenever the power goes, both images are without
    errors, and the upper one is the same disk."""
    base, top, raw, before = folder / "base.qcow2", folder / "top.qcow2", folder / "raw", folder / "before.raw"
    left = folder / "left"
    wrong, cuts, noticed = [], 0, 0
    for options, sizes in ((["-o", "cluster_size=4k"], (MIB, MIB + 700 * KIB)), ([], (2 * MIB, 2 * MIB))):
        raw.write_bytes(content(rng, sizes[0]))
        QEMU.works("convert", "-f", "raw", "-O", "qcow2", *rng.choice([[], ["-c"]]), *options, raw, base)
        QEMU.works("create", "-q", "-f", "qcow2", *options, "-b", "base.qcow2", "-F", "qcow2", top, sizes[1])
        qemu_io(top, "write -P 7 100k 300k", "write -z 600k 100k", f"write -P 8 {sizes[1] - 50 * KIB} 50k")
        QEMU.works("snapshot", "-c", "kept", top)
        qemu_io(top, "write -P 9 200k 100k")
        QEMU.works("convert", "-O", "raw", top, before)
        contents = {path: path.read_bytes() for path in (base, top)}
        operations = operations_of(folder / "trace", *vblk.command, "commit", top)
        at_flushes = {moment for flush in operations if flush.kind == "flush" for moment in (flush.begun - 1, flush.begun, flush.ended)}
        last = max(operation.ended for operation in operations)
        left.mkdir()
        for moment in sorted({*at_flushes, *(rng.randrange(last) for _ in range(5)), last}):
            for fate in ("by sector", rng.choice(FATES[:3])):
                for path, bytes_before in contents.items():
                    (left / path.name).write_bytes(after_power_cut(bytes_before, path, operations, moment, fate, rng))
                cuts += 1
                judged = [check(left / path.name) for path in contents]
                if not all(is_sound(found) for found in judged) or identical(before, "raw", left / "top.qcow2", "qcow2")[0] != 0:
                    wrong.append(f"{options} {moment} of {last}, {fate}: {judged}")
        # Where flushes do nothing this is found.
        for _ in range(6):
            for path, bytes_before in contents.items():
                (left / path.name).write_bytes(after_power_cut(bytes_before, path, operations, last, "by write", rng, True))
            noticed += not all(is_sound(check(left / path.name)) for path in contents) or \
                identical(before, "raw", left / "top.qcow2", "qcow2")[0] != 0
        shutil.rmtree(left)
    report.check("commit and power cuts: both images are without errors, and the disk is the same", not wrong and cuts > 30,
                 f"{cuts}\n" + "\n".join(wrong[:3]))
    report.check("what a disk without flushes leaves of a commit is noticed", noticed > 1, noticed)
    for path in folder.iterdir():
        path.unlink()


def commits_alike(report, vblk, folder, rng):
    def chain(place, options, sizes):
        place.mkdir()
        raw = place / "raw"
        raw.write_bytes(content(rng, sizes[0]))
        kind = rng.choice(["raw", "qcow2"])
        base = place / f"base.{kind}"
        QEMU.works("convert", "-f", "raw", "-O", kind, raw, base)
        raw.unlink()
        for below, below_kind, name, size in ((base.name, kind, "mid.qcow2", sizes[1]), ("mid.qcow2", "qcow2", "top.qcow2", sizes[2])):
            QEMU.works("create", "-q", "-f", "qcow2", *options, "-b", below, "-F", below_kind, place / name, size)
            for _ in range(5):
                at, length = rng.randrange(1500) * SECTOR, rng.randrange(1, 400) * SECTOR
                qemu_io(place / name, f"{rng.choice(['write -P 7', 'write -P 9', 'write -z'])} {at} {length}")
        return base

    wrong = []
    for number in range(8):
        options = rng.choice([[], ["-o", "cluster_size=4k"], ["-o", "extended_l2=on"], ["-o", "compat=0.10"]])
        sizes = [rng.choice([1, 2, 3]) * MIB, rng.choice([1, 2, 4]) * MIB, rng.choice([1, 2, 4]) * MIB]
        if options == ["-o", "compat=0.10"]:
            # qemu-img cannot make one larger where its backing file goes on: that would have to be zeroes.
            sizes[1] = max(sizes[1], sizes[2])
        theirs, ours = folder / "theirs", folder / "ours"
        base = chain(theirs, options, sizes)
        snapshot = rng.random() < 0.4
        if snapshot:
            QEMU.works("snapshot", "-c", "kept", theirs / "top.qcow2")
        shutil.copytree(theirs, ours)
        before = folder / "before.raw"
        QEMU.works("convert", "-O", "raw", theirs / "top.qcow2", before)
        more = rng.choice([[], [], ["-d"], ["-b", base.name], ["-q"]])
        ended = [QEMU("commit", *more, "top.qcow2", cwd=theirs), vblk("commit", *more, "top.qcow2", cwd=ours)]
        found = []
        for name in (base.name, "mid.qcow2", "top.qcow2"):
            kind = name.rsplit(".", 1)[1]
            found.append(identical(theirs / name, kind, ours / name, kind)[0] == 0 and
                         (kind == "raw" or is_clean(check(ours / name))))
        found.append(identical(before, "raw", ours / "top.qcow2", "qcow2")[0] == 0 or sizes[2] < max(sizes))
        allocated = [any(piece["depth"] == 0 and piece["present"] for piece in
                         json.loads(QEMU.works("map", "--output=json", place / "top.qcow2"))) for place in (theirs, ours)]
        if ended[0][:2] != ended[1][:2] or ended[1][0] != 0 or not all(found) or allocated[0] != allocated[1]:
            wrong.append(f"{options} {sizes} {more} {snapshot}: {ended} {found} {allocated}")
        if snapshot and QEMU("snapshot", "-a", "kept", ours / "top.qcow2")[0] != 0:
            wrong.append(f"{options}: the snapshot is of no use any more")
        shutil.rmtree(theirs)
        shutil.rmtree(ours)
    report.check("commit writes down what qemu-img writes down, and empties what it empties", not wrong, "\n".join(wrong[:3]))
    place = folder / "place"
    base = chain(place, [], [3 * MIB, 3 * MIB, 3 * MIB])
    top = place / "top.qcow2"
    before = folder / "before.raw"
    QEMU.works("convert", "-O", "raw", top, before)
    each_fails(report, "commit refuses what qemu-img refuses", vblk, [
        ["commit"], ["commit", before], ["commit", "-b", "nowhere", top], ["commit", folder / "none"], ["commit", "-r", "x", top]],
        folder)
    # What was not closed is closed first; what has errors is not begun with.
    wrong = []
    lazy, below = folder / "lazy.qcow2", folder / "below.qcow2"
    for tool in (QEMU, vblk):
        QEMU.works("create", "-q", "-f", "qcow2", below, "3M")
        QEMU.works("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "-b", below, "-F", "qcow2", lazy)
        run_and_abort(lazy)
        left = Header(lazy)["incompatible_features"]
        QEMU.works("convert", "-O", "raw", lazy, folder / "lazy.raw")
        ended = tool("commit", lazy)
        if left != 1 or ended[:2] != (0, "Image committed.\n") or Header(lazy)["incompatible_features"] or \
                not is_clean(check(lazy)) or identical(folder / "lazy.raw", "raw", below, "qcow2")[0] != 0:
            wrong.append(f"{tool.command}: {left} {ended} {check(lazy)['text'][:400]}")
    report.check("commit of an image that was not closed", not wrong, "\n".join(wrong))
    qemu_io(lazy, "write -P 9 0 1M")
    qemu_io(lazy, "write -P 9 0 1M")
    write_number(lazy, Damage(lazy).refcounts[5], 7, ">H")
    write_number(lazy, Damage(lazy).l1[0], Damage(lazy).header["l1_table_offset"] | COPIED)
    pair = lazy.read_bytes(), below.read_bytes()
    status, _, errors = vblk("commit", lazy)
    report.check("commit of an image with errors is refused before anything is written",
                 status == 1 and "it has errors" in errors and pair == (lazy.read_bytes(), below.read_bytes()), errors)
    for path in (lazy, below, folder / "lazy.raw"):
        path.unlink()
    wrong, interrupted = [], 0
    for when in range(2, 60, 4):
        copy = folder / "copy"
        shutil.copytree(place, copy)
        process = subprocess.Popen(["strace", "-f", "-o", "/dev/null", "-e", f"inject=io_uring_enter,pwritev2:signal=KILL:when={when}",
                                    *vblk.command, "commit", copy / "top.qcow2"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        process.wait(20)
        interrupted += process.returncode != 0
        for name in ("mid.qcow2", "top.qcow2"):
            released(copy / name)
            judged = check(copy / name)
            if judged["corruptions"] or judged["check-errors"]:
                wrong.append(f"{when} {name}: {judged['text'][:500]}")
        if identical(before, "raw", copy / "top.qcow2", "qcow2")[0] != 0:
            wrong.append(f"{when}: the disk has changed")
        shutil.rmtree(copy)
    report.check("commit killed on the way: the image is the same disk, and both are without errors", not wrong and interrupted > 4,
                 f"{interrupted}\n" + "\n".join(wrong[:3]))


# ---- snapshot

def snapshots_alike(report, vblk, folder, rng):
    """The same orders to both; afterwards both images are the same disk, with the same snapshots, and clean."""
    wrong, orders = [], 0
    for options in ([], ["-o", "cluster_size=4k,refcount_bits=32"], ["-o", "extended_l2=on"], ["-o", "compat=0.10"],
                    ["-o", "cluster_size=512"], ["-o", "refcount_bits=64,lazy_refcounts=on"]):
        paths = [folder / "theirs.qcow2", folder / "ours.qcow2"]
        raw = folder / "raw"
        raw.write_bytes(content(rng, 2 * MIB))
        QEMU.works("convert", "-f", "raw", "-O", "qcow2", "-c", *options, raw, paths[0])
        shutil.copy(paths[0], paths[1])
        names = []
        for step in range(12):
            kind = rng.choice(["-c", "-c", "-a", "-d", "write"] if names else ["-c", "write"])
            name = f"s{step}" if kind == "-c" else rng.choice([*names, *names, "none"]) if names else ""
            if kind == "write":
                at = rng.randrange(20) * 96 * KIB // SECTOR * SECTOR
                for path in paths:
                    qemu_io(path, f"write -P {step + 1} {at} {(step * 37 % 300 + 1) * SECTOR}")
                continue
            orders += 1
            ended = [tool("snapshot", kind, name, path)[0] for tool, path in zip((QEMU, vblk), paths)]
            if kind == "-c":
                names.append(name)
            elif kind == "-d" and name in names:
                names.remove(name)
            listed = [[(s["id"], s["name"], s["vm-state-size"], s["icount"]) for s in
                       as_json(QEMU.works("info", "--output=json", path)).get("snapshots", [])] for path in paths]
            judged = check(paths[1])
            found = identical(paths[0], "qcow2", paths[1], "qcow2")
            if ended[0] != ended[1] or listed[0] != listed[1] or not is_clean(judged) or found[0] != 0:
                wrong.append(f"{options} step {step} {kind} {name}: {ended} {listed} {judged['text']} {found}")
        for name in names:
            raws = [folder / "one.raw", folder / "other.raw"]
            for path, to in zip(paths, raws):
                QEMU.works("convert", "-l", f"snapshot.name={name}", "-O", "raw", path, to)
            if raws[0].read_bytes() != raws[1].read_bytes():
                wrong.append(f"{options}: snapshot {name} has another content")
        same(report, f"snapshot -l {' '.join(options)}", vblk, ["snapshot", "-l", paths[0]])
    for path in (paths[0], raw, folder / "none"):
        same(report, f"snapshot of {path.name} without an action", vblk, ["snapshot", path])
    report.check("snapshots are made, taken back to and removed as qemu-img does it", not wrong and orders > 25,
                 f"{orders}\n" + "\n".join(wrong[:3]))
    image = folder / "grow.qcow2"
    QEMU.works("create", "-f", "qcow2", image, "3M")
    qemu_io(image, "write -P 3 0 3M")
    vblk.works("snapshot", "-c", "small", image)
    QEMU.works("resize", image, "700M")
    qemu_io(image, "write -P 4 600M 1M")
    vblk.works("snapshot", "-c", "large", image)
    vblk.works("snapshot", "-a", "small", image)
    sizes = [as_json(QEMU.works("info", "--output=json", image))["virtual-size"]]
    vblk.works("snapshot", "-a", "large", image)
    sizes.append(as_json(QEMU.works("info", "--output=json", image))["virtual-size"])
    report.check("a snapshot brings its size back", sizes == [3 * MIB, 700 * MIB] and is_clean(check(image)), sizes)
    vblk.works("snapshot", "-d", "large", image)
    vblk.works("snapshot", "-d", "small", image)
    report.check("what is removed gives its space back",
                 is_clean(check(image)) and allocated_bytes(image) < 6 * MIB and identical(image, "qcow2", image, "qcow2")[0] == 0,
                 allocated_bytes(image))
    QEMU.works("bitmap", "--add", image, "b")
    narrow = folder / "narrow.qcow2"
    QEMU.works("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", narrow, "1M")
    qemu_io(narrow, "write -P 3 0 1M")
    fresh = folder / "fresh.qcow2"
    shutil.copy(narrow, fresh)
    each_fails(report, "snapshot refuses what qemu-img refuses", vblk, [
        ["snapshot", "-c", "x", raw], ["snapshot", "-a", "none", image], ["snapshot", "-d", "none", image],
        ["snapshot", "-l", "-c", "x", image], ["snapshot"], ["snapshot", "-c"], ["snapshot", "-c", "x", narrow],
        # What nobody else may have open.
        ["snapshot", "-U", "-c", "x", image], ["check", "-U", "-r", "leaks", image], ["check", "--force-share", "-r", "all", image]],
        folder)
    before = fresh.read_bytes()
    report.check("and leaves such an image alone",
                 vblk("snapshot", "-c", "x", fresh)[0] == 1 and fresh.read_bytes() == before)
    wrong = []
    for order in (["-c", "x"], ["-a", "s"], ["-d", "s"]):
        paths = [folder / "theirs.dirty", folder / "ours.dirty"]
        QEMU.works("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", paths[0], "3M")
        QEMU.works("snapshot", "-c", "s", paths[0])
        run_and_abort(paths[0])
        left = Header(paths[0])["incompatible_features"]
        shutil.copy(paths[0], paths[1])
        ended = [tool("snapshot", *order, path)[:2] for tool, path in zip((QEMU, vblk), paths)]
        if left != 1 or ended[0] != ended[1] or ended[1][0] != 0 or Header(paths[1])["incompatible_features"] or \
                not is_clean(check(paths[1])) or identical(paths[0], "qcow2", paths[1], "qcow2")[0] != 0:
            wrong.append(f"{order}: {left} {ended} {check(paths[1])['text'][:400]}")
    report.check("snapshots of an image that was not closed", not wrong, "\n".join(wrong))
    # Killed at any write: no error, leaks at most.
    sound = folder / "sound.qcow2"
    QEMU.works("create", "-f", "qcow2", "-o", "cluster_size=4k", sound, "3M")
    qemu_io(sound, "write -P 3 0 1M")
    QEMU.works("snapshot", "-c", "one", sound)
    qemu_io(sound, "write -P 4 500k 1M")
    wrong, interrupted = [], 0
    before = folder / "before.raw"
    QEMU.works("convert", "-O", "raw", sound, before)
    for order in (["-c", "two"], ["-d", "one"], ["-a", "one"]):
        for when in range(3, 33, 6):
            copy = folder / "copy.qcow2"
            shutil.copy(sound, copy)
            process = subprocess.Popen(["strace", "-f", "-o", "/dev/null", "-e", f"inject=io_uring_enter,pwritev2:signal=KILL:when={when}",
                                        *vblk.command, "snapshot", *order, copy],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            process.wait(20)
            interrupted += process.returncode != 0
            released(copy)
            found = check(copy)
            if not is_clean(found):
                wrong.append(f"{order} {when}: {found['text'][:600]}")
            if order[0] != "-a" and identical(before, "raw", copy, "qcow2")[0] != 0:
                wrong.append(f"{order} {when}: the disk has changed")
            vblk("check", "-r", "all", copy)
            if vblk("snapshot", "-c", "three", copy)[0] != 0 or not is_clean(check(copy)):
                wrong.append(f"{order} {when}: of no use afterwards")
    report.check("snapshot killed on the way: as it was or as it is to be, and clean", not wrong and interrupted > 6,
                 f"{interrupted}\n" + "\n".join(wrong[:3]))
    for path in folder.iterdir():
        path.unlink()


# ---- dd

def copies_parts_alike(report, vblk, folder, rng):
    raw, image, wrong, copied = folder / "in.raw", folder / "in.qcow2", [], 0
    raw.write_bytes(rng.randbytes(5000))
    whole = folder / "whole.raw"
    whole.write_bytes(content(rng, 2 * MIB + 3 * SECTOR))
    QEMU.works("convert", "-f", "raw", "-O", "qcow2", "-c", whole, image)
    cases = [(raw, words) for words in ([], ["bs=700"], ["bs=700", "count=3"], ["bs=1000", "skip=2", "count=3"],
                                        ["bs=1000", "skip=7"], ["bs=1000", "skip=5"], ["count=0"], ["bs=5k", "skip=1E"],
                                        ["bs=1k", "skip=1", "count=1"], ["bs=1M", "count=7E"], ["skip=1", "bs=2147483647"])]
    cases += [(image, [f"bs={rng.choice([1, 333, 512, 4096, 70001])}k", f"skip={rng.randrange(4)}", f"count={rng.randrange(1, 99)}"])
              for _ in range(4)]
    cases += [(image, [f"bs={rng.randrange(1000, 99999)}", f"skip={rng.randrange(30)}"]), (image, ["bs=64k"])]
    for path, words in cases:
        for kind in ("raw", "qcow2"):
            ended, outputs = [], [folder / "theirs", folder / "ours"]
            for tool, output in zip((QEMU, vblk), outputs):
                ended.append(tool("dd", "-f", path.suffix[1:], "-O", kind, *words, f"if={path}", f"of={output}")[:2])
            good = ended[0] == ended[1] and all(output.exists() for output in outputs)
            copied += good
            if good and kind == "raw":
                good = outputs[0].read_bytes() == outputs[1].read_bytes()
            elif good:
                good = identical(*[word for output in outputs for word in (output, kind)])[0] == 0 and is_clean(check(outputs[1]))
            if not good:
                wrong.append(f"{path.name} {kind} {words}: {ended}")
            # Every other one is replaced.
            if rng.random() < 0.5:
                for output in outputs:
                    output.unlink(missing_ok=True)
    report.check("dd copies what qemu-img copies", not wrong and copied > 20, f"{copied}\n" + "\n".join(wrong[:3]))
    for name in ("theirs", "ours"):
        (folder / name).unlink(missing_ok=True)
    same(report, "dd -U", vblk, ["dd", "-U", f"if={raw}", f"of={folder / 'u.raw'}"])
    same(report, "dd --image-opts", vblk, ["dd", "--image-opts", f"if=driver=qcow2,file.filename={image}", f"of={folder / 'u.raw'}"])
    (folder / "u.raw").unlink()
    each_fails(report, "dd refuses what qemu-img refuses", vblk, [
        ["dd"], ["dd", f"if={raw}"], ["dd", f"of={folder / 'x'}"], ["dd", f"if={folder / 'none'}", f"of={folder / 'x'}"],
        *(["dd", word, f"if={raw}", f"of={folder / 'x'}"] for word in
          ("bs=0", "bs=2G", "bs=x", "count=-1", "skip=8E", "nonsense=1", "nonsense", "bs=")),
        ["dd", "-O", "nonsense", f"if={raw}", f"of={folder / 'x'}"], ["dd", "-n", f"if={raw}", f"of={folder / 'x'}"],
        ["dd", "--image-opts", f"if={raw}", f"of={folder / 'x'}"],
        ["dd", "--image-opts", "-f", "raw", f"if=driver=raw,file.filename={raw}", f"of={folder / 'x'}"],
        ["dd", f"if={raw}", f"of={folder / 'no' / 'x'}"], ["dd", "-f", "qcow2", f"if={raw}", f"of={folder / 'x'}"]], folder)
    before = raw.read_bytes()
    status, _, errors = vblk("dd", f"if={raw}", f"of={raw}")
    report.check("dd of a file onto itself is refused", status == 1 and "the source and the target" in errors and
                 raw.read_bytes() == before, errors)
    for path in folder.iterdir():
        path.unlink()


# ---- bitmap

def stored_bitmaps(path):
    """The persistent bitmaps of an image, read from its bytes: {name: (flags, granularity, which bits are set)}."""
    data, header = path.read_bytes(), Header(path)
    at = extension_offset(path, EXTENSION_BITMAPS)
    if at is None or not header["autoclear_features"] & 1:
        return {}
    count, _, length, offset = struct.unpack_from(">IIQQ", data, at + 8)
    cluster, bitmaps, end = 1 << header["cluster_bits"], {}, offset + length
    while offset < end:
        table, entries, flags, kind, bits, name_bytes, extra = struct.unpack_from(">QIIBBHI", data, offset)
        name = data[offset + 24 + extra:offset + 24 + extra + name_bytes].decode()
        content = b""
        for entry in struct.unpack_from(f">{entries}Q", data, table):
            place = entry & OFFSET_MASK
            piece = data[place:place + cluster] if place else (b"\xff" if entry & 1 else b"\0") * cluster
            content += piece.ljust(cluster, b"\0")
        assert kind == 1
        bitmaps[name] = (flags, 1 << bits, int.from_bytes(content, "little"))
        offset += (24 + extra + name_bytes + 7) // 8 * 8
    assert len(bitmaps) == count
    return bitmaps


def keeps_bitmaps_alike(report, vblk, folder, rng):
    """The same orders to both; afterwards both images have the same bitmaps with the same bits, and are clean."""
    wrong, orders, merged = [], 0, 0
    for options in ([], ["-o", "cluster_size=512,refcount_bits=32"], ["-o", "extended_l2=on"]):
        paths, others = [folder / "theirs.qcow2", folder / "ours.qcow2"], [folder / "theirs.other", folder / "ours.other"]
        size = rng.choice([3 * MIB, 7 * MIB + 5 * SECTOR])
        for path in (paths[0], others[0]):
            QEMU.works("create", "-q", "-f", "qcow2", *options, path, size)
        QEMU.works("bitmap", "--add", "-g", "32k", others[0], "far")
        qemu_io(others[0], "write -P 1 70k 1k", "write -P 1 2M 300k")
        shutil.copy(paths[0], paths[1])
        shutil.copy(others[0], others[1])
        names = ["a", "b", "ein Name mit \u00e4"]
        for step in range(10):
            if step % 3 == 2:
                at = rng.randrange(2000) * SECTOR
                for path in paths:
                    qemu_io(path, f"write -P {step} {at} {(step * 37 % 300 + 1) * SECTOR}")
                continue
            name = rng.choice(names)
            actions = [["--add"], ["--add", "-g", rng.choice(["512", "64k", "1M", "2G"])], ["--remove"], ["--clear"],
                       ["--enable"], ["--disable"], ["--merge", rng.choice(names)], ["--merge", "far", "-b", None],
                       ["--add", "--disable", "--merge", rng.choice(names)], ["--disable", "--remove", "--add", "-g", "4k"]]
            words = rng.choice(actions if step > 1 else actions[:2])
            orders += 1
            ended = [tool("bitmap", *[other if word is None else word for word in words], path, name)[:2]
                     for tool, path, other in zip((QEMU, vblk), paths, others)]
            merged += "--merge" in words and ended[0][0] == 0
            stored = [stored_bitmaps(path) for path in paths]
            if ended[0] != ended[1] or stored[0] != stored[1] or not is_clean(check(paths[1])):
                wrong.append(f"{options} step {step} {name} {words}: {ended} {stored} {check(paths[1])['text']}")
                break
        shown = [as_json(QEMU.works("info", "--output=json", path))["format-specific"] for path in paths]
        if shown[0] != shown[1] or identical(paths[0], "qcow2", paths[1], "qcow2")[0] != 0:
            wrong.append(f"{options}: {shown}")
        same(report, f"info tells of bitmaps {' '.join(options)}", vblk, ["info", "--output=json", paths[1]], as_json)
    report.check("bitmap does what qemu-img does, bit by bit", not wrong and orders >= 18, f"{orders}\n" + "\n".join(wrong[:2]))

    # The disk gets another size: what is new is not set, what is behind the end is forgotten.
    wrong = []
    for options, sizes in ((["-o", "cluster_size=512"], ["7M", "+0", "9M", "1000k", "5M"]), ([], ["700M", "2G", "+0", "3M"])):
        paths = [folder / "theirs.qcow2", folder / "ours.qcow2"]
        QEMU.works("create", "-q", "-f", "qcow2", *options, paths[0], 5 * MIB + 3 * SECTOR)
        for words in (["--add", "-g", "512"], ["--add", "-g", "64k", "--disable"], ["--add", "-g", "2G"]):
            QEMU.works("bitmap", *words, paths[0], words[2])
        qemu_io(paths[0], "write -P 1 70k 90k", "write -P 2 5M 1k")
        shutil.copy(paths[0], paths[1])
        for size in sizes:
            ended = [tool("resize", "--shrink", path, size)[:2] for tool, path in zip((QEMU, vblk), paths)]
            stored = [stored_bitmaps(path) for path in paths]
            if ended[0] != ended[1] or stored[0] != stored[1] or len(stored[1]) != 3 or not is_clean(check(paths[1])) or \
                    identical(paths[0], "qcow2", paths[1], "qcow2")[0] != 0:
                wrong.append(f"{options} {size}: {ended} {stored} {check(paths[1])['text']}")
    report.check("resize keeps bitmaps as qemu-img keeps them", not wrong, "\n".join(wrong))
    # None of them may be there that does not know of a change, and a disk of either size is the same disk.
    wrong, interrupted, sound, image = [], 0, folder / "theirs.qcow2", folder / "killed.qcow2"
    QEMU.works("resize", "--shrink", sound, "3M")
    before = stored_bitmaps(sound)
    for when in (1, 3, 6, 10, 15, 21):
        shutil.copy(sound, image)
        interrupted += killed_at(vblk, "io_uring_enter,pwritev2", when, "resize", image, "4M") != 0
        released(image)
        found = stored_bitmaps(image)
        if found not in ({}, before) and {name: bits for name, (_, _, bits) in found.items()} != \
                {name: bits for name, (_, _, bits) in before.items()}:
            wrong.append(f"killed at {when}: {found}")
        # A comparison takes zeroes for what the smaller one does not have.
        if identical(sound, "qcow2", image, "qcow2")[0] != 0 or not is_sound(check(image)):
            wrong.append(f"killed at {when}: {check(image)['text']}")
    report.check("resize with bitmaps killed on the way: the disk is there, its bitmaps are right or gone",
                 not wrong and interrupted > 2, f"{interrupted} {wrong}")

    # Merging where granularities differ, both ways, chosen so that it happens in every run.
    wrong = []
    for coarse, fine in (("64k", "512"), ("1M", "32k")):
        paths = [folder / "theirs.qcow2", folder / "ours.qcow2"]
        QEMU.works("create", "-q", "-f", "qcow2", paths[0], 5 * MIB + 3 * SECTOR)
        for granularity, name in ((coarse, "coarse"), (fine, "fine")):
            QEMU.works("bitmap", "--add", "-g", granularity, paths[0], name)
            qemu_io(paths[0], f"write -P 1 {rng.randrange(2000) * SECTOR} {rng.randrange(1, 999) * SECTOR}")
        qemu_io(paths[0], "write -P 1 5M 1k")
        shutil.copy(paths[0], paths[1])
        for into, source in (("coarse", "fine"), ("fine", "coarse")):
            for tool, path in zip((QEMU, vblk), paths):
                tool.works("bitmap", "--merge", source, path, into)
            if stored_bitmaps(paths[0]) != stored_bitmaps(paths[1]) or not is_clean(check(paths[1])):
                wrong.append(f"{coarse} {fine} {into}: {[stored_bitmaps(path) for path in paths]}")
    report.check("bitmaps of two granularities are merged as qemu-img merges them", not wrong, "\n".join(wrong))

    image, raw, old, small = (folder / name for name in ("image.qcow2", "disk.raw", "old.qcow2", "small.qcow2"))
    QEMU.works("create", "-q", "-f", "qcow2", image, "3M")
    QEMU.works("create", "-q", "-f", "qcow2", "-o", "compat=0.10", old, "3M")
    QEMU.works("create", "-q", "-f", "qcow2", small, "1M")
    raw.write_bytes(bytes(MIB))
    for path in (image, small):
        QEMU.works("bitmap", "--add", path, "b")
    QEMU.works("bitmap", "--add", image, "lost")
    data = image.read_bytes()
    # As an unclean end leaves it: flag in_use.
    entry = struct.unpack_from(">Q", data, extension_offset(image, EXTENSION_BITMAPS) + 8 + 16)[0] + 32
    write_number(image, entry + 12, 3, ">I")
    before = image.read_bytes()
    each_fails(report, "bitmap refuses what qemu-img refuses", vblk, [
        ["bitmap"], ["bitmap", "--add", image], ["bitmap", image, "b"], ["bitmap", "--add", image, "b"],
        ["bitmap", "--add", image, ""], ["bitmap", "--add", image, "n" * 1024], ["bitmap", "--add", "-g", "511", image, "c"],
        ["bitmap", "--add", "-g", "4G", image, "c"], ["bitmap", "--add", "-g", "x", image, "c"],
        ["bitmap", "--clear", image, "none"], ["bitmap", "--remove", image, "none"], ["bitmap", "--merge", "none", image, "b"],
        ["bitmap", "-g", "4k", "--clear", image, "b"], ["bitmap", "-b", small, "--clear", image, "b"],
        ["bitmap", "-F", "qcow2", "--merge", "b", image, "b"], ["bitmap", "-b", image, "--merge", "b", image, "b"],
        ["bitmap", "-b", small, "--merge", "b", image, "b"], ["bitmap", "-b", raw, "-F", "raw", "--merge", "b", image, "b"],
        ["bitmap", "-b", folder / "none", "--merge", "b", image, "b"], ["bitmap", "-U", "--clear", image, "b"],
        ["bitmap", "--clear", image, "lost"], ["bitmap", "--enable", image, "lost"], ["bitmap", "--merge", "lost", image, "b"],
        ["resize", image, "5M"],
        ["bitmap", "--add", old, "b"], ["bitmap", "--add", "-f", "raw", raw, "b"], ["bitmap", "--remove", raw, "b"],
        ["bitmap", "--add", folder / "none", "b"]], folder)
    fresh = folder / "fresh.qcow2"
    fresh.write_bytes(before)
    for words in (["--add", "b"], ["--clear", "lost"], ["--add", "n" * 1024], ["--enable", "b"]):
        vblk("bitmap", words[0], fresh, words[1])
    report.check("and leaves the image alone, as does what changes nothing", fresh.read_bytes() == before)
    report.check("an inconsistent bitmap can be removed",
                 vblk("bitmap", "--remove", fresh, "lost")[0] == 0 and list(stored_bitmaps(fresh)) == ["b"] and is_clean(check(fresh)))
    sizes = []
    for _ in range(12):
        vblk.works("bitmap", "--add", "--disable", fresh, "x")
        vblk.works("bitmap", "--remove", fresh, "x")
        sizes.append(fresh.stat().st_size)
    report.check("a file that is changed again and again does not grow", sizes[-1] == sizes[3] and is_clean(check(fresh)), sizes)

    # convert --bitmaps: the same bitmaps with the same bits.
    shutil.copy(paths[0], folder / "source.qcow2")
    vblk.works("bitmap", "--disable", folder / "source.qcow2", "fine")
    wrong = []
    for options in ([], ["-c", "-o", "cluster_size=4k,refcount_bits=64"], ["-o", "cluster_size=512", "-t", "writeback"]):
        outputs = [folder / "theirs.new", folder / "ours.new"]
        ended = [tool("convert", "--bitmaps", "-O", "qcow2", *options, folder / "source.qcow2", output)[:2]
                 for tool, output in zip((QEMU, vblk), outputs)]
        found = [stored_bitmaps(output) for output in outputs]
        if ended[0] != ended[1] or found[0] != found[1] or len(found[1]) != 2 or not is_clean(check(outputs[1])) or \
                identical(folder / "source.qcow2", "qcow2", outputs[1], "qcow2")[0] != 0:
            wrong.append(f"{options}: {ended} {found} {check(outputs[1])['text']}")
    report.check("convert --bitmaps copies what qemu-img copies", not wrong, "\n".join(wrong))
    each_fails(report, "convert --bitmaps refuses what qemu-img refuses", vblk, [
        ["convert", "--bitmaps", "-O", "qcow2", image, folder / "x"], ["convert", "--bitmaps", "-O", "raw", small, folder / "x"],
        ["convert", "--bitmaps", "-f", "raw", "-O", "qcow2", raw, folder / "x"],
        ["convert", "--bitmaps", "-O", "qcow2", "-o", "compat=0.10", small, folder / "x"],
        ["convert", "--bitmaps", "-O", "qcow2", small, small, folder / "x"],
        ["convert", "--skip-broken-bitmaps", "-O", "qcow2", small, folder / "x"]], folder)
    vblk.works("convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", image, folder / "skipped.qcow2")
    report.check("--skip-broken-bitmaps leaves out what is inconsistent", list(stored_bitmaps(folder / "skipped.qcow2")) == ["b"])

    # Killed at any write: the bitmaps are those of before or after, the disk is the same, and nothing leaks.
    sound, copy = folder / "sound.qcow2", folder / "copy.qcow2"
    QEMU.works("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", sound, "3M")
    for name in ("a", "b"):
        QEMU.works("bitmap", "--add", "-g", "512", sound, name)
        qemu_io(sound, "write -P 3 0 1M" if name == "a" else "write -P 4 500k 1M")
    orders = (["--merge", "a", "--disable"], ["--remove"], ["--disable"])
    wrong, interrupted = killed_alike(vblk, folder, sound, [["bitmap", *order, copy, "b"] for order in orders], stored_bitmaps)
    report.check("bitmap killed on the way: as it was or as it is to be, and clean", not wrong and interrupted > 6,
                 f"{interrupted}\n" + "\n".join(wrong[:3]))
    for path in folder.iterdir():
        path.unlink()


def keeps_bitmaps_while_writing(report, vblk, folder, rng):
    """Whoever writes to an image with bitmaps keeps them: what changed is set in those that record writes, and the others are
    as they were."""
    def make(path, *backing):
        QEMU.works("create", "-q", "-f", "qcow2", *backing, path, "6M")
        for words in (["--add", "-g", "64k"], ["--add", "-g", "512"], ["--add", "--disable", "-g", "4k"], ["--add"]):
            QEMU.works("bitmap", *words, path, {"64k": "coarse", "512": "fine", "4k": "off"}.get(words[-1], "lost"))
        qemu_io(path, "write -P 1 100k 200k")
        # Flag in_use, as an unclean end leaves it, of the last one.
        directory = struct.unpack_from(">Q", path.read_bytes(), extension_offset(path, EXTENSION_BITMAPS) + 8 + 16)[0]
        data = path.read_bytes()
        at = data.index(b"lost", directory) - 24
        write_number(path, at + 12, 3, ">I")

    def disk(path):
        QEMU.works("convert", "-U", "-O", "raw", path, folder / "disk.raw")
        return (folder / "disk.raw").read_bytes()

    source, other = folder / "source.qcow2", folder / "other.raw"
    QEMU.works("create", "-q", "-f", "qcow2", source, "6M")
    for _ in range(6):
        qemu_io(source, f"write -P 7 {rng.randrange(11000) * SECTOR} {rng.randrange(1, 300) * SECTOR}")
    other.write_bytes(content(rng, 6 * MIB))
    wrong = []
    for what in ("commit", "commit -d", "convert -n", "convert -n --target-is-zero", "rebase"):
        places = [folder / "theirs", folder / "ours"]
        found = []
        for tool, place in zip((QEMU, vblk), places):
            place.mkdir()
            image = place / "image.qcow2"
            if what == "rebase":
                make(image, "-b", other, "-F", "raw")
            else:
                make(image)
            old, stored = disk(image), stored_bitmaps(image)
            if what.startswith("commit"):
                top = place / "top.qcow2"
                QEMU.works("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top, "6M")
                QEMU.works("bitmap", "--add", top, "above")
                qemu_io(top, "write -P 9 1M 70k", "write -z 3M 1k", "write -P 4 5M 512")
                above = stored_bitmaps(top)
                ended = tool(*what.split(), top)
                if tool is vblk and (stored_bitmaps(top) != above or not is_clean(check(top))):
                    wrong.append(f"{what}: what is committed has other bitmaps")
            elif what == "rebase":
                ended = tool("rebase", "-b", "", image)
            else:
                ended = tool(*what.split(), "-O", "qcow2", source, image)
            new, now = disk(image), stored_bitmaps(image)
            changed = {number for number in range(len(new) // SECTOR)
                       if new[number * SECTOR:(number + 1) * SECTOR] != old[number * SECTOR:(number + 1) * SECTOR]}
            if what == "rebase":
                # The disk stays; its image has what the backing file had.
                changed = {number for number in range(len(new) // SECTOR) if any(new[number * SECTOR:(number + 1) * SECTOR]) and
                           not 64 * KIB <= number * SECTOR < 320 * KIB}
            found.append((ended[:2], {name: now[name][:2] for name in now}, now["coarse"][2]))
            if tool is QEMU:
                continue
            fine = now["fine"][2]
            missed = [number for number in changed if not fine >> number & 1]
            if ended[0] != 0 or missed or (fine | stored["fine"][2]) != fine or now["off"] != stored["off"] or \
                    not is_clean(check(image)):
                wrong.append(f"{what}: {ended} {len(missed)} of {len(changed)} missed, {check(image)['text'][:300]}")
        if found[0] != found[1]:
            wrong.append(f"{what}: {found}")
        for place in places:
            shutil.rmtree(place)
    report.check("commit, convert -n and rebase keep bitmaps, and set what they write", not wrong, "\n".join(wrong))

    # amend gives the disk another size as resize does; what it cannot keep is refused before.
    wrong, paths = [], [folder / "theirs.qcow2", folder / "ours.qcow2"]
    for tool, path in zip((QEMU, vblk), paths):
        make(path)
        refused = tool("amend", "-o", "size=9M", path)
        QEMU.works("bitmap", "--remove", path, "lost")
        before = stored_bitmaps(path)
        ended = tool("amend", "-o", "size=9M", path)
        if refused[0] != 1 or ended[0] != 0 or Header(path)["size"] != 9 * MIB or not is_clean(check(path)) or \
                {name: bits for name, (_, _, bits) in stored_bitmaps(path).items()} != {name: bits for name, (_, _, bits) in before.items()}:
            wrong.append(f"{tool.command[0]}: {refused} {ended} {stored_bitmaps(path)} {before}")
    report.check("amend -o size keeps bitmaps as qemu-img keeps them", not wrong, "\n".join(wrong))
    QEMU.works("snapshot", "-c", "s", paths[1])
    each_fails(report, "snapshot -a of an image with bitmaps is refused, as by qemu-img", vblk, [["snapshot", "-a", "s", paths[1]]], folder)

    # --bitmaps into an image that is there, beside those that it has.
    wrong = []
    QEMU.works("create", "-q", "-f", "qcow2", source, "6M")
    for name, words in (("one", ["-g", "64k"]), ("two", ["-g", "512", "--disable"])):
        QEMU.works("bitmap", "--add", *words, source, name)
    qemu_io(source, "write -P 5 2M 100k")
    for tool, path in zip((QEMU, vblk), paths):
        QEMU.works("create", "-q", "-f", "qcow2", path, "6M")
        QEMU.works("bitmap", "--add", path, "own")
        ended = tool("convert", "-n", "--bitmaps", "-O", "qcow2", source, path)
        copy = folder / "again.qcow2"
        shutil.copy(path, copy)
        again = tool("convert", "-n", "--bitmaps", "-O", "qcow2", source, copy)
        if ended[0] != 0 or again[0] != 1 or not is_clean(check(path)) or tool is vblk and copy.read_bytes() != path.read_bytes():
            wrong.append(f"{tool.command[0]}: {ended} {again}")
    stored = [stored_bitmaps(path) for path in paths]
    if stored[0] != stored[1] or len(stored[1]) != 3:
        wrong.append(f"{stored}")
    report.check("convert -n --bitmaps copies what qemu-img copies", not wrong, "\n".join(wrong))
    # Killed on the way: right, or gone.
    wrong, interrupted, sound, image = [], 0, paths[1], folder / "killed.qcow2"
    before = stored_bitmaps(sound)
    after = dict(before)
    for when in (1, 3, 6, 10, 15, 21, 30):
        shutil.copy(sound, image)
        interrupted += killed_at(vblk, "io_uring_enter,pwritev2", when, "convert", "-n", "-O", "qcow2", source, image) != 0
        released(image)
        found = stored_bitmaps(image)
        grew = all(found.get(name, entry)[2] & entry[2] == entry[2] for name, entry in after.items())
        if (found and (set(found) != set(before) or not grew)) or check(image)["corruptions"]:
            wrong.append(f"killed at {when}: {found}")
    report.check("convert -n with bitmaps killed on the way: its bitmaps are right or gone", not wrong and interrupted >= 4,
                 f"{interrupted}\n" + "\n".join(wrong))
    for path in folder.iterdir():
        path.unlink()


def killed_alike(vblk, folder, sound, orders, look):
    """Gives each order to a copy of an image and has it killed at many of its system calls; then `look` must say what
    it says before or after, the disk must be the same and the image clean. What is wrong, and how many were killed."""
    copy, wrong, interrupted = folder / "copy.qcow2", [], 0
    for order in orders:
        shutil.copy(sound, copy)
        vblk.works(*order)
        states = [look(sound), look(copy)]
        for when in range(2, 40, 6):
            shutil.copy(sound, copy)
            process = subprocess.Popen(["strace", "-f", "-o", "/dev/null", "-e",
                                        f"inject=io_uring_enter,pwritev2:signal=KILL:when={when}", *vblk.command, *map(str, order)],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            process.wait(20)
            if process.returncode == 0:
                break
            interrupted += 1
            released(copy)
            found = check(copy)
            if not is_clean(found) or look(copy) not in states or identical(sound, "qcow2", copy, "qcow2")[0] != 0:
                wrong.append(f"{order} {when}: {look(copy)} {found['text'][:600]}")
    return wrong, interrupted


# ---- amend

def amends_alike(report, vblk, folder, rng):
    """Each image is amended by both, in steps: the same statuses, the same disk and snapshots, the same information."""
    base = folder / "base.raw"
    base.write_bytes(content(rng, 2 * MIB))
    backed = ["-b", base, "-F", "raw"]
    zeroes = ["write -P 7 0 300k", "write -z 64k 128k", "write -z -u 1M 200k", "write -P 9 1100k 10k"]
    # Small clusters: qemu-img takes seconds for another refcount width with larger ones.
    cases = [
        (["-o", "cluster_size=4k"], zeroes, ["compat=0.10", "lazy_refcounts=on", "refcount_bits=8", "compat=1.1,lazy_refcounts=on,refcount_bits=8",
                      "compat=0.10", "refcount_bits=16,compat=v2"]),
        (["-o", "cluster_size=4k", *backed], [*zeroes, "snapshot", "write -P 3 60k 90k"],
         ["refcount_bits=1", "refcount_bits=2", "refcount_bits=16", "compat=0.10", "compat=v3", "backing_file=other",
          f"backing_file={base},backing_fmt=raw", "backing_fmt=raw", "size=5M"]),
        (["-o", "extended_l2=on,cluster_size=16k"], zeroes, ["compat=0.10", "refcount_bits=64", "lazy_refcounts=on", "lazy_refcounts=off"]),
        (["-o", "compat=0.10,cluster_size=4k"], ["write -P 7 0 300k", "snapshot", "write -P 8 100k 300k"],
         ["size=0", "size=700", "compat=", "data_file_raw=off", "compat=1.1,refcount_bits=32", "size=4M", "compat=0.10"]),
        (["-o", "cluster_size=512"], [*zeroes, "bitmap"], ["refcount_bits=4", "refcount_bits=16,compat=0.10"]),
        (["-o", f"data_file={folder}/data,data_file_raw=on,cluster_size=4k"], ["write -P 7 0 300k"],
         ["compat=0.10", "data_file_raw=off", "data_file_raw=on", f"data_file={folder}/data2", "refcount_bits=64"]),
        ([], ["write -P 7 0 300k"], ["size=1M", "compat=0.10,size=9M", "preallocation=off", "cluster_size=65536", "nonsense=1",
                                     "lazy_refcounts=maybe", "refcount_bits=3", "data_file=x", "compat=2", "refcount_bits=128"]),
    ]
    wrong, amended, refused = [], 0, 0
    for options, commands, steps in cases:
        paths = [folder / "theirs.qcow2", folder / "ours.qcow2"]
        QEMU.works("create", "-q", "-f", "qcow2", *options, paths[0], "3M")
        has_snapshot = "snapshot" in commands
        for command in commands:
            if command == "snapshot":
                QEMU.works("snapshot", "-c", "s", paths[0])
            elif command == "bitmap":
                QEMU.works("bitmap", "--add", paths[0], "b")
            else:
                qemu_io(paths[0], command)
        if (folder / "data").exists():
            shutil.copy(folder / "data", folder / "data2")
        shutil.copy(paths[0], paths[1])
        for step in steps:
            before = paths[1].read_bytes()
            ended = [tool("amend", "-o", step, path)[:2] for tool, path in zip((QEMU, vblk), paths)]
            shown = [as_json(QEMU.works("info", "--output=json", path)) for path in paths]
            for information in shown:
                for key in ("actual-size", "filename"):
                    information.pop(key)
                for snapshot in information.get("snapshots", []):
                    snapshot.pop("icount", None)
            good = ended[0] == ended[1] and shown[0] == shown[1] and is_clean(check(paths[1])) and \
                identical(paths[0], "qcow2", paths[1], "qcow2")[0] == 0
            if ended[1][0] == 0:
                amended += 1
            else:
                refused += 1
                good = good and paths[1].read_bytes() == before
            if not good:
                wrong.append(f"{options} {step}: {ended} {shown} {check(paths[1])['text'][:600]}")
        if has_snapshot:
            contents = []
            for path in paths:
                QEMU.works("convert", "-l", "s", "-O", "raw", path, folder / "snapshot.raw")
                contents.append((folder / "snapshot.raw").read_bytes())
            if contents[0] != contents[1]:
                wrong.append(f"{options}: the snapshot has another content")
    report.check("amend changes what qemu-img changes, and refuses what it refuses", not wrong and amended > 18 and refused > 14,
                 f"{amended} {refused}\n" + "\n".join(wrong[:2]))
    image = folder / "ours.qcow2"
    each_fails(report, "amend: command lines that make no sense fail as qemu-img's do", vblk, [
        ["amend"], ["amend", image], ["amend", "-o", "", image], ["amend", "-o", "size=1M"], ["amend", "-o", "size=1M", image, image],
        ["amend", "-o", "size=1M", "-f", "raw", base], ["amend", "-o", "size=1M", base], ["amend", "-o", "size=1M", folder / "none"],
        ["amend", "-f", "raw", "-o", "help"], ["amend", "-o", "help"], ["amend", "-t", "nonsense", "-o", "size=1M", image],
        ["amend", "-f", "nonsense", "-o", "size=1M", image], ["amend", "-o", "encrypt.keyslot=1", image]], folder)
    status, output, _ = vblk("amend", "-f", "qcow2", "-o", "help")
    theirs = set(re.findall(r"^  ([\w.-]+)=", QEMU("amend", "-f", "qcow2", "-o", "help")[1], re.M))
    listed = set(re.findall(r"^  (\w+)=", output, re.M))
    report.check("amend -o help lists qemu-img's options but encryption's", status == 0 and output.startswith("Amend options for") and
                 listed == {name for name in theirs if not name.startswith("encrypt")}, listed ^ theirs)
    status, output, _ = vblk("amend", "-p", "-o", "compat=1.1,lazy_refcounts=on", image)
    report.check("amend -p shows progress from 0 to 100", status == 0 and output.startswith("    (0.00/100%)\r") and
                 output.endswith("    (100.00/100%)\r\n"), output)

    # Names too long for the header's first sector, and a feature table that has to make way.
    long_name = folder / ("n" * 240)
    shutil.copy(base, long_name)
    tight = folder / "tight.qcow2"
    vblk.works("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", long_name, "-F", "raw", tight, "2M")
    for step in ("compat=0.10", "compat=1.1", "refcount_bits=64"):
        vblk.works("amend", "-o", step, tight)
    report.check("amend: a header that is nearly full", is_clean(check(tight)) and identical(base, "raw", tight, "qcow2")[0] == 0 and
                 as_json(QEMU.works("info", "--output=json", tight))["backing-filename"] == str(long_name))

    # All that is asked for is checked before the first of it is done.
    wrong = []
    QEMU.works("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", tight, "3M")
    qemu_io(tight, "write -P 7 0 300k")
    shutil.copy(tight, folder / "kept.qcow2")
    QEMU.works("snapshot", "-c", "s", folder / "kept.qcow2")
    lonely = folder / "lonely.qcow2"
    QEMU.works("create", "-q", "-f", "qcow2", "-u", "-b", folder / "nobody", "-F", "raw", lonely, "3M")
    for path, step in ((tight, "lazy_refcounts=on,size=1P"), (tight, "refcount_bits=64,size=3000"),
                       (folder / "kept.qcow2", "compat=0.10,size=5M"),
                       (tight, "refcount_bits=8,compat=0.10,size=5M"), (lonely, "refcount_bits=64,size=5M")):
        before = path.read_bytes()
        status, _, errors = vblk("amend", "-o", step, path)
        if status != 1 or len(errors.splitlines()) != 1 or path.read_bytes() != before:
            wrong.append(f"{path.name} {step}: {status} {errors}")
    # A snapshot that will have the disk's size does not forbid it.
    QEMU.works("resize", "-q", folder / "kept.qcow2", "5M")
    vblk.works("amend", "-o", "compat=0.10,size=3M", folder / "kept.qcow2")
    found = as_json(QEMU.works("info", "--output=json", folder / "kept.qcow2"))
    if found["virtual-size"] != 3 * MIB or found["format-specific"]["data"]["compat"] != "0.10" or not is_clean(check(folder / "kept.qcow2")):
        wrong.append(f"{found}")
    report.check("amend with a size: refused before anything is done, or done", not wrong, "\n".join(wrong))

    # What was not closed is repaired first, as opening it would.
    dirty = folder / "dirty.qcow2"
    QEMU.works("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", dirty, "3M")
    run_and_abort(dirty)
    left = Header(dirty)["incompatible_features"]
    vblk.works("amend", "-o", "lazy_refcounts=off", dirty)
    report.check("amend of an image that was not closed", left == 1 and Header(dirty)["incompatible_features"] == 0 and
                 is_clean(check(dirty)))

    # Killed at any write.
    sound, copy = folder / "sound.qcow2", folder / "copy.qcow2"
    QEMU.works("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *backed, sound, "2M")
    qemu_io(sound, "write -P 7 0 300k", "write -z 64k 128k")
    QEMU.works("snapshot", "-c", "s", sound)
    qemu_io(sound, "write -z 1M 64k")

    def look(path):
        return Header(path)["refcount_table_clusters"] and as_json(QEMU.works("info", "--output=json", path))["format-specific"]

    orders = [["amend", "-o", step, copy] for step in ("compat=0.10", "refcount_bits=64,lazy_refcounts=on")]
    wrong, interrupted = killed_alike(vblk, folder, sound, orders, look)
    report.check("amend killed on the way: as it was or as it is to be, and clean", not wrong and interrupted > 6,
                 f"{interrupted}\n" + "\n".join(wrong[:3]))
    for path in folder.iterdir():
        path.unlink()


def run_and_abort(image):
    """Writes, and ends without closing the image."""
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "abort", image], stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, check=False)


# ---- check of damaged images

class Damage:
    """An image whose metadata is changed, place by place."""

    # What the format allows and QEMU does not know: its status, ours.
    NONE = {"a bitmap with extra data": (1, 0), "a bitmap with compatible extra data of no bytes": (1, 0)}

    def __init__(self, path):
        self.path, self.header = path, Header(path)
        cluster = 1 << self.header["cluster_bits"]
        self.l1 = [(self.header["l1_table_offset"] + 8 * i) for i in range(self.header["l1_size"])]
        table = self.header["refcount_table_offset"]
        self.refcount_table = [table + 8 * i for i in range(4)]
        data = path.read_bytes()
        tables = [struct.unpack_from(">Q", data, at)[0] & OFFSET_MASK for at in self.l1]
        blocks = [struct.unpack_from(">Q", data, at)[0] & OFFSET_MASK for at in self.refcount_table]
        is_new = self.header.has("incompatible_features")
        # An extended entry has a second word, of which subclusters have data and which are zeroes.
        words = 2 if is_new and self.header["incompatible_features"] & INCOMPAT_EXTENDED_L2 else 1
        # Large clusters have room for more entries than such a disk has.
        used = min(cluster, 64 * KIB)
        self.l2 = [at for table in tables if table for at in range(table, table + used, 8 * words) if any(data[at:at + 8 * words])]
        self.subclusters = [at + 8 for at in self.l2] if words == 2 else []
        bits = 1 << read_number(path, 96, ">I") if is_new else 16
        # Narrow ones share a byte, which is what is damaged then.
        self.refcount_layout = {1: ">B", 8: ">B", 16: ">H", 32: ">I", 64: ">Q"}[bits]
        self.refcounts = [at + max(bits, 8) // 8 * i for at in blocks if at for i in range(min(cluster * 8 // max(bits, 8), 60))]
        # The first entry of the snapshot table, and of the bitmap directory.
        self.snapshot = self.header["snapshots_offset"] if self.header["nb_snapshots"] else None
        self.extension = extension_offset(path, EXTENSION_BITMAPS)
        self.bitmap = struct.unpack_from(">Q", data, self.extension + 24)[0] if self.extension else None
        # Of both, the bytes that say where things are and how large; but for a bitmap's flags and extra data.
        self.entries = [*range(self.snapshot, self.snapshot + 56, 2)] * 2 if self.snapshot else []
        self.entries += [self.bitmap + at for at in (0, 2, 4, 6, 8, 10, 16, 18)] * 4 if self.bitmap else []
        self.bitmap_table = struct.unpack_from(">Q", data, self.bitmap)[0] if self.bitmap else None

    def flip(self, place, mask):
        write_number(self.path, place, read_number(self.path, place) ^ mask)

    def chosen(self, rng):
        """Named damages, each to a random place."""
        l2, l1, block = rng.choice(self.l2), rng.choice(self.l1), rng.choice(self.refcounts)
        table = self.refcount_table[0]
        other = rng.choice(self.l2)
        return {
            "a copied flag of an L2 entry": lambda: self.flip(l2, COPIED),
            "a copied flag of an L1 entry": lambda: self.flip(l1, COPIED),
            "two guest clusters with one host cluster": lambda: write_number(self.path, l2, read_number(self.path, other)),
            "an L2 entry that is gone": lambda: write_number(self.path, l2, 0),
            "an L1 entry that is gone": lambda: write_number(self.path, l1, 0),
            "a refcount of 0": self.put(block, 0, self.refcount_layout),
            "a refcount of 7": self.put(block, 7, self.refcount_layout),
            "data that does not begin with a cluster": lambda: self.flip(l2, 512),
            "space of a zero cluster that does not begin with a cluster": lambda: write_number(self.path, l2, 0x30201),
            "reserved bits of an L2 entry": lambda: self.flip(l2, 1 << 58 | 2),
            "reserved bits of an L1 entry": lambda: self.flip(l1, 1 << 58 | 2),
            "data beyond the end": lambda: self.flip(l2, 1 << 40),
            "an L2 table beyond the end": lambda: write_number(self.path, l1, 1 << 40 | COPIED),
            "data on the header": lambda: write_number(self.path, l2, COPIED | 0x200000),
            "a refcount block that does not begin with a cluster": lambda: self.flip(table, 512),
            "reserved bits of a refcount table entry": lambda: self.flip(table, 4),
            "a refcount block beyond the end": lambda: write_number(self.path, table, 1 << 40),
            "no refcount block": lambda: write_number(self.path, table, 0),
            "a refcount block on data": lambda: write_number(self.path, table, read_number(self.path, l2) & OFFSET_MASK),
            **(self.of_subclusters(rng.choice(self.subclusters)) if self.subclusters else {}),
            **(self.of_snapshots() if self.snapshot else {}),
            **(self.of_bitmaps() if self.bitmap else {}),
        }

    def put(self, place, value, layout):
        return lambda: write_number(self.path, place, value, layout)

    def change(self, place, by, layout):
        return lambda: write_number(self.path, place, read_number(self.path, place, layout) + by, layout)

    def with_extra_data(self, extra_bytes):
        """The first snapshot, which is the last one too, gets so much extra data."""
        with open(self.path, "r+b") as file:
            file.seek(self.snapshot)
            fixed = file.read(40)
            id_bytes, name_bytes, old_bytes = struct.unpack_from(">HH", fixed, 12) + struct.unpack_from(">I", fixed, 36)
            rest = file.read(old_bytes + id_bytes + name_bytes)
            file.seek(self.snapshot)
            file.write(fixed[:36] + struct.pack(">I", extra_bytes) + rest[:old_bytes].ljust(extra_bytes, b"\0")[:extra_bytes] +
                       rest[old_bytes:] + bytes(8))

    def of_subclusters(self, at):
        """Of the second word of an extended L2 entry (qcow2.txt, "Extended L2 Entries")."""
        return {
            "subclusters that have data and are zeroes": lambda: write_number(self.path, at, 0x00ff_00ff_0000_00ff | 1),
            "subclusters with data of a cluster without space": lambda: (write_number(self.path, at - 8, 0),
                                                                         write_number(self.path, at, 1)),
            "subclusters without data of a cluster with space": lambda: write_number(self.path, at, 0),
            "an extended entry that says by its first word that it is zero": lambda: self.flip(at - 8, 1),
        }

    def of_snapshots(self):
        """Of the snapshot table (qcow2.txt, "Snapshots"), by what each says that the image would be."""
        at = self.snapshot
        return {
            "a snapshot's L1 table that does not begin with a cluster": lambda: self.flip(at, 512),
            "a snapshot's L1 table beyond the end": self.put(at, 1 << 40, ">Q"),
            "a snapshot's L1 table on the disk's": self.put(at, self.header["l1_table_offset"], ">Q"),
            "a snapshot without an L1 table": self.put(at, 0, ">Q"),
            "a snapshot's L1 table of no entries": self.put(at + 8, 0, ">I"),
            "a snapshot's L1 table with an entry more": self.change(at + 8, 1, ">I"),
            "a snapshot's L1 table that is too large": self.put(at + 8, 1 << 24, ">I"),
            "a snapshot's ID that is too long": self.put(at + 12, 0xffff, ">H"),
            "a snapshot's name that is too long": self.put(at + 14, 0xffff, ">H"),
            "a snapshot without a name": self.put(at + 14, 0, ">H"),
            "a snapshot with far too much extra data": self.put(at + 36, 1 << 30, ">I"),
            "a snapshot with some too much extra data": lambda: self.with_extra_data(2000),
            "a snapshot with unknown extra data": lambda: self.with_extra_data(64),
            "a snapshot with half of its extra data": lambda: self.with_extra_data(8),
            "a snapshot without extra data": lambda: self.with_extra_data(0),
            "a snapshot of another size": self.change(at + 48, 1 << 30, ">Q"),
            "a snapshot more": self.change(60, 1, ">I"),
            "no snapshots": self.put(60, 0, ">I"),
            "too many snapshots": self.put(60, 65537, ">I"),
            "a snapshot table that does not begin with a cluster": self.change(64, 512, ">Q"),
            "a snapshot table beyond the end": self.put(64, 1 << 40, ">Q"),
            "a snapshot table on the header": self.put(64, 0, ">Q"),
        }

    def of_bitmaps(self):
        """Of the bitmap directory and what it names (qcow2.txt, "Bitmaps")."""
        at, extension, table = self.bitmap, self.extension + 8, self.bitmap_table
        found = {
            "a bitmap's table that does not begin with a cluster": lambda: self.flip(at, 512),
            "a bitmap's table beyond the end": self.put(at, 1 << 40, ">Q"),
            "a bitmap's table on the header": self.put(at, 0, ">Q"),
            "a bitmap's table on the disk's L1 table": self.put(at, self.header["l1_table_offset"], ">Q"),
            "a bitmap's table of no entries": self.put(at + 8, 0, ">I"),
            "a bitmap's table with an entry more": self.change(at + 8, 1, ">I"),
            "a bitmap's table that is too large": self.put(at + 8, 1 << 28, ">I"),
            "a bitmap in use": self.put(at + 12, 3, ">I"),
            "unknown flags of a bitmap": self.put(at + 12, 0x100, ">I"),
            "a bitmap with compatible extra data of no bytes": self.put(at + 12, 6, ">I"),
            "a bitmap of no known type": self.put(at + 16, 2, ">B"),
            "a bitmap of type 0": self.put(at + 16, 0, ">B"),
            "a bitmap of too fine a granularity": self.put(at + 17, 8, ">B"),
            "a bitmap of the finest granularity": self.put(at + 17, 9, ">B"),
            "a bitmap of the coarsest granularity": self.put(at + 17, 31, ">B"),
            "a bitmap of too coarse a granularity": self.put(at + 17, 32, ">B"),
            "a bitmap of a granularity that nothing has": self.put(at + 17, 255, ">B"),
            "a bitmap without a name": self.put(at + 18, 0, ">H"),
            "a bitmap with too long a name": self.put(at + 18, 1024, ">H"),
            "a bitmap with extra data": self.put(at + 20, 4, ">I"),
            "a bitmap with too much extra data": self.put(at + 20, 1 << 30, ">I"),
            "a bitmap's data that does not begin with a cluster": self.put(table, 0x30200, ">Q"),
            "a bitmap's data beyond the end": self.put(table, 1 << 40, ">Q"),
            "a bitmap's data on the header": self.put(table, 1, ">Q"),
            "a bitmap's data with reserved bits": self.put(table, 1 << 60, ">Q"),
            "a bitmap's data that is ones and has a place": self.put(table, (1 << 40) + 1, ">Q"),
            "no bitmaps": self.put(extension, 0, ">I"),
            "a bitmap more": self.change(extension, 1, ">I"),
            "too many bitmaps": self.put(extension, 65536, ">I"),
            "a bitmaps extension with reserved bits": self.put(extension + 4, 1, ">I"),
            "a bitmaps extension of another length": self.put(extension - 4, 16, ">I"),
            "a bitmap directory of no bytes": self.put(extension + 8, 0, ">Q"),
            "a bitmap directory that is too short": self.change(extension + 8, -8, ">Q"),
            "a bitmap directory that is too long": self.change(extension + 8, 8, ">Q"),
            "a bitmap directory that is far too long": self.put(extension + 8, 1 << 30, ">Q"),
            "a bitmap directory that does not begin with a cluster": self.change(extension + 16, 512, ">Q"),
            "a bitmap directory beyond the end": self.put(extension + 16, 1 << 40, ">Q"),
            "a bitmap directory on the header": self.put(extension + 16, 0, ">Q"),
            "bitmaps that nothing vouches for": self.put(88, 0, ">Q"),
        }
        # What was not closed is judged less strictly.
        in_use = found["a bitmap in use"]
        for name in ("a bitmap's table on the disk's L1 table", "a bitmap's table with an entry more", "a bitmap's table beyond the end",
                     "a bitmap's data that does not begin with a cluster", "a bitmap's data beyond the end",
                     "a bitmap's data with reserved bits", "a bitmap's data that is ones and has a place"):
            found[f"{name}, of one in use"] = lambda damage=found[name]: (in_use(), damage())
        return found


def forget_what_nothing_vouches_for(damage):
    """Without snapshots it says nothing where they would be, nor does a bitmaps extension without its feature bit; qemu-img minds
    all the same."""
    header = Header(damage.path)
    if header["nb_snapshots"] == 0:
        header["snapshots_offset"] = 0
    if damage.extension and not header["autoclear_features"] & 1:
        write_number(damage.path, damage.extension + 4, 24, ">I")


def by_qemu(mode, path):
    """Repaired by qemu-img, which may not make a file of more than a GiB: of what leads far beyond the end it makes a TiB, and
    needs half a minute for that."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))  # noqa: E731
    return QEMU("check", "-r", mode, path, preexec_fn=limit, restore_signals=False)


def repairs_all_it_has(report, vblk, folder, image, rng):
    """An image with snapshots and bitmaps: repaired where qemu-img repairs it, to the same disk with the same bitmaps; and with
    its snapshots, which qemu-img 7.2 loses."""
    broken, theirs, ours, raw = folder / "broken.qcow2", folder / "theirs.qcow2", folder / "ours.qcow2", folder / "snapshot.raw"
    ranks = {0: 0, 3: 1, 2: 2, 1: 3}
    QEMU.works("convert", "-l", "s", "-O", "raw", image, raw)
    kept, wrong, repaired = raw.read_bytes(), [], 0
    sound = stored_bitmaps(image)
    for number in range(16):
        shutil.copy(image, broken)
        damage = Damage(broken)
        # Every other time of the tables that all images have.
        possible = [name for name in damage.chosen(rng) if name not in Damage.NONE and
                    (number % 2 or "snapshot" not in name and "bitmap" not in name)]
        certain = ["a refcount of 0", "a refcount of 7", "a copied flag of an L2 entry", "no refcount block"]
        names = certain[number:number + 1] or rng.choices(possible, k=rng.choice([1, 1, 2]))
        for name in names:
            damage.chosen(rng)[name]()
        forget_what_nothing_vouches_for(damage)
        mode = rng.choice(["leaks", "all", "all"]) if number >= len(certain) else "all"
        before = QEMU("check", broken)[0]
        for path in (theirs, ours):
            shutil.copy(broken, path)
        expected, found = by_qemu(mode, theirs), vblk("check", "-r", mode, ours)
        judged = QEMU("check", ours)[0]
        of_snapshots = any("snapshot" in name for name in names)
        of_bitmaps = any("bitmap" in name for name in names)
        # Where qemu-img loses a snapshot, it loses what was wrong with it; with -r leaks it writes bitmaps anew.
        is_comparable = not of_snapshots and not (of_bitmaps and mode == "leaks")
        about = f"{number} {names} -r {mode}: before {before}, qemu-img {expected}, vblk img {found}, then {judged}"
        if is_comparable and (mode == "all" or before in (0, 3)) and ranks[found[0]] > ranks[expected[0]] or \
                judged != found[0] or ranks[judged] > ranks[before]:
            wrong.append(about)
        if found[0] != 0:
            continue
        repaired += before != 0
        if expected[0] == 0 and identical(ours, "qcow2", theirs, "qcow2")[0] != 0:
            wrong.append(f"{about}: another disk")
        if not of_bitmaps and stored_bitmaps(ours) != sound:
            wrong.append(f"{about}: other bitmaps")
        # What leads into another cluster, or nowhere, is another content also in a snapshot that shares the table.
        if not of_snapshots and not any("L1" in name or "L2" in name or "data" in name or "cluster" in name for name in names):
            raw.unlink()
            if vblk("convert", "-l", "s", "-O", "raw", ours, raw)[0] != 0 or raw.read_bytes() != kept:
                wrong.append(f"{about}: the snapshot has another content")
    report.check("check -r of an image with snapshots and bitmaps: as good as qemu-img's, and nothing is lost",
                 not wrong and repaired > 2, f"{repaired}\n" + "\n".join(wrong[:3]))
    for path in (broken, theirs, ours, raw):
        path.unlink(missing_ok=True)


def repairs(report, vblk, folder, images, rng):
    """What can be repaired is, so that qemu-img agrees; killed on the way, the image is no worse."""
    broken, theirs, ours = folder / "broken.qcow2", folder / "theirs.qcow2", folder / "ours.qcow2"
    wrong, repeated, repaired = [], [], 0
    # Of an image with bitmaps qemu-img 7.2 loses all snapshots when it opens it to repair it, and their errors with them.
    comparable = [images[0], *images[2:]]
    for number in range(40):
        image = rng.choice(comparable)
        shutil.copy(image, broken)
        damage, done = Damage(broken), []
        for _ in range(rng.choice([1, 1, 2, 3])):
            done.append(rng.choice([name for name in damage.chosen(rng) if name not in Damage.NONE]))
            damage.chosen(rng)[done[-1]]()
        # Without snapshots it says nothing where they would be; qemu-img minds all the same.
        forget_what_nothing_vouches_for(damage)
        mode = rng.choice(["leaks", "all", "all"])
        before = QEMU("check", broken)[0]
        shutil.copy(broken, theirs)
        shutil.copy(broken, ours)
        qemu_status = by_qemu(mode, theirs)[0]
        status, output, errors = vblk("check", "-r", mode, "--output=json", ours)
        judged = QEMU("check", ours)[0]
        # As good as qemu-img's repair or better, and what is told of it is so.
        ranks = {0: 0, 3: 1, 2: 2, 1: 3}
        # With -r leaks, qemu-img happens to write bitmaps anew, and with them what was wrong there.
        is_comparable = mode == "all" or before in (0, 3)
        # Too much extra data goes where nothing else is wrong; until then the rest cannot be looked at.
        is_comparable = is_comparable and not (len(done) > 1 and any("too much extra data" in name for name in done))
        if is_comparable and ranks[status] > ranks[qemu_status] or judged != status or ranks[judged] > ranks[before]:
            wrong.append(f"{number} {image.name} {done} -r {mode}: before {before}, qemu-img {qemu_status}, vblk img {status}, then {judged}\n"
                         f"{output}\n{errors[:800]}\n{QEMU('check', ours)}\n{QEMU('check', theirs)}")
        if status == 0 and before != 0:
            repaired += 1
            # A data file has the disk as it is; what an entry says otherwise is found by neither, and read by neither.
            if qemu_status == 0 and identical(ours, "qcow2", theirs, "qcow2")[0] not in (0, identical(theirs, "qcow2", theirs, "qcow2")[0]):
                wrong.append(f"{number} {image.name} {done} -r {mode}: the disk is another than after qemu-img's repair")
        content = ours.read_bytes()
        again = vblk("check", "-r", mode, "--output=json", ours)
        if again[0] != status or ours.read_bytes() != content:
            repeated.append(f"{number} {again}")
    report.check("check -r repairs what qemu-img repairs, to the same disk", not wrong and repaired > 5,
                 f"{repaired}\n" + "\n".join(wrong[:3]))
    report.check("check -r once more changes nothing", not repeated, "\n".join(repeated[:3]))

    # Every write but the first so many fails: what a kill leaves.
    worse, interrupted = [], 0
    for number in range(6):
        shutil.copy(rng.choice(images[:4]), broken)
        damage = Damage(broken)
        chosen = damage.chosen(rng)
        for name in ("a refcount block that does not begin with a cluster", "a copied flag of an L1 entry",
                     "two guest clusters with one host cluster") if number % 2 else ("a refcount of 0", "a refcount of 7"):
            chosen[name]()
        before = as_json(vblk("check", "--output=json", broken)[1])
        process = subprocess.Popen(["strace", "-f", "-o", "/dev/null", "-e", f"inject=io_uring_enter,pwritev2:signal=KILL:when={number // 2 + 3}",
                                    *vblk.command, "check", "-r", "all", broken],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process.wait(20)
        interrupted += process.returncode not in (0, 1, 2, 3)
        released(broken)
        after = as_json(vblk("check", "--output=json", broken)[1])
        # A file that has grown has more refcounts that cannot be read.
        if after["check-errors"] > 2 * before["check-errors"] or \
                after["check-errors"] >= before["check-errors"] and after.get("corruptions", 0) > before.get("corruptions", 0):
            worse.append(f"{before} {after}")
        last = vblk("check", "-r", "all", broken)
        if last[0] != 0:
            worse.append(f"{last}")
    report.check("check -r killed on the way: no worse, and repaired by the next", not worse and interrupted > 2,
                 f"{interrupted}\n" + "\n".join(worse[:3]))
    dirty = folder / "dirty.qcow2"
    shutil.copy(images[2], dirty)
    Header(dirty)["incompatible_features"] = 1
    report.check("an image that was not closed is marked clean when it is sound",
                 vblk("check", "-r", "leaks", dirty)[0] == 0 and Header(dirty)["incompatible_features"] == 0)
    for path in (broken, theirs, ours, dirty):
        path.unlink(missing_ok=True)


def damaged(report, vblk, folder, rng):
    """Every damage is found where qemu-img finds it, and counted as it counts."""
    images, raw = [], folder / "disk.raw"
    raw.write_bytes(content(rng, 600 * KIB))
    for number, (options, things) in enumerate((
            ("cluster_size=4k", ""), ("cluster_size=64k", "snapshot bitmap"), ("cluster_size=4k,lazy_refcounts=on", "snapshot"),
            ("cluster_size=4k,refcount_bits=32", "bitmap"), ("extended_l2=on,cluster_size=16k", "snapshot"),
            (f"data_file={folder}/data,cluster_size=4k", ""), ("cluster_size=512", ""), ("cluster_size=2M", ""),
            ("refcount_bits=1,cluster_size=4k", ""), ("refcount_bits=64,cluster_size=4k", "snapshot"),
            ("cluster_size=4k", "compressed"), ("compat=0.10,cluster_size=4k", "compressed snapshot"))):
        image = folder / f"sound{number}.qcow2"
        if "compressed" in things:
            QEMU.works("convert", "-f", "raw", "-O", "qcow2", "-c", "-o", options, raw, image)
            QEMU.works("resize", "-q", image, "6M")
            qemu_io(image, "write -P 2 3M 200k")
        else:
            QEMU.works("create", "-f", "qcow2", "-o", options, image, "600k" if "=512" in options else "6M")
            qemu_io(image, "write -P 1 0 300k", *([] if "=512" in options else ["write -P 2 3M 200k", "write -z 4M 64k"]))
        if "snapshot" in things:
            QEMU.works("snapshot", "-c", "s", image)
        if "bitmap" in things:
            QEMU.works("bitmap", "--add", "-g", "64k", image, "b")
        if things:
            qemu_io(image, "write -P 3 100k 100k")
        images.append(image)
    copy = folder / "damaged.qcow2"

    def judge(name, wrong):
        theirs, ours = both_at_once(vblk, "check", "--output=json", copy)
        if (theirs[0], ours[0]) == Damage.NONE.get(name):
            return theirs[0]
        if theirs[0] != ours[0] or as_json(theirs[1]) != as_json(ours[1]):
            wrong.append(f"{name}: {theirs}\n{ours}")
        return theirs[0]

    wrong, statuses = {}, []
    for number, image in enumerate(images):
        names = list(Damage(image).chosen(rng))
        # All of them of the first images, a third, others in each run, of the other shapes.
        for name in names if number < 4 else rng.sample(names, len(names) // 3):
            shutil.copy(image, copy)
            Damage(copy).chosen(rng)[name]()
            statuses.append(judge(name, wrong.setdefault(name, [])))
    for name, cases in wrong.items():
        report.check(f"check finds {name}", not cases, "\n".join(cases[:2]))
    report.check("most of these are damages", sum(status != 0 for status in statuses) > len(statuses) * 0.7, statuses)

    wrong, statuses = [], []
    for _ in range(60):
        image = rng.choice(images)
        shutil.copy(image, copy)
        damage = Damage(copy)
        for _ in range(rng.choice([1, 1, 2, 5])):
            places = [*damage.l1, *damage.l2, *damage.subclusters, *damage.refcounts, *damage.refcount_table, *damage.entries]
            place = rng.choice(places) + rng.randrange(2)
            with open(copy, "r+b") as file:
                file.seek(place)
                file.write(bytes([rng.choice([0, 1, 0xff, rng.randrange(256)])]))
        statuses.append(judge("random bytes", wrong))
    report.check("check: 60 images with random bytes are judged as qemu-img judges them", not wrong, "\n".join(wrong[:3]))
    repairs(report, vblk, folder, images, rng)
    repairs_all_it_has(report, vblk, folder, images[1], rng)
    wrong = []
    for _ in range(30):
        # check does not look for a data file.
        image = rng.choice([*images[:5], *images[6:]])
        shutil.copy(image, copy)
        with open(copy, "r+b") as file:
            # Without snapshots it says nothing where they would be; qemu-img minds all the same. Nor does it mind where extensions
            # end (15), or how long the one is that ends them (76, of version 2).
            file.seek(rng.choice([*range(15), *range(16, 64), *(range(72, 112) if Header(image).has("header_length") else [])]))
            file.write(bytes([rng.randrange(256)]))
        theirs, ours = both_at_once(vblk, "check", "--output=json", copy)
        if ours[0] not in (0, 1, 2, 3, 63) or theirs[0] >= 0 and (theirs[0] == 0) != (ours[0] == 0):
            wrong.append(f"{theirs}\n{ours}")
    report.check("check: 30 images with a random byte in the header are good or bad to both", not wrong, "\n".join(wrong[:3]))
    for path in folder.iterdir():
        path.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    parser.add_argument("--only", help="run the tests whose names have this in them")
    options = parser.parse_args()
    options.vblk = options.vblk.resolve()
    rng = random.Random(test_seed())
    vblk, report = Tool(options.vblk, "img"), Report()
    tests = {
        "describes_alike": lambda folder: describes_alike(report, vblk, folder, rng),
        "describes_special": lambda folder: describes_special(report, vblk, folder),
        "takes_descriptions": lambda folder: takes_descriptions(report, vblk, folder),
        "creates_alike": lambda folder: creates_alike(report, vblk, folder, rng),
        "gives_hints": lambda folder: gives_hints(report, vblk, folder),
        "converts": lambda folder: converts(report, vblk, folder, rng),
        "converts_content": lambda folder: converts_content(report, vblk, folder, rng),
        "converts_overlays": lambda folder: converts_overlays(report, vblk, folder, rng),
        "compresses_into_images": lambda folder: compresses_into_images(report, vblk, folder, rng),
        "copies_in_kernel": lambda folder: copies_in_kernel(report, vblk, folder, rng),
        "converts_distribution": lambda folder: converts_distribution(report, vblk, folder, rng),
        "bounds_memory": lambda folder: bounds_memory(report, vblk, folder, rng),
        "survives_changing_sources": lambda folder: survives_changing_sources(report, vblk, folder, rng),
        "refuses_to_convert": lambda folder: refuses_to_convert(report, vblk, folder, options),
        "follows_chains": lambda folder: follows_chains(report, vblk, folder, options),
        "leaves_nothing_half": lambda folder: leaves_nothing_half(report, vblk, folder, options, rng),
        "salvages": lambda folder: salvages(report, vblk, folder, rng),
        "makes_two_files": lambda folder: makes_two_files(report, vblk, folder, rng),
        "speaks_to_nobody": lambda folder: speaks_to_nobody(report, vblk, folder, rng),
        "uses_block_devices": lambda folder: uses_block_devices(report, vblk, folder, rng),
        "keeps_mounted_names": lambda folder: keeps_mounted_names(report, vblk, folder, rng),
        "compares_alike": lambda folder: compares_alike(report, vblk, folder, rng),
        "tells_errors_of_compare": lambda folder: tells_errors_of_compare(report, vblk, folder, rng),
        "shows_progress_alike": lambda folder: shows_progress_alike(report, vblk, folder, rng),
        "resizes_alike": lambda folder: resizes_alike(report, vblk, folder, rng),
        "preallocates_alike": lambda folder: preallocates_alike(report, vblk, folder),
        "fills_empty_disks": lambda folder: fills_empty_disks(report, vblk, folder),
        "commits_alike": lambda folder: commits_alike(report, vblk, folder, rng),
        "commit_survives_power_cuts": lambda folder: commit_survives_power_cuts(report, vblk, folder, rng),
        "rebases_alike": lambda folder: rebases_alike(report, vblk, folder, rng),
        "rebase_killed": lambda folder: rebase_killed(report, vblk, folder, rng),
        "snapshots_alike": lambda folder: snapshots_alike(report, vblk, folder, rng),
        "copies_parts_alike": lambda folder: copies_parts_alike(report, vblk, folder, rng),
        "keeps_bitmaps_alike": lambda folder: keeps_bitmaps_alike(report, vblk, folder, rng),
        "keeps_bitmaps_while_writing": lambda folder: keeps_bitmaps_while_writing(report, vblk, folder, rng),
        "amends_alike": lambda folder: amends_alike(report, vblk, folder, rng),
        "damaged": lambda folder: damaged(report, vblk, folder, rng),
    }
    for name, test in tests.items():
        if options.only and options.only not in name:
            continue
        begun = time.monotonic()
        with Folder() as top:
            folder = top / "t"
            folder.mkdir()
            try:
                test(folder)
            except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
                report.check(f"{name} runs", False, f"{type(error).__name__}: {error}")
        print(f"# {name}: {time.monotonic() - begun:.1f} s", flush=True)
    report.exit()


if __name__ == "__main__":
    main()
