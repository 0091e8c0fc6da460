"""Which CUDA stream a method runs on."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class MethodStream:
    """`with stream(): …` runs what is inside on the current stream, or (`own`) on a stream of the method's own, which
    first waits for the work that the current stream has, and for which the current stream then waits. Both by events: the
    host waits for nothing. Memory that one side frees is safe to use again, since each side's next work waits for the
    other's."""

    def __init__(self, device: torch.device, *, own: bool):
        self.stream = torch.cuda.Stream(device) if own and device.type == "cuda" else None

    def __call__(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stream is None else self._inside(self.stream)

    @contextmanager
    def _inside(self, stream: torch.cuda.Stream):
        outside = torch.cuda.current_stream(stream.device)
        stream.wait_stream(outside)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            outside.wait_stream(stream)
