"""New processes whose imports are paid once: forks of a process that has imported, and done nothing else.

As a program, `forks.py MODULES…`, it is that process: a line of JSON in tells what to run, one out how it ended.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 1800  # on a machine that is busy with other things; alone nothing takes a minute


class Forks:
    """Runs programs as `python WORDS…` would, from an interpreter that has imported some modules already.

    Args:
        scratch: A folder for what programs print.
        modules: What is imported. Everything else a program imports itself.
        environment: Of this interpreter, for variables that are read when a module is imported.
    """

    def __init__(self, scratch: Path, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,  # a group of its own, to be ended as a whole
        )

    def run(
        self,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        processes: int = 1,
        expected: int = 0,
    ) -> str:
        """Runs a program and fails the test if it ends otherwise than expected.

        Args:
            words: `FILE ARGUMENTS…` or `-c CODE ARGUMENTS…`.
            folder: Where it runs.
            environment: All of its variables, by default those of this process.
            processes: How many run it at the same time; several have the variables of a launcher such as torchrun, and
                where one fails the others are ended.
            expected: The exit code.

        Returns:
            What it printed on both streams, of all processes one after the other.
        """
        own = dict(os.environ if environment is None else environment)
        shared = {} if processes == 1 else {"WORLD_SIZE": str(processes), **_meeting_place()}
        ranks: list[dict[str, str]] = [{}]
        if processes > 1:
            ranks = [{"LOCAL_RANK": str(rank), "NODE_RANK": "0"} for rank in range(processes)]
        job = {
            "words": list(words),
            "folder": str(folder),
            "environments": [{**own, **shared, **rank} for rank in ranks],
        }
        places = [self._scratch / f"printed-{rank}" for rank in range(processes)]
        job["printed"] = [str(place) for place in places]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
        if not ready:
            os.killpg(self._process.pid, signal.SIGKILL)
        answer = self._process.stdout.readline()
        said = "".join(place.read_text(encoding="utf-8", errors="replace") for place in places if place.exists())
        assert answer, f"nothing came back within {TIMEOUT} seconds: {said[-4000:]}"
        assert json.loads(answer) == [expected] * processes, said[-4000:]
        return said

    def close(self) -> None:
        """Ends the interpreter."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _meeting_place() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def _serve(modules: Sequence[str]) -> None:
    sys.path[0] = str(ROOT)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that is imported may print among the answers
    for name in modules:
        importlib.import_module(name)
    while line := sys.stdin.readline():
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)
    os._exit(0)  # nothing here is worth seconds of tidying


def _run(job: dict[str, Any]) -> list[int]:
    """Exit codes of all processes, negative for a signal."""
    running = {_fork(job, number): number for number in range(len(job["environments"]))}
    codes = [0] * len(running)
    while running:
        process, status = os.wait()
        codes[running.pop(process)] = code = os.waitstatus_to_exitcode(status)
        if code:
            for other in running:
                os.kill(other, signal.SIGKILL)  # it would wait for the one that has failed
    return codes


def _fork(job: dict[str, Any], number: int) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        code = _program(job["words"], job["folder"], job["environments"][number], job["printed"][number])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _program(words: list[str], folder: str, environment: dict[str, str], printed: str) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # a fork has no other threads
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1:])
