#!/usr/bin/python3
"""The program as a user meets it: bad input, locks, sockets and signals. Prints TAP.

Bad input must cost the user one readable line: a status that is not 0, one line on standard error that names the thing,
and nothing left behind.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import ENGINES, Folder, Report, Server, activation, make_sparse, refused, run  # noqa: E402

MIB = 1 << 20
MANUAL_PAGE = Path(__file__).resolve().parent.parent.parent / "docs/man/vblk.1"


def test_bad_images(report, vblk):
    with Folder() as folder:
        at = ["--socket-path", folder / "s"]
        (folder / "empty.img").touch()
        (folder / "odd.img").write_bytes(b"x" * 700)
        make_sparse(folder / "disk.img", MIB)
        refused(report, vblk, "missing image", folder, [folder / "none.img", *at], "none.img")
        refused(report, vblk, "empty image", folder, [folder / "empty.img", *at], "empty.img")
        (folder / "disk.vmdk").write_bytes(b"KDMV" + bytes(MIB - 4))
        refused(report, vblk, "image of another format", folder, [folder / "disk.vmdk", *at], "format vmdk")
        (folder / "luks.img").write_bytes(b"LUKS\xba\xbe" + bytes(MIB - 6))
        with Server(vblk, [folder / "luks.img"], folder / "s", folder / "log") as server:
            report.check("a disk that a guest has encrypted as a whole is a raw one", server.stop() == 0, server.log.read_text())
        refused(report, vblk, "directory as image", folder, [folder, *at], str(folder))
        refused(report, vblk, "character device as image", folder, ["/dev/null", *at], "/dev/null")
        if os.geteuid() == 0:
            os.chmod(folder, 0o777)
            os.chmod(folder / "disk.img", 0o600)
            other = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
            reachable = subprocess.run([*other, vblk, "--version"], capture_output=True).returncode == 0
            if reachable:
                refused(report, vblk, "unreadable image", folder, [folder / "disk.img", *at], "disk.img", other)
            else:
                report.skip("unreadable image", "another user cannot reach the program's folder")
        else:
            os.chmod(folder / "disk.img", 0)
            refused(report, vblk, "unreadable image", folder, [folder / "disk.img", *at], "disk.img")


def test_full_output(report, vblk):
    """What cannot be written to standard output is an error; a reader who has left is none."""
    for words in (["--help"], ["serve", "--help"], ["bench", "--help"], ["conform", "--list"], ["serve", "--print-capabilities"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([vblk, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        report.check(f"{' '.join(words)} into a full disk fails in one line that says so",
                     done.returncode == 1 and "cannot write to standard output: No space left" in done.stderr and
                     done.stderr.count("\n") == 1, f"{done.returncode}: {done.stderr}")
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([vblk, "bench", "--help"], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    report.check("a reader of a pipe who has left is told nothing", done.returncode == 0 and not done.stderr,
                 f"{done.returncode}: {done.stderr}")


def test_bad_options(report, vblk):
    with Folder() as folder:
        image, at = folder / "disk.img", ["--socket-path", folder / "s"]
        make_sparse(image, MIB)
        for title, arguments, names in (
                ("no image", at, "image"),
                ("no socket", [image], "socket"),
                ("unknown engine", [image, *at, "--aio", "warp"], "warp"),
                ("unknown kind of operation", [image, *at, "--aio", "reed=threads"], "reed"),
                ("unknown feature of io_uring", [image, *at, "--io-uring", "sqpoll=on"], "sqpoll"),
                ("unknown cache mode", [image, *at, "--cache", "some"], "some"),
                ("unknown way to flush", [image, *at, "--share-flushes", "often"], "share-flushes"),
                ("write-behind under O_DIRECT", [image, *at, "--write-behind", "8M"], "write-behind"),
                ("write-behind that is too small", [image, *at, "--cache", "writeback", "--write-behind", "1K"], "1K"),
                ("write-behind that is no size", [image, *at, "--cache", "writeback", "--write-behind", "x"], "x"),
                ("unknown format", [image, *at, "--format", "vhd"], "vhd"),
                ("unknown option", [image, *at, "--turbo"], "turbo"),
                ("no queues", [image, *at, "--queues", "0"], "--queues"),
                ("queue size that is no power of two", [image, *at, "--queue-size", "100"], "queue-size"),
                ("more threads than queues", [image, *at, "--queues", "1", "--iothreads", "2"], "iothreads"),
                ("odd sector size", [image, *at, "--logical-block-size", "700"], "logical-block-size"),
                ("serial that is too long", [image, *at, "--serial", "x" * 21], "serial"),
                ("size of an image", [image, *at, "--size", "1G"], "--size"),
                ("null disk without size", ["--format", "null", *at], "size"),
                ("recovery that is neither on nor off", [image, *at, "--recovery", "maybe"], "recovery"),
                ("descriptor that is not open", [image, "--fd", "97"], "97"),
        ):
            refused(report, vblk, title, folder, arguments, names)


def test_bad_sockets(report, vblk):
    with Folder() as folder:
        image, other = folder / "disk.img", folder / "other.img"
        make_sparse(image, MIB)
        make_sparse(other, MIB)
        (folder / "file").write_text("precious")
        refused(report, vblk, "socket path that is a file", folder, [image, "--socket-path", folder / "file"], "file")
        report.check("the file at the socket path is untouched", (folder / "file").read_text() == "precious")
        long = folder / ("n" * 120)
        refused(report, vblk, "socket path that is too long", folder, [image, "--socket-path", long], "nnnn")
        refused(report, vblk, "socket path in no folder", folder, [image, "--socket-path", folder / "no/s"],
                "no/s': No such file or directory (ENOENT); make its folder first")
        refused(report, vblk, "socket path below a file", folder, [image, "--socket-path", folder / "file/s"],
                "file/s': Not a directory (ENOTDIR); make its folder first")
        with Server(vblk, [image], folder / "s", folder / "log"):
            refused(report, vblk, "socket path in use", folder, [other, "--socket-path", folder / "s"], "/s")


def test_refused_engines(report, vblk):
    """An engine that the kernel refuses, as strace makes it do."""
    with Folder() as folder:
        image, at = folder / "disk.img", ["--socket-path", folder / "s"]
        make_sparse(image, MIB)
        for title, engine, fault, names in (
                ("io_uring disabled by the administrator", "io_uring", "io_uring_setup:error=EPERM", "io_uring"),
                ("kernel without io_uring", "io_uring", "io_uring_setup:error=ENOSYS", "io_uring"),
                ("aio-max-nr exhausted", "native", "io_setup:error=EAGAIN", "aio-max-nr"),
                ("kernel without AIO", "native", "io_setup:error=ENOSYS", "Linux AIO"),
        ):
            strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + fault.split(":")[0], "-e", "inject=" + fault]
            refused(report, vblk, title, folder, [image, *at, "--aio", engine], names, strace)


def test_locks(report, vblk):
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, MIB)
        with Server(vblk, [image], folder / "s", folder / "log"):
            other = [image, "--socket-path", folder / "t"]
            refused(report, vblk, "image that another vblk writes", folder, other, "disk.img")
            for options in ([], ["--size", "2M"]):
                done = subprocess.run(list(map(str, [vblk, "demo", "--image", image, "--overwrite", *options])), timeout=20,
                                      stdin=subprocess.DEVNULL, capture_output=True, text=True)
                report.check(f"demo, an image that another vblk writes, {options}: refused in one line, and nothing is written",
                             done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1 and
                             "is in use" in done.stderr and image.read_bytes() == bytes(MIB), f"{done.stdout}{done.stderr}")
            # `qemu-img info` asks for no lock that a writer refuses; reading the content does.
            status, output = run("qemu-img", "convert", "-f", "raw", "-O", "raw", image, folder / "copy.img")
            report.check("qemu-img is refused while vblk writes", status != 0 and "lock" in output, output)
            status, output = run("qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", image, folder / "copy.img")
            report.check("qemu-img -U may look while vblk writes", status == 0, output)
            status, output = run("qemu-io", "-f", "raw", "-c", "write 0 512", image)
            report.check("qemu-io may not write while vblk writes", "lock" in output, output)
        with Server(vblk, [image, "--read-only"], folder / "s", folder / "log"), \
                Server(vblk, [image, "--read-only"], folder / "t", folder / "log2"):
            report.check("two read-only servers share an image", True)
            refused(report, vblk, "image that others read", folder, [image, "--socket-path", folder / "u"], "add --read-only")
            status, output = run("qemu-img", "convert", "-f", "raw", "-O", "raw", image, folder / "copy.img")
            report.check("qemu-img reads beside read-only servers", status == 0, output)


    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, MIB)
        peer = subprocess.Popen(["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
        print("length", file=peer.stdin, flush=True)
        opened = "1 MiB" in peer.stdout.readline()
        report.check("qemu-io holds the image", opened)
        refused(report, vblk, "image that QEMU writes", folder, [image, "--socket-path", folder / "t"], "disk.img")
        peer.communicate("quit\n", 20)


def test_end_of_life(report, vblk):
    for engine in ENGINES:
        with Folder() as folder:
            image = folder / "disk.img"
            make_sparse(image, MIB)
            with Server(vblk, [image, "--aio", engine], folder / "s", folder / "log") as server:
                report.check(f"{engine}: SIGTERM ends the server with 0", server.stop() == 0, server.log.read_text())
                report.check(f"{engine}: SIGTERM removes the socket", not server.socket.exists())
            with Server(vblk, [image, "--aio", engine], folder / "s", folder / "log") as server:
                server.kill()
                report.check(f"{engine}: SIGKILL leaves the socket", server.socket.exists())
            with Server(vblk, [image, "--aio", engine], folder / "s", folder / "log") as server:
                report.check(f"{engine}: a new server takes a dead one's socket path", server.stop() == 0)
            with Server(vblk, [image, "--aio", engine], folder / "s", folder / "log") as server:
                for junk in (b"", b"\0" * 12, b"\xff" * 400, b"\1\0\0\0\1\0\0\0\xff\xff\xff\x7f"):
                    with socket.socket(socket.AF_UNIX) as client:
                        client.connect(str(server.socket))
                        client.sendall(junk)
                report.check(f"{engine}: junk on the socket costs the connection only", server.stop() == 0,
                             server.log.read_text())


def test_two_signals(report, vblk):
    """timeout(1) sends two signals at once, which must not cost the flush; a second one later is a user's impatience."""
    def slow_server(folder, seconds):
        fault = f"inject=fdatasync:delay_enter={seconds}s"
        strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", fault]
        return Server(vblk, [folder / "disk.img"], folder / "s", folder / "log", strace)

    with Folder() as folder:
        make_sparse(folder / "disk.img", MIB)
        with slow_server(folder, 0.5) as server:
            os.kill(server.pid(), signal.SIGTERM)
            time.sleep(0.1)
            report.check("two signals at once: the server flushes and ends with 0", server.stop() == 0,
                         server.log.read_text())
            report.check("two signals at once: the socket is removed", not server.socket.exists())
        with slow_server(folder, 4) as server:
            os.kill(server.pid(), signal.SIGTERM)
            time.sleep(1.2)
            report.check("a second signal later ends a server whose disk does not answer", server.stop() == 1,
                         server.log.read_text())


def test_answers(report, vblk):
    status, output = run(vblk, "--version")
    report.check("--version answers", status == 0 and output.startswith("vblk "), output)
    status, output = run(vblk, "serve", "--print-capabilities")
    try:
        capabilities = json.loads(output)
    except ValueError:
        capabilities = {}
    good = status == 0 and capabilities.get("type") == "block" and \
        {"blk-file", "read-only"} <= set(capabilities.get("features", []))
    report.check("--print-capabilities is as vhost-user.rst has it", good, output)
    status, output = run(vblk, "serve", "--help")
    report.check("serve --help answers", status == 0 and "--socket-path" in output, output)


def options_in_help(text):
    """Long options with their defaults, as boost::program_options prints them; {name: default or None}."""
    found = re.findall(r"^  --([a-z0-9_-]+)(?: \S+)?(?: \(=([^)\s]*)\))?", text, re.MULTILINE)
    return {name: default or None for name, default in found}


def options_in_man(text, section):
    """The same of one section of the manual page."""
    part = re.search(rf"^\.SH {section}\n(.*?)(?=^\.SH )", text.replace("\\-", "-"), re.MULTILINE | re.DOTALL)[1]
    entries = re.findall(r"^\.TP\n\.BI?R? --([a-z0-9_-]+)(?: \"?[^\n(]*(?:\(=([^)\s]*)\))?\"?)?$", part, re.MULTILINE)
    return {name: default or None for name, default in entries}


def test_manual_page(report, vblk):
    text = MANUAL_PAGE.read_text()
    for command in ("serve", "bench", "bench flush", "conform", "demo", "wash"):
        _, help_text = run(vblk, *command.split(), "--help")
        in_help, in_man = options_in_help(help_text), options_in_man(text, f"OPTIONS OF {command.upper()}")
        report.check(f"the manual page has the options of {command} --help, with their defaults",
                     len(in_help) > 5 and in_help == in_man, f"--help {in_help}\nman    {in_man}")
    _, help_text = run(vblk, "img", "--help")
    in_help = set(re.findall(r"^  (\w+) +\[", help_text, re.MULTILINE))
    in_man = set(re.findall(r'^\.BR "img (\w+) "', text, re.MULTILINE))
    report.check("the manual page has the commands of img --help", in_help and in_help == in_man, f"{in_help} {in_man}")
    for command in sorted(in_help):
        _, help_text = run(vblk, "img", command, "--help")
        line = re.search(rf'^\.BR "img {command} "(.*)$', text.replace("\\-", "-"), re.MULTILINE)[1]
        options = [set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", words)) for words in (help_text, line)]
        report.check(f"the manual page has the options of img {command} --help", options[0] == options[1], options)
    _, help_text = run(vblk, "ctl", "--help")
    in_help = set(re.findall(r"^  ((?:query|set)-\S+)", help_text, re.MULTILINE))
    in_man = set(re.findall(r"^\.BI? ((?:query|set)-\S+)", text, re.MULTILINE))
    report.check("the manual page has the commands of ctl --help", in_help and in_help == in_man, f"{in_help} {in_man}")


def test_io_uring_features(report, vblk):
    """What is switched on is used for every request, and what is switched off for none."""
    counters = ("registered-files", "registered-buffers")
    for features, files, buffers in (("registered-files=on,registered-buffers=on", True, True),
                                     ("registered-buffers=off", True, False),
                                     ("registered-files=off,defer-taskrun=off", False, False)):
        with Folder() as folder:
            image, monitor = folder / "disk.img", folder / "m"
            make_sparse(image, MIB)
            arguments = [image, "--aio", "io_uring", "--io-uring", features, "--monitor", monitor]
            with Server(vblk, arguments, folder / "s", folder / "log"):
                status, text = run(vblk, "bench", "--socket-path", folder / "s", "--rw", "randwrite", "--iodepth", 4,
                                   "--runtime", 0.2, "--ramp_time", 0)
                report.check(f"a disk with --io-uring {features} works", status == 0, text)
                _, text = run(vblk, "ctl", monitor, "query-aio")
                engine = json.loads(text)["iothreads"][0]["engines"][0]
                used = {name: engine[name] / max(engine["submitted"], 1) for name in counters}
                report.check(f"--io-uring {features} is what the requests use",
                             used == {"registered-files": files, "registered-buffers": buffers}, text)


def test_monitor(report, vblk):
    with Folder() as folder:
        image, monitor = folder / "disk.img", folder / "m"
        make_sparse(image, MIB)
        arguments = [image, "--aio", "read=io_uring,write=native", "--iothreads", 2, "--queues", 2, "--monitor", monitor]
        with Server(vblk, arguments, folder / "s", folder / "log") as server:
            status, output = run(vblk, "ctl", monitor, "query-aio")
            threads = json.loads(output)["iothreads"] if status == 0 else []
            routes = [{route["kind"]: route["engine"] for route in thread["routes"]} for thread in threads]
            wanted = {"read": "io_uring", "write": "native", "flush": "threads"}
            report.check("ctl query-aio tells the engine of each kind for each thread",
                         len(routes) == 2 and all(wanted.items() <= route.items() for route in routes), output)
            status, output = run(vblk, "ctl", monitor, "query-status")
            answer = json.loads(output) if status == 0 else {}
            report.check("ctl query-status tells the disk and that nobody is connected",
                         answer.get("size") == MIB and answer.get("connected") is False, output)
            status, output = run(vblk, "ctl", monitor, "query-weather")
            report.check("ctl refuses an unknown command in one line that lists what there is",
                         status == 1 and "query-aio" in output and output.count("\n") == 1, output)
            for title, line in (("no JSON", b"hello\n"), ("no object", b"[1]\n"), ("no command", b"{}\n"),
                                ("a command that is no text", b'{"execute": 1}\n'), ("nesting", b"[" * 4000 + b"\n")):
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(10)
                    client.connect(str(monitor))
                    client.sendall(line)
                    answer = client.recv(65536)
                    report.check(f"monitor: {title} is answered by an error", b'"error"' in answer, answer)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(str(monitor))
                try:
                    client.sendall(b"x" * 100000)
                    closed = client.recv(1) == b""
                except OSError:
                    closed = True
                report.check("monitor: a line without end costs its connection", closed)
            status, output = run(vblk, "ctl", monitor, "query-status")
            report.check("monitor: answers afterwards", status == 0, output)
            report.check("a server with a monitor ends with 0", server.stop() == 0, server.log.read_text())
            report.check("SIGTERM removes the monitor's socket", not monitor.exists())
        status, output = run(vblk, "ctl", monitor, "query-status")
        report.check("ctl names a monitor that is not there", status == 1 and str(monitor) in output, output)


def test_short_of_descriptors(report, vblk):
    """A server that has no descriptor left waits for one and uses no processor meanwhile."""
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, MIB)
        with Server(vblk, [image, "--monitor", folder / "m"], folder / "s", folder / "log") as server:
            highest = max(int(fd) for fd in os.listdir(f"/proc/{server.pid()}/fd"))
            run("prlimit", "--pid", server.pid(), f"--nofile={highest + 1}:{highest + 1}")
            clients = []
            for path in (folder / "s", folder / "m"):
                client = socket.socket(socket.AF_UNIX)
                client.connect(str(path))
                clients.append(client)
            time.sleep(1.5)
            busy = sum(int(text) for text in Path(f"/proc/{server.pid()}/stat").read_text().split()[13:15])
            said = server.log.read_text().count("cannot accept")
            report.check("short of descriptors: the server waits without work", busy < 50 and 1 <= said < 20,
                         f"{busy} ticks, {said} log lines")
            for client in clients:
                client.close()
            report.check("short of descriptors: the server ends with 0", server.stop() == 0, server.log.read_text())


def test_conventions(report, vblk):
    """vhost-user.rst, "Backend program conventions": options without a command, an inherited socket."""
    status, output = run(vblk, "--print-capabilities")
    report.check("--print-capabilities answers without a command", status == 0 and '"block"' in output, output)
    with Folder() as folder:
        image, path = folder / "disk.img", folder / "s"
        make_sparse(image, MIB)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            command = [vblk, "--fd", str(listener.fileno()), "--blk-file", image, "--read-only"]
            with subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
                ready = server.stdout.readline().decode()
                report.check("--fd with a listening socket, --blk-file and --read-only: served", "ready" in ready, ready)
                server.terminate()
                report.check("--fd: SIGTERM ends with 0", server.wait(20) == 0)


def test_activation(report, vblk):
    """sd_listen_fds(3): a socket that is passed needs no option, and goes with none that names another."""
    with Folder() as folder:
        image, path = folder / "disk.img", folder / "s"
        make_sparse(image, MIB)
        (folder / "file").touch()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            with Server(vblk, [image], path, folder / "log", listener=listener) as server:
                status, output = run(vblk, "bench", "--socket-path", path, "--rw", "read", "--runtime", 0.1, "--ramp_time", 0)
                report.check("LISTEN_FDS: served", status == 0, output)
                report.check("LISTEN_FDS: SIGTERM ends with 0 and leaves the socket", server.stop() == 0 and path.exists())
            near, far = socket.socketpair()
            with near, far:
                for title, fd, count, arguments, names in (
                        ("a socket that is passed, beside --socket-path", listener, 1, ["--socket-path", folder / "t"], "--socket-path"),
                        ("a socket that is passed, beside --fd", listener, 1, ["--fd", "7"], "--fd"),
                        ("two sockets that are passed", listener, 2, [], "LISTEN_FDS=2"),
                        ("a connected socket that is passed", near, 1, [], "does not listen"),
                ):
                    command = [*activation(fd.fileno(), count), vblk, "serve", image, *arguments]
                    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, timeout=20,
                                          pass_fds=[fd.fileno()])
                    lines = done.stderr.decode().splitlines()
                    report.check(f"{title}: refused in one line that names it",
                                 done.returncode > 0 and len(lines) == 1 and names in lines[0], done.stderr.decode())
        prefix = ["sh", "-c", f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<"{folder}/file"', "-"]
        refused(report, vblk, "a file that is passed as a socket", folder, [image], "descriptor 3", prefix)
        prefix = ["sh", "-c", 'LISTEN_PID=1 LISTEN_FDS=1 exec "$@"', "-"]
        refused(report, vblk, "a socket that is passed to somebody else", folder, [image], "socket", prefix)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    vblk = parser.parse_args().vblk.resolve()
    report = Report()
    for test in (test_answers, test_manual_page, test_conventions, test_activation, test_monitor, test_io_uring_features,
                 test_bad_images, test_full_output, test_bad_options,
                 test_bad_sockets, test_short_of_descriptors, test_refused_engines, test_locks, test_end_of_life,
                 test_two_signals):
        try:
            test(report, vblk)
        except RuntimeError as error:
            report.check(f"{test.__name__} runs", False, error)
    report.exit()


if __name__ == "__main__":
    main()
