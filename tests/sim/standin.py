"""A copying engine with the ports and registers of ours: what the harness is tested with.

It copies `program_length` x 64 bytes from segment 2 to segment 3 in full bursts, many of them outstanding, so
that only the memory limits it. Segment 4 chooses: bit 0 skips the reads (and writes zeros), bit 1 the writes,
bit 2 never ends, bit 3 takes the number of a beat as its strobes. Segment 5, if not 0, is the STATUS it reports
at once, with fault index 1. Each beat read counts as a write of the load unit, its number being address and mask.
"""

from weft.arch.config import EngineConfig
from weft.arch.isa import Unit
from weft.arch.registers import ADDRESS_BITS, MAGIC, REGISTERS, Status

NO_READ, NO_WRITE, ENDLESS, STROBES = 1, 2, 4, 8


def standin(config: EngineConfig) -> str:
    """Verilog of the stand-in for `config`."""
    bus, lanes, address = config.bus_bytes, config.lanes, config.address_bits

    def word(name: str) -> str:
        return f"file[{REGISTERS[name].offset // 4}]"

    def port(name: str) -> str:
        return f"output {name}_valid, output [15:0] {name}_address, output [15:0] {name}_tag, " \
               f"output [{8 * lanes - 1}:0] {name}_data, output [{lanes - 1}:0] {name}_mask,"

    def case(name: str, value: str) -> str:
        return f"{REGISTERS[name].offset // 4}: s_axil_rdata <= {value};"

    return f"""
module weft_engine(
  input clk, input rst,
  output m_axi_arid, output [{address - 1}:0] m_axi_araddr, output [7:0] m_axi_arlen, output [2:0] m_axi_arsize,
  output [1:0] m_axi_arburst, output m_axi_arvalid, input m_axi_arready,
  input m_axi_rid, input [{8 * bus - 1}:0] m_axi_rdata, input [1:0] m_axi_rresp, input m_axi_rlast, input m_axi_rvalid,
  output m_axi_rready,
  output m_axi_awid, output [{address - 1}:0] m_axi_awaddr, output [7:0] m_axi_awlen, output [2:0] m_axi_awsize,
  output [1:0] m_axi_awburst, output m_axi_awvalid, input m_axi_awready,
  output [{8 * bus - 1}:0] m_axi_wdata, output [{bus - 1}:0] m_axi_wstrb, output m_axi_wlast, output m_axi_wvalid,
  input m_axi_wready, input m_axi_bid, input [1:0] m_axi_bresp, input m_axi_bvalid, output m_axi_bready,
  input [{ADDRESS_BITS - 1}:0] s_axil_araddr, input [2:0] s_axil_arprot, input s_axil_arvalid, output s_axil_arready,
  output reg [31:0] s_axil_rdata, output [1:0] s_axil_rresp, output reg s_axil_rvalid, input s_axil_rready,
  input [{ADDRESS_BITS - 1}:0] s_axil_awaddr, input [2:0] s_axil_awprot, input s_axil_awvalid, output s_axil_awready,
  input [31:0] s_axil_wdata, input [3:0] s_axil_wstrb, input s_axil_wvalid, output s_axil_wready,
  output [1:0] s_axil_bresp, output reg s_axil_bvalid, input s_axil_bready,
  {port("mon_load")} {port("mon_matrix")} {port("mon_vector")} {port("mon_row")}
  output [{len(Unit) - 1}:0] mon_start, output [{len(Unit) - 1}:0] mon_retire, output mon_running, output irq);

  localparam BURST = {config.burst_beats};
  reg [31:0] file [0:255];
  reg [{8 * bus - 1}:0] buffer [0:65535];
  reg [31:0] status, cycles, ar, r, aw, w, b;  // bursts of addresses and responses, beats of data
  wire [31:0] beats = {word("program_length")} * {64 // bus}, bursts = beats / BURST;
  wire running = status == {Status.RUNNING}, no_read = {word("segment4")}[0], no_write = {word("segment4")}[1];

  wire write = s_axil_awvalid & s_axil_wvalid & ~s_axil_bvalid;
  assign s_axil_awready = write, s_axil_wready = write, s_axil_arready = ~s_axil_rvalid;
  assign s_axil_rresp = 0, s_axil_bresp = 0;
  wire start = write && s_axil_awaddr == {REGISTERS["control"].offset} && s_axil_wdata[0];

  assign m_axi_arid = 0, m_axi_arlen = BURST - 1, m_axi_arsize = {bus.bit_length() - 1}, m_axi_arburst = 1;
  assign m_axi_awid = 0, m_axi_awlen = BURST - 1, m_axi_awsize = {bus.bit_length() - 1}, m_axi_awburst = 1;
  assign m_axi_araddr = {word("segment2")} + ar * (BURST * {bus}), m_axi_arvalid = running & ~no_read & (ar < bursts);
  assign m_axi_awaddr = {word("segment3")} + aw * (BURST * {bus});
  assign m_axi_awvalid = running & ~no_write & (aw < bursts) & (no_read | r >= (aw + 1) * BURST);
  assign m_axi_wvalid = running & (w < aw * BURST), m_axi_wdata = no_read ? 0 : buffer[w[15:0]];
  assign m_axi_wstrb = {word("segment4")}[3] ? w : {{{bus}{{1'b1}}}}, m_axi_wlast = w % BURST == BURST - 1;
  assign m_axi_rready = 1, m_axi_bready = 1;

  wire fed = m_axi_rvalid & m_axi_rready, sent = m_axi_wvalid & m_axi_wready, answered = m_axi_bvalid & m_axi_bready;
  wire finished = running & (no_read | r == beats) & (no_write | b == bursts) & ~{word("segment4")}[2];
  assign irq = status >= {Status.DONE};
  assign mon_load_valid = fed, mon_load_address = r, mon_load_tag = 7, mon_load_mask = r;
  assign mon_load_data = {{{lanes // bus}{{m_axi_rdata}}}};
  assign mon_matrix_valid = 0, mon_vector_valid = 0, mon_row_valid = 0, mon_running = running;
  assign mon_start = start ? 'b0011 : 0, mon_retire = finished ? 'b0011 : 0;

  always @(posedge clk) begin
    if (write) file[s_axil_awaddr[{ADDRESS_BITS - 1}:2]] <= s_axil_wdata;
    s_axil_bvalid <= write | (s_axil_bvalid & ~s_axil_bready);
    s_axil_rvalid <= (s_axil_arvalid & s_axil_arready) | (s_axil_rvalid & ~s_axil_rready);
    if (s_axil_arvalid & s_axil_arready) case (s_axil_araddr[{ADDRESS_BITS - 1}:2])
      {case("magic", f"32'd{MAGIC}")}
      {case("status", "status")}
      {case("fault_index", "1")}
      {case("fingerprint", f"32'h{config.fingerprint[8:]}")}
      {REGISTERS["fingerprint"].offset // 4 + 1}: s_axil_rdata <= 32'h{config.fingerprint[:8]};
      {case("cycles", "cycles")}
      {case("bytes_read", f"r * {bus}")}
      {case("bytes_written", f"w * {bus}")}
      default: s_axil_rdata <= 0;
    endcase
    if (fed) buffer[r[15:0]] <= m_axi_rdata;
    ar <= ar + (m_axi_arvalid & m_axi_arready);
    r <= r + fed;
    aw <= aw + (m_axi_awvalid & m_axi_awready);
    w <= w + sent;
    b <= b + answered;
    if (running) cycles <= cycles + 1;
    if (finished) status <= {Status.DONE};
    if (fed & m_axi_rresp != 0) status <= {Status.BUS_ERROR};
    if (answered & m_axi_bresp != 0) status <= {Status.BUS_ERROR | 1 << 8};
    if (start) begin
      status <= {word("segment5")} != 0 ? {word("segment5")} : {Status.RUNNING};
      cycles <= 0; ar <= 0; r <= 0; aw <= 0; w <= 0; b <= 0;
    end
    if (rst) begin
      status <= 0; s_axil_bvalid <= 0; s_axil_rvalid <= 0;
    end
  end
endmodule
"""
