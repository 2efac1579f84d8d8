#!/usr/bin/python3
"""vblk against Debian's qemu-storage-daemon and fio, on the same disk, by the same driver, in interleaved rounds.

Every round measures every cell once, in a new random order, so that what changes with time (other load, a warm host)
falls on both sides alike. What is compared are ratios within a round; the table shows the median ratio and its spread.
Absolute numbers are of one machine and one hour.

As root, the disk is a loop device over a file in RAM, which does the same work at any time, and some workloads are
measured on a file on the real disk as well, where CPU per I/O alone is stable; otherwise the disk is that file.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
IMAGE_MIB = 512  # of the disk in an image file
ENGINES = ("native", "io_uring", "threads")
QSD = "qemu-storage-daemon"
WITHOUT = "vblk without the feature"
RAW = "vblk on a raw file"
# Of qcow2 images, the same on all sides.
L2_CACHE_BYTES, REFCOUNT_CACHE_BYTES = 8 * MIB, 2 * MIB
FEATURES = ("defer-taskrun", "registered-files", "registered-buffers")


class Cell:
    """One comparison: a workload on an engine of both servers, of one and fio, or with and without a feature.

    `image`: of a qcow2 disk; made anew for each measurement where writing changes what it is."""

    def __init__(self, group, title, engine, workload, disk="disk", cache="none", fio=False, feature=None, image=None,
                 beside_raw=False, threads=1):
        self.group, self.title, self.engine, self.workload = group, title, engine, workload
        self.disk, self.cache, self.fio, self.feature = disk, cache, fio, feature
        self.image, self.beside_raw, self.threads = image, beside_raw, threads
        self.reference = WITHOUT if feature else QSD
        self.rounds = []  # one dictionary per round: side -> measurement

    def ratio(self, name, ours="vblk", theirs=None):
        """Median, lowest and highest of ours / theirs over the rounds; theirs: the reference, unless it is named."""
        theirs = theirs or self.reference
        ratios = [entry[ours][name] / entry[theirs][name] for entry in self.rounds
                  if theirs in entry and entry[theirs].get(name) and entry[ours].get(name)]
        return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None

    def median(self, side, name):
        values = [entry[side][name] for entry in self.rounds if side in entry and entry[side].get(name) is not None]
        return statistics.median(values) if values else None


def all_cells(quick):
    cells = []

    def add(*arguments, **options):
        cells.append(Cell(*arguments, **options))

    for depth in (32,) if quick else (32, 128):
        add("null disk", f"4k read, depth {depth}", "none", {"rw": "randread", "bs": 4096, "iodepth": depth}, disk="null")
    for engine in ENGINES:
        for rw, name in (("randread", "read"), ("randwrite", "write")):
            for depth in (1, 32) if quick else (1, 32, 128):
                if quick and rw == "randwrite" and depth == 1:
                    continue
                add(engine, f"4k random {name}, depth {depth}", engine, {"rw": rw, "bs": 4096, "iodepth": depth},
                    fio=depth == 32 and engine != "threads")
        if not quick:
            for size, name in ((65536, "64k"), (MIB, "1M")):
                add(engine, f"{name} random read, depth 8", engine, {"rw": "randread", "bs": size, "iodepth": 8})
                add(engine, f"{name} random write, depth 8", engine, {"rw": "randwrite", "bs": size, "iodepth": 8})
        add(engine, "4k write + flush, depth 1", engine, {"rw": "randwrite", "bs": 4096, "iodepth": 1, "fsync": 1})
    add_qcow2_cells(add, quick)
    for depth in (1, 32):
        add("page cache", f"4k random read, all hits, depth {depth}", "threads",
            {"rw": "randread", "bs": 4096, "iodepth": depth}, disk="cached", cache="writeback")
    if not quick:
        for engine in ENGINES:
            for title, workload in (("4k random read, depth 32", {"rw": "randread", "iodepth": 32}),
                                    ("4k random write, depth 32", {"rw": "randwrite", "iodepth": 32}),
                                    ("4k write + flush, depth 1", {"rw": "randwrite", "iodepth": 1, "fsync": 1})):
                add("file on the disk", f"{engine}: {title}", engine, {"bs": 4096, **workload}, disk="file")
    if not quick:
        for feature in FEATURES:
            for size, name, depth in ((4096, "4k", 1), (4096, "4k", 32), (MIB, "1M", 8)):
                add("io_uring with / without a feature", f"{feature}: {name} random read, depth {depth}", "io_uring",
                    {"rw": "randread", "bs": size, "iodepth": depth}, feature=feature)
    return cells


def add_qcow2_cells(add, quick):
    def add_one(engine, title, image, **workload):
        options = {name: workload.pop(name) for name in ("beside_raw", "threads") if name in workload}
        add(f"qcow2, {engine}", title, engine, workload, disk="qcow2", image=image, **options)

    for engine in ("io_uring",) if quick else ENGINES:
        for rw, name in (("randread", "read"), ("randwrite", "write")):
            for depth in (32,) if quick else (1, 32, 128):
                add_one(engine, f"allocated, 4k random {name}, depth {depth}", "full", rw=rw, bs=4096, iodepth=depth,
                        beside_raw=True)
        add_one(engine, "empty, 4k random write, depth 32", "empty", rw="randwrite", bs=4096, iodepth=32, io_size="32M")
        add_one(engine, "over a backing file, 4k random write, depth 32", "overlay", rw="randwrite", bs=4096, iodepth=32,
                io_size="24M")
        if quick:
            continue
        add_one(engine, "empty, 64k random write, depth 32", "empty", rw="randwrite", bs=65536, iodepth=32,
                io_size="192M")
        add_one(engine, "empty, 4k write + flush, depth 1", "empty", rw="randwrite", bs=4096, iodepth=1, fsync=1,
                io_size="16M")
        add_one(engine, "allocated, 4k random read, depth 8, 4 queues on 2 threads", "full", rw="randread", bs=4096,
                iodepth=8, numjobs=4, beside_raw=True, threads=2)


class Disks:
    """The disks that are measured, made for the run and gone after it."""

    def __init__(self, size_mib, with_file):
        self.size_mib, self.with_file = size_mib, with_file
        self.file_system_mib = 8 * IMAGE_MIB

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vblk-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")))
        self.mounted = self.loop = None
        self.cached = self.folder / "cached.img"
        self._fill(self.cached, 256)
        self.cached.read_bytes()
        if os.geteuid() == 0:
            ram = self.folder / "ram"
            ram.mkdir()
            mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size_mib + self.file_system_mib + 64}m", "tmpfs", ram])
            self.mounted = ram if mounted.returncode == 0 else None
        if self.mounted:
            self._fill(ram / "disk", self.size_mib)
            attached = subprocess.run(["losetup", "--direct-io=on", "--show", "-f", ram / "disk"], capture_output=True)
            self.loop = attached.stdout.decode().strip() if attached.returncode == 0 else None
        self._make_files()
        self.file = self.folder / "disk.img"
        self.disk = self.loop or self.file
        if self.with_file or not self.loop:
            self._fill(self.file, self.size_mib)
        self.description = f"loop device over RAM, {self.size_mib} MiB" if self.loop else f"file in {self.folder.parent}"
        return self

    def _make_files(self):
        """Where image files are: a file system on a loop device over RAM, or the folder."""
        self.files, self.files_loop = self.folder, None
        if self.mounted:
            subprocess.run(["truncate", "-s", f"{self.file_system_mib}M", self.mounted / "files"], check=True)
            attached = subprocess.run(["losetup", "--direct-io=on", "--show", "-f", self.mounted / "files"],
                                      capture_output=True)
            if attached.returncode == 0:
                self.files_loop = attached.stdout.decode().strip()
                self.files = self.folder / "files"
                self.files.mkdir()
                subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", self.files_loop], check=True)
                subprocess.run(["mount", self.files_loop, self.files], check=True)
        self._fill(self.files / "raw.img", IMAGE_MIB)
        # Not into the page cache, whose pages the first direct writes would have to drop.
        subprocess.run(["qemu-img", "convert", "-t", "none", "-O", "qcow2", self.files / "raw.img", self.files / "full.qcow2"], check=True)

    def image(self, kind):
        """The path of an image that is as `kind` says, made now if it has to be."""
        path = self.files / f"{kind}.qcow2"
        if kind == "empty":
            path.unlink(missing_ok=True)
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64G"], check=True)
        elif kind == "overlay":
            path.unlink(missing_ok=True)
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "raw.img", path], check=True)
        return path

    @staticmethod
    def _fill(path, size_mib):
        with open(path, "wb") as file:
            for _ in range(size_mib):
                file.write(random.randbytes(MIB))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def __exit__(self, *_):
        if self.files_loop:
            subprocess.run(["umount", "-l", self.files])
            subprocess.run(["losetup", "-d", self.files_loop])
        if self.loop:
            subprocess.run(["losetup", "-d", self.loop])
        if self.mounted:
            subprocess.run(["umount", "-l", self.mounted])
        subprocess.run(["rm", "-rf", self.folder])

    def path_of(self, cell):
        return {"cached": self.cached, "file": self.file}.get(cell.disk, self.disk)


def vblk_command(vblk, cell, side, disks, socket):
    if cell.disk == "null":
        return [vblk, "serve", "--format", "null", "--size", "1G", "--socket-path", socket, "--log-level", "warning"]
    caches = []
    if cell.image and side == RAW:
        path = disks.files / "raw.img"
    elif cell.image:
        path = disks.image(cell.image)
        caches = ["--l2-cache-size", str(L2_CACHE_BYTES), "--refcount-cache-size", str(REFCOUNT_CACHE_BYTES)]
    else:
        path = disks.path_of(cell)
    feature = ["--io-uring", f"{cell.feature}={'off' if side == WITHOUT else 'on'}"] if cell.feature else []
    return [vblk, "serve", path, "--socket-path", socket, "--aio", cell.engine, "--cache", cell.cache,
            "--queues", str(cell.workload.get("numjobs", 1)), "--iothreads", str(cell.threads), "--log-level", "warning", *caches,
            *feature]


def qsd_command(cell, disks, socket):
    if cell.disk == "null":
        node = "driver=null-co,node-name=d,size=1073741824"
    elif cell.image:
        file = (f"l2-cache-size={L2_CACHE_BYTES},refcount-cache-size={REFCOUNT_CACHE_BYTES},file.driver=file,"
                f"file.filename={disks.image(cell.image)},file.cache.direct=on,file.aio={cell.engine}")
        node = f"driver=qcow2,node-name=d,discard=unmap,{file}"
        if cell.image == "overlay":
            # The backing file by the same engine, as vblk does.
            file += f",backing.driver=raw,backing.file.driver=file,backing.file.filename={disks.files}/raw.img"
            node = (f"driver=qcow2,node-name=d,discard=unmap,{file},backing.file.cache.direct=on,"
                    f"backing.file.aio={cell.engine}")
    else:
        path = disks.path_of(cell)
        driver = "host_device" if str(path).startswith("/dev/") else "file"
        direct = "off" if cell.cache == "writeback" else "on"
        node = f"driver={driver},node-name=d,filename={path},cache.direct={direct},aio={cell.engine}"
    return [QSD, "--blockdev", node, "--object", "iothread,id=t", "--export",
            f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on,iothread=t,"
            f"num-queues={cell.workload.get('numjobs', 1)}"]


def end(server):
    """SIGTERM, and SIGKILL for those who do not listen: Debian's qemu-storage-daemon hung once so, on io_uring."""
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def measure_server(vblk, command, socket, cell, seconds, seed, ramp_seconds=0.2):
    socket.unlink(missing_ok=True)
    with subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 20
            while not socket.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"does not start: {' '.join(map(str, command))}")
                time.sleep(0.01)
            options = [f"--{name}={value}" for name, value in cell.workload.items()]
            # By time, unless the amount is given: what has been written is not empty any more.
            length = [] if "io_size" in cell.workload else ["--runtime", str(seconds), "--ramp_time", str(ramp_seconds)]
            output = subprocess.run([vblk, "bench", "--socket-path", socket, "--pid", str(server.pid), *length,
                                     "--randseed", str(seed), "--output-format", "json", *options], check=True,
                                    capture_output=True).stdout
        finally:
            end(server)
    job = json.loads(output)["jobs"][0]
    done = job["read"] if job["read"]["total_ios"] else job["write"]
    latencies = job["vblk"]["write_and_flush_ns"] if "fsync" in job["job options"] else done["lat_ns"]
    # A disk that stalled for the whole measurement has none.
    percentiles, usage = latencies.get("percentile", {}), job["vblk"]["usage"]
    return {"iops": done["iops"], "p50": percentiles.get("50.000000"), "p99": percentiles.get("99.000000"),
            "cpu": usage["cpu_us_per_io"], "switches": usage["context_switches_per_io"]}


def measure_fio(cell, disks, seconds):
    engine = {"native": "libaio", "io_uring": "io_uring"}[cell.engine]
    output = subprocess.run(
        ["fio", "--name=x", f"--filename={disks.disk}", f"--ioengine={engine}", "--direct=1", f"--rw={cell.workload['rw']}",
         f"--bs={cell.workload['bs']}", f"--iodepth={cell.workload['iodepth']}", f"--runtime={seconds}", "--time_based",
         "--ramp_time=0.2", f"--size={disks.size_mib}m", "--output-format=json", "--iodepth_batch=16",
         "--iodepth_batch_complete_max=16"], check=True, capture_output=True).stdout
    job = json.loads(output)["jobs"][0]
    return {"iops": max(job["read"]["iops"], job["write"]["iops"])}


def sides(cell, have_qsd, have_fio):
    reference = [cell.reference] if cell.feature or have_qsd else []
    return ["vblk", *reference] + (["fio"] if cell.fio and have_fio else []) + ([RAW] if cell.beside_raw else [])


def run_rounds(options, cells, disks, have_qsd, have_fio):
    order = [(cell, side) for cell in cells for side in sides(cell, have_qsd, have_fio)]
    total, done, begin = len(order) * options.rounds, 0, time.monotonic()
    socket = disks.folder / "s"
    for round_number in range(1, options.rounds + 1):
        for cell in cells:
            cell.rounds.append({})
        # Cells in a new order; the sides of one cell one after another, in a new order too.
        for cell in random.sample(cells, len(cells)):
            seed = random.getrandbits(32)
            for side in random.sample(sides(cell, have_qsd, have_fio), len(sides(cell, have_qsd, have_fio))):
                left = (time.monotonic() - begin) / done * (total - done) if done else total * (options.seconds + 0.6)
                print(f"\r\033[Kround {round_number}/{options.rounds}  {cell.engine}  {cell.title}  {side}  "
                      f"about {left:.0f} s left", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
                if side == "fio":
                    cell.rounds[-1][side] = measure_fio(cell, disks, options.seconds)
                else:
                    command = (qsd_command(cell, disks, socket) if side == QSD
                               else vblk_command(options.vblk, cell, side, disks, socket))
                    cell.rounds[-1][side] = measure_server(options.vblk, command, socket, cell, options.seconds, seed)
                done += 1
    print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr)


def number(value, digits):
    return "n/a" if value is None else f"{value:,.{digits}f}"


def spread(ratio):
    return "n/a" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"


def print_table(cells, have_qsd):
    header = ("| workload | IOPS | CPU us/IO | switches/IO | IOPS ratio | CPU ratio | p50 ratio | p99 ratio |\n"
              "|---|--:|--:|--:|--:|--:|--:|--:|")
    group = None
    for cell in cells:
        if cell.group != group:
            group = cell.group
            print(f"\n{group}\n\n{header}")
        print(f"| {cell.title} | {number(cell.median('vblk', 'iops'), 0)} | {number(cell.median('vblk', 'cpu'), 2)} | "
              f"{number(cell.median('vblk', 'switches'), 2)} | " +
              " | ".join(spread(cell.ratio(name)) for name in ("iops", "cpu", "p50", "p99")) + " |")
    print(f"\nRatios are vblk / {QSD} where nothing else is said, median (lowest-highest) of the rounds: above 1 is better "
          "for IOPS, below 1 for the rest." if have_qsd else f"\nNo ratios to {QSD}: it is not installed.")
    against_fio = [(cell, cell.ratio("iops", theirs="fio")) for cell in cells if cell.fio]
    if any(ratio for _, ratio in against_fio):
        print("\nIOPS of vblk / IOPS of fio on the bare disk with the same engine\n")
        for cell, ratio in against_fio:
            print(f"- {cell.engine}, {cell.title}: {spread(ratio)}")


    beside_raw = [cell for cell in cells if cell.beside_raw]
    if beside_raw:
        print("\nvblk on an allocated qcow2 image / vblk on a raw file: IOPS, CPU per I/O\n")
        for cell in beside_raw:
            print(f"- {cell.engine}, {cell.title}: {spread(cell.ratio('iops', theirs=RAW))}, "
                  f"{spread(cell.ratio('cpu', theirs=RAW))}")


def resident_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def measure_memory(options, disks, have_qsd):
    """What a server has in memory when a qcow2 disk of 64 GiB, all mapped, has been read all over."""
    image, socket, figures = disks.folder / "mapped.qcow2", disks.folder / "s", []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, "64G"], check=True)
    sides = [("vblk", [options.vblk, "serve", image, "--socket-path", socket, "--log-level", "warning"])]
    if have_qsd:
        sides.append((QSD, [QSD, "--blockdev", f"driver=qcow2,node-name=d,l2-cache-size={L2_CACHE_BYTES},file.driver=file,"
                            f"file.filename={image}",
                            "--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on"]))
    for side, command in sides:
        socket.unlink(missing_ok=True)
        with subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
            try:
                while not socket.exists() and server.poll() is None:
                    time.sleep(0.01)
                before = resident_mib(server.pid)
                # A dozen reads for each 4 KiB of its L2 tables.
                subprocess.run([options.vblk, "bench", "--socket-path", socket, "--rw", "randread", "--bs", "4k",
                                "--iodepth", "32", "--io_size", "96M"], check=True, capture_output=True)
                figures.append(f"{side} {resident_mib(server.pid):.1f} MiB resident, {before:.1f} before")
            finally:
                end(server)
    print(f"\nA qcow2 disk of 64 GiB, all mapped, read all over (8 MiB of L2 tables): {'; '.join(figures)}.")


def measure_standing_costs(options, disks):
    """An idle server's context switches, its memory, and its start."""
    socket = disks.folder / "s"
    socket.unlink(missing_ok=True)
    command = [options.vblk, "serve", disks.disk, "--socket-path", socket, "--queues", "4", "--iothreads", "4", "--aio",
               "io_uring", "--log-level", "warning"]
    begin = time.monotonic()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as server:
        server.stdout.readline()
        ready_ms = (time.monotonic() - begin) * 1000
        subprocess.run([options.vblk, "bench", "--socket-path", socket, "--runtime", "0.5"], check=True,
                       capture_output=True)
        time.sleep(0.5)

        def switches():
            tasks = Path(f"/proc/{server.pid}/task").iterdir()
            text = "".join((task / "status").read_text() for task in tasks)
            return sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)

        before = switches()
        time.sleep(options.idle_seconds)
        idle = switches() - before
        resident = resident_mib(server.pid)
        end(server)
    print(f"\nStanding costs, 4 queues on 4 I/O threads: ready after {ready_ms:.0f} ms; {resident:.1f} MiB resident; "
          f"{idle} context switches in {options.idle_seconds} s without requests.")


def version(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer workloads, shorter: under two minutes")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--seconds", type=float, help="of each measurement; default 1, with --quick 0.4")
    parser.add_argument("--size-mib", type=int, default=512, help="of the disk")
    parser.add_argument("--only", help="only workloads whose engine, group or title contains this")
    options = parser.parse_args()
    options.vblk = options.vblk.resolve()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.4 if options.quick else 1)
    options.idle_seconds = 2 if options.quick else 10
    if options.rounds < 1 or options.seconds <= 0 or options.size_mib < 64:
        parser.error("use at least 1 round, a positive time and 64 MiB")
    cells = [cell for cell in all_cells(options.quick)
             if not options.only or options.only in f"{cell.engine} {cell.group} {cell.title}"]
    if not cells:
        parser.error(f"no workload matches --only {options.only}")
    qsd, fio = version(QSD, "--version"), version("fio", "--version")
    with Disks(options.size_mib, with_file=any(cell.disk == "file" for cell in cells)) as disks:
        if not disks.loop:
            # The disk is that file already.
            cells = [cell for cell in cells if cell.disk != "file"]
        print(f"{version(options.vblk, '--version')}; {qsd or 'no ' + QSD}; {fio or 'no fio'}; Linux {os.uname().release}; "
              f"{os.cpu_count()} processors; {disks.description}; {options.rounds} rounds of {options.seconds} s")
        run_rounds(options, cells, disks, qsd is not None, fio is not None)
        print_table(cells, qsd is not None)
        measure_standing_costs(options, disks)
        measure_memory(options, disks, qsd is not None)


if __name__ == "__main__":
    main()
