"""`python -m moeexp.export OVERRIDES… out=DIR`: writes the portable artifact that `artifact=DIR` runs."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from moeexp.config import compose, schema, threads
from moeexp.config.errors import explain
from moeexp.record import streams
from moeexp.record.phases import Phases
from moeexp.record.record import Record
from moeexp.run import signals

USAGE = """usage: python -m moeexp.export OVERRIDES… out=DIR

Exports and compiles the methods of a config and writes them with its quantised weights to DIR, a new folder:
  python -m moeexp.export model=tiny quant=int4 out=tiny-int4
  python -m moeexp artifact=tiny-int4 cuda_graph=true
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 1 failed, 2 invalid input, 130 interrupted."""
    with signals.handled():  # SIGTERM as Ctrl-C
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    streams.prepare()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        folder, manifest = export(arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (HydraException, OmegaConfBaseException) as error:
        return _say(f"error: {explain(error)}", 2)
    except ValueError as error:
        return _say(f"error: {' '.join(str(error).split())}", 2)
    except Exception as error:
        traceback.print_exc()
        return _say(f"error: {type(error).__name__}: {' '.join(str(error).split())}", 1)
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(f"{folder}: {', '.join(manifest['methods'])}, {len(manifest['files'])} files, {size / 2**20:.1f} MiB")
    print(f"run it with: python -m moeexp artifact={folder}")
    return 0


def export(arguments: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The folder and the manifest. Nothing is left of it if this raises."""
    out = _out([argument for argument in arguments if argument.startswith("out=")])
    cfg = compose.compose([argument for argument in arguments if not argument.startswith("out=")])

    threads.prepare()
    import torch

    from moeexp.config import resolve, sources, validate
    from moeexp.model.inputs import check_inputs
    from moeexp.stack import artifact_key

    artifact_key.prepare()  # an error here, not after minutes of compiling
    if cfg.artifact is not None:
        raise ValueError(f"artifact={cfg.artifact} is an artifact already: copy its folder")
    if cfg.export != "aoti":
        raise ValueError(f"export={cfg.export} compiles nothing that could be kept; an artifact needs export=aoti")
    cuda = torch.cuda.is_available()
    validate.validate(cfg, cuda_available=cuda)
    cfg = resolve.resolve(cfg, cuda_available=cuda)
    check_inputs(cfg)
    threads.apply(threads.choose(cfg.threads, sources.load_architecture(cfg.model)), cfg.device)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:  # the record of an export is the artifact's manifest
        record = Record(Path(scratch) / "record.json", id="export", config=cfg, command=["python", "-m", "moeexp.export"])
        phases = Phases(record, Console(stderr=True))
        manifest = _build(out, cfg, record, phases)
    phases.console.print(f"exported in {time.perf_counter() - start:.1f} s", style="dim", highlight=False)
    return out, manifest


def _build(out: Path, cfg: schema.Config, record: Record, phases: Phases) -> dict[str, Any]:
    from moeexp.run import identity
    from moeexp.stack import artifact_writer, compilers, factory

    made_from = identity.Identities(phases.progress).files(cfg)
    with compilers.Compilers([cfg]) as ahead:
        with phases("weights"):
            model = factory.build_model(cfg, phases)
        identity.confirm(cfg, made_from)
        # No capture is needed, but `all` is made of another prefill method.
        graph = None if cfg.cuda_graph == "all" else False
        stack = factory.build_stack(cfg, model, phases, cuda_graph=graph, made_ahead=ahead.join)
    try:
        with phases("write"):
            return artifact_writer.write(out, cfg, stack, made_in_s=record.data["phases_s"], identity=made_from)
    finally:
        stack.close()


def _out(given: list[str]) -> Path:
    if len(given) != 1 or not given[0].removeprefix("out="):
        raise ValueError("out=DIR is needed once: the new folder that the artifact is written to")
    out = Path(given[0].removeprefix("out=")).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists already: give a new folder, or remove it")
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    shutil.disk_usage(parent)  # an OSError here, not after minutes of compiling
    return out


def _say(line: str, code: int) -> int:
    print(streams.fitted(line), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
