"""The pool of scratchpad words shared by all units."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from weft.arch.config import EngineConfig
from weft.hw.interfaces import ReadPort, WritePort


class Scratchpad(wiring.Component):
    """`config.banks` banks of `config.bank_words` words; the bank of a word is the low bits of its address.

    Driven by: ports `read[i]` and `write[j]` of hw/interfaces.py. In every cycle each bank serves one read and
    one write; of several ports that ask for one bank, the one of least index is accepted, separately for
    readers and writers. So every port is accepted in every cycle in which no two meet in a bank. A port's
    `ready` depends on the address it offers and on the ports before it, not on its own `valid`.

    Latency: data READ_LATENCY cycles after the accepted request (the memory, then a register behind the
    crossbar). A write is seen by the reads accepted in later cycles; a word read and written in the same
    cycle may be read as anything.

    `fault` is high in the cycle after an access outside the pool was accepted; such a write is dropped, such
    a read is answered with any word. Words are zero at the start and keep their value through a reset.
    """

    def __init__(self, config: EngineConfig, readers: int, writers: int) -> None:
        self.config = config
        super().__init__({
            "read": In(ReadPort(config)).array(readers),
            "write": In(WritePort(config)).array(writers),
            "fault": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        bank_bits = exact_log2(config.banks)
        reads = [(port.request, port.request.payload) for port in self.read]
        writes = [(port.request, port.request.payload.address) for port in self.write]

        for requests in (reads, writes):
            for index, (request, address) in enumerate(requests):
                taken = [before.valid & (other[:bank_bits] == address[:bank_bits])
                         for before, other in requests[:index]]
                m.d.comb += request.ready.eq(~Cat(taken).any())
        m.d.sync += self.fault.eq(Cat(
            request.valid & request.ready & (address[bank_bits:] >= config.bank_words)
            for request, address in reads + writes
        ).any())

        words = []  # of each bank, in the cycle after the request
        for bank in range(config.banks):
            # One memory as wide as a word, with byte enables: block RAM and simulators both like it.
            memory = Memory(shape=unsigned(8 * config.lanes), depth=config.bank_words, init=[])
            m.submodules[f"bank{bank}"] = memory
            read, write = memory.read_port(), memory.write_port(granularity=8)
            words.append(read.data)
            for index, (request, address) in enumerate(reads):
                with _case(m, index, request.valid & (address[:bank_bits] == bank)):
                    m.d.comb += [read.addr.eq(address[bank_bits:]), read.en.eq(1)]
            for index, (request, address) in enumerate(writes):
                with _case(m, index, request.valid & (address[:bank_bits] == bank)):
                    m.d.comb += [write.addr.eq(address[bank_bits:]), write.data.eq(request.payload.data)]
                    with m.If(address[bank_bits:] < config.bank_words):
                        m.d.comb += write.en.eq(request.payload.mask)

        for index, port in enumerate(self.read):
            valid = Signal(name=f"valid{index}")
            bank = Signal(bank_bits, name=f"bank_of{index}")
            data = Signal(8 * config.lanes, name=f"data{index}", reset_less=True)
            m.d.comb += port.data.eq(data)
            m.d.sync += [
                valid.eq(port.request.valid & port.request.ready),
                bank.eq(port.request.payload),
                port.data_valid.eq(valid),
            ]
            with m.Switch(bank):
                for number, word in enumerate(words):
                    with m.Case(number):
                        m.d.sync += data.eq(word)
        return m


def _case(m: Module, index: int, condition):
    """The next branch of an if-else chain: the first one whose condition holds is taken."""
    return m.If(condition) if index == 0 else m.Elif(condition)
