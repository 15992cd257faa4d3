"""The cost of an adapter on one attention: parameters, storage and FLOPs (§3.5).

A multiplication and an addition count as two FLOPs. Only matrix products and OFT's solve are counted, not thresholds,
norms or sorting. The four projections q, k, v and output all map C_i to C_o.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    parameters: int  # trained
    storage: float  # numbers to keep after training
    merge: float | None  # FLOPs, once, to merge the adapter into the frozen weights; None if impossible
    forward: dict[str, float]  # product -> extra FLOPs of one forward pass over N tokens

    def __str__(self):
        forward = " + ".join(f"{flops / 1e9:.2g} for {product}" for product, flops in self.forward.items())
        merge = "cannot be merged" if self.merge is None else f"or {self.merge / 1e9:.2g} once to merge"
        return f"{self.parameters:,} trained, {self.storage:,.0f} stored; GFLOP: {forward}, {merge}"


def sparse_cost(c_in, c_out, *, tokens, atoms=256, density=0.02):
    """ΔO = A σ(X W_s) D with W_s (C_i, M) and D (M, C_o)

    The paper counts "X W_s" and "S D": 2 N M C_i + 2 ρ N M C_o. It leaves out "A σ", the product that mixes S over the
    tokens: 2 N² M, which is more than "X W_s" when N > C_i. Its ρ is the density before this mixing. `SparseAttention`
    uses dense products: it runs "S D" at ρ = 1, and its zero padding of q and k costs "A σ" once more. The paper's
    storage, C_i M + ρ C_o M, is enough only if all tokens together use no more than ρ M atoms. σ is not linear, so the
    adapter cannot be merged.
    """
    return Cost(
        parameters=(c_in + c_out) * atoms,
        storage=c_in * atoms + density * c_out * atoms,
        merge=None,
        forward={
            "X W_s": 2 * tokens * c_in * atoms,
            "A σ": 2 * tokens**2 * atoms,
            "S D": 2 * density * tokens * atoms * c_out,
        },
    )


def lora_cost(c_in, c_out, *, tokens, r=16):
    """W + B A with A (r, C_i) and B (C_o, r), four times

    The paper's FLOPs, 8 C_i C_o r, do not depend on N: they are `merge`, the cost of forming B A once. After that LoRA
    is free for any number of tokens. In training it is applied to N tokens: 8 N (C_i + C_o) r.
    """
    parameters = 4 * (c_in + c_out) * r
    return Cost(parameters, parameters, 8 * c_in * c_out * r, {"(X Aᵀ) Bᵀ": 2 * tokens * parameters})


def dora_cost(c_in, c_out, *, tokens, r=16):
    """LoRA and the row norms m (C_o,), four times; each pass forms B A, since it divides by the norms of the rows."""
    lora = lora_cost(c_in, c_out, tokens=tokens, r=r)
    parameters = lora.parameters + 4 * c_out
    return Cost(parameters, parameters, lora.merge, {**lora.forward, "B A": lora.merge})


def oft_cost(c_in, c_out, *, tokens, blocks=4):
    """W R with R block-diagonal from P (blocks, b, b), four times

    R depends only on P − Pᵀ, so b (b − 1)/2 numbers per block are enough. Solving for R takes 8/3 b³ FLOPs per block.
    """
    b = c_in // blocks
    solve = 4 * blocks * 8 / 3 * b**3
    return Cost(
        parameters=4 * blocks * b**2,
        storage=4 * blocks * b * (b - 1) // 2,
        merge=solve + 8 * c_out * c_in * b,
        forward={"R": solve, "X R": 8 * tokens * c_in * b},
    )


def attention_flops(width, *, tokens):
    """FLOPs of the frozen attention itself, C_i = C_o = `width`: four projections, Q Kᵀ and A V"""
    return 8 * tokens * width**2 + 4 * tokens**2 * width
