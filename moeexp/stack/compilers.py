"""Methods that the cache lacks, each compiled in a process of its own: beside the others, and while the weights are made.

One takes 0.6 GiB of host memory, its C++ compiler 0.4 GiB more. On a GPU it holds a CUDA context, about 0.5 GiB, and memory for
the arguments of one call: Inductor launches each kernel once. Where a device has no room for that beside what the runs need, they
compile in their own process, one method after the other.

Where the cache is empty a run will need them all: the first are started before it knows what for (`start_ahead`), and import
while it does, as both take seconds for that.

python -m moeexp.stack.compilers      compiles one. What it is told, and what it answers, are pickles of its parent's own. With
its parent's number it imports first, and ends where it is told nothing.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from moeexp.record.process_group import die_with_parent, end_groups, has_ended, kill_group, signal_name

if TYPE_CHECKING:
    from moeexp.config.schema import Config
    from moeexp.stack.compile_cache import MethodSpec


@dataclass(frozen=True)
class Surroundings:
    """What decides what a process imports and compiles: the variables that it was started with, the import path, the folder."""

    environment: dict[str, str]
    path: list[str]
    folder: str

    def are_here(self) -> bool:
        """Whether a process that is started now has the same. torch adds variables, where its cache is, what its profiler does;
        of such that change what is compiled there must be none."""
        added = os.environ.keys() - self.environment.keys()
        changing = any(name.startswith(("TORCHINDUCTOR_", "TRITON_")) and not name.endswith("_DIR") for name in added)
        kept = all(os.environ.get(name) == value for name, value in self.environment.items())
        return kept and not changing and (self.path, self.folder) == (sys.path, os.getcwd())


# Those that were started ahead: the process, the pipe for its job, the file of its answer, and what it was started in.
_ahead: list[tuple[subprocess.Popen, IO[bytes], IO[bytes], Surroundings]] = []
# How often a wait for one looks, and what one has to remove what it has half written.
LOOK_S, GRACE_S = 0.05, 5.0
# Bytes that are free for one, on each device that it uses.
ROOM = {"cpu": 3 << 29, "cuda": 2 << 30}


class Compilers:
    """`with Compilers(configs) as compilers:` one for each missing method, as many at once as the machine grants cores and has
    memory for. On leaving, for whatever reason, none is left. What several configs share is compiled once."""

    def __init__(self, configs: Sequence[Config]):
        from moeexp.config.threads import granted
        from moeexp.stack.compile_cache import find, key_of
        from moeexp.stack.packages import package_specs

        self._waiting: dict[str, tuple[Config, MethodSpec]] = {}
        self._running: dict[str, tuple[MethodSpec, subprocess.Popen, IO[bytes]]] = {}
        self._answers: dict[str, bool | Exception] = {}
        for cfg in configs:
            if cfg.export == "aoti" and cfg.artifact is None:
                wanted = {key_of(spec): (cfg, spec) for spec in package_specs(cfg)}
                self._waiting |= {key: job for key, job in wanted.items() if find(key, job[1]) is None}
        self._at_once = min(len(self._waiting), granted().cores, room(configs)) if self._waiting else 0
        if self._at_once == 0:
            self._waiting.clear()
            end_ahead()

    def __enter__(self) -> Compilers:
        try:
            self._go_on()
            end_ahead()  # of those that are left nobody knows when they will be needed
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._waiting.clear()
        end_ahead()
        end_groups([process for _, process, _ in self._running.values()], GRACE_S)
        for _, _, answer in self._running.values():
            answer.close()
        self._running.clear()

    def join(self, key: str) -> bool:
        """Waits for the package of this key, and raises what went wrong with it. Whether it was made here: not if it was in
        the cache, came there from another run, or is still to be made."""
        while key in self._waiting or key in self._running:
            time.sleep(LOOK_S)
            self._go_on()
        answer = self._answers.get(key, False)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _go_on(self) -> None:
        for key, (spec, process, answer) in list(self._running.items()):
            if has_ended(process):
                kill_group(process)  # what it may have left running in its session
                process.wait()
                self._answers[key] = _read(spec.method, process.returncode, answer)
                del self._running[key]
        while self._waiting and len(self._running) < self._at_once:
            key = next(iter(self._waiting))
            cfg, spec = self._waiting.pop(key)
            self._running[key] = spec, *_start(cfg, spec.method, key, self._at_once)


def room(configs: Sequence[Config]) -> int:
    """For how many processes there is memory beside what runs of these configs need, over the weights that they share."""
    from moeexp.config.memory_need import need_of
    from moeexp.record import free_memory

    needs = list(map(need_of, configs))
    needed = max(need.weights for need in needs) + sum(need.state + need.workspace for need in needs)
    device, most = configs[0].device, sys.maxsize
    for used in {"cpu", device}:
        free = free_memory.of_device(used)
        if free is not None:
            most = min(most, max(0, free - (needed if used == device else 0)) // ROOM[used])
    return most


def start_ahead(cfg: Config) -> None:
    """Processes for the methods of a config that is not resolved yet, where all are sure to be missing."""
    from moeexp.config.threads import granted, with_compilers
    from moeexp.record import free_memory
    from moeexp.record.gpus import visible_gpus
    from moeexp.stack.caches import cache_dir

    if _ahead or cfg.engine != "moeexp" or cfg.export != "aoti" or cfg.artifact is not None:
        return
    with contextlib.suppress(OSError):  # there is no folder yet
        if any(entry.is_dir() for entry in (cache_dir() / "compiled").iterdir()):
            return
    free = free_memory.of_device("cpu")
    most = sys.maxsize if free is None else free // ROOM["cpu"] - 1
    device = cfg.device if cfg.device != "auto" else "cuda" if visible_gpus() else "cpu"
    environment = with_compilers(os.environ, device)
    for _ in range(min(2 if cfg.dispatch == "dual" else 1, granted().cores, most)):
        answer = _file()
        process = _spawn(subprocess.PIPE, answer, environment, str(os.getpid()))
        assert process.stdin is not None
        _ahead.append((process, process.stdin, answer, Surroundings(environment, list(sys.path), os.getcwd())))


def end_ahead() -> None:
    """Ends those that have no job."""
    while _ahead:
        process, pipe, answer, _ = _ahead.pop()
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
        kill_group(process)  # it has written nothing
        process.wait()
        answer.close()


def _start(cfg: Config, method: str, key: str, at_once: int) -> tuple[subprocess.Popen, IO[bytes]]:
    """The process, and the file that its answer will be in."""
    import torch

    job = pickle.dumps((os.getpid(), cfg, method, key, torch.get_num_threads(), at_once))
    while _ahead:
        process, pipe, answer, started_in = _ahead.pop(0)
        if started_in.are_here() and not has_ended(process):
            with contextlib.suppress(BrokenPipeError):  # one that has ended since says so itself
                with pipe:
                    pipe.write(job)
            return process, answer
        _ahead.insert(0, (process, pipe, answer, started_in))
        end_ahead()  # what one was not started in, none was
    answer = _file()
    with _file() as told:
        told.write(job)
        told.seek(0)
        return _spawn(told, answer, os.environ), answer


def _spawn(stdin: IO[bytes] | int, answer: IO[bytes], environment: Mapping[str, str], *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        # -P: of the working directory only what the parent would import.
        [sys.executable, "-P", "-m", "moeexp.stack.compilers", *arguments],
        stdin=stdin,
        stdout=answer,
        env={**environment, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        start_new_session=True,  # Ctrl-C reaches the parent alone, which ends this
    )


def _file() -> IO[bytes]:
    """Of no disk where the system has such files: that one is full may be the answer."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("moeexp"), "w+b")
    return tempfile.TemporaryFile()


def _read(method: str, code: int, answer: IO[bytes]) -> bool | Exception:
    with answer:
        answer.seek(0)
        if code == 0 and (said := answer.read()):
            return pickle.loads(said)
    if code >= 0:
        return RuntimeError(f"the process that compiled {method} exited with code {code} without an answer")
    killed = "; if nobody killed it, the machine may be out of memory" if -code == signal.SIGKILL else ""
    return RuntimeError(f"the process that compiled {method} was ended by {signal_name(code)}{killed}")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # what is half written is removed
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    if sys.argv[1:]:
        die_with_parent(int(sys.argv[1]), signal.SIGTERM)
        _import()
    told = sys.stdin.buffer.read()
    if not told:
        return 0
    parent, *job = pickle.loads(told)
    die_with_parent(parent, signal.SIGTERM)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints is no answer
    try:
        answer: bool | Exception = _compile(*job)
    except Exception as error:
        answer = _to_send(error)
    with answers:
        pickle.dump(answer, answers)
    return 0


def _import() -> None:
    """What compiling imports, and that late."""
    import torch._inductor.codegen.cpp_wrapper_gpu
    import torch._inductor.codegen.triton
    import torch._inductor.compile_fx
    import torch._inductor.package
    import torch.export._trace  # noqa: F401

    import moeexp.stack.packages  # noqa: F401


def _compile(cfg: Config, method: str, key: str, threads: int, at_once: int) -> bool:
    """Whether it was compiled, rather than found: another run may have been faster."""
    import torch
    from torch._inductor import config

    from moeexp.stack.compile_cache import key_of
    from moeexp.stack.packages import package, package_specs

    torch.set_num_threads(threads)  # for which a method of a CPU is compiled
    config.compile_threads = max(1, (config.compile_threads or 1) // at_once)
    (spec,) = [spec for spec in package_specs(cfg) if spec.method == method]
    assert key_of(spec) == key, f"{method} has another key here than in the process that asks for it"
    return not package(cfg, spec).cached


def _to_send(error: Exception) -> Exception:
    """Itself where a pickle keeps what it says. The parent's traceback has this process's as a note."""
    sent: Any = error
    with contextlib.suppress(Exception):
        sent = pickle.loads(pickle.dumps(error))
    if sent is error or str(sent) != str(error):
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note("In the process that compiled it:\n" + "".join(traceback.format_exception(error)))
    return sent


if __name__ == "__main__":
    sys.exit(main())
