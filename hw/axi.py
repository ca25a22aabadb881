"""AXI4 and AXI4-Lite signatures, seen from the manager. Names and widths follow the AMBA AXI specification."""

from __future__ import annotations

from amaranth.lib.wiring import In, Out, Signature


def _channel(prefix: str, fields: dict[str, int], forward: bool) -> dict:
    """Ports of one channel: payload and valid in the channel's direction, ready against it."""
    there, back = (Out, In) if forward else (In, Out)
    return {f"{prefix}{name}": there(width) for name, width in fields.items()} | {
        f"{prefix}valid": there(1),
        f"{prefix}ready": back(1),
    }


class AXI4(Signature):
    """AXI4 manager port without user, region, QoS, cache, lock and protection signals (all default)."""

    def __init__(self, data_bytes: int, address_bits: int, id_bits: int = 1) -> None:
        self.data_bytes, self.address_bits, self.id_bits = data_bytes, address_bits, id_bits
        address = {"id": id_bits, "addr": address_bits, "len": 8, "size": 3, "burst": 2}
        super().__init__(
            _channel("ar", address, True)
            | _channel("r", {"id": id_bits, "data": 8 * data_bytes, "resp": 2, "last": 1}, False)
            | _channel("aw", address, True)
            | _channel("w", {"data": 8 * data_bytes, "strb": data_bytes, "last": 1}, True)
            | _channel("b", {"id": id_bits, "resp": 2}, False)
        )


class AXI4Lite(Signature):
    """AXI4-Lite with 32-bit data, seen from the manager."""

    def __init__(self, address_bits: int) -> None:
        self.address_bits = address_bits
        super().__init__(
            _channel("ar", {"addr": address_bits, "prot": 3}, True)
            | _channel("r", {"data": 32, "resp": 2}, False)
            | _channel("aw", {"addr": address_bits, "prot": 3}, True)
            | _channel("w", {"data": 32, "strb": 4}, True)
            | _channel("b", {"resp": 2}, False)
        )
