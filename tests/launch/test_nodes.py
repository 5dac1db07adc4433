"""Several machines: two network namespaces that are joined by a cable of their own and share the file system."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy

import collie_lab as lab
from collie_lab.folder import RunFolder
from collie_lab.launch import Run, _nodes, runs
from tests.ranks import losses, run_here

HERE = Path(__file__).parent


class Hosts:
    """Starts the notebook on the first host and joins it from the second."""

    def __init__(self, prefixes: tuple[list[str], list[str]], address: str, folder: Path, mark: str):
        self.prefixes, self.address, self.folder, self.mark = prefixes, address, folder, mark
        self.started: list[subprocess.Popen[str]] = []
        self.port = _free_port()

    def start(self, host: int, *command: str) -> subprocess.Popen[str]:
        environment = {**os.environ, toy.MARK: self.mark, "PYTHONPATH": str(HERE.parents[1])}
        process = subprocess.Popen([*self.prefixes[host], sys.executable, *command], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                                   cwd=self.folder, start_new_session=True)
        self.started.append(process)
        return process

    def launch(self, callback: str, nodes: dict[str, Any] | None = None,
               **options: Any) -> tuple[subprocess.Popen[str], Run]:
        """The notebook's process, and the run that it has launched."""
        options["nodes"] = {"count": 2, "address": self.address, "port": self.port, **(nodes or {})}
        kernel = self.start(0, str(HERE / "nodes_kernel.py"), self.mark, "runs", callback, json.dumps(options))
        launched = self.folder / "runs"
        toy.wait_until(lambda: kernel.poll() is not None or any(launched.glob("*/status.json")))
        assert kernel.poll() is None, kernel.communicate()
        return kernel, runs(launched)[0]

    def join(self, run: Run, *options: str) -> subprocess.Popen[str]:
        return self.start(1, "-m", "collie_lab.launch.join", str(run.folder.path), *options)

    def pull_the_cable(self) -> None:
        space = self.prefixes[1][-1]
        _ip("-n", space, "link", "set", _cable(space), "down")

    def both(self, callback: str, **options: Any) -> tuple[subprocess.Popen[str], subprocess.Popen[str], Run]:
        kernel, run = self.launch(callback, **options)
        return kernel, self.join(run), run


def _cable(space: str) -> str:
    """The end of the cable in a network namespace; names of interfaces are short."""
    return space.replace("lab-", "v")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _ended(hosts: Hosts) -> Iterator[Hosts]:
    try:
        yield hosts
    finally:
        for process in hosts.started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path, mark: str) -> Iterator[Hosts]:
    """Two hosts with a network of their own each: nothing but the cable joins them."""
    name = uuid.uuid4().hex[:8]
    spaces = [f"lab-{name}-{host}" for host in (0, 1)]
    try:
        if shutil.which("ip") is None:
            pytest.skip("there is no `ip` (Debian: apt-get install iproute2)")
        try:
            for space in spaces:
                _ip("netns", "add", space)
            _ip("-n", spaces[0], "link", "add", _cable(spaces[0]), "type", "veth",
                "peer", _cable(spaces[1]), "netns", spaces[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        for host, space in enumerate(spaces):
            _ip("-n", space, "addr", "add", f"10.77.0.{9 + host}/24", "dev", _cable(space))  # 10 sorts before 9
            for link in (_cable(space), "lo"):
                _ip("-n", space, "link", "set", link, "up")
        prefixes = ["ip", "netns", "exec", spaces[0]], ["ip", "netns", "exec", spaces[1]]
        with _ended(Hosts(prefixes, "10.77.0.9", tmp_path, mark)) as made:
            yield made
    finally:
        for space in spaces:
            if (Path("/run/netns") / space).exists():
                _ip("netns", "del", space)  # and the cable with it


@pytest.fixture
def one_machine(tmp_path: Path, mark: str) -> Iterator[Hosts]:
    """Both nodes on this machine: what needs no network of its own."""
    with _ended(Hosts(([], []), "127.0.0.1", tmp_path, mark)) as made:
        yield made


def outcome(kernel: subprocess.Popen[str]) -> dict[str, Any]:
    """What the notebook's process has printed at its end."""
    text, _ = kernel.communicate(timeout=120)
    assert kernel.returncode == 0, text
    return dict(json.loads(text.splitlines()[-1]))


def began(run: Run) -> Callable[[], bool]:
    return lambda: all((run.folder.path / f"began-{rank}").exists() for rank in (0, 1))


# --- over the cable


def test_ranks_of_two_machines_reduce_over_the_cable(hosts: Hosts, mark: str) -> None:
    kernel, member, run = hosts.both("reduces")
    text, _ = member.communicate(timeout=120)
    ended = outcome(kernel)
    assert ended["status"] == "ok", ended
    assert member.returncode == 0, text
    assert text.splitlines()[-1] == f"{run.id}, node 1 of 2: ok"
    for rank in (0, 1):
        total, interface, *rest = run.logs(rank).split()
        assert total == "3"
        assert interface.endswith(f"-{rank}")  # node k has the k-th ranks, and each machine found the cable
        assert rest == ["yes", str(hosts.folder)]
    assert run.folder.read("status.json")["exit_codes"] == {"0": 0, "1": 0}
    toy.assert_gone(mark)


def test_training_on_two_machines_is_that_of_one_process(hosts: Hosts, tmp_path: Path, mark: str) -> None:
    from nodes_kernel import EXPERIMENT

    kernel, _, run = hosts.both("real")
    assert outcome(kernel)["status"] == "ok", run.error
    alone = losses(run_here(EXPERIMENT, tmp_path / "alone"))
    assert losses(run.folder) == pytest.approx(alone, rel=0, abs=1e-5)
    assert len(alone) == 3
    toy.assert_gone(mark)


def test_a_failure_on_the_other_machine_is_told_in_the_notebook(hosts: Hosts, mark: str) -> None:
    kernel, member, _ = hosts.both("fails_on_rank_1")
    told = outcome(kernel)
    assert (told["status"], told["rank"]) == ("error", 1)
    assert told["detail"] == "rank 1: ValueError: the loss is upside down"
    assert 'raise ValueError("the loss is upside down")  # this line is shown' in told["error"]
    text, _ = member.communicate(timeout=60)
    assert member.returncode == 1
    assert text.splitlines()[-1].endswith("error: rank 1: ValueError: the loss is upside down")
    toy.assert_gone(mark)


@pytest.mark.parametrize("victim", ["member", "torchrun", "supervisor", "machine"])
def test_a_lost_machine_ends_the_run_and_leaves_nothing(hosts: Hosts, mark: str, victim: str) -> None:
    kernel, member, run = hosts.both("hangs", silence=4.0)
    toy.wait_until(began(run))
    supervisor = psutil.Process(run.folder.read("status.json")["pid"])
    if victim == "machine":  # out of reach of the network, and thereby of the run folder
        os.kill(_member_pid(run), signal.SIGSTOP)
        hosts.pull_the_cable()
    elif victim == "torchrun":
        psutil.Process(_member_pid(run)).children()[0].kill()
    else:
        (supervisor if victim == "supervisor" else psutil.Process(_member_pid(run))).kill()
    told = outcome(kernel)
    if victim == "supervisor":
        assert told["status"] == "lost"
        text, _ = member.communicate(timeout=60)
        assert "node 0 has shown no sign of life" in text
        assert member.returncode == 1
    else:
        assert told["status"] == "error"
        words = "the launcher (torchrun) was killed (SIGKILL)" if victim == "torchrun" else "is gone: no sign of life"
        assert told["detail"].startswith(f"node 1 ({socket.gethostname()})")
        assert words in told["detail"]
    if victim == "machine":
        os.kill(_member_pid(run), signal.SIGCONT)
    toy.assert_gone(mark, seconds=30.0)


def _member_pid(run: Run) -> int:
    return int(json.loads(run.folder.node(1).read_text())["pid"])


# --- on one machine


def test_a_stop_reaches_all_nodes(one_machine: Hosts, mark: str) -> None:
    kernel, member, run = one_machine.both("steps_slowly", steps=1000)
    toy.wait_until(began(run))
    run.stop()
    told = outcome(kernel)
    assert (told["status"], told["detail"]) == ("stopped", "")
    assert 0 < told["steps"] < 1000
    assert member.wait(timeout=60) == 0
    toy.assert_gone(mark)


@pytest.mark.parametrize("how", ["kill", "timeout", "member", "kernel"])
def test_an_end_reaches_all_nodes(one_machine: Hosts, mark: str, how: str) -> None:
    kernel, member, run = one_machine.both("hangs", timeout=50.0 if how == "timeout" else None)
    toy.wait_until(began(run))
    match how:
        case "kill":
            stacks = run.stacks()
            assert list(stacks) == [0, 1]
            assert "in hangs_here" in stacks[1]
            run.kill()
        case "member":
            os.kill(_member_pid(run), signal.SIGTERM)
        case "kernel":
            kernel.kill()
    if how != "kernel":
        assert outcome(kernel)["status"] == {"kill": "stopped", "timeout": "timeout", "member": "error"}[how]
    assert member.wait(timeout=60) == (0 if how in ("kill", "kernel") else 1)
    words = {"kill": "on request", "timeout": "no end after 50 s", "member": "left: somebody", "kernel": "the kernel"}
    assert words[how] in run.detail
    if how == "timeout":
        assert "in hangs_here" in run.logs(1, "err")  # the stacks of the other machine's ranks
    toy.assert_gone(mark)


def test_nodes_that_do_not_come(one_machine: Hosts, mark: str) -> None:
    kernel, run = one_machine.launch("reduces", nodes={"count": 4, "timeout": 5.0}, ranks=4)
    member = one_machine.join(run)
    toy.wait_until(lambda: run.detail.startswith("waiting for 2 of 4 nodes: run `python -m collie_lab.launch.join "))
    assert str(run.folder.path) in run.detail
    told = outcome(kernel)
    assert told["status"] == "timeout"
    assert told["detail"] == "node 2 did not come within 5 s; node 3 did not come within 5 s"
    assert member.wait(timeout=60) == 1
    toy.assert_gone(mark)


def test_a_machine_that_leaves_before_the_beginning_makes_room(one_machine: Hosts, mark: str) -> None:
    kernel, run = one_machine.launch("reduces", nodes={"count": 4}, ranks=4)
    for end in (signal.SIGINT, signal.SIGHUP):
        member = one_machine.join(run)
        toy.wait_until(lambda: "waiting for 2 of 4" in run.detail)
        member.send_signal(end)
        text, _ = member.communicate(timeout=60)
        assert text.splitlines()[-1] == f"{run.id}, node 1 of 4: left; another machine may come instead"
        assert member.returncode == 1
        toy.wait_until(lambda: "waiting for 3 of 4" in run.detail)
    run.stop()
    assert outcome(kernel)["status"] == "stopped"
    toy.assert_gone(mark)


def test_whom_a_run_does_not_wait_for_is_told_so(one_machine: Hosts, mark: str) -> None:
    kernel, run = one_machine.launch("steps_slowly", steps=1000)
    with (run.folder.path / "launch.json").open() as file:
        plan = json.load(file)
    words = {
        "the notebook's machine has": {**plan, "nodes": {**plan["nodes"], "versions": {"Python": "2.7"}}},
        "no network interface 'nowhere'": {**plan, "nodes": {**plan["nodes"], "interface": "nowhere"}},
        "launched for one machine": {**plan, "nodes": None},
        "all 2 nodes are there already": plan,
    }
    assert "has to lie on a file system" in _refusal(one_machine, one_machine.folder)
    for refusal, changed in words.items():
        run.folder.write("launch.json", changed)
        if changed is plan:
            one_machine.join(run)
            toy.wait_until(began(run))
        assert refusal in _refusal(one_machine, run.folder.path)
    run.kill()
    outcome(kernel)
    assert "the run is over: stopped" in _refusal(one_machine, run.folder.path)
    toy.assert_gone(mark)


def _refusal(hosts: Hosts, folder: Path) -> str:
    process = hosts.start(1, "-m", "collie_lab.launch.join", str(folder))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    return text


# --- before anything is written


@pytest.mark.parametrize(("nodes", "words"), [
    (lab.Nodes(3, "127.0.0.1"), r"Nodes.count: 2 ranks .* among 3 machines .* multiple of 3"),
    (lab.Nodes(2, "192.0.2.1"), r"Nodes.address: 192.0.2.1 is no address of this machine .* 127.0.0.1 \(lo\)"),
    (lab.Nodes(2, "no.such.host.invalid"), r"Nodes.address: .* cannot be resolved"),
    (lab.Nodes(2, "127.0.0.1", interface="nowhere"), r"Nodes.interface: .* no network interface 'nowhere' .* lo"),
], ids=["count", "address", "name", "interface"])
def test_what_is_wrong_with_the_nodes_is_said_before_anything_is_written(tmp_path: Path, nodes: lab.Nodes,
                                                                         words: str) -> None:
    with pytest.raises(lab.CellError, match=words):
        toy.start("unused", tmp_path / "runs", nodes=nodes)
    assert not (tmp_path / "runs").exists()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        nodes = lab.Nodes(2, "127.0.0.1", port=other.getsockname()[1])
        with pytest.raises(lab.CellError, match=r"Nodes.port: port \d+ of this machine cannot be used"):
            toy.start("unused", tmp_path / "runs", nodes=nodes)


def test_the_cell_refuses_what_is_no_cluster() -> None:
    for count, address, field in [(1, "host", "count"), (2, "host:29500", "address")]:
        with pytest.raises(lab.CellError, match=rf"Nodes\.{field}"):
            lab.Nodes(count, address)


# --- the beacons


def test_a_half_written_beacon_is_no_news_and_silence_is_loss(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.node(0).parent.mkdir()
    sight = _nodes.Sight(folder, 1, silence=1.0)
    assert sight.look() == {}
    assert _nodes.claim(folder, 3) == 1
    assert _nodes.claim(folder, 3) == 2
    assert _nodes.claim(folder, 3) is None

    def sees(state: str) -> None:
        toy.wait_until(lambda: sight.look().get("state") == state)

    sees("waiting")
    assert sight.host == socket.gethostname()
    folder.node(1).write_text('{"state": "runn')
    time.sleep(0.3)
    sees("waiting")
    toy.wait_until(lambda: sight.look() and sight.lost)
    _nodes.Beacon(folder, 1).say(state="ended")
    sees("ended")
    time.sleep(1.3)
    sees("ended")
    assert not sight.lost  # who has said that it is over may be silent
    sight.forget()
    assert sight.look() == {}
    assert _nodes.claim(folder, 3) == 1
