"""The control groups of Linux that limit this process: in a container, a job of a cluster, a service."""

from __future__ import annotations

from pathlib import Path

PROCESS = Path("/proc/self")


def of_process(controller: str, folder: Path = PROCESS) -> list[Path]:
    """The folders of the groups that limit what `controller` (cpu, memory) shares out: of this process and of all around it.
    `folder`: that of the process in /proc. Version 2 of the hierarchy has one for all controllers, version 1 one for each."""
    return [
        group
        for mount, root, controllers in _mounts(folder / "mountinfo", controller)
        for group in _around(mount, root, _group(folder / "cgroup", controllers))
    ]


def text_of(path: Path) -> str:
    """Empty where there is no such file, or where a container hides it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _mounts(mountinfo: Path, controller: str) -> list[tuple[Path, str, str]]:
    """(where, the group that stands there, controller: "" for version 2) of each hierarchy that has limits."""
    found = []
    for line in text_of(mountinfo).splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *_, options) = before.split(), after.split() or [""]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            root, mount = (field.replace("\\040", " ") for field in fields[3:5])
            found.append((Path(mount), root, controller if kind == "cgroup" else ""))
    return found


def _group(cgroup: Path, controller: str) -> str:
    for line in text_of(cgroup).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _around(mount: Path, root: str, path: str) -> list[Path]:
    """The group and all around it, as folders. In a container the path may be the host's and only its tail be there; then
    what is mounted is the container's own group."""
    inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) and ".." not in path else Path()
    return [mount / inside, *(mount / parent for parent in inside.parents)]
