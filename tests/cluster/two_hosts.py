"""Two hosts on this machine: namespaces with an address and a host name, a wire between them, and an sshd in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from conftest import start_in_session

BIN = Path(sys.executable).parent
# Of this process: another checkout's tests may run, and what a killed run left is nobody's.
ADDRESSES = {f"esi-ds-a-{os.getpid()}": "10.77.31.1", f"esi-ds-b-{os.getpid()}": "10.77.31.2"}
PROBE = f"esi-ds-probe-{os.getpid()}"
PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}


def missing() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    probe = subprocess.run(["ip", "netns", "add", PROBE], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"no network namespaces here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", PROBE], check=True)
    return None


class Hosts:
    """``start``, ``launch``, ``stop``. Both see one file system, as the hosts of a cluster do."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        first, second = ADDRESSES
        for name in ADDRESSES:
            self._ip("netns", "add", name)
        self._ip("link", "add", "wire0", "netns", first, "type", "veth", "peer", "name", "wire1", "netns", second)
        for name, wire in ((first, "wire0"), (second, "wire1")):
            self._ip("-n", name, "address", "add", f"{ADDRESSES[name]}/24", "dev", wire)
            self._ip("-n", name, "link", "set", wire, "up")
            self._ip("-n", name, "link", "set", "lo", "up")
        self._start_sshd()
        (self.folder / "hosts").write_text("".join(f"{address} slots=2\n" for address in ADDRESSES.values()))

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def _start_sshd(self) -> None:
        key = self.folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        shutil.copy(key.with_suffix(".pub"), self.folder / "authorized")
        Path("/run/sshd").mkdir(exist_ok=True)
        (self.folder / "sshd_config").write_text(
            f"HostKey {key}\nAuthorizedKeysFile {self.folder}/authorized\nStrictModes no\nPermitRootLogin yes\n"
            f"UsePAM no\nPidFile none\nSetEnv OMP_NUM_THREADS=1 PATH={BIN}:/usr/bin:/bin\n"
        )
        # pdsh calls ``ssh`` as it finds it.
        options = f"-i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        (self.folder / "bin").mkdir()
        (self.folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
        (self.folder / "bin/ssh").chmod(0o755)
        for name, address in ADDRESSES.items():
            listening = f"ListenAddress={address}"
            command = [shutil.which("sshd"), "-D", "-e", "-f", str(self.folder / "sshd_config"), "-o", listening]
            log = (self.folder / f"{name}.log").open("ab")
            self.daemons.append(subprocess.Popen([*self.on(name), *command], stderr=log))
        deadline = time.monotonic() + 20
        for name in ADDRESSES:
            while "Server listening" not in (self.folder / f"{name}.log").read_text():
                assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()
                time.sleep(0.05)

    @staticmethod
    def on(name: str) -> list[str]:
        """What to write before a command so that it runs on that host."""
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "-"]

    def launch(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """``deepspeed --hostfile`` from the first host: two ranks on each."""
        command = [*self.on(next(iter(ADDRESSES))), str(BIN / "deepspeed")]
        hosts = ["--hostfile", str(self.folder / "hosts"), "--master_addr", next(iter(ADDRESSES.values()))]
        environment = {**os.environ, "PATH": f"{self.folder}/bin:{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        return start_in_session([*command, *hosts, script, *arguments], environment)

    def stop(self) -> None:
        for daemon in self.daemons:
            daemon.terminate()
        for name in ADDRESSES:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-9", pid], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
