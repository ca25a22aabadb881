"""Where everything of a language model lies: scratchpad areas for a group of tokens, and the cache in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError
from weft.arch.language import GROUP, LanguageConfig
from weft.compiler.language_pack import NOTHING, padded

RING_SHARE = 4  # the ring of weights takes at least this part of the pool, so that loads run ahead of their use
CHUNKS = 3  # and holds at least so many of the largest chunks
MOST_TOKENS = 64  # in a group; more would not make the array busier


class Region(NamedTuple):
    """Scratchpad words base .. base + words - 1."""

    base: int
    words: int


@dataclass(frozen=True)
class Rows16:
    """16-bit numbers of a group of tokens: low bytes of block b, token t at base + b*plane + t, high bytes behind."""

    base: int
    blocks: int
    plane: int

    @property
    def high(self) -> int:
        return self.blocks * self.plane

    @property
    def region(self) -> Region:
        return Region(self.base, 2 * self.high)

    def part(self, first: int, blocks: int) -> Region:
        """Low words of some blocks; the high ones lie `high` further on."""
        return Region(self.base + first * self.plane, blocks * self.plane)


@dataclass(frozen=True)
class Shape:
    """Block counts of a model on an engine. A block is a word of `lanes` channels."""

    model: LanguageConfig
    config: EngineConfig

    def __post_init__(self) -> None:
        if self.config.group != GROUP:
            raise ModelError(f"engine '{self.config.name}' has words of {self.config.lanes} channels; language models "
                             f"share weight scales among {GROUP}: choose lanes = {GROUP}")
        if "attention" in self.model.layers and self.config.plain_parameter_words > 1:
            raise ModelError(f"engine '{self.config.name}' has {self.config.columns} columns, whose scales take more "
                             f"than a word; the key cache wants one: choose at most {self.config.lanes // 4} columns")
        if "attention" in self.model.layers and self.model.head_size % self.config.lanes:
            raise ModelError(f"language model '{self.model.name}' has heads of {self.model.head_size}; the engine "
                             f"wants a multiple of {self.config.lanes}")

    def words(self, channels: int) -> int:
        return -(-channels // self.config.lanes)

    @property
    def width(self) -> int:
        return self.words(self.model.width)

    @property
    def feed_forward(self) -> int:
        return self.words(self.model.feed_forward)

    @property
    def span(self) -> int:
        """Blocks of one half of the rotated part of a head."""
        return self.words(self.model.rotary // 2)

    @property
    def head(self) -> tuple[int, ...]:
        """Dimensions of a query or key head in the engine's order: partners of a rotation in the same lane."""
        half, lanes = self.model.rotary // 2, self.config.lanes
        rest = padded(self.model.head_size - 2 * half, lanes, 2 * half)
        return (*padded(half, lanes), *padded(half, lanes, half), *rest)

    @property
    def head_blocks(self) -> int:
        return self.words(len(self.head))

    @property
    def value_blocks(self) -> int:
        return self.words(self.model.head_size)

    def head_rows(self, heads: int) -> list[int]:
        """Rows of a query or key projection in the engine's order."""
        size = self.model.head_size
        return [NOTHING if i == NOTHING else head * size + i for head in range(heads) for i in self.head]


@dataclass(frozen=True)
class Cache:
    """Bytes of a sequence's part of segment CACHE.

    Attention layer: keys [kv head][tile of C positions][head_blocks * C words], their scales [kv head][tile] words,
    values [kv head][tile of C dimensions][words of L/C positions], their magnitudes [kv head][block of L positions]
    [2 words]. Convolution layer: the last kernel - 1 gated values, [low, high][block][token] words.
    """

    shape: Shape
    context: int  # positions, a multiple of `lanes`

    @property
    def _head(self) -> int:
        return self.shape.model.kv_heads * self.shape.config.lanes

    @property
    def key_tile(self) -> int:
        return self.shape.head_blocks * self.shape.config.columns * self.shape.config.lanes

    @property
    def key_head(self) -> int:
        return self.key_tile * self.context // self.shape.config.columns

    @property
    def key_scale_head(self) -> int:
        return self.shape.config.plain_parameter_words * self.shape.config.lanes * self.context \
            // self.shape.config.columns

    @property
    def value_tile(self) -> int:
        return self.context * self.shape.config.columns

    @property
    def value_tiles(self) -> int:
        return self.shape.value_blocks * self.shape.config.scaled_words

    @property
    def magnitude_head(self) -> int:
        return 2 * self.context

    def layer_bytes(self, kind: str) -> int:
        if kind == "conv":
            return 2 * self.shape.width * (self.shape.model.kernel - 1) * self.shape.config.lanes
        heads = self.shape.model.kv_heads
        return heads * (self.key_head + self.key_scale_head + self.value_tiles * self.value_tile + self.magnitude_head)

    def start(self, layer: int) -> int:
        return sum(self.layer_bytes(kind) for kind in self.shape.model.layers[:layer])

    def attention(self, layer: int) -> tuple[int, int, int, int]:
        """First byte of a layer's keys, key scales, values and magnitudes."""
        heads, keys = self.shape.model.kv_heads, self.start(layer)
        scales = keys + heads * self.key_head
        values = scales + heads * self.key_scale_head
        return keys, scales, values, values + heads * self.value_tiles * self.value_tile

    @property
    def sequence_bytes(self) -> int:
        size = self.start(len(self.shape.model.layers))
        return -(-max(size, 1) // 4096) * 4096


class _Stack:
    """Hands out scratchpad words from the bottom up."""

    def __init__(self, top: int) -> None:
        self.top = top

    def words(self, count: int) -> Region:
        region = Region(self.top, count)
        self.top += count
        return region

    def rows(self, blocks: int, plane: int) -> Rows16:
        return Rows16(self.words(2 * blocks * plane).base, blocks, plane)


class Plan:
    """Scratchpad areas for groups of `tokens` tokens. Areas of different kinds of work share their words.

    residual h; row: codes of a normalized row and its scales; constants of a layer; then, one over the other:
        convolution  b, c, x (c and x serve the result), gated with the tokens before
        attention    q, k, v, over them scores, probabilities and magnitudes; codes of q; staging of keys, then of
                     values, over it the mixer's result; the attention's result
        feed forward product; gate and value of two chunks of columns, over them the result
    and above all that the ring of weights.
    """

    def __init__(self, shape: Shape, context: int, tokens: int, queries: int, buffers: int) -> None:
        config, model = shape.config, shape.model
        self.shape, self.config, self.tokens = shape, config, tokens
        self.queries, self.buffers = queries, buffers  # tokens attended to at a time; buffers of scores
        self.cache = Cache(shape, -(-context // config.lanes) * config.lanes)
        stack = _Stack(0)
        self.residual = stack.rows(shape.width, tokens)
        self.row = stack.words(shape.width * tokens)
        self.row_scales = stack.words(tokens)
        head = 2 * shape.head_blocks if "attention" in model.layers else 0
        self.norm = stack.words(2 * shape.width)
        self.kernel = stack.words(2 * model.kernel * shape.width)
        self.head_norms = stack.words(2 * head)
        self.value_parameters = stack.words(config.plain_parameter_words * shape.value_blocks * config.scaled_words)
        self.answer = stack.words(1)
        base, tops = stack.top, [stack.top]

        if "conv" in model.layers:
            stack = _Stack(base)
            self.b, self.c, self.x = (stack.rows(shape.width, tokens) for _ in range(3))
            self.gated = stack.rows(shape.width, tokens + model.kernel - 1)
            tops.append(stack.top)
        if "attention" in model.layers:
            self._attention(base, tops)

        stack = _Stack(base)
        self.product = stack.rows(shape.feed_forward, tokens)
        start = stack.top
        self.chunk_blocks = min(shape.feed_forward, 8)
        self.gates = [stack.rows(self.chunk_blocks, tokens) for _ in range(2)]
        self.values = [stack.rows(self.chunk_blocks, tokens) for _ in range(2)]
        tops.append(stack.top)
        stack = _Stack(start)
        self.down = stack.rows(shape.width, tokens)
        tops.append(stack.top)

        stack = _Stack(base)
        self.logit_blocks = min(32, shape.words(model.vocab))
        self.logits = [stack.rows(self.logit_blocks, 1) for _ in range(2)]
        tops.append(stack.top)
        self.ring = Region(max(tops), config.pool_words - max(tops))

    def _attention(self, base: int, tops: list[int]) -> None:
        shape, model, tokens = self.shape, self.shape.model, self.tokens
        c, lanes = self.config.columns, self.config.lanes
        stack = _Stack(base)
        self.q = stack.rows(model.heads * shape.head_blocks, tokens)
        self.k = stack.rows(model.kv_heads * shape.head_blocks, tokens)
        self.v = stack.rows(model.kv_heads * shape.value_blocks, tokens)
        inner = _Stack(base)
        blocks = self.cache.context // lanes
        pixels = self.queries * model.queries
        self.scores = [inner.rows(blocks, pixels) for _ in range(self.buffers)]
        self.probabilities = [inner.words(blocks * pixels) for _ in range(self.buffers)]
        self.probability_scales = [inner.words(pixels) for _ in range(self.buffers)]
        self.magnitudes = [inner.words(2 * blocks) for _ in range(self.buffers)]
        stack.top = max(stack.top, inner.top)
        self.codes = stack.words(tokens * model.heads * shape.head_blocks)
        self.code_scales = stack.words(tokens * model.heads)
        self.table = stack.words(tokens * 4 * shape.span)
        staging = stack.top
        self.key_codes = stack.words(tokens * model.kv_heads * shape.head_blocks * c)
        self.key_scales = stack.words(tokens * model.kv_heads)
        tops.append(stack.top)
        stack = _Stack(staging)
        self.value_codes = stack.words(tokens * model.kv_heads * shape.value_blocks * lanes // c)
        self.value_magnitudes = stack.words(2 * tokens * model.kv_heads)
        tops.append(stack.top)
        stack = _Stack(staging)
        self.mixed = stack.rows(shape.width, tokens)
        stack.top = max(*tops, stack.top)
        # [token][block of a head][head] words, low bytes then high bytes
        self.attended = stack.words(2 * tokens * model.heads * shape.value_blocks)
        tops.append(stack.top)


def plan_language(model: LanguageConfig, config: EngineConfig, context: int) -> Plan:
    """The plan with the largest group of tokens that leaves enough for weights. Raises ModelError when none does.

    A long context makes scores long: then fewer tokens are attended to at a time, and the scores of one key head
    wait for those of the one before.
    """
    shape = Shape(model, config)
    inputs = max(shape.width, shape.feed_forward, model.heads * shape.value_blocks)
    tile = config.tile_words(inputs, grouped=True) + config.plain_parameter_words
    wanted = max(CHUNKS * tile, config.pool_words // RING_SHARE)
    sizes = [*range(config.pixels, MOST_TOKENS + 1, config.pixels)]
    most = max(1, config.pixels // model.queries)
    for tokens in [*reversed(sizes), *([1] if config.pixels > 1 else [])]:
        for queries, buffers in dict.fromkeys([(most, 2), (most, 1), (1, 2), (1, 1)]):
            plan = Plan(shape, context, tokens, min(queries, tokens), buffers)
            if plan.ring.words >= wanted:
                return plan
    needed = config.pool_words - plan.ring.words + wanted
    raise ModelError(
        f"language model '{model.name}' with a context of {context} needs {needed} "
        f"scratchpad words for a single token, engine '{config.name}' has {config.pool_words}: enlarge bank_words, or "
        "choose a smaller context")
