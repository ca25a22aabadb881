"""Language models on a Device: sequences, checked against golden and functional model, and text from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weft.arch.device import Device, RunResult
from weft.arch.errors import ModelError
from weft.arch.program import Argument, Program, Segment
from weft.arch.trace import Trace
from weft.sim.compare import StreamingComparison, compare_layers
from weft.sim.functional import FunctionalDevice, Step
from weft.sim.golden_language import GoldenLanguage
from weft.sw.profile import Executed


class Session:
    """Sequences of one language model on any Device: the host's side of arch/program.py's Language.

    Loads the Program with room for `sequences` sequences, all of them empty.
    """

    def __init__(self, device: Device, program: Program, sequences: int = 1) -> None:
        if program.language is None:
            raise ModelError(f"Program '{program.model}' is not a language model; run it with `weft simulate`")
        self.device, self.program, self.layout = device, program, program.language
        self.lengths = [0] * sequences
        device.load(program, sequences)

    def prepare(self, tokens: Sequence[int] | np.ndarray, sequence: int = 0) -> tuple[int, ...]:
        """Puts tokens that continue a sequence into memory; the arguments of the run that will take them.

        Raises ModelError for no tokens, tokens outside the vocabulary or more than the context holds.
        """
        codes, before = np.asarray(tokens, np.int64), self.lengths[sequence]
        if codes.ndim != 1 or not codes.size:
            raise ModelError("a run needs at least one token: give a prompt that is not empty")
        if codes.min() < 0 or codes.max() >= self.layout.vocab:
            raise ModelError(f"token {int(codes.max())} is outside the vocabulary of {self.layout.vocab}: the "
                             "tokenizer belongs to another model")
        if before + len(codes) > self.layout.context:
            raise ModelError(f"{before + len(codes)} tokens exceed the context of {self.layout.context} that Program "
                             f"'{self.program.model}' was compiled for: shorten the text, or compile with a larger "
                             "--context")
        self.device.write_segment(Segment.INPUT, 0, codes.astype("<u4").tobytes())
        arguments = {Argument.POSITION: before, Argument.COUNT: len(codes),
                     Argument.SEQUENCE: sequence * self.layout.sequence_bytes}
        return tuple(arguments[name] for name in Argument)

    def forward(self, tokens: Sequence[int] | np.ndarray, sequence: int = 0) -> RunResult:
        """Runs tokens that continue a sequence; `logits` and `answer` are then those behind the last one."""
        arguments = self.prepare(tokens, sequence)
        result = self.device.start(arguments)
        self.lengths[sequence] += len(tokens)
        return result

    @property
    def logits(self) -> np.ndarray:
        """Codes int32 [vocab] of the last run; real value = code * layout.logit_scale."""
        layout = self.layout
        low, high = (np.frombuffer(self.device.read_segment(Segment.OUTPUT, at, layout.vocab), kind).astype(np.int32)
                     for at, kind in ((layout.logits, np.uint8), (layout.logits + layout.high, np.int8)))
        return low | high << 8

    @property
    def answer(self) -> int:
        """The token with the greatest logit of the last run, the first of equals, as the engine found it."""
        return int(np.frombuffer(self.device.read_segment(Segment.OUTPUT, self.layout.answer, 8), "<u4")[1])

    def clear(self, sequence: int = 0) -> None:
        """Makes a sequence empty."""
        size = self.layout.sequence_bytes
        self.device.write_segment(Segment.CACHE, sequence * size, bytes(size))
        self.lengths[sequence] = 0


@dataclass
class Run:
    """One run of some tokens: what the Device reports, and how everything it computed compares."""

    tokens: int
    position: int
    result: RunResult
    executed: Executed
    compared: int = 0  # layer outputs, golden with functional
    writes: int = 0  # scratchpad writes, functional with RTL
    mismatches: int = 0
    first: str = ""
    wall_s: float = 0.0


class CheckedSession:
    """One sequence on golden model, functional machine and, if given, another Device, compared in everything.

    Golden and functional: every element of every layer's output, and the logits. Functional and RTL: every
    scratchpad write of every unit, in a stream, and the stored logits. Without `golden` the first part is left out.
    """

    def __init__(self, program: Program, golden: GoldenLanguage | None, device: Device | None = None) -> None:
        self.functional = Session(FunctionalDevice(program.config), program)
        self.session = self.functional if device is None else Session(device, program)
        self.golden, self.cache = golden, golden.new_cache() if golden else None
        self.program = program

    def fill(self, cache: bytes, length: int) -> None:
        """Puts `length` positions into the Devices' cache, as compiler/language_cache.py makes it."""
        for session in {id(s): s for s in (self.functional, self.session)}.values():
            session.device.write_segment(Segment.CACHE, 0, cache)
            session.lengths[0] = length

    def forward(self, tokens: Sequence[int]) -> Run:
        """Runs and compares tokens that continue the sequence."""
        device, machine = self.session.device, self.functional.device
        assert isinstance(machine, FunctionalDevice)
        position, wrong = self.session.lengths[0], list[str]()
        executed, writes = Executed(self.program.config), 0
        steps = _noted(machine.steps(self.functional.prepare(tokens)), executed)
        began = time.perf_counter()
        if self.session is self.functional:
            for _ in steps:
                pass
            self.functional.lengths[0] += len(tokens)
            result, wall = RunResult({}, machine.counters), time.perf_counter() - began
        else:
            comparison = StreamingComparison(self.program, steps)

            def observe(trace: Trace) -> None:
                comparison.consume(trace)
                executed.observe(trace)

            device.observer = observe  # of an RtlDevice
            result = self.session.forward(tokens)
            wall = time.perf_counter() - began
            difference = comparison.finish()
            self.functional.lengths[0] += len(tokens)
            writes = comparison.compared
            if difference:
                wrong.append(f"RTL, {difference.describe()}")
            if not np.array_equal(self.functional.logits, self.session.logits):
                wrong.append("RTL, stored logits differ from the functional machine's")
        compared = 0
        if self.golden:
            record: dict[str, np.ndarray] = {}
            logits = self.golden.forward(np.asarray(tokens), self.cache, record)
            for name, want in record.items():
                got = {name: machine.layers[name]} if name in machine.layers else {}
                if difference := compare_layers({name: want}, got):
                    wrong.append(f"functional machine, {difference.describe()}")
            if not np.array_equal(logits, self.session.logits) or self.golden.answer(logits) != self.session.answer:
                wrong.append("stored logits or answer differ from the golden model's")
            compared = len(record)
        return Run(len(tokens), position, result, executed, compared, writes, len(wrong), next(iter(wrong), ""), wall)


def _noted(steps: Iterator[Step], executed: Executed) -> Iterator[Step]:
    for step in steps:
        executed.add(step[1])
        yield step


def choose(logits: np.ndarray, temperature: float, top: int, rng: np.random.Generator) -> int:
    """A token drawn by its real-valued logits [vocab]: from the `top` greatest (0: from all), at a temperature > 0."""
    allowed = np.argsort(-logits, kind="stable")[: top or None]
    weights = np.exp((logits[allowed] - logits[allowed[0]]) / temperature)
    return int(rng.choice(allowed, p=weights / weights.sum()))


def generate(session: CheckedSession, prompt: Sequence[int], most: int, temperature: float = 0.0, top: int = 0,
             seed: int = 0, chunk: int = 0, stop: int | None = None,
             emit: Callable[[int, Run], None] | None = None) -> tuple[list[int], list[Run]]:
    """Up to `most` tokens behind a prompt, until `stop` or the end of the context; the runs that made them.

    The prompt goes in `chunk` tokens at a time (0: all at once). Temperature 0 takes the engine's own answer. `emit`
    is called with each token as it is known.
    """
    rng, runs, tokens = np.random.default_rng(seed), list[Run](), list[int]()
    size = chunk or len(prompt)
    pieces = [list(prompt[first : first + size]) for first in range(0, len(prompt), size)] or [[]]
    context = session.session.layout.context
    while pieces:
        runs.append(session.forward(pieces.pop(0)))
        if pieces:
            continue
        if temperature > 0:
            scale = session.session.layout.logit_scale
            token = choose(session.session.logits * scale, temperature, top, rng)
        else:
            token = session.session.answer
        tokens.append(token)
        if emit:
            emit(token, runs[-1])
        if len(tokens) < most and token != stop and session.session.lengths[0] < context:
            pieces = [[token]]
    return tokens, runs

