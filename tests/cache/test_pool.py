"""The pool of blocks under random use: no leak, no cross-talk, a full pool loses nothing."""

import copy
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

import gqa
from gqa.cache.pool import BlockPool
from gqa.errors import GqaError

LAYERS = ((2, 3, 5), (1, 4, 4))  # H, D, Dv
LENGTHS = st.sampled_from([1, 2, 3, 4, 5, 8, 13])


def kv(B, T, H, D, Dv, generator=None):
    return torch.randn(B, H, T, D, generator=generator), torch.randn(B, H, T, Dv, generator=generator)


def table_of(stored):
    assert stored.block_table is not None
    return stored.block_table


def gathered(stored, row):
    """(H, length, D) of one sequence, token by token."""
    block = stored.data.shape[2]
    places = [(int(table_of(stored)[row, s // block]), s % block) for s in range(int(stored.lengths[row]))]
    rows = [stored.data[place, :, offset] for place, offset in places]
    return torch.stack(rows, dim=1) if rows else stored.data[0, :, :0]


class PoolMachine(RuleBasedStateMachine):
    """Beside the pool stands a model of it: per sequence its plain tensors, and which blocks it shares with whom."""

    live = Bundle("live")

    @initialize(num_blocks=st.integers(1, 9), block=st.sampled_from([1, 2, 4]), grows=st.booleans())
    def begin(self, num_blocks, block, grows):
        self.pool = BlockPool(num_blocks, block=block, grows=grows)
        self.random = torch.Generator().manual_seed(0)
        self.tokens = {}  # sequence -> per layer (k (H, S, D), v (H, S, Dv))
        self.blocks = {}  # sequence -> names of its blocks
        self.names = itertools.count()
        first = self.pool.allocate()
        self.pool.append([first], *zip(*(kv(1, 0, *sizes) for sizes in LAYERS), strict=True))
        for layer in range(len(LAYERS)):
            for stored in self.pool.stored(layer, [first]):
                stored.data.fill_(torch.nan)  # nobody may read what nobody wrote
        self.pool.release(first)

    @rule(target=live)
    def allocate(self):
        sequence = self.pool.allocate()
        assert sequence not in self.tokens
        self.tokens[sequence] = [
            (torch.empty(H, 0, D), torch.empty(H, 0, Dv)) for H, D, Dv in LAYERS
        ]  # fmt: skip
        self.blocks[sequence] = []
        return sequence

    @rule(target=live, sequence=live)
    def fork(self, sequence):
        return self.forked(sequence) if sequence in self.tokens else multiple()

    def forked(self, sequence):
        free = self.pool.free_blocks
        new = self.pool.fork(sequence)
        assert new not in self.tokens
        assert self.pool.free_blocks == free
        self.tokens[new] = self.tokens[sequence]
        self.blocks[new] = list(self.blocks[sequence])
        return new

    @rule(sequence=consumes(live))
    def release(self, sequence):
        if sequence in self.tokens:
            self.pool.release(sequence)
            del self.tokens[sequence], self.blocks[sequence]
            with pytest.raises(GqaError, match="no such sequence"):
                self.pool.length(sequence)

    @rule(sequence=live, share=st.floats(0, 1))
    def crop(self, sequence, share):
        if sequence in self.tokens:
            length = int(share * self.pool.length(sequence))
            self.pool.crop(sequence, length)
            self.tokens[sequence] = [(k[:, :length], v[:, :length]) for k, v in self.tokens[sequence]]
            del self.blocks[sequence][-(-length // self.pool.block) :]

    @rule(sequences=st.lists(live, min_size=1, max_size=4, unique=True), tokens=LENGTHS)
    def append(self, sequences, tokens):
        self.appended([sequence for sequence in sequences if sequence in self.tokens], tokens)

    @rule(target=live, sequence=live, tokens=LENGTHS)
    def branch(self, sequence, tokens):
        """What beam search does: a sequence and its fork go forward in one step."""
        if sequence not in self.tokens:
            return multiple()
        new = self.forked(sequence)
        self.appended([sequence, new], tokens)
        return new

    def appended(self, sequences, tokens):
        if not sequences:
            return
        new = [kv(len(sequences), tokens, *sizes, self.random) for sizes in LAYERS]
        blocks = self.blocks_after(sequences, tokens)
        needed = len(set().union(*blocks.values()))
        if needed > self.pool.num_blocks and not self.pool.grows:
            before = self.everything()
            with pytest.raises(GqaError, match="full") as caught:
                self.pool.append(sequences, *zip(*new, strict=True))
            assert f"{self.pool.free_blocks} free of {self.pool.num_blocks}" in str(caught.value)
            assert "release" in str(caught.value)
            assert self.everything() == before
            return
        self.pool.append(sequences, *zip(*new, strict=True))
        self.blocks = blocks
        for row, sequence in enumerate(sequences):
            self.tokens[sequence] = [
                (torch.cat([held_k, k[row]], dim=1), torch.cat([held_v, v[row]], dim=1))
                for (held_k, held_v), (k, v) in zip(self.tokens[sequence], new, strict=True)
            ]

    def blocks_after(self, sequences, tokens):
        """The names of every sequence's blocks, once these have gone forward."""
        blocks = copy.deepcopy(self.blocks)
        for sequence in sequences:
            length = self.tokens[sequence][0][0].shape[1]
            mine = blocks[sequence]
            if length % self.pool.block and sum(mine[-1] in others for others in blocks.values()) > 1:
                mine[-1] = next(self.names)
            while len(mine) * self.pool.block < length + tokens:
                mine.append(next(self.names))
        return blocks

    def everything(self):
        """What the pool says of itself, as plain numbers."""
        held = [table_of(stored).tolist() for sequence in self.tokens for stored in self.pool.stored(0, [sequence])]
        lengths = [self.pool.length(sequence) for sequence in self.tokens]
        return held, lengths, self.pool.free_blocks, self.pool.num_blocks, self.pool.nbytes_used

    @invariant()
    def every_sequence_has_its_own_tokens(self):
        if not self.tokens:
            return
        assert set(self.pool.sequences) == set(self.tokens)
        for layer in range(len(LAYERS)):
            stored = self.pool.stored(layer, list(self.tokens))
            for row, (sequence, want) in enumerate(self.tokens.items()):
                assert self.pool.length(sequence) == want[layer][0].shape[1]
                for one, expected in zip(stored, want[layer], strict=True):
                    assert torch.equal(gathered(one, row), expected)

    @invariant()
    def no_block_is_lost(self):
        used = len(set().union(*self.blocks.values()))
        assert self.pool.free_blocks + used == self.pool.num_blocks
        assert self.pool.blocks_of(list(self.tokens)) == used
        numbers = [
            number
            for sequence in self.tokens
            for number in table_of(self.pool.stored(0, [sequence])[0]).flatten().tolist()
        ]
        assert sorted(set(numbers)) == sorted(set(range(self.pool.num_blocks)) - set(self.pool._free))
        assert [numbers.count(number) for number in range(self.pool.num_blocks)] == self.pool._holders.tolist()
        block_bytes = self.pool.block * sum(H * (D + Dv) * 4 for H, D, Dv in LAYERS)
        assert self.pool.nbytes_used == used * block_bytes
        assert self.pool.nbytes_allocated == self.pool.num_blocks * block_bytes

    @invariant()
    def attention_over_the_table_equals_attention_over_the_tensors(self):
        sequences = [sequence for sequence in self.tokens if self.pool.length(sequence)] if self.tokens else []
        if not sequences:
            return
        H, D, _ = LAYERS[0]
        k, v = self.pool.stored(0, sequences)
        q = torch.randn(len(sequences), 2 * H, 1, D, generator=self.random)
        got = gqa.attention(q, k.data, v.data, block_table=k.block_table, kv_lengths=k.lengths)
        for row, sequence in enumerate(sequences):
            keys, values = (x.double().repeat_interleave(2, 0) for x in self.tokens[sequence][0])
            want = torch.softmax(q[row].double() @ keys.mT * D**-0.5, dim=-1) @ values
            eight_roundings = 8 * 2.0**-24 * float(values.abs().max())
            torch.testing.assert_close(got[row].double(), want, rtol=0, atol=eight_roundings)

    def teardown(self):
        for sequence in self.pool.sequences:
            self.pool.release(sequence)
        assert self.pool.free_blocks == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestPool = PoolMachine.TestCase


def test_the_last_to_write_keeps_the_shared_block():
    pool = BlockPool(3, block=4)
    first = pool.allocate()
    sizes = LAYERS[0]
    pool.append([first], *zip(kv(1, 6, *sizes), strict=True))
    second = pool.fork(first)
    pool.append([first, second], *zip(kv(2, 1, *sizes), strict=True))  # one copy is enough: there is room for no more
    assert pool.free_blocks == 0
    one, other = table_of(pool.stored(0, [first, second])[0])
    assert (one == other).tolist() == [True, False]


def test_layers_of_one_step_are_written_one_by_one():
    pool = BlockPool(4, block=4)
    sequences = [pool.allocate(), pool.allocate()]
    new = [kv(2, 5, *sizes) for sizes in LAYERS]
    step = pool.reserve(sequences, 5)
    for layer, (k, v) in enumerate(new):
        keys, values = pool.write(layer, step, k, v)
        for row in range(2):
            assert torch.equal(gathered(keys, row), k[row])
            assert torch.equal(gathered(values, row), v[row])


def test_refusals_change_nothing():
    pool = BlockPool(2, block=4)
    sequence = pool.allocate()
    k, v = kv(1, 3, *LAYERS[0])
    pool.append([sequence], [k], [v])
    for keys, values in (
        ([k[:, :1]], [v[:, :1]]),  # heads
        ([k.half()], [v.half()]),
        ([k], [v[..., :2]]),
        ([k], [v[:, :, :1]]),
        ([k, k], [v]),
        ([torch.cat([k, k])], [torch.cat([v, v])]),  # a batch of two for one sequence
        ([k, k[:, :, :2]], [v, v[:, :, :2]]),  # tokens differ between layers
        ([k[0]], [v[0]]),
    ):
        with pytest.raises(GqaError, match="keys and values"):
            pool.append([sequence], keys, values)
    with pytest.raises(GqaError, match="once per step"):
        pool.append([sequence, sequence], [torch.cat([k, k])], [torch.cat([v, v])])
    with pytest.raises(GqaError, match="differentiated"):
        pool.append([sequence], [k.requires_grad_()], [v])
    with pytest.raises(GqaError, match="not of this step"):
        pool.write(0, pool.reserve([sequence], 1), *kv(1, 2, *LAYERS[0]))
    pool.crop(sequence, 3)
    with pytest.raises(GqaError, match="cropped"):
        pool.crop(sequence, 4)
    with pytest.raises(GqaError, match="nothing was written"):
        pool.stored(1, [sequence])
    with pytest.raises(GqaError, match="no such sequence"):
        pool.fork(99)
    assert (pool.length(sequence), pool.free_blocks) == (3, 1)


@pytest.mark.parametrize("arguments", [{"num_blocks": 0}, {"num_blocks": -1}, {"num_blocks": 2, "block": 0}], ids=str)
def test_a_pool_needs_blocks(arguments):
    with pytest.raises(GqaError, match=r"a number of (blocks|tokens)"):
        BlockPool(**arguments)


def test_blocks_outlive_inference_mode():
    pool = BlockPool(1, grows=True)
    with torch.inference_mode():
        sequence = pool.allocate()
        pool.append([sequence], *zip(kv(1, 3, *LAYERS[0]), strict=True))
    with torch.no_grad():
        pool.append([sequence], *zip(kv(1, 30, *LAYERS[0]), strict=True))
    assert pool.length(sequence) == 33
