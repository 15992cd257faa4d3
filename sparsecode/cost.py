"""What an adapter costs beside one attention: parameters, storage and FLOPs (§3.5). Plain arithmetic.

A multiplication and an addition are two FLOPs. Only products of matrices, and OFT's solve, are counted: no
thresholds, norms or sorting. The four projections q, k, v and output all go from C_i to C_o.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    parameters: int  # trained
    storage: float  # numbers that suffice after training
    merge: float | None  # FLOPs, once, to fold the adapter into the frozen weights; None where that cannot be done
    forward: dict[str, float]  # product -> FLOPs of one pass over N tokens beside the frozen weights

    def __str__(self):
        forward = " + ".join(f"{flops / 1e9:.2g} for {product}" for product, flops in self.forward.items())
        merge = "cannot be merged" if self.merge is None else f"or {self.merge / 1e9:.2g} once to merge"
        return f"{self.parameters:,} trained, {self.storage:,.0f} stored; GFLOP: {forward}, {merge}"


def sparse_cost(c_in, c_out, *, tokens, atoms=256, density=0.02):
    """ΔO = A σ(X W_s) D with W_s (C_i, M) and D (M, C_o)

    The paper's FLOPs are "X W_s" and "S D": 2 N M C_i + 2 ρ N M C_o. It leaves out that A has to mix S over the tokens,
    2 N² M, which overtakes X W_s as soon as N > C_i. And its ρ is the density before A mixes. `SparseAttention`, whose
    products are dense, runs "S D" at ρ = 1, and spends "A σ" once more on the zeros that it pads q and k with.
    The paper's storage, C_i M + ρ C_o M, suffices if all tokens together use only ρ M atoms. σ is not linear, so there
    is nothing to merge.
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

    The paper's FLOPs, 8 C_i C_o r, do not have N: they are `merge`, what it takes to form B A once, after which LoRA is
    free for any number of tokens. While it trains, it is applied to N tokens: 8 N (C_i + C_o) r.
    """
    parameters = 4 * (c_in + c_out) * r
    return Cost(parameters, parameters, 8 * c_in * c_out * r, {"(X Aᵀ) Bᵀ": 2 * tokens * parameters})


def dora_cost(c_in, c_out, *, tokens, r=16):
    """LoRA and the lengths of the rows, m (C_o,), four times; each pass forms B A to measure the rows it divides by."""
    lora = lora_cost(c_in, c_out, tokens=tokens, r=r)
    parameters = lora.parameters + 4 * c_out
    return Cost(parameters, parameters, lora.merge, {**lora.forward, "B A": lora.merge})


def oft_cost(c_in, c_out, *, tokens, blocks=4):
    """W R with R block-diagonal from P (blocks, b, b), four times

    Only P − Pᵀ enters R, so b(b − 1)/2 numbers of a block suffice. Solving for R takes 8/3 b³ a block.
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
    """Of the frozen attention itself, C_i = C_o: four projections, Q Kᵀ and A V"""
    return 8 * tokens * width**2 + 4 * tokens**2 * width
