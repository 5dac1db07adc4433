"""The forward pass of a Llama-like model in sizes: what transformers' code makes, keeps and drops, line by line.

The order of lines and the lifetimes of variables are those of `modeling_llama.py`, `training.packed`, `training.loss`
and peft's linear layers, for they decide what is alive at once.
"""

from __future__ import annotations

import math

from collie_lab.planning._fsdp import Group, Sharded
from collie_lab.planning._llama import Block, Linear, Model
from collie_lab.planning._sizes import Memory, Parameter, Storage, Tape, Value

__all__ = ["Forward"]

#: As in `collie_lab.training.loss`.
_SMALLEST_CHUNK = 1024
#: Bytes of the state of a CPU's random numbers, of which a recomputed layer keeps one.
_RANDOM_STATE = 5056


class Forward:
    """One forward pass for some documents of `length` tokens each: `run` gives the loss.

    `sharded` gathers the weights before they are used. With `drawn`, the model draws the labels itself. `again`: a
    block is recomputed, which ends with the last operation that keeps something, before it makes its result.
    """

    def __init__(self, model: Model, tape: Tape, documents: int, length: int, *, recompute: bool = False,
                 sharded: Sharded | None = None, drawn: bool = False, again: bool = False):
        self._sharded, self._drawn, self._again = sharded, drawn, again
        self._model, self._tape, self._documents, self._tokens = model, tape, documents, documents * length
        self._recompute = recompute
        self._memory: Memory = tape.memory
        self._casts: dict[Parameter, Storage] = {}

    def run(self) -> Value:
        """The loss of all tokens but the first of every document."""
        sharded, layers = self._sharded, len(self._model.blocks)
        if sharded is not None:
            sharded.before(sharded.root)
        hidden = self.embed()
        angles = self.angles(hidden.width)
        for index, block in enumerate(self._model.blocks):
            self._memory.moment = f"layer {index}"
            if sharded is not None:
                hidden = self._gathered(hidden, sharded, index)
            if self._recompute:
                hidden = self._checkpointed(hidden, angles, block, f"recomputed layer {index}")
            else:
                hidden = self.block(hidden, angles, block)
            if sharded is not None:
                sharded.after(sharded.layers[index])
                hidden = self._then(hidden, sharded.layers[index], sharded.layers[index - 1] if index else None)
        self._memory.moment = "loss"
        hidden = self.norm(hidden, self._model.norm)
        loss = self.loss(hidden)
        self._casts.clear()
        if sharded is not None:
            sharded.after(sharded.root)
            loss = self._then(loss, sharded.root, sharded.layers[layers - 1])
        return loss

    def _gathered(self, hidden: Value, sharded: Sharded, index: int) -> Value:
        """What goes into a layer that has to be gathered; when its gradient is there, the layer's own are."""
        group = sharded.layers[index]
        sharded.before(group)

        def run(gradient: Storage) -> list[Storage]:
            sharded.after_backward(group)
            return [gradient]

        return self._tape.record(Value(hidden.count, hidden.width, hidden.storage), [hidden], run)

    def _then(self, out: Value, group: Group, ahead: Group | None) -> Value:
        """What comes out of a group: before its backward pass it is gathered again, and the next one ahead."""
        sharded = self._sharded
        assert sharded is not None

        def run(gradient: Storage) -> list[Storage]:
            sharded.before_backward(group, ahead)
            return [gradient]

        return self._tape.record(Value(out.count, out.width, out.storage), [out], run)

    def embed(self) -> Value:
        """Rows of the embedding; its gradient is as large as itself."""
        self._memory.moment = "embedding"
        weight, tape = self._model.embedding, self._tape
        count = self._tokens * self._model.shape.hidden
        # With a piece of the vocabulary: which tokens are in it, and where.
        kept = [tape.new(self._tokens, 1), tape.new(self._tokens, 8)] if self._model.cut_vocabulary else []

        def run(_: Storage, kept: object = kept) -> list[Storage]:
            return [tape.new(weight.count, weight.width)]

        out = tape.record(Value(count, weight.width, tape.new(count, weight.width)), [weight.value], run)
        if self._model.cut_vocabulary:  # the other tokens' rows are zero, and the ranks' are summed
            out = tape.copy(tape.scale(out))
        return out

    def angles(self, width: int) -> tuple[Value, Value]:
        """Cosine and sine of every position, made in fp32."""
        count = self._tokens * self._model.shape.head_size
        wide = [Value(count, 4, self._tape.new(count, 4)) for _ in range(2)]
        return self._tape.cast(wide[0], width), self._tape.cast(wide[1], width)

    def block(self, hidden: Value, angles: tuple[Value, Value], block: Block) -> Value:
        """Attention and MLP, each added to what went in."""
        tape = self._tape
        normal = self.norm(hidden, block.norms[0])
        out = self.attention(normal, angles, block)
        del normal
        hidden = tape.add(hidden, out)
        del out
        normal = self.norm(hidden, block.norms[1])
        out = self.mlp(normal, block)
        del normal
        return tape.add(hidden, out)

    def _checkpointed(self, hidden: Value, angles: tuple[Value, Value], block: Block, name: str) -> Value:
        """The same, but nothing of it is kept but what went in: the backward pass runs it again."""
        tape, memory = self._tape, self._memory
        state = memory.of_host(_RANDOM_STATE)
        tape.recording = False
        result = self.block(hidden, angles, block)
        tape.recording = True

        def run(gradient: Storage, kept: Value = hidden, _: object = state) -> list[Storage | None]:
            leaf, found = Parameter((kept.count,), kept.width, kept.width, kept.needs), list[Storage]()
            again = Tape(memory, lambda parameter, each: (
                found.append(each) if parameter is leaf else tape.take(parameter, each)))
            memory.moment = name
            with memory.as_role("activations"):
                outside = memory.of_host(_RANDOM_STATE)
                inner = Forward(self._model, again, self._documents, self._tokens // self._documents, again=True)
                out = inner.block(Value(kept.count, kept.width, kept.storage, leaf), angles, block)
            memory.muted = False
            del inner, outside
            out.storage = None
            again.backward(out, gradient)
            return [found.pop() if found else None]

        return tape.record(result, [hidden], run, inside=any(each.trained for each in block.parameters()))

    def norm(self, x: Value, weight: Parameter, rows: int | None = None) -> Value:
        """RMS norm, in fp32."""
        tape = self._tape
        wide = tape.cast(x, 4)
        mean = tape.mean(tape.square(wide), rows or self._tokens)
        wide = tape.mul(wide, tape.inverse_root(tape.view(mean)))
        return tape.mul(weight.value, tape.cast(wide, x.width))

    def attention(self, x: Value, angles: tuple[Value, Value], block: Block) -> Value:
        """Queries, keys and values, turned by their positions; attention; the output's matrix."""
        shape, linears = self._model.shape, block.linears
        query = self.linear(x, linears["q_proj"])
        if block.head_norms:
            query = self.norm(query, block.head_norms[0], self._tokens * shape.heads)
        key = self.linear(x, linears["k_proj"])
        if block.head_norms:
            key = self.norm(key, block.head_norms[1], self._tokens * shape.key_heads)
        value = self.linear(x, linears["v_proj"])
        turned = self.turn(query, angles), self.turn(key, angles)
        del query, key
        out = self.attend(*turned, value)
        return self.linear(out, linears["o_proj"])

    def turn(self, x: Value, angles: tuple[Value, Value]) -> Value:
        """x·cos + rotate(x)·sin."""
        tape = self._tape
        first = tape.mul(x, angles[0])
        return tape.add(first, tape.mul(self.rotate(x), angles[1]))

    def rotate(self, x: Value) -> Value:
        """The halves of every head exchanged, one of them negated."""
        tape, half, size = self._tape, x.size // 2, x.size
        negated = tape.memory.new(half)
        out = Value(x.count, x.width, tape.memory.new(size))
        del negated

        def run(gradient: Storage) -> list[Storage]:
            halves = [tape.memory.beside(half, size=size), tape.memory.new(size)]  # each in a tensor of zeros
            made = tape.memory.new(size)
            halves.clear()
            return [made]

        return tape.record(out, [x], run)

    def attend(self, query: Value, key: Value, value: Value) -> Value:
        """Flash attention keeps its operands, its result and a number a row; all documents are of one length."""
        tape, operands = self._tape, [query, key, value]
        if self._model.autocast:
            operands = [tape.cast(each, self._model.compute) for each in operands]
        rows = self._tokens * self._model.shape.heads
        # Documents are cut out of the row, and selected where they are several.
        operands = [tape.piece(each) for each in operands]
        if self._documents > 1:
            operands = [tape.piece(each) for each in operands]
        out = tape.memory.new(operands[0].size)
        sums = tape.new(rows, 4)
        kept = [*(each.storage for each in operands), out, sums]
        sizes = [each.size for each in operands]

        def run(_: Storage, kept: object = kept) -> list[Storage]:
            return [tape.memory.new(size) for size in sizes]

        return tape.copy(tape.record(Value(operands[0].count, operands[0].width, out), operands, run))

    def mlp(self, x: Value, block: Block) -> Value:
        """down(silu(gate(x)) · up(x))."""
        tape, linears = self._tape, block.linears
        return self.linear(tape.mul(self.activate(self.linear(x, linears["gate_proj"])),
                                    self.linear(x, linears["up_proj"])), linears["down_proj"], last=self._again)

    def activate(self, x: Value) -> Value:
        """An activation keeps its input."""
        tape, size = self._tape, x.size

        def run(_: Storage, kept: object = x.storage) -> list[Storage]:
            return [tape.memory.new(size)]

        return tape.record(Value(x.count, x.width, tape.memory.new(size)), [x], run)

    def linear(self, x: Value, linear: Linear, last: bool = False) -> Value:
        """x·Wᵀ + b, and LoRA's share. `last`: nothing counts after what is kept last."""
        if self._model.cut and not linear.by_rows:  # the ranks' gradients of x are summed, in a new tensor
            x = self._tape.piece(x)
        out = self.product(x, linear.weight, last and linear.up is None)
        if self._model.cut and linear.by_rows:  # the ranks' results are
            out = self._tape.copy(out)
        if linear.bias is not None:
            bias = linear.bias
            out = self._tape.record(out, [Value(out.count, out.width, None, out.origin), bias.value], lambda gradient: [
                gradient, self._tape.new(bias.count, bias.width)])
        if linear.down is None or linear.up is None:
            return out
        wide = self._tape.cast(x, linear.down.width)
        narrow = self.product(self.product(wide, linear.down), linear.up)
        self._memory.muted = last  # the number that it is scaled by is kept too
        return self._tape.add(out, self._tape.scale(narrow))

    def product(self, x: Value, weight: Parameter, last: bool = False) -> Value:
        """A matrix product in the type of the computation. Autocast keeps its copies of trained weights."""
        tape, model = self._tape, self._model
        operand = weight.value
        if model.autocast and weight.width != model.compute:
            back = weight.count * weight.width
            copy = self._casts.get(weight) or tape.new(weight.count, model.compute)
            if weight.trained:
                self._casts[weight] = copy
            operand = tape.record(Value(weight.count, model.compute, copy), [operand],
                                  lambda _: [tape.memory.new(back)])
        if model.autocast:
            x = tape.cast(x, model.compute)
        self._memory.muted = last
        return tape.matmul(x, operand, self._tokens)

    def loss(self, hidden: Value) -> Value:
        """Cross-entropy in chunks of tokens, with the gradients of hidden states and head; see `training.loss`.

        Of labels that the model draws, probabilities and their sums are needed too, and a graph.
        """
        tape, memory, model = self._tape, self._memory, self._model
        tokens, vocabulary, c = self._tokens - self._documents, model.shape.vocabulary, model.shape.hidden
        head, width, compute = model.head.value, hidden.width, model.compute
        if model.cut_vocabulary:
            hidden = tape.piece(hidden)
        unpicked = hidden.size
        picked_size = tokens * c * width

        def spread(_: Storage) -> list[Storage]:  # zeros, into a copy of which the gradients are added
            return [memory.beside(unpicked, size=unpicked)]

        picked = tape.record(Value(tokens * c, width, memory.new(picked_size)), [hidden], spread)
        with memory.as_role("loss"):
            of_hidden = memory.new(picked.size) if picked.needs else None
            of_head = tape.new(head.count, 4) if head.needs else None
            weight = tape.new(head.count, compute) if compute != head.width else None
            chunk = max(_SMALLEST_CHUNK, math.ceil(tokens / math.ceil(vocabulary / c)))
            logits = gradient = None
            for begin in range(0, tokens, chunk):
                rows = min(chunk, tokens - begin)
                part = tape.new(rows * c, compute) if compute != width else None
                narrow = tape.new(rows * vocabulary, compute)
                logits = narrow if compute == 4 else tape.new(rows * vocabulary, 4)
                del narrow
                whole = rows * vocabulary * 4
                if self._drawn:  # logarithms of probabilities, their gradient, a number a row; then that of the logits
                    gradient = memory.beside(whole, whole, rows * 4, size=whole)
                else:
                    if not model.cut_vocabulary:
                        with memory.as_role("temporaries"):
                            memory.new(whole + 2 * rows * 4)  # of the logarithm of the sum, inside
                    gradient = logits
                gradient = gradient if compute == 4 else tape.new(rows * vocabulary, compute)
                if of_hidden is not None:
                    tape.new(rows * c, compute)
                if of_head is not None and compute != 4:
                    tape.new(head.count, compute)
            del logits, gradient, part, weight
            out = Value(1, 4, tape.new(1, 4))
        del hidden
        back = None if of_head is None or head.width == 4 else head.size

        def run(_: Storage, of_hidden: Storage | None = of_hidden, of_head: Storage | None = of_head
                ) -> list[Storage | None]:
            return [of_hidden, of_head if back is None else memory.new(back)]

        return tape.record(out, [picked, head], run)
