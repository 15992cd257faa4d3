"""The formulas of §3.5 against the paper's numbers, against what `attach` makes, and against torch's count of FLOPs."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsecode import (
    Attention,
    attach,
    attention_flops,
    detach,
    dora_cost,
    lora_cost,
    oft_cost,
    sparse_cost,
    trainable,
)

METHODS = {
    "sparse": (sparse_cost, dict(atoms=40)),
    "lora": (lora_cost, dict(r=3)),
    "dora": (dora_cost, dict(r=3)),
    "oft": (oft_cost, dict(blocks=6)),
}
WIDTH, HEADS, TOKENS = 24, 4, 10


def build():
    return nn.ModuleDict({"attn1": Attention(WIDTH, HEADS)})


def count(model, x):
    """FLOPs of one forward pass, in the kernel made of plain matrix products: fused ones are not counted."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model["attn1"](x)
    return counter.get_total_flops()


def test_the_example_of_the_paper():
    """§3.5: 264k numbers and 0.54 GFLOP, LoRA 131k and 0.13 GFLOP. The digits it prints are cut or rounded."""
    ours = sparse_cost(1024, 1024, tokens=1024, atoms=256, density=0.01)
    assert int(ours.storage / 1000) == 264
    assert round((ours.forward["X W_s"] + ours.forward["S D"]) / 1e9, 2) == 0.54
    lora = lora_cost(1024, 1024, tokens=1024, r=16)
    assert lora.storage // 1000 == 131
    assert round(lora.merge / 1e9, 2) == 0.13


def test_parameters_at_the_size_of_pixart():
    """§4.3: about 17M, 4M, 4M and 37M in 28 self-attentions of width 1152."""
    costs = {name: cost(1152, 1152, tokens=4096) for name, (cost, _) in METHODS.items()}
    parameters = {name: 28 * cost.parameters for name, cost in costs.items()}
    assert parameters == {"sparse": 16_515_072, "lora": 4_128_768, "dora": 4_257_792, "oft": 37_158_912}
    assert [round(n / 1e6) for n in parameters.values()] == [17, 4, 4, 37]
    assert 28 * costs["oft"].storage == 18_514_944  # the 288·287/2 numbers of a skew block


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("defaults", [True, False])
def test_parameters_are_what_attach_trains(method, defaults):
    """With options, and with the defaults of both."""
    cost, options = METHODS[method]
    options = {} if defaults else options
    with torch.device("meta"):
        model = build()
        attach(model, method, **options)
    assert cost(WIDTH, WIDTH, tokens=1, **options).parameters == sum(p.numel() for p in trainable(model))


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_what_torch_counts(method):
    """Beside the frozen attention. Two things differ, both known: torch has no count for OFT's solve, and
    SparseAttention pads q and k with zeros by M/H a head, which Q Kᵀ multiplies: 2 N² M."""
    cost, options = METHODS[method]
    model, x = build(), torch.randn(1, TOKENS, WIDTH)
    frozen = count(model, x)
    assert frozen == attention_flops(WIDTH, tokens=TOKENS)
    adapters = attach(model, method, **options)
    if method == "sparse":
        nn.init.normal_(adapters[0].D)  # a silent one takes O from a pass of its own
        expected = cost(WIDTH, WIDTH, tokens=TOKENS, density=1, **options).forward
        expected["padding"] = 2 * TOKENS**2 * options["atoms"]
    else:
        expected = cost(WIDTH, WIDTH, tokens=TOKENS, **options).forward
        expected.pop("R", None)
    assert count(model, x) - frozen == sum(expected.values())
    detach(model)
    assert count(model, x) == frozen


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_flops_of_merging_are_those_of_b_a(method):
    cost, options = METHODS[method]
    model = build()
    adapters = attach(model, method, **options)
    with FlopCounterMode(display=False) as counter:
        for adapter in adapters:
            adapter.B @ adapter.A
    assert counter.get_total_flops() == cost(WIDTH, WIDTH, tokens=1, **options).merge


def test_flops_of_the_solve_are_those_of_elimination():
    """(I + Q)⁻¹ (I − Q) by Gauss, each operation counted: 8/3 b³ up to the lower powers of b."""
    b, flops = 60, 0
    for pivot in range(b):
        below, right = b - 1 - pivot, 2 * b - 1 - pivot  # rows under the pivot; columns after it, with the b of I − Q
        flops += below * (1 + 2 * right)  # a factor for each row, then row -= factor · pivot row
    for row in range(b):
        flops += b * (2 * row + 1)  # back substitution, b right-hand sides
    assert oft_cost(b, b, tokens=1, blocks=1).forward["R"] / 4 == pytest.approx(flops, rel=2 / b)


def test_reads_well():
    costs = sparse_cost(1024, 1024, tokens=1024, density=0.01), lora_cost(1024, 1024, tokens=1024)
    assert [str(cost) for cost in costs] == [
        "524,288 trained, 264,765 stored; GFLOP: 0.54 for X W_s + 0.54 for A σ + 0.0054 for S D, cannot be merged",
        "131,072 trained, 131,072 stored; GFLOP: 0.27 for (X Aᵀ) Bᵀ, or 0.13 once to merge",
    ]


def test_what_the_density_changes():
    """Only D's share of the storage and S D; the density of 1 stores all that is trained."""
    sparse, dense = (sparse_cost(20, 30, tokens=7, atoms=50, density=rho) for rho in (0.1, 1))
    assert dense.storage == dense.parameters == sparse.parameters == 50 * (20 + 30)
    assert sparse.storage == 50 * (20 + 3)
    assert sparse.forward["S D"] == pytest.approx(0.1 * dense.forward["S D"])
    assert sparse.forward["X W_s"] == dense.forward["X W_s"] == 2 * 7 * 20 * 50
