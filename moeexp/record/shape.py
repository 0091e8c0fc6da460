"""The shape of a record, as its readers rely on it: types, finite numbers within what a run can be, dates with a zone,
lengths that fit each other. Keys that are not named here are nobody's to rely on, and may hold anything."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moeexp.record.names import STATUSES
from moeexp.record.quantities import (
    LARGEST,
    Amount,
    Count,
    Date,
    Id,
    Number,
    Outcome,
    Positive,
    Shape,
    TextRows,
    Texts,
    measured,
)
from moeexp.record.text import MAX_OVERRIDES, brief

MAX_SAMPLES = 4000  # of a kind; a record keeps no more
MOST = 1 << 24  # sequences, or tokens of a prompt


class Model(Shape):
    name: str
    weights: str


class Quant(Shape):
    name: str
    bits: int


class TrackerConfigShape(Shape):
    name: str
    project: str | None = None
    entity: str | None = None


class ConfigShape(Shape):
    """What readers name of it; of a refused config the values may be whatever was asked for."""

    model: Model
    quant: Quant
    ops: dict[str, Any]
    tracker: TrackerConfigShape
    device: str
    dtype: str
    export: str
    batch: int
    cuda_graph: bool | str
    engine: str = "moeexp"
    check: str = "inline"
    state: str = "shared"
    prompt_len: int | None = None
    new_tokens: int = 1
    loop_ahead: int = 1


class Latencies(Shape):
    """Milliseconds."""

    samples: Annotated[list[Annotated[float, Field(ge=0, le=LARGEST)]], Field(max_length=MAX_SAMPLES)]
    p50: Amount
    p90: Amount
    p99: Amount
    mean: Amount
    sd: Amount
    n: Annotated[int, Field(ge=1, le=LARGEST)]

    @model_validator(mode="after")
    def fits(self) -> Latencies:
        if len(self.samples) > self.n:
            raise ValueError(f"n={self.n} is less than its {len(self.samples)} samples")
        if not self.p50 <= self.p90 <= self.p99:
            raise ValueError("p50, p90 and p99 are not in this order")
        measured(min(filter(None, self.samples), default=0.0))
        return self


class Round(Shape):
    n: Count
    tokens: Count = 0

    @model_validator(mode="after")
    def fits(self) -> Round:
        if "tokens" in self.model_fields_set and (self.tokens > 0) != (self.n > 0):
            raise ValueError(f"tokens={self.tokens} in n={self.n} steps")
        return self


class Stalls(Shape):
    count: Count
    total_ms: Amount
    longest_ms: Amount
    decode_tok_s: Positive


class VerifySteps(Shape):
    tokens: Annotated[int, Field(ge=2, le=32)]
    passes: Count
    steps: Count
    step_ms: Positive
    decode_steps: Positive | None = None


class ToleranceShape(Shape):
    tolerance: str
    value: Outcome
    limit: Outcome
    passed: bool
    where: str


class PartReport(Shape):
    positions: Count = 0
    with_logits: Count = 0


class PartShape(Shape):
    name: str
    passed: bool
    tolerances: list[ToleranceShape]
    report: PartReport = PartReport()


class Check(Shape):
    passed: bool | None = None
    parts: list[PartShape] = []
    failures: Texts = []


class Range(Shape):
    min: Number
    median: Number
    max: Number


class OtherLoad(Shape):
    cores: Annotated[float, Field(ge=0, le=1e6)]
    of: Annotated[int, Field(ge=1, le=1_000_000)]


class TelemetryShape(Shape):
    n: Count = 0
    # With a default that is no value of theirs: they may be left out, not null.
    sm_mhz: Range = None  # type: ignore[assignment]
    memory_mhz: Range = None  # type: ignore[assignment]
    power_w: Range = None  # type: ignore[assignment]
    temperature_c: Range = None  # type: ignore[assignment]
    load: Range = None  # type: ignore[assignment]
    mhz: Range = None  # type: ignore[assignment]
    throttle_reasons: dict[str, Amount] | None = None
    other_load: OtherLoad | None = None


class Kernel(Shape):
    name: str
    calls: Amount
    us: Amount


class TimeSplit(Shape):
    wall_us: Positive
    kernels_us: Amount
    copies_us: Amount
    gaps_us: Amount
    host_us: Amount
    kernels: Amount
    by_kernel: list[Kernel] | None = None


class BudgetRow(Shape):
    op: str | None
    kernel: str | None
    calls: Amount
    bytes: Count
    activations: Count
    us: Amount
    adds_us: Amount


class BudgetLayers(Shape):
    name: str
    count: Annotated[int, Field(ge=1, le=LARGEST)]
    bytes: Count
    adds_us: Amount


class StepBudget(Shape):
    rows: list[BudgetRow]
    layers: list[BudgetLayers] | None


class BytesPerToken(Shape):
    total: Annotated[int | float, Field(ge=1, le=LARGEST)]
    read_bandwidth_gb_s: Positive | None = None


class Cpu(Shape):
    name: str | None = None
    cores: Count | None = None
    torch_threads: Count


class GpuShape(Shape):
    name: str
    driver: str | None = None


class GpuState(Shape):
    error: str = ""
    sm_mhz: Number | None = None
    memory_mhz: Number | None = None
    power_w: Number | None = None
    power_limit_w: Number | None = None
    temperature_c: Number | None = None


class Environment(Shape):
    versions: dict[str, str | None] | None = None
    cuda: str | None = None
    cpu: Cpu | None = None
    gpu: GpuShape | None = None
    gpu_before: GpuState | None = None
    gpu_after: GpuState | None = None
    gpu_other_processes: int | None = None


class Weights(Shape):
    seed: int | None = None
    sha256: str | None = None


class Allocator(Shape):
    settings: Texts | None = None


class Software(Shape):
    allocator: Allocator | None = None


class Identity(Shape):
    weights: Weights | None = None
    heldout: str | None = None
    tokenizer: str | None = None
    software: Software | None = None


class Design(Shape):
    name: str | None = None
    cell: str | None = None
    index: Count | None = None


class Group(Shape):
    id: str
    name: str | None = None
    order: Texts | None = None
    members: Texts | None = None
    runs: Texts | None = None


class Tracker(Shape):
    name: str
    path: str | None = None
    url: str | None = None


class FaultShape(Shape):
    message: str
    type: str | None = None
    phase: str | None = None
    traceback: str | None = None


class FullConfig(Shape):
    sha256: str


class Migrated(Shape):
    medians: Texts = []


class Whole(Shape):
    id: Id
    config_hash: str | None = None
    code_fingerprint: str | None = None
    status: Literal[STATUSES]  # type: ignore[valid-type]
    started: Date
    finished: Date | None = None
    phase: str | None = None
    process: dict[str, Any] | None = None
    design: Design | None = None
    command: Texts
    overrides: Annotated[Texts, Field(max_length=MAX_OVERRIDES)]
    config: ConfigShape
    full_config: FullConfig | None = None
    identity: Identity | None = None
    random_weights: bool | None = None
    check: Check | None = None
    decode_tok_s: Positive | None = None
    prefill_tok_s: Positive | None = None
    ttft_s: Amount | None = None
    stalls: Stalls | None = None
    verify: VerifySteps | None = None
    token_latencies_ms: Latencies | None = None
    prefill_latencies_ms: Latencies | None = None
    ttft_latencies_ms: Latencies | None = None
    rounds: Annotated[list[Round], Field(max_length=MAX_SAMPLES)] | None = None
    telemetry: TelemetryShape | None = None
    group: Group | None = None
    generated_ids: list[list[int]] | None = None
    generated_text: TextRows = None
    prompt_text: TextRows = None
    bits_per_byte: Outcome = None
    evaluation: dict[str, Any] | None = None
    bytes_per_token: BytesPerToken | None = None
    bandwidth_share: Amount | None = None
    kernels_per_token: Amount | None = None
    time_split: TimeSplit | None = None
    step_budget: StepBudget | None = None
    joules_per_token: Amount | None = None
    energy: dict[str, Any] | None = None
    phases_s: dict[str, Number] | None = None
    memory_gib: dict[str, Amount] | None = None
    quantised_coverage: Amount | None = None
    first_token_s: Number | None = None
    ops: dict[str, Any] | None = None
    not_applicable: Texts | None = None
    environment: Environment | None = None
    tracker: Tracker | None = None
    error: FaultShape | None = None
    notes: Texts
    migrated: Migrated | None = None

    @model_validator(mode="after")
    def fits(self) -> Whole:
        weights = self.identity.weights if self.identity else None
        if weights and (weights.seed if self.random_weights else weights.sha256) is None:
            raise ValueError("identity.weights tells no seed of random weights and no digest of others")
        for name in ("batch", "prompt_len") if self.decode_tok_s is not None else ():
            number = getattr(self.config, name)
            if number is not None and not 1 <= number <= MOST:
                raise ValueError(
                    f"decode_tok_s={self.decode_tok_s:g} is of config.{name}={brief(number)}, which is not 1..{MOST}"
                )
        return self
