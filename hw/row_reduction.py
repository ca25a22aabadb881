"""The maximum and the sum of a row."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from weft.arch.config import EngineConfig
from weft.arch.isa import RowOp
from weft.hw.row_layouts import ANSWER, FIELDS, KEY_BITS, SUM_BITS, TERM_BITS


class RowReduction(wiring.Component):
    """Maximum of `keys` and sum of `terms`, one group per cycle, each through a tree of registers.

    Driven by: `instruction`, steady; `keys` with `key_valid`, `key_first` for the first group of a pass, `key_last`
    for the last; `terms` with `term_valid`, `term_first`, the last of them before the last keys. Of equal keys the
    first wins; an ARGMAX without `first` starts from the answer in `prelude`.

    `end` is high for a cycle with `end_power` (those keys were products of powers) when `maximum`, `total` and
    `answer` are those of the pass; they stay so until the first group of another. Latency: log2(row_lanes) + 1 cycles.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(FIELDS),
            "prelude": In(ANSWER),
            "key_valid": In(1),
            "key_first": In(1),
            "key_last": In(1),
            "key_power": In(1),
            "keys": In(data.ArrayLayout(KEY_BITS, config.row_lanes)),
            "term_valid": In(1),
            "term_first": In(1),
            "terms": In(data.ArrayLayout(TERM_BITS, config.row_lanes)),
            "end": Out(1),
            "end_power": Out(1),
            "maximum": Out(KEY_BITS),
            "total": Out(SUM_BITS),
            "answer": Out(ANSWER),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        now, row_lanes = self.instruction, self.config.row_lanes

        # ---- maximum ---------------------------------------------------------------------------------------------
        flags, valid = Cat(self.key_first, self.key_last, self.key_power), self.key_valid
        level = [(self.keys[lane], Cat()) for lane in range(row_lanes)]  # key, bits of its lane
        number = 0
        while len(level) > 1 or number == 0:
            above, pairs = [], [level[i:i + 2] for i in range(0, len(level), 2)]
            for i, pair in enumerate(pairs):
                (key, lane), (other_key, other_lane) = pair[0], pair[-1]
                second = other_key > key
                chosen = Signal(KEY_BITS, name=f"key{number}_{i}", reset_less=True)
                place = Signal(max(1, number + 1), name=f"lane{number}_{i}", reset_less=True)
                with m.If(valid):
                    m.d.sync += chosen.eq(Mux(second, other_key, key))
                    m.d.sync += place.eq(Cat(Mux(second, other_lane, lane)[:number], second))
                above.append((chosen, place))
            flags_next, valid_next = Signal(3, name=f"flags{number}", reset_less=True), Signal(name=f"valid{number}")
            with m.If(valid):
                m.d.sync += flags_next.eq(flags)
            m.d.sync += valid_next.eq(valid)
            level, flags, valid, number = above, flags_next, valid_next, number + 1
        (key, lane), (first, last, power) = level[0], flags

        argmax = now.operation == RowOp.ARGMAX
        # Numbers of the group's first element and of the best one.
        base, index = Signal(32, reset_less=True), Signal(32, reset_less=True)
        prior = self.prelude
        prior_key = Cat(prior.value[:15], ~prior.value[15])
        best = Mux(first, Mux(argmax, prior_key, 0), self.maximum)
        better = (key > best) | (first & (~argmax | now.first))
        here = Mux(first, now.constant, base)
        with m.If(valid):
            m.d.sync += self.maximum.eq(Mux(better, key, best))
            with m.If(argmax):
                m.d.sync += base.eq(here + row_lanes)
                with m.If(better):
                    m.d.sync += index.eq(here + lane)
                with m.Elif(first):
                    m.d.sync += index.eq(prior.index)
        m.d.sync += [self.end.eq(valid & last), self.end_power.eq(power)]
        m.d.comb += [
            self.answer.value.eq(Cat(self.maximum[:15], ~self.maximum[15])),
            self.answer.index.eq(index),
        ]

        # ---- sum -------------------------------------------------------------------------------------------------
        first, valid = self.term_first, self.term_valid
        level, number = [self.terms[lane] for lane in range(row_lanes)], 0
        while len(level) > 1 or number == 0:
            above = []
            for i in range(0, len(level), 2):
                added = level[i] + (level[i + 1] if i + 1 < len(level) else 0)
                register = Signal(TERM_BITS + number + 1, name=f"sum{number}_{i // 2}", reset_less=True)
                with m.If(valid):
                    m.d.sync += register.eq(added)
                above.append(register)
            first_next, valid_next = Signal(name=f"sum_first{number}"), Signal(name=f"sum_valid{number}")
            m.d.sync += [first_next.eq(first), valid_next.eq(valid)]
            level, first, valid, number = above, first_next, valid_next, number + 1
        with m.If(valid):
            m.d.sync += self.total.eq(Mux(first, 0, self.total) + level[0])
        return m
