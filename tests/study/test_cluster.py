"""What is asked of a cluster and what it says, without one: Slurm's programs are stood in for by their words."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from collie_lab.cells import CellError, Experiment, Model, Parallel, RandomTokens, Training
from collie_lab.study import Ray, Slurm, _slurm_queue
from collie_lab.study.arms import Arm
from collie_lab.study.executor import cluster, make_executor
from collie_lab.study.store import ArmFolder

_SINFO = """\
short|(null)|16|10:00|30:00
gpu*|gpu:a100:4(S:0-1)|32|n/a|2-00:00:00
gpu*|gpu:h100:8,nvme:1|96+|n/a|2-00:00:00
endless|gpu:2|8|n/a|infinite
"""


@pytest.fixture
def arm() -> Arm:
    """Of four ranks."""
    experiment = Experiment(model=Model("llama-tiny", init="random"), data=RandomTokens(length=8),
                            parallel=Parallel(dp=4), training=Training(steps=1, batch_size=4, micro_batch_size=1))
    return Arm(name="AdamW, seed=0", id="0123456789ab", key="", labels={}, seed=0, experiment=experiment)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each of Slurm's programs says; what sbatch is given is the `script`, how often the `count`."""
    pytest.importorskip("submitit")
    from submitit.core.utils import CommandFunction

    words = {"sinfo": _SINFO, "squeue": ""}

    def ask(*command: str) -> str:
        return words[command[0]].strip()

    def submit(self: CommandFunction) -> str:
        words["script"] = Path(self.command[1]).read_text(encoding="utf-8")
        name = next(line.partition("=")[2] for line in words["script"].splitlines() if "--job-name" in line)
        array = "--array" in words["script"]
        words["squeue"] += f"7_0|{name}|PENDING|Resources\n7_1|{name}|PENDING|Resources\n" if array else \
            f"7|{name}|PENDING|Resources\n"
        words["count"] = str(int(words.get("count", "0")) + 1)
        return "Submitted batch job 7"

    monkeypatch.setattr(_slurm_queue, "_ask", ask)
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", lambda _: 2)
    monkeypatch.setattr(CommandFunction, "__call__", submit)
    return words


# Limits as `man sbatch` writes them: minutes, minutes:seconds, hours:minutes:seconds, days-hours, ...
@pytest.mark.parametrize(("text", "minutes"), [
    ("90", 90), ("1:30", 1.5), ("4:00:00", 240), ("0:00:30", 0.5), ("1-12", 2160), ("1-12:30", 2190),
    ("2-00:00:30", 2880.5), ("infinite", None), ("n/a", None)])
def test_minutes_of_every_form(text: str, minutes: float | None) -> None:
    assert _slurm_queue.minutes(text) == minutes


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(CellError, match=r"Slurm.time.*4 hours"):
        Slurm(time="4 hours")
    with pytest.raises(CellError, match="a job needs a limit"):
        Slurm(time="infinite")
    with pytest.raises(CellError, match=r"Ray.partition"):
        cluster("ray", partition="gpu")
    with pytest.raises(CellError, match=r"there are: local .*slurm, ray"):
        make_executor("pbs")
    with pytest.raises(CellError, match=r"local"):
        cluster("local", partition="gpu")
    assert Slurm(memory="64 GB").memory == 64 * 10**9


@pytest.mark.parametrize(("name", "library"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_library_that_is_absent_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CellError, match=rf"{library} is not installed → pip install collie-lab\[{name}\]"):
        make_executor(name)


def test_what_an_arm_asks_for(arm: Arm) -> None:
    assert Ray().memory_of(arm) is None
    assert Ray().memory_of(replace(arm, memory_limit=4 * 10**9)) == 5 * 10**9  # and what starts it
    assert Ray(memory="2 GB").memory_of(replace(arm, memory_limit=4 * 10**9)) == 2 * 10**9
    assert [place.on_gpus(8) for place in (Ray(), Ray(gpus="none"), Ray(gpus="h100"))] == [True, False, True]
    assert not Ray().on_gpus(0)
    [problem] = Ray().too_large(arm, gpus=2, cpus=1)  # CPUs were not asked for
    assert str(problem).startswith("Ray.gpus: 'AdamW, seed=0' takes 4 GPUs; no node has more than 2, and an arm")
    assert [problem.field for problem in Ray(cpus=4).too_large(arm, gpus=2, cpus=8)] == ["gpus", "cpus"]
    assert [problem.field for problem in Ray().too_large(arm, gpus=0, cpus=2)] == ["cpus"]
    assert not [*Ray().too_large(arm, gpus=0, cpus=4)]


# States as `man squeue` lists them; the words are slurmstepd's, of 22.05, with and without cgroups.
@pytest.mark.parametrize(("state", "log", "status"), [
    ("OUT_OF_MEMORY", "", "host_oom"), ("TIMEOUT", "", "timeout"), ("CANCELLED", "", "stopped"),
    ("NODE_FAIL", "", "lost"), ("", "", "lost"),
    ("FAILED", "slurmstepd-vm: error: StepId=5.batch exceeded memory limit (3 > 1), being killed", "host_oom"),
    ("FAILED", "slurmstepd: error: Detected 1 oom_kill event in StepId=5.batch.", "host_oom"),
    ("FAILED", "ValueError: exceeded memory limit", "lost")])
def test_the_end_of_a_job_is_a_status(state: str, log: str, status: str) -> None:
    assert _slurm_queue.ending(state, log)[0] == status


def test_partitions_are_those_of_their_largest_nodes(slurm: dict[str, str]) -> None:
    assert [*map(str, _slurm_queue.partitions())] == [
        "Partition(name='gpu', gpus=8, cpus=96, default_minutes=None, max_minutes=2880.0)",
        "Partition(name='short', gpus=0, cpus=16, default_minutes=10.0, max_minutes=30.0)",
        "Partition(name='endless', gpus=2, cpus=8, default_minutes=None, max_minutes=None)"]
    with pytest.raises(CellError, match=r"no partition 'nope' → there are: gpu, short, endless"):
        make_executor(Slurm(partition="nope"))


def test_an_arm_without_a_place_or_a_limit_is_refused(slurm: dict[str, str], arm: Arm) -> None:
    make_executor("slurm").check([arm])
    with pytest.raises(CellError, match=r"takes 4 GPUs; no node has more than 2(.|\n)*neither .* nor the partition "
                                        "'endless' has a limit"):
        make_executor(Slurm(partition="endless")).check([arm])
    with pytest.raises(CellError, match="asks for 60 minutes; 'short' gives 30 at most"):
        make_executor(Slurm(partition="short", time="60")).check([arm])
    with pytest.raises(CellError, match="asks for 40 minutes"):  # its time-out, and what it takes to start and end
        make_executor(Slurm(partition="short")).check([replace(arm, timeout=1800.0)])


def test_arms_that_ask_for_the_same_are_one_array(slurm: dict[str, str], arm: Arm, tmp_path: Path) -> None:
    settings = Slurm(time="1-0", gpus="h100", cpus=6, memory="64 GB", setup=["module load cuda"], interval=1e-9,
                     options={"constraint": "nvlink"})
    executor = make_executor(settings)
    arms = [replace(arm, id=id, timeout=60.0) for id in ("aaaaaaaaaaaa", "bbbbbbbbbbbb")]
    folders = [ArmFolder.create(tmp_path / "my study", each).path for each in arms]
    jobs = [executor.submit(folder, arm.gpus) for folder in folders]
    assert "script" not in slurm
    assert [job.alive for job in jobs] == [True, True]  # the first look submits all
    assert slurm["count"] == "1"
    script = slurm["script"].splitlines()
    assert {"#SBATCH --array=0-1%2", "#SBATCH --time=1440", "#SBATCH --gpus-per-node=h100:4", "#SBATCH --requeue",
            "#SBATCH --cpus-per-task=24", "#SBATCH --mem=61036M", "#SBATCH --constraint=nvlink", "module load cuda",
            "#SBATCH --signal=B:USR2@120"} <= set(script)
    assert script[-1].startswith(f"exec {sys.executable} -u -m submitit.core._submit ")

    # Whoever comes after a runner that was killed finds them.
    heir = make_executor(settings)
    assert heir.submit(folders[1], arm.gpus).alive
    assert slurm["count"] == "1"

    slurm["squeue"] = slurm["squeue"].replace("PENDING|Resources", "OUT_OF_MEMORY|None", 1)
    assert [job.alive for job in jobs] == [False, True]
    state = ArmFolder(folders[0]).state
    assert (state["status"], state["seconds"]) == ("host_oom", 0.0)
    assert state["reason"] == "Slurm ended the job: it took more memory than it had asked for (job 7_0)"


def test_a_refusal_of_sbatch_is_told_and_leaves_nothing(slurm: dict[str, str], arm: Arm, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from submitit.core.utils import CommandFunction, FailedJobError

    def refuse(self: object) -> str:
        raise FailedJobError("sbatch: error: Invalid account")

    monkeypatch.setattr(CommandFunction, "__call__", refuse)
    executor = make_executor(Slurm(time="60"))
    job = executor.submit(ArmFolder.create(tmp_path, arm).path, arm.gpus)
    with pytest.raises(CellError, match=r"sbatch does not take the jobs.*Invalid account"):
        _ = job.alive
    assert [path.name for path in (tmp_path / "slurm").iterdir()] == ["lock"]


def test_a_job_that_fails_before_its_arm_begins_says_why(slurm: dict[str, str], arm: Arm, tmp_path: Path) -> None:
    executor = make_executor(Slurm(time="60", interval=1e-9))
    folder = ArmFolder.create(tmp_path, arm)
    folder.write_status({"status": "stopped", "attempts": 1, "ended": 1.0})  # of an earlier attempt
    job = executor.submit(folder.path, arm.gpus)
    assert job.alive
    slurm["squeue"] = slurm["squeue"].replace("PENDING|Resources", "FAILED|NonZeroExitCode")
    [array] = (tmp_path / "slurm").glob("*/arms.json")
    (array.parent / "7_0_log.out").write_text("exec: python: not found\n", encoding="utf-8")
    assert not job.alive
    assert folder.status == "lost"
    assert folder.state["reason"].endswith("the job's last: exec: python: not found (job 7)")


def test_a_job_that_slurm_has_forgotten_is_asked_of_its_accounting(slurm: dict[str, str], arm: Arm,
                                                                   tmp_path: Path) -> None:
    executor = make_executor(Slurm(time="60", interval=1e-9))
    folder = ArmFolder.create(tmp_path, arm)
    job = executor.submit(folder.path, arm.gpus)
    assert job.alive
    slurm |= {"squeue": "", "sacct": "NODE_FAIL\nCANCELLED by 0\n"}
    assert not job.alive
    assert folder.status == "stopped"


def test_an_interrupt_ends_a_job_that_waits_and_one_that_runs(slurm: dict[str, str], arm: Arm, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[str, ...]] = []
    monkeypatch.setattr(_slurm_queue, "cancel", lambda *words: ended.append(words))
    executor = make_executor(Slurm(time="60"))
    job = executor.submit(ArmFolder.create(tmp_path, arm).path, arm.gpus)
    assert job.alive
    job.stop()  # whichever it does by now
    assert ended == [("7", "--state=PENDING"), ("7", "--batch", "--signal=TERM")]
    job.kill()
    assert ended[2:] == [("7",)]
    unsubmitted = executor.submit(ArmFolder.create(tmp_path, replace(arm, id="aaaaaaaaaaaa")).path, arm.gpus)
    unsubmitted.stop()
    assert not unsubmitted.alive
    assert slurm["count"] == "1"


def test_slots_bound_what_is_in_the_queue(slurm: dict[str, str], arm: Arm, tmp_path: Path) -> None:
    executor = make_executor(Slurm(time="60"), slots=1)
    assert executor.has_room(4)
    job = executor.submit(ArmFolder.create(tmp_path, arm).path, arm.gpus)
    assert not executor.has_room(4)
    assert "script" not in slurm
    assert job.alive
    assert not executor.has_room(4)
    ArmFolder(job.arm).write_status({"status": "ok"})
    assert executor.has_room(4)
