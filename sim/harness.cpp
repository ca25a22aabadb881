// The engine, its clock and its memory, behind a C interface: Python is never in the cycle loop.
//
// Nothing here depends on a configuration. Verilator stores a port in the smallest type that holds it, and the
// widths of our data and mask ports are powers of two, so sizeof(port) is their width in bytes.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "Vtop.h"
#include "verilated.h"
#if VM_TRACE
#include "verilated_vcd_c.h"
#endif

namespace {

enum Response { OKAY = 0, SLVERR = 2, DECERR = 3 };
constexpr size_t QUEUE = 64;         // bursts accepted before the memory stops taking addresses
constexpr int LITE_TIMEOUT = 10000;  // cycles a register access may take
constexpr int RESET_CYCLES = 4;
constexpr int INCR = 1;

struct Timing {  // mirrored by weft.sim.rtl.Timing
    uint64_t latency, gate_open, gate_period, error_first, error_end;
    double bytes_per_cycle;
    uint64_t shared;
};

struct Burst {
    uint64_t address, id, due;
    unsigned left;  // beats not yet offered or taken
};

struct Reply {
    uint64_t id, due;
    int response;
};

// Data bytes that may move: filled at a steady rate, holding no more than a beat and a cycle's worth, so that
// the mean rate is exact under load and an idle bus saves up nothing.
class Bucket {
  public:
    void configure(double rate, double beat) { rate_ = rate, beat_ = beat, level_ = 0; }
    void tick() { level_ = std::min(level_ + rate_, beat_ + rate_); }
    bool has(int beats) const { return rate_ == 0 || level_ >= beats * beat_; }
    void take() { level_ -= beat_; }

  private:
    double rate_ = 0, beat_ = 0, level_ = 0;
};

struct Writes {  // of one writer to the scratchpad
    std::vector<uint64_t> cycle;
    std::vector<uint16_t> address, tag;
    std::vector<uint8_t> data, mask;

    void clear() { cycle.clear(), address.clear(), tag.clear(), data.clear(), mask.clear(); }
};

template <class Port> void append(std::vector<uint8_t>& to, const Port& port) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(&port);
    to.insert(to.end(), bytes, bytes + sizeof port);
}

class Harness {
  public:
    static constexpr unsigned BEAT = sizeof(Vtop::m_axi_rdata);

    Harness() : context_(new VerilatedContext), top_(new Vtop(context_.get())) {
        configure({1, 1, 1, 0, 0, 0, 1});
        reset();
    }

    ~Harness() {
        stop_waves();
        std::free(memory_);
    }

    void configure(const Timing& timing) {
        timing_ = timing;
        for (Bucket& bucket : buckets_) bucket.configure(timing.bytes_per_cycle, BEAT);
    }

    bool allocate(uint64_t size) {
        std::free(memory_);
        size_ = (size + BEAT - 1) / BEAT * BEAT;
        memory_ = static_cast<uint8_t*>(std::calloc(std::max<uint64_t>(size_, 1), 1));
        if (!memory_) size_ = 0;
        return memory_ != nullptr;
    }

    // Puts engine and memory channels into their first state. Memory and scratchpad keep their contents.
    void reset() {
        reads_.clear(), writes_.clear(), replies_.clear();
        violation_.clear();
        held_ar_ = held_aw_ = held_w_ = reading_ = running_ = false;
        worst_ = OKAY, read_first_ = true;
        top_->m_axi_rvalid = top_->m_axi_bvalid = top_->m_axi_wready = 0;
        top_->m_axi_arready = top_->m_axi_awready = 0;
        top_->s_axil_arvalid = top_->s_axil_awvalid = top_->s_axil_wvalid = 0;
        top_->s_axil_rready = top_->s_axil_bready = 0;
        for (int left = RESET_CYCLES; left > 0; --left) {
            top_->rst = left > 1;  // a flip-flop stands before the engine's reset
            settle(), edge();
        }
        origin_ = cycle_;
    }

    // Until the interrupt, a protocol violation, or `most` cycles. Returns the cycles run.
    uint64_t run(uint64_t most) {
        const uint64_t first = cycle_;
        while (cycle_ - first < most && !top_->irq && violation_.empty()) step();
        return cycle_ - first;
    }

    bool write_register(uint32_t address, uint32_t value) {
        top_->s_axil_awaddr = address, top_->s_axil_wdata = value, top_->s_axil_wstrb = 15;
        top_->s_axil_awvalid = top_->s_axil_wvalid = top_->s_axil_bready = 1;
        for (int i = 0; i < LITE_TIMEOUT && top_->s_axil_bready; ++i) {
            settle();
            const bool aw = top_->s_axil_awvalid && top_->s_axil_awready;
            const bool w = top_->s_axil_wvalid && top_->s_axil_wready;
            const bool b = top_->s_axil_bvalid;
            if (aw && w) origin_ = cycle_;
            finish();
            if (aw) top_->s_axil_awvalid = 0;
            if (w) top_->s_axil_wvalid = 0;
            if (b) top_->s_axil_bready = 0;
        }
        return !top_->s_axil_bready;
    }

    bool read_register(uint32_t address, uint32_t* value) {
        top_->s_axil_araddr = address;
        top_->s_axil_arvalid = top_->s_axil_rready = 1;
        for (int i = 0; i < LITE_TIMEOUT && top_->s_axil_rready; ++i) {
            settle();
            const bool ar = top_->s_axil_arvalid && top_->s_axil_arready;
            const bool r = top_->s_axil_rvalid;
            *value = top_->s_axil_rdata;
            finish();
            if (ar) top_->s_axil_arvalid = 0;
            if (r) top_->s_axil_rready = 0;
        }
        return !top_->s_axil_rready;
    }

    // Forgets what was recorded so far, and goes on recording or not.
    void record(bool on) {
        recording_ = on;
        for (Writes& log : logs) log.clear();
        for (auto& events : starts) events.clear();
        for (auto& events : retires) events.clear();
    }

    // Waves of the cycles `from` up to `to`, counted from the engine's start, as the events are.
    bool start_waves(const char* path, uint64_t from, uint64_t to) {
#if VM_TRACE
        stop_waves();
        if (!vcd_) {
            context_->traceEverOn(true);
            vcd_.reset(new VerilatedVcdC);
            top_->trace(vcd_.get(), 99);
        }
        vcd_->open(path);
        waves_from_ = from, waves_to_ = to;
        return vcd_->isOpen();
#else
        return false;
#endif
    }

    void stop_waves() {
#if VM_TRACE
        if (vcd_ && vcd_->isOpen()) vcd_->close();
#endif
    }

    uint8_t* memory() { return memory_; }
    uint64_t size() const { return size_; }
    uint64_t cycle() const { return cycle_ - origin_; }
    bool irq() const { return top_->irq; }
    const char* violation() const { return violation_.c_str(); }

    Writes logs[4];
    std::vector<uint64_t> starts[8], retires[8];

  private:
    void step() { settle(), finish(); }

    // First half of a cycle: inputs spread, outputs settle; these are the values that the clock edge samples.
    void settle() {
        top_->clk = 0;
        top_->eval();
        dump(0);
    }

    // Second half: what the handshakes of this cycle mean for the memory, the edge, and the next cycle's inputs.
    void finish() {
        const bool r = top_->m_axi_rvalid && top_->m_axi_rready, b = top_->m_axi_bvalid && top_->m_axi_bready;
        take_addresses();
        take_write();
        if (r) reading_ = false;
        if (b) replies_.pop_front();
        if (top_->mon_running && !running_) origin_ = cycle_;
        running_ = top_->mon_running;
        if (recording_) observe();
        edge();
        drive(b);
    }

    void edge() {
        top_->clk = 1;
        top_->eval();
        dump(1);
        ++cycle_;
    }

    void take_addresses() {
        if (top_->m_axi_arvalid && top_->m_axi_arready) {
            check_burst("read", top_->m_axi_araddr, top_->m_axi_arlen, top_->m_axi_arsize, top_->m_axi_arburst);
            reads_.push_back({top_->m_axi_araddr, top_->m_axi_arid, cycle_ + timing_.latency, top_->m_axi_arlen + 1u});
        }
        if (top_->m_axi_awvalid && top_->m_axi_awready) {
            check_burst("write", top_->m_axi_awaddr, top_->m_axi_awlen, top_->m_axi_awsize, top_->m_axi_awburst);
            writes_.push_back({top_->m_axi_awaddr, top_->m_axi_awid, 0, top_->m_axi_awlen + 1u});
        }
        check_hold("AR", held_ar_, held_ar_address_, top_->m_axi_arvalid, top_->m_axi_arready, top_->m_axi_araddr);
        check_hold("AW", held_aw_, held_aw_address_, top_->m_axi_awvalid, top_->m_axi_awready, top_->m_axi_awaddr);
        check_hold("W", held_w_, held_w_last_, top_->m_axi_wvalid, top_->m_axi_wready, top_->m_axi_wlast);
    }

    void take_write() {
        if (!(top_->m_axi_wvalid && top_->m_axi_wready)) return;
        Burst& burst = writes_.front();
        const int response = respond(burst.address);
        if (response == OKAY) {
            const auto* data = reinterpret_cast<const uint8_t*>(&top_->m_axi_wdata);
            const auto* strobes = reinterpret_cast<const uint8_t*>(&top_->m_axi_wstrb);
            for (unsigned i = 0; i < BEAT; ++i)
                if (strobes[i / 8] >> i % 8 & 1) memory_[burst.address + i] = data[i];
        }
        bucket(1).take();
        read_first_ = true;
        worst_ = std::max(worst_, response);
        burst.address += BEAT;
        --burst.left;
        if (bool(top_->m_axi_wlast) != (burst.left == 0)) violate("WLAST is not on the last beat of its burst");
        if (burst.left == 0) {
            replies_.push_back({burst.id, cycle_ + timing_.latency, worst_});
            writes_.pop_front();
            worst_ = OKAY;
        }
    }

    // Inputs of the coming cycle. `answered`: the write response of the last one was taken.
    void drive(bool answered) {
        const bool open = cycle() % timing_.gate_period < timing_.gate_open;
        buckets_[0].tick();
        if (!timing_.shared) buckets_[1].tick();
        const bool want_read = !reading_ && !reads_.empty() && reads_.front().due <= cycle_;
        const bool want_write = !writes_.empty();
        // with budget for one beat only, the channels take turns
        const bool both = want_read && want_write && top_->m_axi_wvalid && timing_.shared && !bucket(0).has(2);
        const bool read = open && want_read && bucket(0).has(1) && (!both || read_first_);
        if (read) offer();
        top_->m_axi_wready = open && want_write && bucket(1).has(1);
        top_->m_axi_rvalid = reading_;
        top_->m_axi_arready = reads_.size() < QUEUE;
        top_->m_axi_awready = writes_.size() < QUEUE;
        if (answered || !top_->m_axi_bvalid) {
            top_->m_axi_bvalid = !replies_.empty() && replies_.front().due <= cycle_;
            if (top_->m_axi_bvalid) top_->m_axi_bid = replies_.front().id, top_->m_axi_bresp = replies_.front().response;
        }
    }

    void offer() {
        Burst& burst = reads_.front();
        const int response = respond(burst.address);
        if (response == OKAY) std::memcpy(&top_->m_axi_rdata, memory_ + burst.address, BEAT);
        else std::memset(&top_->m_axi_rdata, 0, BEAT);
        top_->m_axi_rid = burst.id, top_->m_axi_rresp = response, top_->m_axi_rlast = burst.left == 1;
        bucket(0).take();
        read_first_ = false;
        reading_ = true;
        burst.address += BEAT;
        if (--burst.left == 0) reads_.pop_front();
    }

    Bucket& bucket(int channel) { return buckets_[timing_.shared ? 0 : channel]; }

    int respond(uint64_t address) const {
        if (address >= timing_.error_first && address < timing_.error_end) return SLVERR;
        return address < size_ && size_ - address >= BEAT ? OKAY : DECERR;
    }

    void check_burst(const char* what, uint64_t address, unsigned length, unsigned size, unsigned kind) {
        const std::string name = std::string(what) + " burst ";
        if (address % BEAT) violate(name + "starts inside a beat");
        if (1u << size != BEAT) violate(name + "is narrower than the bus");
        if (kind != INCR) violate(name + "is not incrementing");
        if (address / 4096 != (address + uint64_t(length) * BEAT) / 4096) violate(name + "crosses a 4 KB boundary");
    }

    // A channel that was valid and not ready must stay valid, with the same payload.
    void check_hold(const char* channel, bool& held, uint64_t& value, bool valid, bool ready, uint64_t now) {
        if (held && !(valid && now == value)) violate(std::string(channel) + " changed before it was accepted");
        held = valid && !ready, value = now;
    }

    void violate(const std::string& what) {
        if (violation_.empty()) violation_ = what;
    }

    void observe() {
#define OBSERVE(number, port)                                                                                          \
    if (top_->port##_valid) {                                                                                          \
        Writes& log = logs[number];                                                                                    \
        log.cycle.push_back(cycle()), log.address.push_back(top_->port##_address), log.tag.push_back(top_->port##_tag); \
        append(log.data, top_->port##_data), append(log.mask, top_->port##_mask);                                      \
    }
        OBSERVE(0, mon_load)
        OBSERVE(1, mon_matrix)
        OBSERVE(2, mon_vector)
        OBSERVE(3, mon_row)
#undef OBSERVE
        for (unsigned bits = top_->mon_start, unit = 0; bits; bits >>= 1, ++unit)
            if (bits & 1) starts[unit].push_back(cycle());
        for (unsigned bits = top_->mon_retire, unit = 0; bits; bits >>= 1, ++unit)
            if (bits & 1) retires[unit].push_back(cycle());
    }

    void dump(int half) {
#if VM_TRACE
        if (vcd_ && vcd_->isOpen() && cycle() >= waves_from_ && cycle() < waves_to_) vcd_->dump(2 * cycle_ + half);
#endif
    }

    std::unique_ptr<VerilatedContext> context_;
    std::unique_ptr<Vtop> top_;
#if VM_TRACE
    std::unique_ptr<VerilatedVcdC> vcd_;
    uint64_t waves_from_ = 0, waves_to_ = 0;
#endif
    Timing timing_;
    Bucket buckets_[2];  // reads (or both), writes
    uint8_t* memory_ = nullptr;
    uint64_t size_ = 0;
    uint64_t cycle_ = 0, origin_ = 0;  // since construction; when the engine began to run, or the last register write
    std::deque<Burst> reads_, writes_;
    std::deque<Reply> replies_;
    int worst_ = OKAY;        // response of the write burst so far
    bool reading_ = false;    // a read beat is on offer
    bool read_first_ = true;  // whose turn it is
    bool held_ar_ = false, held_aw_ = false, held_w_ = false, recording_ = false, running_ = false;
    uint64_t held_ar_address_ = 0, held_aw_address_ = 0, held_w_last_ = 0;
    std::string violation_;
};

template <class T> const void* contents(const std::vector<T>& items, uint64_t* bytes) {
    *bytes = items.size() * sizeof(T);
    return items.data();
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API Harness* weft_new() { return new Harness; }
API void weft_delete(Harness* h) { delete h; }
API void weft_widths(uint64_t* beat_bytes, uint64_t* word_bytes, uint64_t* mask_bytes) {
    *beat_bytes = Harness::BEAT, *word_bytes = sizeof(Vtop::mon_load_data), *mask_bytes = sizeof(Vtop::mon_load_mask);
}
API void weft_configure(Harness* h, const Timing* timing) { h->configure(*timing); }
API int weft_allocate(Harness* h, uint64_t size) { return h->allocate(size); }
API uint8_t* weft_memory(Harness* h) { return h->memory(); }
API void weft_reset(Harness* h) { h->reset(); }
API uint64_t weft_run(Harness* h, uint64_t most) { return h->run(most); }
API uint64_t weft_cycle(Harness* h) { return h->cycle(); }
API int weft_irq(Harness* h) { return h->irq(); }
API const char* weft_violation(Harness* h) { return h->violation(); }
API int weft_write_register(Harness* h, uint32_t address, uint32_t value) { return h->write_register(address, value); }
API int weft_read_register(Harness* h, uint32_t address, uint32_t* value) { return h->read_register(address, value); }
API void weft_record(Harness* h, int on) { h->record(on); }
API int weft_start_waves(Harness* h, const char* path, uint64_t from, uint64_t to) { return h->start_waves(path, from, to); }
API void weft_stop_waves(Harness* h) { h->stop_waves(); }

// Column `column` (cycle, address, tag, data, mask) of the writes of writer `writer`; `bytes` is its size.
API const void* weft_writes(Harness* h, int writer, int column, uint64_t* bytes) {
    const Writes& log = h->logs[writer];
    switch (column) {
        case 0: return contents(log.cycle, bytes);
        case 1: return contents(log.address, bytes);
        case 2: return contents(log.tag, bytes);
        case 3: return contents(log.data, bytes);
        default: return contents(log.mask, bytes);
    }
}

// Cycles at which unit `unit` started (which = 0) or retired (which = 1) instructions.
API const void* weft_events(Harness* h, int which, int unit, uint64_t* bytes) {
    return contents((which ? h->retires : h->starts)[unit], bytes);
}
